"""How the phantoms' radiologists write: several of them, each with wording of his own, more or less silent.

Real reports word the normal almost always alike and a finding hardly ever twice the same, so that an imitator who is
unsure writes the normal sentence even where the finding is likelier. The settings here make phantoms do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mrg_r1.phantom.lexicon import FIVE, Lexicon
from mrg_r1.phantom.traits import WRITERS_STREAM, keyed_generator

T = TypeVar("T")
UNCERTAIN = 0.05  # share of the findings that are there which a report is not sure of


@dataclass(frozen=True)
class Habits:
    """Shares over all writers; a writer's own silence lies between half and one and a half times the mean.

    Attributes:
        writers: how many, each with about half of the frames of each kind; 1: one writer with all of them.
        negatives_stated: share of the findings that are not there which a report denies; the rest is silence.
        passed_over: share of the findings that are there which a report does not mention.
        normal_alike: how often a denial that is to be written next is worded in the one stock way, "No pneumothorax."
            (of all denials a little less: another sentence may deny two findings at once).
    """

    writers: int = 1
    negatives_stated: float = 0.85
    passed_over: float = 0.02
    normal_alike: float = 0.0

    def __post_init__(self) -> None:
        if self.writers < 1:
            raise ValueError(f"writers {self.writers}; at least one is needed")
        for name, most in (("negatives_stated", 1.0), ("passed_over", 0.6), ("normal_alike", 1.0)):
            share = getattr(self, name)
            if not 0 <= share <= most:
                raise ValueError(f"{name} {share}; it is a share between 0 and {most:g}")


USUAL = Habits()


@dataclass(frozen=True)
class Writer:
    """One radiologist."""

    lexicon: Lexicon
    negatives_stated: float
    passed_over: float
    normal_alike: float

    def say(self, present: bool, u: float) -> int | None:
        """What is said of a finding: 1, 0, -1 (not sure) or None; u: uniform in [0, 1)."""
        if present:
            certain = 1 - UNCERTAIN - self.passed_over
            return 1 if u < certain else -1 if u < certain + UNCERTAIN else None
        return 0 if u < self.negatives_stated else None


def writer_of(habits: Habits, seed: int, index: int) -> Writer:
    """Who writes study `index`; each writer writes about as many."""
    if habits.writers == 1:
        return Writer(FIVE, habits.negatives_stated, habits.passed_over, habits.normal_alike)
    return _writers(habits, seed)[int(keyed_generator(seed, index, WRITERS_STREAM).integers(habits.writers))]


@lru_cache(maxsize=8)
def _writers(habits: Habits, seed: int) -> tuple[Writer, ...]:
    rng = np.random.default_rng([seed, WRITERS_STREAM])
    silent = 1 - habits.negatives_stated
    silences, passed = (rng.permutation(_around(share, habits.writers)) for share in (silent, habits.passed_over))
    return tuple(
        Writer(
            lexicon=_own(FIVE, rng),
            negatives_stated=float(1 - silences[number]),
            passed_over=float(passed[number]),
            normal_alike=habits.normal_alike,
        )
        for number in range(habits.writers)
    )


def _around(share: float, writers: int) -> NDArray[np.float64]:
    """The writers' own shares, evenly from half to one and a half times the mean, or as near as the largest stays a
    share.
    """
    reach = min(0.5 * share, 1 - share)
    return np.linspace(share - reach, share + reach, writers)


def _own(lexicon: Lexicon, rng: np.random.Generator) -> Lexicon:
    """About half of the frames of each kind."""
    return replace(
        lexicon,
        noun_frames={
            split: {value: _half(frames, rng) for value, frames in by_value.items()}
            for split, by_value in lexicon.noun_frames.items()
        },
        pair_frames={split: _half(frames, rng) for split, frames in lexicon.pair_frames.items()},
    )


def _half(frames: tuple[T, ...], rng: np.random.Generator) -> tuple[T, ...]:
    """At least one that may open a report."""
    opening = [frame for frame in frames if "also" not in str(frame).lower()]
    first = opening[int(rng.integers(len(opening)))]
    return tuple(frame for frame in frames if frame is first or rng.random() < 0.5)
