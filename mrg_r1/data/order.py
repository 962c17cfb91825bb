"""In which order studies come: a pure function of seed and position.

Positions count studies from the start of an endless stream of epochs. Where a run goes on needs nothing but the number
of studies that it has consumed, whatever its ranks and batches were; a weighted stream needs its weights besides, which
come from the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, POSITIVE

COMMON_SHARE = 0.1  # findings in at least this share of the reports are not rare (ours)


class StudyOrder:
    """The stream of studies.

    Args:
        count: studies of an epoch, numbered from 0.
        seed: of the recipe.
        weights: [count] how often a study comes, relative to the others; None: each once an epoch.
    """

    def __init__(self, count: int, *, seed: int, weights: Sequence[float] | NDArray[np.float64] | None = None) -> None:
        self.count, self.seed = count, seed
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def take(self, start: int, length: int) -> list[int]:
        """The studies at positions `start` … `start + length - 1`."""
        return [self._epoch(position // self.count)[position % self.count] for position in range(start, start + length)]

    def share(self, start: int, *, batch_size: int, rank: int, world_size: int) -> list[int]:
        """Of the batch at `start`, what one rank takes: a contiguous part, so that a study and its group are on one
        rank (docs/traps.md #7).
        """
        own = batch_size // world_size
        return self.take(start + rank * own, own)

    def fingerprint(self, names: Sequence[str]) -> str:
        """What the order depends on besides the seed: equal for equal studies (by name, in order) and weights."""
        digest = sha256("\n".join(names).encode())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()[:16]

    def _make_epoch(self, epoch: int) -> list[int]:
        if self.weights is None:
            return np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
        return _weighted_epoch(self.weights, np.random.default_rng([self.seed, epoch, 1])).tolist()


def _weighted_epoch(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many draws as studies. A study of weight w comes n * w / sum(w) times, rounded down or up, its copies spread
    over the epoch.

    Systematic resampling (Kitagawa 1996, doi:10.2307/1390750): one random offset, equal steps through the shuffled
    weights.
    """
    count = len(weights)
    shuffled = rng.permutation(count)
    edges = np.cumsum(weights[shuffled])
    places = np.searchsorted(edges * (count / edges[-1]), np.arange(count) + rng.random(), side="right")
    studies, copies = np.unique(shuffled[np.minimum(places, count - 1)], return_counts=True)
    # copy j of n stands at (j + u) / n of the epoch, u the study's own: copies lie apart, and everything is shuffled
    of, first = np.repeat(copies, copies), np.repeat(np.cumsum(copies) - copies, copies)
    keys = (np.arange(count) - first + np.repeat(rng.random(len(studies)), copies)) / of
    return np.repeat(studies, copies)[np.argsort(keys, kind="stable")]


def rare_finding_weights(classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Repeat factors: a study comes as often as its rarest positive finding asks for, sqrt(0.1 / share), and at least
    as often as others.

    Args:
        classes: [N, 14] classes of the training references.

    Returns:
        [N] float64, at least 1; the root keeps a finding that a single report names from filling an epoch.

    Source: repeat factor sampling, LVIS (arXiv 1908.03195), appendix B; its threshold t is `COMMON_SHARE` here.
    """
    positive = classes[:, :NO_FINDING] == POSITIVE  # [N, 13]
    shares = positive.mean(axis=0)
    factors = np.sqrt(COMMON_SHARE / np.maximum(shares, 1 / len(classes)))
    weights: NDArray[np.float64] = np.where(positive, factors, 0.0).max(axis=1, initial=1.0)
    return weights
