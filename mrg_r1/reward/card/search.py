"""What every constant report earns: all 3^13 signed vectors against all references, exactly, in seconds for any number
of references.

Distinct reference vectors with their counts enter, mean MCCS and zeros leave. numpy only. How: MCCS depends on the dot
product d and on the two squared norms alone, so that a report's rewards are a histogram of the references over (d,
norm) times a table. The histograms of many reports at once come from one pass over the observations, as a fast Fourier
transform's do: naming observation j moves the references that name it too by +1 or -1 along d and leaves the others
where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, POSITIVE
from mrg_r1.reward.additive import DENIAL
from mrg_r1.reward.terms import mccs, weighted_signs

Signs = NDArray[np.int8]
Floats = NDArray[np.float64]

ZERO = 1e-6  # MCCS at or below it is zero: float32 puts a cosine of exactly m a little to either side
_TIE = 1e-9
# A reference of n named observations and dot product d, -n <= d <= n, is counted in bin n * n + n + d.
_BINS = (NO_FINDING + 1) ** 2
_NAMED = np.repeat(np.arange(NO_FINDING + 1), 2 * np.arange(NO_FINDING + 1) + 1)  # [196], n of each bin
_DOT = np.arange(_BINS) - _NAMED * _NAMED - _NAMED  # [196], d of each bin
_TOGETHER = 6  # observations handled at once: 729 reports of 196 bins, 0.6 MB, stay in a processor's cache
_PAIRS = 2_000_000  # of references at once where they are weighted: 16 MB a number
_DIGITS = (0, 1, -1)  # an observation's sign by its digit in base 3


@dataclass(frozen=True)
class Distinct:
    """Signed vectors without repetition.

    Attributes:
        vectors: [D, 13] int8.
        counts: [D] int64, how many of the N studies have each.
        row_of_study: [N] int64, the row of each study's vector.
    """

    vectors: Signs
    counts: NDArray[np.int64]
    row_of_study: NDArray[np.int64]


@dataclass(frozen=True)
class Earned:
    """What constant reports earn at M margins.

    Attributes:
        best: [M, 13] int8, the report with the highest mean MCCS of all 3^13; of equals the one that names the fewest
            observations.
        mean: [D, M] mean MCCS of each distinct reference vector, had it been the answer to every study.
        zeros: [D, M] the share of the references for which that answer earns zero.
        ccs: [D] its mean CCS.
    """

    best: Signs
    mean: Floats
    zeros: Floats
    ccs: Floats


def distinct(vectors: Signs) -> Distinct:
    """The distinct rows of [N, 13] signed vectors, ordered by their digits in base 3.

    Raises:
        ValueError: no vectors, another shape than [N, 13], or a value outside -1, 0, 1.
    """
    if vectors.ndim != 2 or vectors.shape[1] != NO_FINDING or not len(vectors):
        raise ValueError(f"signed vectors of shape {vectors.shape}; expected [N, {NO_FINDING}] with N at least 1")
    if vectors.min() < -1 or vectors.max() > 1:
        raise ValueError("signed vectors hold values outside -1, 0, 1; make them with signed_vector(classes)")
    _, first, row_of_study, counts = np.unique(
        _codes(vectors), return_index=True, return_inverse=True, return_counts=True
    )
    return Distinct(vectors[first].astype(np.int8), counts, row_of_study)


def earned_by_constants(references: Distinct, margins: Sequence[float]) -> Earned:
    """Try every constant report against every reference.

    Args:
        references: from `distinct`.
        margins: M of them, each 0 <= m < 1.

    Returns:
        The best of all reports, and what each of the references themselves would earn.

    Raises:
        ValueError: no margins, or one outside [0, 1).

    Time and memory do not depend on how many studies there are (about 2 s and 50 MB where all 13 observations are
    named).
    """
    if not margins:
        raise ValueError("no margins; give at least one")
    # An observation that no reference names is best left out: naming it only makes the report's norm larger.
    active = np.flatnonzero(references.vectors.any(axis=0))
    vectors = references.vectors[:, active].astype(np.int64)  # [D, K]
    head = max(len(active) - _TOGETHER, 0)
    # [3^T, T], the last T <= 6 observations
    tails = np.array(list(itertools.product(_DIGITS, repeat=len(active) - head)), dtype=np.int64)
    rows_naming = [np.flatnonzero(np.abs(tails).sum(axis=1) == named) for named in range(tails.shape[1] + 1)]
    named = np.abs(vectors).sum(axis=1)
    # [D], where a reference of dot product 0 is counted
    cell = _codes(vectors[:, head:]) * _BINS + named * named + named
    codes = _codes(vectors)
    table = _table(margins) / references.counts.sum()  # [14, 196, 2 M + 1]
    rewards = np.ascontiguousarray(table[..., : len(margins)])

    best, best_mean = np.zeros((len(margins), NO_FINDING), dtype=np.int8), np.full(len(margins), -1.0)
    best_named = np.zeros(len(margins), dtype=np.int64)
    own = np.empty((len(vectors), table.shape[-1]))
    for block, digits in enumerate(itertools.product(_DIGITS, repeat=head)):
        start = np.array(digits, dtype=np.int64)
        counted = np.bincount(cell + vectors[:, :head] @ start, weights=references.counts, minlength=len(tails) * _BINS)
        histograms = _histograms(counted.astype(np.int32), tails.shape[1])  # [3^T, 196]
        for named_in_tail, rows in enumerate(rows_naming):
            named_in_all = int(np.abs(start).sum()) + named_in_tail
            means = histograms[rows].astype(np.float64) @ rewards[named_in_all]  # [R, M]
            top = means.max(axis=0)
            for m in np.flatnonzero(
                (top > best_mean + _TIE) | ((top > best_mean - _TIE) & (named_in_all < best_named))
            ):
                row = rows[np.argmax(means[:, m] > top[m] - _TIE)]
                best[m] = 0
                best[m, active] = (*digits, *tails[row])
                best_mean[m], best_named[m] = top[m], named_in_all
        for r in range(*np.searchsorted(codes, (block * len(tails), (block + 1) * len(tails)))):
            own[r] = histograms[codes[r] - block * len(tails)] @ table[named[r]]
    return Earned(best, own[:, : len(margins)], own[:, len(margins) : -1], own[:, -1])


def earned_under_weights(
    references: Distinct, margins: Sequence[float], weights: NDArray[np.float64]
) -> tuple[Floats, Floats]:
    """What each of the references would earn under a weighted CCS, had it been the answer to every study.

    All pairs, since weighted dot products are no small integers that could be counted.

    Args:
        references: from `distinct`.
        margins: M of them, each 0 <= m < 1.
        weights: [13, 2] of `terms.ccs`.

    Returns:
        [D, M] mean MCCS and [D] mean CCS of each distinct vector.
    """
    vectors = weighted_signs(references.vectors, weights)  # [D, 13]
    squares = (vectors * vectors).sum(axis=1)
    share = references.counts / references.counts.sum()
    mean, cosine = np.empty((len(vectors), len(margins))), np.empty(len(vectors))
    step = max(1, _PAIRS // len(vectors))
    for first in range(0, len(vectors), step):
        rows = slice(first, first + step)
        norms = np.sqrt(np.outer(squares[rows], squares))
        of_pairs = (vectors[rows] @ vectors.T) / np.where(norms == 0, 1.0, norms)
        of_pairs[np.ix_(squares[rows] == 0, squares == 0)] = 1.0  # neither names anything
        rounded = of_pairs.astype(np.float32)  # as `terms.ccs` answers
        cosine[rows] = rounded @ share
        for m, margin in enumerate(margins):
            mean[rows, m] = mccs(rounded, margin) @ share
    return mean, cosine


def additive_of_constants(references: Distinct, thresholds: NDArray[np.float64]) -> Floats:
    """[D] what each of the references would earn of `additive`, on average, had it been the answer to every study.

    A sum over observations: what saying, denying and silence earn of each, on average, is all that is needed.
    """
    share = references.counts / references.counts.sum()
    there, denied = share @ (references.vectors > 0), share @ (references.vectors < 0)  # [13]
    saying = there - thresholds
    denying = DENIAL * (thresholds * denied - (1 - thresholds) * there)
    return ((references.vectors > 0) @ saying + (references.vectors < 0) @ denying) / NO_FINDING


def ce_f1_of_constants(classes: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """What each of the references would earn of `ce_f1`, on average, had it been the answer to every study.

    Args:
        classes: [N, 14] classes; what is not certain is no positive.

    Returns:
        [N] means, and [N] int64 codes of the sets of positives, of which there are at most 2^13.
    """
    codes = (classes[:, :NO_FINDING] == POSITIVE) @ (1 << np.arange(NO_FINDING))
    sets, row_of_study, counts = np.unique(codes, return_inverse=True, return_counts=True)
    named = (sets[:, None] >> np.arange(NO_FINDING) & 1).astype(np.float64)  # [S, 13]
    size, share = named.sum(axis=1), counts / counts.sum()
    means = np.empty(len(sets))
    step = max(1, _PAIRS // len(sets))
    for first in range(0, len(sets), step):
        rows = slice(first, first + step)
        both = size[rows, None] + size
        means[rows] = np.where(both == 0, 1.0, 2 * (named[rows] @ named.T) / np.maximum(both, 1)) @ share
    return means[row_of_study], codes


def _histograms(counted: NDArray[np.int32], observations: int) -> NDArray[np.int32]:
    """[3^T * 196] references by their own signs of T observations and by bin -> [3^T, 196] references of every report
    by bin.
    """
    for j in range(observations):
        old = counted.reshape(3**j, 3, -1, _BINS)
        silent, positive, negative = old[:, 0], old[:, 1], old[:, 2]  # the references' sign
        new = np.empty_like(old)  # the report's sign
        np.add(silent, positive, out=new[:, 0])
        new[:, 0] += negative
        # No reference lies at the edge that it would be moved over: |d| is at most what has been handled of its n.
        new[:, 1], new[:, 2] = silent, silent
        new[:, 1, :, 1:] += positive[..., :-1]
        new[:, 1, :, :-1] += negative[..., 1:]
        new[:, 2, :, :-1] += positive[..., 1:]
        new[:, 2, :, 1:] += negative[..., :-1]
        counted = new
    return counted.reshape(-1, _BINS)


def _table(margins: Sequence[float]) -> Floats:
    """[14, 196, 2 M + 1]: by what the report names and by bin, MCCS at each margin, whether it is zero, and CCS, as
    `terms` has them.
    """
    norms = np.sqrt((np.arange(NO_FINDING + 1)[:, None] * _NAMED).astype(np.float64))  # [14, 196]
    ccs = _DOT / np.where(norms == 0, 1.0, norms)
    ccs[0, 0] = 1.0  # neither names anything
    rewards = [mccs(ccs.astype(np.float32), margin) for margin in margins]
    return np.stack([*rewards, *(reward <= ZERO for reward in rewards), ccs], axis=-1).astype(np.float64)


def _codes(vectors: NDArray[np.signedinteger]) -> NDArray[np.int64]:
    """[N, K] signs -> [N] numbers in base 3, the first observation's digit the highest; 0 is 0, 1 is 1, -1 is 2."""
    return (vectors.astype(np.int64) % 3) @ 3 ** np.arange(vectors.shape[1])[::-1]
