"""How sure an F1 is: percentile intervals over resampled studies.

Source: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), studies drawn with replacement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mrg_r1.metrics.clinical import DEFINITIONS, average_counts, check_classes, study_counts

_CELLS = 4_000_000  # of a chunk's weights (32 MB): many studies never need samples x studies at once


def bootstrap_intervals(
    predicted: NDArray[np.int64], reference: NDArray[np.int64], *, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the F1 of every definition of spec section 4.

    Drawing N of N studies with replacement is a multinomial number of copies of each study, and every F1 is a function of summed
    counts, so a sample is one product of copies and counts.

    Args:
        predicted, reference: [N, 14] integer classes, as for `clinical_scores`.
        samples: resamplings.
        seed: the same seed gives the same intervals, whatever the chunks.

    Returns:
        (2.5 %, 97.5 %) percentiles by definition, in `DEFINITIONS`' order.

    Raises:
        ValueError: as `clinical_scores`, or fewer than 1 sample.
    """
    check_classes(predicted, reference)
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    studies = len(reference)
    counts = {name: study_counts(predicted, reference, definition) for name, definition in DEFINITIONS.items()}
    generator = np.random.default_rng(seed)
    f1: dict[str, list[NDArray[np.float64]]] = {name: [] for name in DEFINITIONS}
    for start in range(0, samples, rows := max(1, _CELLS // studies)):
        drawn = generator.integers(studies, size=(min(rows, samples - start), studies))  # [S, N]
        sample = np.arange(len(drawn))[:, None] * studies
        weights = np.bincount((drawn + sample).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        for name, definition in DEFINITIONS.items():
            f1[name].append(average_counts(counts[name], definition.average, weights)[2])
    intervals = {}
    for name, parts in f1.items():
        low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals
