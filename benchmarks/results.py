"""From what workers answered to numbers and tables: minima, medians, ratios, JSON and Markdown. Pure, but for
`write_results`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Quantity, Ratio
from mrg_r1.files import write_text_atomically

HOW = (
    "After one warm-up unit each, the contenders of a case take turns, one unit at a time, one thread each. "
    "Ratios are theirs / ours, so more is better, of the MINIMA over repetitions: on a machine that others use, "
    "the least disturbed repetition says most about the code. Memory is the largest resident size during the "
    "measured units less what was resident before the first. growth_8_16 is our step at 16 completions a study / "
    "at 8."
)

# wall clock over CPU time from which a unit was disturbed: every contender computes on one thread and waits for nothing
BUSY = 1.1

Table = tuple[list[str], list[list[str]]]  # header and rows


@dataclass
class Measurement:
    """What one contender of a case did.

    Attributes:
        repetitions: the worker's answers after the warm-up, in order.
        error: why there are no more of them; None where all is well.
        note: what a reader should know of a measurement that is well.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    resident_mb: float | None = None
    warm_up: dict[str, Any] | None = None
    repetitions: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    note: str | None = None

    def value(self, quantity: Quantity) -> float | None:
        """Least seconds, or most memory over what was resident; None where nothing was measured or the contender
        failed.
        """
        if self.error is not None or not self.repetitions:
            return None
        if quantity == "memory":
            return max(unit["peak_mb"] - unit["resident_mb"] for unit in self.repetitions)
        return min(unit[quantity] for unit in self.repetitions)

    @property
    def median(self) -> float | None:
        return statistics.median(unit["seconds"] for unit in self.repetitions) if self.repetitions else None

    @property
    def remark(self) -> str:
        """What stands beside the numbers: a failure, a note, or that other work on the machine had a share in the best
        unit.
        """
        if self.error is not None:
            return f"FAILED: {self.error}"
        remarks = [self.note] if self.note else []
        if self.fastest and self.fastest["seconds"] > BUSY * self.fastest["cpu_seconds"]:
            remarks.append(
                f"busy machine: {self.fastest['seconds'] / self.fastest['cpu_seconds']:.1f} s of wall clock a CPU "
                "second"
            )
        return "; ".join(remarks)

    @property
    def fastest(self) -> dict[str, Any] | None:
        return min(self.repetitions, key=lambda unit: unit["seconds"]) if self.repetitions else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "min_seconds": self.value("seconds"),
            "median_seconds": self.median,
            "memory_mb": self.value("memory"),
        }


@dataclass
class CaseResult:
    """The measurements of one case, in the order of its contenders."""

    name: str
    title: str
    measurements: list[Measurement]

    @property
    def errors(self) -> list[str]:
        return [f"{one.name}: {one.error}" for one in self.measurements if one.error is not None]


def compute_ratios(
    results: Sequence[CaseResult], ratios: Sequence[Ratio]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Every ratio, None where a side of it is missing, and the reason for each None."""
    by_case = {result.name: {one.name: one for one in result.measurements} for result in results}
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for ratio in ratios:
        values[ratio.name] = None
        if ratio.case not in by_case:
            reasons[ratio.name] = f"case {ratio.case} was not run"
            continue
        over, under = by_case[ratio.case][ratio.over], by_case[ratio.case][ratio.under]
        above, below = over.value(ratio.quantity), under.value(ratio.quantity)
        if above is None or below is None:
            missing = [one for one in (over, under) if one.value(ratio.quantity) is None]
            reasons[ratio.name] = "; ".join(f"{one.name}: {one.error or 'not measured'}" for one in missing)
        elif below <= 0:
            reasons[ratio.name] = f"{under.name}: {below:.1f} is no denominator"
        else:
            values[ratio.name] = above / below
    return values, reasons


def case_table(result: CaseResult) -> Table:
    """One row a contender, seconds and memory beside those of the first one."""
    header = ["", "min s", "median s", "CPU s", "units", "memory MB", "time / first", "remark"]
    first = result.measurements[0].value("seconds")
    rows = []
    for one in result.measurements:
        least, fastest = one.value("seconds"), one.fastest
        rows.append(
            [
                one.name,
                _number(least, ".2f"),
                _number(one.median, ".2f"),
                _number(fastest["cpu_seconds"] if fastest else None, ".2f"),
                str(len(one.repetitions)),
                _number(one.value("memory"), ".0f"),
                _number(least / first if least is not None and first else None, ".2f"),
                one.remark,
            ]
        )
    return header, rows


def phase_table(result: CaseResult) -> Table:
    """Seconds by phase of each contender's fastest unit."""
    rows = [
        [one.name, ", ".join(f"{name} {seconds:.2f}" for name, seconds in one.fastest["phases"].items())]
        for one in result.measurements
        if one.fastest and one.fastest["phases"]
    ]
    return ["", "phases of the fastest unit, seconds"], rows


def ratio_table(ratios: dict[str, float | None], reasons: dict[str, str]) -> Table:
    return ["ratio", "value", "reason if none"], [
        [name, _number(value, ".2f"), reasons.get(name, "")] for name, value in ratios.items()
    ]


def write_results(
    folder: Path,
    *,
    results: Sequence[CaseResult],
    ratios: Sequence[Ratio],
    environment: dict[str, Any],
    complete: bool,
    more: Mapping[str, Any] | None = None,
    tables: Sequence[tuple[str, Table]] = (),
) -> dict[str, Any]:
    """Write bench.json and bench.md, each whole or not at all.

    Args:
        more: further keys of bench.json.
        tables: further tables of bench.md, with their titles.

    Returns:
        What stands in bench.json.
    """
    values, reasons = compute_ratios(results, ratios)
    of_cpu = [replace(ratio, quantity="cpu_seconds") for ratio in ratios if ratio.quantity == "seconds"]
    content = {
        "ratios": values,
        "cpu_ratios": compute_ratios(results, of_cpu)[0],  # neighbours disturb CPU time less than the wall clock
        "reasons": reasons,
        **(more or {}),
        "complete": complete,
        "how": HOW,
        "environment": environment,
        "cases": {
            result.name: {"title": result.title, "contenders": {one.name: one.to_json() for one in result.measurements}}
            for result in results
        },
    }
    replace_file(folder / "bench.json", json.dumps(content, indent=1) + "\n")
    replace_file(folder / "bench.md", to_markdown(results, values, reasons, environment, tables))
    return content


def to_markdown(
    results: Sequence[CaseResult],
    values: dict[str, float | None],
    reasons: dict[str, str],
    environment: dict[str, Any],
    tables: Sequence[tuple[str, Table]] = (),
) -> str:
    """The same tables as on the terminal, for a reader of the file."""
    parts = ["# Bench", HOW, markdown_table(ratio_table(values, reasons))]
    for title, table in tables:
        parts += [f"## {title}", markdown_table(table)]
    for result in results:
        parts += [f"## {result.title}", markdown_table(case_table(result))]
        if phase_table(result)[1]:
            parts.append(markdown_table(phase_table(result)))
        parts.append(
            markdown_table((["", "settings"], [[one.name, _flat(one.settings)] for one in result.measurements]))
        )
    parts += ["## Where", markdown_table((["", ""], [[name, _flat(value)] for name, value in environment.items()]))]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _flat(value: Any) -> str:
    return (
        ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items()) if isinstance(value, dict) else str(value)
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def replace_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text)
