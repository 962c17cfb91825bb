"""How sure a validation's score is: its standard error over the studies, and that of a difference between validations
of the same studies, by the jackknife.

Of a validation one number a study is kept, the score without that study. What is made of several validations of the
same studies, a difference or a mean, is made of these numbers too, and its standard error is theirs: what the
validations have in common (hard studies, easy ones) cancels out.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mrg_r1.metrics.clinical import DEFINITIONS, average_totals, check_classes, example_rates, study_counts


def f1_without_each(predicted: NDArray[np.int64], reference: NDArray[np.int64], definition: str) -> NDArray[np.float64]:
    """[N] F1 of `clinical.DEFINITIONS[definition]` over the N - 1 other studies; of one study 0.

    Args:
        predicted, reference: [N, 14] classes.

    Raises:
        ValueError: as `clinical_scores`.
    """
    check_classes(predicted, reference)
    found = DEFINITIONS[definition]
    counts = study_counts(predicted, reference, found.positive)  # [3, N, 14]
    if found.average == "example":
        return mean_without_each(example_rates(counts)[2])
    totals = counts.sum(axis=1, keepdims=True, dtype=np.float64) - counts
    return average_totals(totals, found)[2]


def mean_without_each(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] means of the N - 1 other values; of one value 0."""
    return (values.sum() - values) / max(len(values) - 1, 1)


def standard_error(without_each: NDArray[np.float64]) -> float | None:
    """Of the score, difference or mean whose [N] values without each study these are; None where one study is all."""
    studies = len(without_each)
    if studies < 2:
        return None
    return math.sqrt((studies - 1) / studies * float(((without_each - without_each.mean()) ** 2).sum()))
