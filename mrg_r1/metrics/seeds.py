"""What seeds say of a method: the mean over them, and how far it can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t, n - 1 degrees of freedom; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half
