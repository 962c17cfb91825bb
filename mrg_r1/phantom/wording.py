"""What is said of a study: a grammar of short report sentences for all 13 observations.

Where a word depends on what was drawn (side, size, zone, device) it comes from the traits, so text and image agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.lexicon import (
    FIVE,
    IN_LUNG,
    NEW,
    ORDER,
    SPLITS,
    THINK,
    UNCHANGED,
    Clause,
    Lexicon,
    Noun,
    Vocabulary,
)
from mrg_r1.phantom.traits import LUNG_OPACITY, SUPPORT_DEVICES, Trait

__all__ = ["SPLITS", "think_text", "write_report"]
T = TypeVar("T")
_NOTHING_TO_THINK = "nothing of note"
_BEFORE, _AFTER, _NOWHERE = "before", "after", "nowhere"  # where a sentence says the place


def write_report(
    said: Sequence[int | None],
    traits: Sequence[Trait],
    rng: np.random.Generator,
    *,
    wording: str = "train",
    lexicon: Lexicon = FIVE,
    earlier: Sequence[int | None] | None = None,
    alike: float = 0.0,
) -> str:
    """A report that says exactly `said`.

    Args:
        said: 14 file values. 1, 0 and -1 each get (a part of) one sentence, None is silence; No Finding 1 allows a
            sentence that says so, and makes one certain where nothing else is said.
        traits: 13, from `findings.sample_traits`; only the words for side, zone, size and device depend on them.
        rng: every choice of words and order.
        wording: "train", "heldout" or "all" (each sentence from either).
        lexicon: the preset's words.
        earlier: 14 file values that the report of the patient's earlier study said, or None where there is none. A
            positive finding may then be called unchanged (it was said, and the traits are a patient's, so it is) or new
            (it was denied).
        alike: share of the denials that are worded in the one stock way.

    Returns:
        Sentences separated by one space, each ending in a full stop.

    Raises:
        ValueError: not 14 values or 13 traits, an unknown wording, or a `said` that leaves nothing to write.
    """
    if len(said) != len(OBSERVATIONS) or len(traits) != NO_FINDING:
        raise ValueError(
            f"expected {len(OBSERVATIONS)} label values and {NO_FINDING} traits, got {len(said)} and {len(traits)}"
        )
    if wording not in (*SPLITS, "all"):
        raise ValueError(f"wording {wording!r}; allowed are {', '.join(SPLITS)} and all")
    order = [observation for observation in ORDER if said[observation] is not None]
    vocabulary = lexicon.vocabulary
    if len(order) > 1 and rng.random() < 0.3:
        at = int(rng.integers(len(order) - 1))
        order[at], order[at + 1] = order[at + 1], order[at]
    if rng.random() < 0.2:
        order.sort(key=lambda observation: said[observation] == 0)
    sentences: list[str] = []
    while order:
        split = _split(rng, wording)
        observation = order.pop(0)
        partners = [other for other in order if said[other] == 0] if said[observation] == 0 else []
        if said[observation] == 0 and alike and rng.random() < alike:
            sentences.append(_stock_denial(vocabulary[observation]))
        elif len(partners) > 1 and split in lexicon.triple_frames and rng.random() < 0.5:
            together = (observation, *partners[:2])
            sentences.append(
                _list_sentence(
                    _pick(rng, lexicon.triple_frames[split]), *(_absent_noun(rng, vocabulary[o]) for o in together)
                )
            )
            order = [other for other in order if other not in together]
        elif partners and rng.random() < 0.4:
            order.remove(partners[0])
            frame = _pick(rng, lexicon.pair_frames[split])
            sentences.append(
                _list_sentence(frame, *(_absent_noun(rng, vocabulary[o]) for o in (observation, partners[0])))
            )
        else:
            # lungs with something in them are not called clear
            plain = (
                observation == LUNG_OPACITY
                and said[observation] == 0
                and any(said[other] in (1, -1) for other in IN_LUNG)
            )
            change = _change(said[observation], earlier[observation]) if earlier is not None else ""
            sentences.append(
                _sentence(
                    lexicon,
                    observation,
                    said[observation] or 0,
                    traits[observation],
                    split,
                    rng,
                    first=not sentences,
                    change=change,
                    plain=plain,
                )
            )
    if said[NO_FINDING] == 1 and (not sentences or rng.random() < 0.35):
        frames = lexicon.normal[_split(rng, wording)]
        if said[SUPPORT_DEVICES]:
            # a chest with a device in it is not called normal
            frames = tuple(frame for frame in frames if "abnormality" in frame)
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
    return "; ".join(thoughts) or _NOTHING_TO_THINK


def _split(rng: np.random.Generator, wording: str) -> str:
    return _pick(rng, SPLITS) if wording == "all" else wording


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _stock_denial(words: Vocabulary) -> str:
    return f"No {words.absent_nouns[0].singular}."


def _absent_noun(rng: np.random.Generator, words: Vocabulary) -> Noun:
    return _pick(rng, words.absent_nouns)


def _change(value: int | None, before: int | None) -> str:
    """What may be said of a finding against the earlier report, or nothing."""
    if value != 1:
        return ""
    return UNCHANGED if before == 1 else NEW if before == 0 else ""


def _sentence(
    lexicon: Lexicon,
    observation: int,
    value: int,
    trait: Trait,
    split: str,
    rng: np.random.Generator,
    *,
    first: bool,
    change: str,
    plain: bool,
) -> str:
    """One sentence that says `value` (1, 0 or -1) of `observation`; `plain`: with a noun, not a clause."""
    words = lexicon.vocabulary[observation]
    changed = bool(change) and rng.random() < 0.7
    clauses = _clauses(words, value, trait)
    if not plain and not changed and clauses and rng.random() < 0.45:
        clause = _pick(rng, clauses)
        adverb = _adverb(words, trait) if rng.random() < 0.4 else ""
        return _clause_sentence(
            _pick(rng, _clause_frames(lexicon, split, clause, value)), clause, value, trait, adverb=adverb
        )
    frames = lexicon.change_frames[split][change] if changed else lexicon.noun_frames[split][value]
    frame = _pick(rng, [frame for frame in frames if not (first and "also" in frame.lower())])
    if value == 0:
        return _noun_sentence(frame, words, _absent_noun(rng, words), trait)
    fitting = [noun for noun in words.nouns if trait.grade >= noun.smallest and noun.kind in (None, trait.kind)]
    place = _pick(rng, (_BEFORE, _BEFORE, _AFTER, _NOWHERE))
    # a size and a place after the noun together would make sentences too long for a small policy
    sized = value == 1 and place != _AFTER and rng.random() < 0.5
    lung = lexicon.lung_places[0] if len(lexicon.lung_places) == 1 else _pick(rng, lexicon.lung_places)
    return _noun_sentence(frame, words, _pick(rng, fitting), trait, place=place, sized=sized, lung=lung)


def _noun_sentence(
    frame: str,
    words: Vocabulary,
    noun: Noun,
    trait: Trait,
    *,
    place: str = _NOWHERE,
    sized: bool = False,
    lung: str = "{side} {zone} lung",
) -> str:
    both = trait.side == "both"
    if not noun.sides or (both and noun.countable and not noun.plural):
        place = _NOWHERE
    many = both and place != _NOWHERE and noun.countable
    name = noun.plural if many else noun.singular
    before = [_size(words, trait)] if sized else []
    site = lung.format(side=trait.side, zone=trait.zone) if words.lung_zone else trait.side
    where = ""
    if place == _BEFORE:
        before.append("bilateral" if both else site)
        name = name.removeprefix("lung ") if words.lung_zone else name
    elif place == _AFTER:
        where = " on both sides" if both else f" in the {site}" if words.lung_zone else f" on the {site}"
    phrase = " ".join(word for word in (*before, name) if word)
    with_article = phrase if many or not noun.countable else _with_article(phrase)
    return _finish(frame.format(np=phrase, NP=with_article, where=where, be="are" if many else "is"))


def _list_sentence(frame: str, *nouns: Noun) -> str:
    return _finish(frame.format(**{letter: noun.singular for letter, noun in zip("abc", nouns, strict=False)}))


def _clauses(words: Vocabulary, value: int, trait: Trait) -> list[Clause]:
    """The clauses that can say `value`; one that names a side cannot speak of both."""
    if value == 0:
        return [clause for clause in words.clauses if clause.absent]
    return [
        clause
        for clause in words.clauses
        if clause.present and not ("{side}" in clause.subject and trait.side == "both")
    ]


def _clause_frames(lexicon: Lexicon, split: str, clause: Clause, value: int) -> list[str]:
    """The frames that fit: a predicate of several words ("normal in size") cannot stand before its noun."""
    one_word = value != 0 or " " not in clause.absent
    return [frame for frame in lexicon.clause_frames[split][value] if one_word or "{quality}" not in frame]


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
            Subject=subject,
            subject=bare,
            state=state,
            quality=state,
            a_quality=_with_article(state),
            be="are" if plural else "is",
        )
    )


def _size(words: Vocabulary, trait: Trait) -> str:
    return words.sizes[int(trait.grade * len(words.sizes))] if words.sizes else ""


def _adverb(words: Vocabulary, trait: Trait) -> str:
    """The size as an adverb ("mildly"), empty for sizes that have none ("small")."""
    size = _size(words, trait)
    return f"{size}ly" if words.sizes[:1] == ("mild",) and size else ""


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _finish(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
