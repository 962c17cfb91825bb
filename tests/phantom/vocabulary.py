"""Every sentence that the phantoms' grammar can write: what a tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from mrg_r1.labels.observations import NO_FINDING
from mrg_r1.phantom import wording
from mrg_r1.phantom.lexicon import FIVE, SPLITS, Lexicon
from mrg_r1.phantom.traits import Trait
from mrg_r1.phantom.wording import think_text

_SAMPLES = (("upper", 0.1), ("mid", 0.5), ("lower", 0.9))  # zones and grades that bring out every word


def vocabulary_texts(lexicon: Lexicon = FIVE) -> list[str]:
    """Sentences of every frame of both splits with every noun, and think texts: what a tokenizer is trained on."""
    texts = list(dict.fromkeys(sentence for split in SPLITS for sentence in _all_sentences(lexicon, split)))
    for value in (1, 0, -1):
        for observation in range(NO_FINDING):
            said: list[int | None] = [value] * NO_FINDING + [None]
            texts.append(
                think_text(said, [observation, (observation + 1) % NO_FINDING, (observation + 5) % NO_FINDING])
            )
    texts.append(wording._NOTHING_TO_THINK)
    return texts


def _all_sentences(lexicon: Lexicon, split: str) -> Iterator[str]:
    yield from lexicon.normal[split]
    traits = [Trait(side, zone, grade, 0, (0.0, 0.0)) for side in ("left", "right", "both") for zone, grade in _SAMPLES]
    for observation, words in lexicon.vocabulary.items():
        of_value = [
            *lexicon.noun_frames[split].items(),
            *((1, frames) for frames in lexicon.change_frames.get(split, {}).values()),
        ]
        for value, frames in of_value:
            for frame in frames:
                for noun in words.nouns if value else words.absent_nouns:
                    for place in (wording._BEFORE, wording._AFTER, wording._NOWHERE) if value else (wording._NOWHERE,):
                        for trait in traits if value else traits[:1]:
                            for lung in (
                                lexicon.lung_places
                                if words.lung_zone and place != wording._NOWHERE
                                else lexicon.lung_places[:1]
                            ):
                                yield wording._noun_sentence(
                                    frame,
                                    words,
                                    noun,
                                    trait,
                                    place=place,
                                    sized=value == 1 and place != wording._AFTER,
                                    lung=lung,
                                )
        for value in (1, 0, -1):
            for trait in traits:
                for clause in wording._clauses(words, value, trait):
                    for frame in wording._clause_frames(lexicon, split, clause, value):
                        adverb = wording._adverb(words, trait)
                        yield wording._clause_sentence(frame, clause, value, trait, adverb=adverb)
        for other in lexicon.vocabulary:
            if other != observation:
                for frame in (*lexicon.pair_frames[split], *lexicon.triple_frames.get(split, ())):
                    yield wording._list_sentence(
                        frame, words.absent_nouns[0], lexicon.vocabulary[other].absent_nouns[-1], words.absent_nouns[-1]
                    )
