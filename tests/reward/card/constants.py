"""The best constant answer at one margin, as a reward card finds it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mrg_r1.reward.card.search import distinct, earned_by_constants
from mrg_r1.reward.terms import ccs, mccs


def best_constant(vectors: NDArray[np.int8], margin: float) -> tuple[NDArray[np.int8], float]:
    """The signed vector [13] that earns the most when every study [N, 13] is answered with it, and its mean MCCS."""
    best = earned_by_constants(distinct(vectors), [margin]).best[0]
    return best, float(mccs(ccs(np.broadcast_to(best, vectors.shape), vectors), margin).mean(dtype=np.float64))
