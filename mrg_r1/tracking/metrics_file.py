"""RUN/metrics.jsonl: one JSON object a step, each step once however often the run was interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from mrg_r1.files import naming, write_text_atomically
from mrg_r1.tracking.backend import Metrics, Tracked
from mrg_r1.tracking.sharing import Shared


class MetricsFile:
    """Appends to RUN/metrics.jsonl; what a killed run wrote after its checkpoint is cut off, since it comes again."""

    def __init__(self, run: Tracked) -> None:
        path = run.directory / "metrics.jsonl"
        if path.exists():
            kept = [line for step, line in _whole_lines(path) if step < run.start_step]
            # killed here, a run loses none of its steps
            write_text_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics, shared: Sequence[Shared]) -> None:
        """Write a step's line; what is not finite becomes null, since NaN is no JSON."""
        written = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        with naming(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **written}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """A checkpoint that survives a crash of the machine must not survive its metrics."""
        with naming(Path(self._file.name)):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """What a full disk did not take is written again here, and fails again."""
        with naming(Path(self._file.name)):
            self._file.close()


def last_logged(directory: Path) -> int:
    """The last step that RUN/metrics.jsonl has, -1 where there is none."""
    path = directory / "metrics.jsonl"
    return max((step for step, _ in _whole_lines(path)), default=-1) if path.exists() else -1


def _whole_lines(path: Path) -> list[tuple[int, str]]:
    """(step, line) of every line but one that a crash cut in the middle."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append((json.loads(line)["step"], line))
        except json.JSONDecodeError:
            continue
    return lines
