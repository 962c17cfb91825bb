"""How well scores tell what is there from what is not, whatever threshold is put to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auc(scores: ArrayLike, truth: ArrayLike) -> float | None:
    """Area under the ROC curve: the probability that a positive scores above a negative, equal scores counting half.

    Args:
        scores: [N] numbers, higher where a positive is likelier.
        truth: [N] bool.

    Returns:
        0 to 1; None where all are positive or all negative, of which nothing can be said.

    Raises:
        ValueError: not two vectors of one length, or a score that is not finite.

    Source: Hanley and McNeil, 1982 (doi:10.1148/radiology.143.1.7063747), by the ranks of Mann and Whitney.
    """
    values = np.asarray(scores, dtype=np.float64)
    positive = np.asarray(truth, dtype=bool)
    if values.ndim != 1 or values.shape != positive.shape:
        raise ValueError(f"scores of shape {values.shape} and truth of shape {positive.shape}; expected the same [N]")
    if not np.isfinite(values).all():
        raise ValueError("scores that are not finite have no order")
    there = int(positive.sum())
    if there in (0, len(positive)):
        return None
    above = _middle_ranks(values)[positive].sum() - there * (there + 1) / 2
    return float(above / (there * (len(positive) - there)))


def _middle_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[group])
