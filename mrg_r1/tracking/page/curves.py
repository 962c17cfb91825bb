"""Every metric of metrics.jsonl as a curve, put into panels by its prefix, so that a new metric shows up without
anybody's doing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrg_r1.tracking.page.reading import number, read_lines

_POINTS = 2400  # of one metric over all runs on the page; longer runs are drawn as means of neighbouring steps
_SECTION = {  # a metric's prefix -> its section; any other prefix is a section of its own
    "reward": "Reward",
    "validation": "Clinical",
    "agreement": "Clinical",
    "loss": "Policy",
    "policy": "Policy",
    "sampling": "Policy",
    "sft": "Policy",
    "groups": "Groups",
    "time": "Time",
}
_TOGETHER = (  # metrics of one plot: title, pattern of the whole name; the first that matches. Others have a plot each.
    ("mean reward, beside one constant report", r"reward/(total|constant)"),
    ("spread of the rewards", r"reward/(std|.*_std)"),
    ("reward terms, before weights", r"reward/.*"),
    ("F1 on the validation studies, by definition", r"validation/(disease|held_out_disease|r2gen|chexbert|example).*"),
    ("gap to the drawn truth, to the held-out labeler", r"validation/.*_gap"),
    ("reports on the validation studies, shares", r"validation/(format_rate|distinct_share|no_finding_rate)"),
    ("agreement of samples with their references", r"agreement/.*"),
    ("probability ratio, new to old", r"policy/ratio.*"),
    ("share of tokens clipped", r"policy/clip_.*"),
    ("sampled against scored log-probability", r"sampling/logp_gap.*"),
    ("groups without signal", r"groups/(zero_signal|all_zero_.*)"),
    ("distinct reports, share", r"groups/distinct.*"),
    ("repetition and contradiction", r"groups/(repeated_sentence|repetition|contradiction)"),
    (
        "repetition and contradiction on the validation studies",
        r"validation/(repeated_sentence|repetition|contradiction)",
    ),
    ("truncated and malformed, share", r"groups/(truncated|malformed)"),
    ("shares and counts", r"time/.*(_share|_busy|_max)"),
    ("seconds a step", r"time/(?!start|evaluation|checkpoint|validation).*"),
    ("seconds now and then", r"time/.*"),
)
_TITLES = {
    "loss": "loss",
    "policy/kl": "KL to the reference",
    "policy/entropy": "entropy, nats a token",
    "policy/grad_norm": "gradient norm",
    "policy/learning_rate": "learning rate",
    "validation/mean_reward": "mean reward on the validation studies",
    "groups/length": "length, tokens",
    "groups/no_finding": "reports that say No Finding, share",
}
_FIRST = (  # plots that open their section
    "mean reward, beside one constant report",
    "reward terms, before weights",
    "F1 on the validation studies, by definition",
    *_TITLES.values(),
)
_ORDER = ("Reward", "Clinical", "Policy", "Groups")  # then other prefixes; time is last


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
    names = sorted({name for run in curves for name in run.metrics}, key=lambda name: ("constant" in name, name))
    found: dict[str, dict[str, list[str]]] = {}
    flat: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        section = _SECTION.get(name.split("/")[0]) or (name.split("/")[0].capitalize() if "/" in name else "Other")
        values = {value for run in curves for value in run.columns.get(name, []) if value is not None}
        if len(values) == 1:
            flat.setdefault(section, []).append({"name": name, "value": values.pop()})
            continue
        found.setdefault(section, {}).setdefault(_title(name), []).append(name)
    order = [*_ORDER, *sorted({*found, *flat} - {*_ORDER, "Time"}), "Time"]
    return [
        {
            "title": section,
            "plots": [
                plot
                for found_plot in sorted(found.get(section, {}).items(), key=_place)
                for plot in _plots(*found_plot, runs=len(curves))
            ],
            "flat": flat.get(section, []),
        }
        for section in order
        if section in found or section in flat
    ]


def _title(name: str) -> str:
    for title, pattern in _TOGETHER:
        if re.fullmatch(pattern, name):
            return title
    return _TITLES.get(name, name)


def _place(plot: tuple[str, list[str]]) -> int:
    return _FIRST.index(plot[0]) if plot[0] in _FIRST else len(_FIRST)


def _plots(title: str, names: list[str], *, runs: int) -> list[dict[str, Any]]:
    """One plot, or with several runs one a metric where its lines could not be told apart."""
    if runs > 1 and len(names) > 4:
        return [{"title": f"{title}: {name.split('/', 1)[-1]}", "names": [name]} for name in names]
    return [{"title": title, "names": names}]
