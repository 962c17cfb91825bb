"""Terms as a user might bring them, good and bad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NOT_CALLABLE = 3


def brevity(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    return [1.0 / len(report.split()) if report else -1.0 for report in generated]


def agreement(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Any:
    return (labels == reference_labels).mean(axis=1)


def spoils_its_inputs(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Any:
    generated[:] = ["spoiled"] * len(generated)
    labels[:] = 0
    reference_labels[:] = 0
    return np.zeros(len(references))


def too_short(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    return [0.5]


def not_numbers(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[Any]:
    return ["good"] * len(generated)


def not_a_number(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    return [float("nan") if report == "broken" else 1.0 for report in generated]


def raises(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    raise KeyError("no server")
