"""Terms as a user might bring them, good and bad."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
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


def too_short(
    generated: list[str | None], references: list[str], labels: Any, reference_labels: Any
) -> Sequence[float]:
    return [0.5]


def not_numbers(
    generated: list[str | None], references: list[str], labels: Any, reference_labels: Any
) -> Sequence[Any]:
    return ["good"] * len(generated)


def not_a_number(
    generated: list[str | None], references: list[str], labels: Any, reference_labels: Any
) -> Sequence[float]:
    return [float("nan") if report == "broken" else 1.0 for report in generated]


def raises(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    raise KeyError("no server")


def dies(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    """Kills its process at call DIES_AT and later, DIES_TIMES times in all; counted in the file DIES_COUNTER, over
    restarts.
    """
    counter = Path(os.environ["DIES_COUNTER"])
    calls = counter.read_bytes() if counter.exists() else b""
    dying = len(calls) >= int(os.environ["DIES_AT"]) and calls.count(b"x") < int(os.environ["DIES_TIMES"])
    counter.write_bytes(calls + (b"x" if dying else b"."))
    if dying:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(generated)


def nan_at(generated: list[str | None], references: list[str], labels: Any, reference_labels: Any) -> Sequence[float]:
    """NaN in the calls from NAN_FROM to NAN_TO, counted in the file NAN_COUNTER."""
    counter = Path(os.environ["NAN_COUNTER"])
    call = counter.stat().st_size if counter.exists() else 0
    with open(counter, "ab") as file:
        file.write(b".")
    bad = int(os.environ["NAN_FROM"]) <= call < int(os.environ["NAN_TO"])
    return [float("nan") if bad else 0.0] * len(generated)
