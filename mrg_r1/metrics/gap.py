"""How far two readers of one policy's reports are apart, and whether the distance has grown: `disease_micro13` by one
minus by the other.

The first reader is the labeler that is rewarded; the second is never rewarded: another labeler (the held-out labeler),
or the findings that a phantom was drawn from. A policy that learns to fool the first rises under it and not under the
second (docs/traps.md #26).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.metrics.clinical import DISEASES, STRICT, check_classes, study_counts

SAMPLES = 2000  # resamplings
LEVEL = 0.99
_PERCENTILES = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
_CELLS = 4_000_000  # of a chunk's weights (32 MB)


@dataclass(frozen=True)
class GapChange:
    """The gap of two evaluations of the same studies."""

    first: float
    now: float
    change: float  # now - first
    ci: tuple[float, float]  # 99 %


def disease_counts(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N, 3] true positives, false positives and false negatives of each study over the 13 diseases: all that
    `disease_micro13` needs.

    Args:
        predicted, reference: [N, 14] classes, by one reader.

    Raises:
        ValueError: as `clinical_scores`.
    """
    check_classes(predicted, reference)
    return study_counts(predicted, reference, STRICT)[:, :, list(DISEASES)].sum(axis=2).T.astype(np.int64)


def gap_change(first: NDArray[np.int64], now: NDArray[np.int64]) -> GapChange:
    """By how much the gap has changed between two evaluations of the same studies, with a paired bootstrap interval.

    The same resample of studies serves both evaluations and both readers, so that what all four have in common (hard
    studies, findings that one reader never sees) cancels out and does not hide a change.

    Args:
        first, now: [N, 6] `disease_counts` of the rewarded reader, then of the other one; the same studies in the same
            order.

    Raises:
        ValueError: shapes that differ, or no study.

    Source: Koehn, 2004 (W04-3250), with a difference of differences in place of a difference.
    """
    if first.shape != now.shape or first.ndim != 2 or first.shape[1] != 6 or not len(first):
        raise ValueError(f"counts of shapes {first.shape} and {now.shape}; expected [N, 6] of the same studies twice")
    studies = len(first)
    counts = np.concatenate([first, now], axis=1).astype(np.float64)  # [N, 12]
    generator = np.random.default_rng(0)  # the same counts give the same interval
    drawn = np.empty(SAMPLES)
    rows = max(1, _CELLS // studies)
    for start in range(0, SAMPLES, rows):
        size = min(rows, SAMPLES - start)
        drawings = (generator.integers(studies, size=studies) for _ in range(size))
        # [size, N] copies of each study
        weights = np.stack([np.bincount(drawing, minlength=studies) for drawing in drawings])
        of_first, of_now = _gaps(weights @ counts)
        drawn[start : start + size] = of_now - of_first
    before, after = (float(gap[0]) for gap in _gaps(counts.sum(axis=0, keepdims=True)))
    low, high = np.percentile(drawn, _PERCENTILES)
    return GapChange(before, after, after - before, (float(low), float(high)))


def _gaps(totals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The gaps [S] of the first and the second evaluation, of summed counts [S, 12]; 0/0 is 0."""
    hits, invented, missed = totals.reshape(-1, 4, 3).transpose(2, 0, 1)  # [S, 4]
    whole = 2 * hits + invented + missed
    f1 = np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0)
    return f1[:, 0] - f1[:, 1], f1[:, 2] - f1[:, 3]
