"""What is done to reports in training, so that a labeler learns what a sentence says and not which report it stands in.

Encoded reports and their classes enter, one pass over them in batches of examples leaves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import BLANK, NEGATIVE, NO_FINDING, POSITIVE, UNCERTAIN

# where two reports disagree, the later one here holds for both
_BY_STRENGTH = np.array([BLANK, NEGATIVE, UNCERTAIN, POSITIVE])
_STRENGTH = np.argsort(_BY_STRENGTH)


@dataclass(frozen=True)
class Augmentation:
    """How often a report is changed, and how. All are shares from 0 to 1."""

    # of the reports: joined with the one drawn next, their labels united. Parts the findings that come together
    joined: float
    shuffled: float  # of the examples: sentences in another order, on which what a report says does not depend
    masked: float  # of the tokens: replaced by [MASK]
    spread: float  # of the tokens: one or two [UNK] put before them, so that "no" and its noun stand at many distances


@dataclass(frozen=True)
class SpecialIds:
    """The tokenizer's ids of the tokens that training itself sets."""

    cls: int
    sep: int
    mask: int
    unknown: int
    pad: int


@dataclass(frozen=True)
class Example:
    """What the model sees of one report or of two joined ones: ids with [CLS] and [SEP], and [14] classes."""

    ids: list[int]
    classes: NDArray[np.int64]
    reports: int


def unite(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes of two reports read as one: positive before uncertain before negative before blank.

    No Finding is positive only where it is in both: one finding in either report is a finding.

    Args:
        first: [..., 14] classes of one report.
        second: [..., 14] classes of the other.

    Returns:
        [..., 14] classes of both.
    """
    united: NDArray[np.int64] = _BY_STRENGTH[np.maximum(_STRENGTH[first], _STRENGTH[second])]
    united[..., NO_FINDING] = np.minimum(first[..., NO_FINDING], second[..., NO_FINDING])
    return united


def one_pass(
    sentences: Sequence[Sequence[Sequence[int]]],
    classes: NDArray[np.int64],
    augmentation: Augmentation,
    special: SpecialIds,
    *,
    batch: int,
    longest: int,
    rng: random.Random,
) -> Iterator[list[Example]]:
    """Every report once, alone or joined with another, in batches of examples of like length (little is padding) in
    random order.

    Args:
        sentences: of each of N reports, the ids of each sentence.
        classes: [N, 14] classes.
        augmentation: what is done to the reports.
        special: the tokenizer's ids.
        batch: examples a batch; the last may be shorter.
        longest: ids of an example at most; what is over is cut off.
        rng: decides everything.
    """
    examples = [
        _example(rows, sentences, classes, augmentation, special, longest, rng)
        for rows in _joined(len(sentences), augmentation, rng)
    ]
    examples.sort(key=lambda example: len(example.ids) + rng.uniform(-8, 8))
    batches = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    rng.shuffle(batches)
    yield from batches


def _joined(reports: int, augmentation: Augmentation, rng: random.Random) -> Iterator[list[int]]:
    """The rows 0 to `reports` in random order, one or two at a time; a joined pair starts so often that its share comes
    out right.
    """
    order = rng.sample(range(reports), reports)
    start_pair = augmentation.joined / (2 - augmentation.joined)
    while order:
        yield [order.pop() for _ in range(2 if len(order) > 1 and rng.random() < start_pair else 1)]


def _example(
    rows: list[int],
    sentences: Sequence[Sequence[Sequence[int]]],
    classes: NDArray[np.int64],
    augmentation: Augmentation,
    special: SpecialIds,
    longest: int,
    rng: random.Random,
) -> Example:
    said = [sentence for row in rows for sentence in sentences[row]]
    if rng.random() < augmentation.shuffled:
        rng.shuffle(said)
    tokens: list[int] = []
    for token in (token for sentence in said for token in sentence):
        if rng.random() < augmentation.spread:
            tokens += [special.unknown] * rng.randint(1, 2)
        tokens.append(special.mask if rng.random() < augmentation.masked else token)
    united = classes[rows[0]] if len(rows) == 1 else unite(classes[rows[0]], classes[rows[1]])
    return Example([special.cls, *tokens[: longest - 2], special.sep], united, len(rows))
