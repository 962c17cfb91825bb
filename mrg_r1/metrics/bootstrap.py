"""How sure an F1 is, and a difference of two: percentile intervals over resampled studies.

Source: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), studies
drawn with replacement; two systems on the same resamples: Koehn, 2004 (W04-3250).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.metrics.clinical import (
    DEFINITIONS,
    LENIENT,
    STRICT,
    average_totals,
    check_classes,
    clinical_scores,
    example_rates,
    study_counts,
)

SAMPLES = 1000
LEVEL = 0.95
_PERCENTILES = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
_CELLS = 4_000_000  # of a chunk's weights (16 MB): many studies never need samples x studies at once
_EXACT_IN_FLOAT32 = 2**24  # sums of whole numbers up to this are


@dataclass(frozen=True)
class Difference:
    """The F1 of two systems under one definition, or the means of a metric, on the same studies."""

    first: float
    second: float
    difference: float  # second - first
    ci: tuple[float, float]  # 95 %
    p: float  # two-sided; `paired_differences` has the formula

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not hold 0."""
        return not self.ci[0] <= 0 <= self.ci[1]


def bootstrap_intervals(
    predicted: NDArray[np.int64],
    reference: NDArray[np.int64],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    shown: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the F1 of every definition of docs/method.md §4.

    Args:
        predicted, reference: [N, 14] integer classes, as for `clinical_scores`.
        samples: resamplings.
        seed: the same seed gives the same intervals, whatever the chunks.
        shown: wraps the chunks, such as in a progress bar.

    Returns:
        (2.5 %, 97.5 %) percentiles by definition, in `DEFINITIONS`' order.

    Raises:
        ValueError: as `clinical_scores`, or fewer than 1 sample.
    """
    check_classes(predicted, reference)
    f1 = _resampled_f1([predicted], reference, samples, seed, shown)
    return {name: _interval(values[0]) for name, values in f1.items()}


def paired_differences(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    reference: NDArray[np.int64],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    shown: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[str, Difference]:
    """How much better the second system is than the first, on the same studies and the same resamples of them.

    With d the differences over S resamples, p = min(1, 2 min(1 + #{d <= 0}, 1 + #{d >= 0}) / (S + 1)): never 0, and
    never below 2 / (S + 1). Definitions are tested one by one, without a correction for their number.

    Args:
        first, second: [N, 14] integer classes of the two systems, in the same order.
        reference: [N, 14].
        samples, seed, shown: as for `bootstrap_intervals`.

    Returns:
        By definition, in `DEFINITIONS`' order.

    Raises:
        ValueError: as `clinical_scores`, or fewer than 1 sample.

    Source: Efron and Tibshirani, 1993, section 15.4 (achieved significance level); the added 1: Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 4.2.
    """
    scores = clinical_scores(first, reference), clinical_scores(second, reference)
    differences = {}
    for name, (of_first, of_second) in _resampled_f1([first, second], reference, samples, seed, shown).items():
        drawn = of_second - of_first  # [S]
        a, b = (system[name].f1 for system in scores)
        differences[name] = Difference(a, b, b - a, _interval(drawn), _p(drawn))
    return differences


def mean_intervals(values: NDArray[np.float64], *, samples: int = SAMPLES, seed: int = 0) -> list[tuple[float, float]]:
    """95 % intervals of means over studies, of metrics that give each study a number.

    Args:
        values: [M, N] of M metrics and N studies.
        samples, seed: as for `bootstrap_intervals`, which draws the same studies.

    Raises:
        ValueError: fewer than 1 sample.
    """
    return [_interval(drawn) for drawn in _resampled_means(values, samples, seed)]


def paired_mean_differences(
    first: NDArray[np.float64], second: NDArray[np.float64], *, samples: int = SAMPLES, seed: int = 0
) -> list[Difference]:
    """`paired_differences` of means over studies: how much more the second system has than the first.

    Args:
        first, second: [M, N] of M metrics and the same N studies.
        samples, seed: as for `paired_differences`, which draws the same studies.

    Raises:
        ValueError: fewer than 1 sample.
    """
    found = []
    for a, b, drawn in zip(first, second, _resampled_means(second - first, samples, seed), strict=True):
        means = float(a.mean()), float(b.mean())
        found.append(Difference(*means, means[1] - means[0], _interval(drawn), _p(drawn)))
    return found


def _resampled_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """[M, samples] means of [M, N] values."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    studies = values.shape[1]
    generator = np.random.default_rng(seed)
    means = np.empty((len(values), samples))
    for sample in range(samples):
        copies = np.bincount(generator.integers(studies, size=studies), minlength=studies)
        means[:, sample] = values @ copies / studies
    return means


def _p(drawn: NDArray[np.float64]) -> float:
    """Of differences over resamples; `paired_differences` has the formula."""
    tail = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * tail / (len(drawn) + 1))


def _resampled_f1(
    systems: Sequence[NDArray[np.int64]],
    reference: NDArray[np.int64],
    samples: int,
    seed: int,
    shown: Callable[[Sequence[int]], Iterable[int]],
) -> dict[str, NDArray[np.float64]]:
    """[systems, samples] F1 by definition, every system on the same resamples.

    Drawing N of N studies with replacement is a multinomial number of copies of each, and every F1 but `example14` is a
    function of summed counts, so a sample is one product of copies and counts.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    studies = len(reference)
    # sums are at most N, so that those of float32 are exact and do not depend on how a product is cut
    dtype = np.float32 if studies < _EXACT_IN_FLOAT32 else np.float64
    counts = [
        {positive: study_counts(system, reference, positive) for positive in (STRICT, LENIENT)} for system in systems
    ]
    # [N, systems * 2 * 3 * 14]
    columns = np.concatenate(
        [count.transpose(1, 0, 2).reshape(studies, -1).astype(dtype) for system in counts for count in system.values()],
        axis=1,
    )
    example = [example_rates(system[STRICT])[2] for system in counts]
    generator = np.random.default_rng(seed)
    f1 = {name: np.empty((len(systems), samples)) for name in DEFINITIONS}
    rows = max(1, _CELLS // studies)
    for start in shown(range(0, samples, rows)):
        end = min(start + rows, samples)
        weights = np.empty((end - start, studies), dtype=dtype)
        for sample in range(start, end):
            copies = np.bincount(generator.integers(studies, size=studies), minlength=studies)
            weights[sample - start] = copies
            for system, rates in enumerate(example):  # no whole numbers: float64, and summed row by row
                f1["example14"][system, sample] = (copies * rates).sum() / studies
        totals = (weights @ columns).astype(np.float64).reshape(end - start, len(systems), 2, 3, -1)
        for name, definition in DEFINITIONS.items():
            if definition.average == "example":
                continue
            for system in range(len(systems)):
                of_policy = totals[:, system, int(definition.positive == LENIENT)].transpose(1, 0, 2)  # [3, S, 14]
                f1[name][system, start:end] = average_totals(of_policy, definition)[2]
    return f1


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, _PERCENTILES)
    return float(low), float(high)
