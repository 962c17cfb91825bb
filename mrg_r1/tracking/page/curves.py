"""Every metric of metrics.jsonl as a curve, in the groups and plots of `tracking.panels`, so that a new metric shows up
without anybody's doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mrg_r1.tracking.page.reading import number, read_lines
from mrg_r1.tracking.panels import group_of, in_order, plots

_POINTS = 2400  # of one metric over all runs on the page; longer runs are drawn as means of neighbouring steps


@dataclass(frozen=True)
class Curves:
    """One run's metrics."""

    name: str
    steps: int  # whole steps in the file
    bucket: int  # steps whose mean is one point
    columns: dict[str, list[float | None]]  # `step` (counted from 1) and the metrics that have a value

    @property
    def metrics(self) -> list[str]:
        return [name for name in self.columns if name != "step"]


def read_curves(run: Path, *, runs: int = 1) -> Curves:
    """RUN/metrics.jsonl, thinned to what a page of `runs` runs can hold.

    Raises:
        ValueError: a line that cannot be read; names file and line.
    """
    rows: list[dict[str, float | None]] = []
    for where, row in read_lines(run / "metrics.jsonl", ["step"]):
        rows.append({name: None if value is None else number(value, where, name) for name, value in row.items()})
        number(row["step"], where, "step")
    names = sorted({name for row in rows for name, value in row.items() if value is not None} - {"step"})
    bucket = max(1, -(-len(rows) * runs // _POINTS))
    parts = [rows[start : start + bucket] for start in range(0, len(rows), bucket)]
    columns: dict[str, list[float | None]] = {
        "step": [_mean([row["step"] for row in part], offset=1) for part in parts]
    }
    for name in names:
        columns[name] = [_mean([row.get(name) for row in part]) for part in parts]
    return Curves(name=run.resolve().name, steps=len(rows), bucket=bucket, columns=columns)


def _mean(values: Sequence[float | None], offset: int = 0) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known) + offset:.5g}") if known else None


def sections(curves: Sequence[Curves]) -> list[dict[str, Any]]:
    """The plots: `[{title, plots: [{title, names}], flat: [{name, value}]}]`; `flat` are the metrics that never
    change.
    """
    changing: list[str] = []
    flat: dict[str, list[dict[str, Any]]] = {}
    for name in sorted({name for run in curves for name in run.metrics}):
        values = {value for run in curves for value in run.columns.get(name, []) if value is not None}
        if len(values) == 1:
            flat.setdefault(group_of(name), []).append({"name": name, "value": values.pop()})
        else:
            changing.append(name)
    drawn = plots(changing, runs=len(curves))
    return [
        {"title": group, "plots": [asdict(plot) for plot in drawn.get(group, [])], "flat": flat.get(group, [])}
        for group in in_order([*drawn, *flat])
    ]
