"""What is said of a study: a grammar of short report sentences for all 13 observations.

Where a word depends on what was drawn (side, size, zone, device) it comes from the traits, so text and image agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.findings import SUPPORT_DEVICES, Trait
from mrg_r1.phantom.lexicon import (
    CLAUSE_FRAMES,
    NORMAL,
    NOUN_FRAMES,
    ORDER,
    PAIR_FRAMES,
    SPLITS,
    THINK,
    VOCABULARY,
    Clause,
    Noun,
)

__all__ = ["SPLITS", "think_text", "vocabulary_texts", "write_report"]
T = TypeVar("T")
_NOTHING_TOTHINK = "nothing of note"
_BEFORE, _AFTER, _NOWHERE = "before", "after", "nowhere"  # where a sentence says the place
_SAMPLES = (("upper", 0.1), ("mid", 0.5), ("lower", 0.9))  # zones and grades that bring out every word


def write_report(said: Sequence[int | None], traits: Sequence[Trait], rng: np.random.Generator, *, wording: str = "train") -> str:
    """A report that says exactly `said`.

    Args:
        said: 14 file values. 1, 0 and -1 each get (a part of) one sentence, None is silence; No Finding 1 allows a sentence that
            says so, and makes one certain where nothing else is said.
        traits: 13, from `findings.sample_traits`; only the words for side, zone, size and device depend on them.
        rng: every choice of words and order.
        wording: "train", "heldout" or "all" (each sentence from either).

    Returns:
        Sentences separated by one space, each ending in a full stop.

    Raises:
        ValueError: not 14 values or 13 traits, an unknown wording, or a `said` that leaves nothing to write.
    """
    if len(said) != len(OBSERVATIONS) or len(traits) != NO_FINDING:
        raise ValueError(f"expected {len(OBSERVATIONS)} label values and {NO_FINDING} traits, got {len(said)} and {len(traits)}")
    if wording not in (*SPLITS, "all"):
        raise ValueError(f"wording {wording!r}; allowed are {', '.join(SPLITS)} and all")
    order = [observation for observation in ORDER if said[observation] is not None]
    if len(order) > 1 and rng.random() < 0.3:
        at = int(rng.integers(len(order) - 1))
        order[at], order[at + 1] = order[at + 1], order[at]
    if rng.random() < 0.2:
        order.sort(key=lambda observation: said[observation] == 0)
    sentences: list[str] = []
    while order:
        split = _split(rng, wording)
        observation = order.pop(0)
        partner = next((other for other in order if said[other] == 0), None)
        if said[observation] == 0 and partner is not None and rng.random() < 0.4:
            order.remove(partner)
            sentences.append(_pair_sentence(_pick(rng, PAIR_FRAMES[split]), _absent_noun(rng, observation), _absent_noun(rng, partner)))
        else:
            sentences.append(_sentence(observation, said[observation] or 0, traits[observation], split, rng, first=not sentences))
    if said[NO_FINDING] == 1 and (not sentences or rng.random() < 0.35):
        frames = NORMAL[_split(rng, wording)]
        if said[SUPPORT_DEVICES]:
            frames = tuple(frame for frame in frames if "abnormality" in frame)  # a chest with a device in it is not called normal
        sentences.insert(0 if rng.random() < 0.5 else len(sentences), _pick(rng, frames))
    if not sentences:
        raise ValueError("nothing to write: all 13 observations are silent and No Finding is not 1")
    return " ".join(sentences)


def think_text(said: Sequence[int | None], preset_observations: Sequence[int]) -> str:
    """What a model in think mode is taught to think first, e.g. "heart enlarged; effusion none; device possible".

    Args:
        said: 14 file values; silent observations are left out.
        preset_observations: indices below 13 to go through, in this order.

    Raises:
        ValueError: not 14 values.
    """
    if len(said) != len(OBSERVATIONS):
        raise ValueError(f"expected {len(OBSERVATIONS)} label values, one an observation, got {len(said)}")
    thoughts = []
    for observation in preset_observations:
        value = said[observation]
        if value is not None:
            name, present, absent = THINK[observation]
            thoughts.append(f"{name} {({1: present, 0: absent, -1: 'possible'})[value]}")
    return "; ".join(thoughts) or _NOTHING_TOTHINK


def vocabulary_texts() -> list[str]:
    """Sentences of every frame of both splits with every noun, and think texts: what a tokenizer is trained on."""
    texts = list(dict.fromkeys(sentence for split in SPLITS for sentence in _all_sentences(split)))
    for value in (1, 0, -1):
        for observation in range(NO_FINDING):
            said: list[int | None] = [value] * NO_FINDING + [None]
            texts.append(think_text(said, [observation, (observation + 1) % NO_FINDING, (observation + 5) % NO_FINDING]))
    texts.append(_NOTHING_TOTHINK)
    return texts


def _all_sentences(split: str) -> Iterator[str]:
    yield from NORMAL[split]
    traits = [Trait(side, zone, grade, 0, (0.0, 0.0)) for side in ("left", "right", "both") for zone, grade in _SAMPLES]
    for observation, words in VOCABULARY.items():
        for value, frames in NOUN_FRAMES[split].items():
            for frame in frames:
                for noun in words.nouns if value else words.absent_nouns:
                    for place in (_BEFORE, _AFTER, _NOWHERE) if value else (_NOWHERE,):
                        for trait in traits if value else traits[:1]:
                            yield _noun_sentence(frame, observation, noun, trait, place=place, sized=value == 1 and place != _AFTER)
        for value in (1, 0, -1):
            for trait in traits:
                for clause in _clauses(observation, value, trait):
                    for frame in _clause_frames(split, clause, value):
                        yield _clause_sentence(frame, clause, value, trait, adverb=_adverb(observation, trait))
        for other in VOCABULARY:
            if other != observation:
                for frame in PAIR_FRAMES[split]:
                    yield _pair_sentence(frame, words.absent_nouns[0], VOCABULARY[other].absent_nouns[-1])


def _split(rng: np.random.Generator, wording: str) -> str:
    return _pick(rng, SPLITS) if wording == "all" else wording


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _absent_noun(rng: np.random.Generator, observation: int) -> Noun:
    return _pick(rng, VOCABULARY[observation].absent_nouns)


def _sentence(observation: int, value: int, trait: Trait, split: str, rng: np.random.Generator, *, first: bool) -> str:
    """One sentence that says `value` (1, 0 or -1) of `observation`."""
    clauses = _clauses(observation, value, trait)
    if clauses and rng.random() < 0.45:
        clause = _pick(rng, clauses)
        adverb = _adverb(observation, trait) if rng.random() < 0.4 else ""
        return _clause_sentence(_pick(rng, _clause_frames(split, clause, value)), clause, value, trait, adverb=adverb)
    frame = _pick(rng, [frame for frame in NOUN_FRAMES[split][value] if not (first and "also" in frame.lower())])
    if value == 0:
        return _noun_sentence(frame, observation, _absent_noun(rng, observation), trait)
    fitting = [noun for noun in VOCABULARY[observation].nouns if trait.grade >= noun.smallest and noun.kind in (None, trait.kind)]
    place = _pick(rng, (_BEFORE, _BEFORE, _AFTER, _NOWHERE))
    # a size and a place after the noun together would make sentences too long for a small policy
    sized = value == 1 and place != _AFTER and rng.random() < 0.5
    return _noun_sentence(frame, observation, _pick(rng, fitting), trait, place=place, sized=sized)


def _noun_sentence(frame: str, observation: int, noun: Noun, trait: Trait, *, place: str = _NOWHERE, sized: bool = False) -> str:
    both = trait.side == "both"
    if not noun.sides or (both and not noun.plural):
        place = _NOWHERE
    in_lung = VOCABULARY[observation].lung_zone
    many = both and place != _NOWHERE
    name = noun.plural if many else noun.singular
    words = [_size(observation, trait)] if sized else []
    where = ""
    if place == _BEFORE:
        words.append("bilateral" if both else f"{trait.side} {trait.zone} lung" if in_lung else trait.side)
        name = name.removeprefix("lung ") if in_lung else name
    elif place == _AFTER:
        where = " on both sides" if both else f" in the {trait.side} {trait.zone} lung" if in_lung else f" on the {trait.side}"
    phrase = " ".join(word for word in (*words, name) if word)
    with_article = phrase if many or not noun.countable else _with_article(phrase)
    return _finish(frame.format(np=phrase, NP=with_article, where=where, be="are" if many else "is"))


def _pair_sentence(frame: str, a: Noun, b: Noun) -> str:
    return _finish(frame.format(a=a.singular, b=b.singular))


def _clauses(observation: int, value: int, trait: Trait) -> list[Clause]:
    """The clauses that can say `value`; one that names a side cannot speak of both."""
    clauses = VOCABULARY[observation].clauses
    if value == 0:
        return [clause for clause in clauses if clause.absent]
    return [clause for clause in clauses if clause.present and not ("{side}" in clause.subject and trait.side == "both")]


def _clause_frames(split: str, clause: Clause, value: int) -> list[str]:
    """The frames that fit: a predicate of several words ("normal in size") cannot stand before its noun."""
    one_word = value != 0 or " " not in clause.absent
    return [frame for frame in CLAUSE_FRAMES[split][value] if one_word or "{quality}" not in frame]


def _clause_sentence(frame: str, clause: Clause, value: int, trait: Trait, *, adverb: str = "") -> str:
    state = clause.absent if value == 0 else clause.present
    if value == 1 and adverb:
        state = f"{adverb} {state}"
    subject = clause.subject.format(side=trait.side)
    plural = value == 0 and bool(clause.plural_subject)
    if plural:
        subject = clause.plural_subject
    bare = subject.removeprefix("the ").removeprefix("a ")
    return _finish(
        frame.format(
            Subject=subject, subject=bare, state=state, quality=state, a_quality=_with_article(state), be="are" if plural else "is"
        )
    )


def _size(observation: int, trait: Trait) -> str:
    sizes = VOCABULARY[observation].sizes
    return sizes[int(trait.grade * len(sizes))] if sizes else ""


def _adverb(observation: int, trait: Trait) -> str:
    """The size as an adverb ("mildly"), empty for sizes that have none ("small")."""
    size = _size(observation, trait)
    return f"{size}ly" if VOCABULARY[observation].sizes[:1] == ("mild",) else ""


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _finish(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
