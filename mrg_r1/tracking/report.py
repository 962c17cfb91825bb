"""The closing table of a run: before against after, beside its control, and the gain over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mrg_r1.console import wide_console
from mrg_r1.metrics.renamed import todays_names
from mrg_r1.metrics.seeds import t_interval
from mrg_r1.tracking.control import control_name
from mrg_r1.tracking.evaluation_tables import reference_sources
from mrg_r1.tracking.page.clinical import radeval_of
from mrg_r1.tracking.page.reading import read_json
from mrg_r1.tracking.terminal import where_time_went

_RADEVAL = "radeval:"
_LEGEND = {  # part of a key -> what it means, said where such a row is shown
    "disease_": "micro13, macro13: F1 of 13 diseases, pooled and averaged, as the labeler reads reports and references",
    "_truth": "truth: against what the phantoms were drawn from",
    "repeated_sentence": "repeated_sentence: reports in which a whole sentence stands twice; repetition: share of "
    "sentences or phrases said before; contradiction: reports that affirm and deny one observation",
    "held_out": "held_out: by a labeler that is not rewarded",
    _RADEVAL: "radeval: means over reports, as RadEval's metrics give them (evaluation.radeval)",
}


def read_summary(run: Path) -> dict[str, Any]:
    """RUN/summary.json.

    Raises:
        ValueError: no summary there, or a run that has not ended.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run}: no summary.json; the run has not ended, or this is not a run's folder")
    summary: dict[str, Any] = todays_names(json.loads(path.read_text(encoding="utf-8")))
    if summary.get("after") is None:
        raise ValueError(
            f"{run}: its summary has no `after`; the recipe did not evaluate the test split (evaluation.test)"
        )
    return summary


def _with_radeval(run: Path) -> dict[str, Any]:
    """RUN/summary.json, and in its `before` and `after` what RadEval's metrics gave on average, by `radeval:NAME`.

    Raises:
        ValueError: as `read_summary`; an evaluation that cannot be read.
    """
    summary = read_summary(run)
    for when, file in (("before", "test_before.json"), ("after", "test.json")):
        scores = radeval_of(read_json(run / "evaluation" / file))["scores"]
        if summary[when] is not None:
            summary[when] |= {f"{_RADEVAL}{name}": score["mean"] for name, score in scores.items()}
    return summary


def print_report(runs: Sequence[Path], *, control: Path | None = None, arms: Sequence[str] = ()) -> None:
    """Print before and after of each run; with a control, beside it; with several runs, the mean gain and its spread.

    Args:
        runs: their folders.
        control: of a single run; else a run keeps it in RUN/control.
        arms: names of folders in every RUN that hold runs from the same start; the gains of several runs are shown
            beside theirs. Empty: `control`, where every run has one.

    Raises:
        ValueError: as `read_summary`.
    """
    console = wide_console()
    summaries = [_with_radeval(run) for run in runs]
    if not arms and all((run / "control" / "summary.json").is_file() for run in runs):
        arms = ["control"]
    others = {arm: [_with_radeval(run / arm) for run in runs] for arm in arms} if len(runs) > 1 else {}
    for run, summary in zip(runs, summaries, strict=True):
        # a run keeps its control in RUN/control
        beside = control if control is not None and len(runs) == 1 else run / "control"
        compared = _with_radeval(beside) if (beside / "summary.json").is_file() else None
        console.print(_before_after(run, summary, compared))
        stage = f", ZeRO-{summary['zero_stage']}" if summary["zero_stage"] else ""  # none where nothing was learned
        labelers = sum(summary.get("labeler_cpu_seconds", {}).values())
        where = where_time_went(summary["seconds"], None, labelers)
        targets = summary.get("lora_targets")
        stage += f", LoRA on {targets}" if targets not in (None, "language") else ""
        ran = f"{summary['world_size']} ranks{stage}, seed {summary['seed']}; {where}"
        page = run / "page" / "index.html"
        console.print(ran, markup=False, highlight=False)
        if summary["note"]:
            console.print(summary["note"], markup=False, highlight=False)
        sources = reference_sources(read_json(run / "evaluation" / "test.json") or {})
        if sources is not None:
            console.print(f"references' labels: {sources}", markup=False, highlight=False)
        if page.is_file():
            console.print(f"its reports beside the radiographs: {page}", markup=False, highlight=False)
        console.print()
    if len(runs) > 1:
        for arm, beside_it in others.items():
            console.print(_gains(summaries, arm, beside_it))
        if not others:
            console.print(_gains(summaries, None, []))
    shown = [key for summary in summaries for key, value in summary["after"].items() if value is not None]
    for part, meaning in _LEGEND.items():
        if any(part in key for key in shown):
            console.print(meaning, markup=False, highlight=False)


def seeds_as_json(runs: Sequence[Path], arms: Sequence[str] = ()) -> dict[str, Any]:
    """What `print_report` reads of each run, by its seed: `before`, `after`, `control` (its `after`, or null), under
    `arms` the `after` of each further arm, `best` (which adapter was chosen) and the training's processor seconds.

    Raises:
        ValueError: as `read_summary`, or two runs of one seed.
    """
    seeds: dict[str, Any] = {}
    for run in runs:
        summary = _with_radeval(run)
        seed = str(summary["seed"])
        if seed in seeds:
            raise ValueError(f"{run}: a second run of seed {seed}; give one run a seed")
        beside = run / "control"
        seeds[seed] = {
            "before": summary["before"],
            "after": summary["after"],
            "control": _with_radeval(beside)["after"] if (beside / "summary.json").is_file() else None,
            "arms": {arm: _with_radeval(run / arm)["after"] for arm in arms if arm != "control"},
            "best": summary.get("best"),
            "training_cpu_seconds": summary.get("training_cpu_seconds"),
            "world_size": summary["world_size"],
        }
    return {"seeds": seeds}


def training_seconds(run: Path) -> float:
    """Seconds that a run spent in its training steps."""
    return float(read_summary(run)["training_seconds"])


def training_cpu_seconds(run: Path) -> float:
    """Processor seconds that rank 0 and its share of the labeler spent in the training steps; what an equal-time
    control gets.

    Raises:
        ValueError: as `read_summary`, or a summary of a version that did not count them.
    """
    summary = read_summary(run)
    if "training_cpu_seconds" not in summary:
        raise ValueError(f"{run}: its summary has no training_cpu_seconds; an older version wrote it: run it again")
    return float(summary["training_cpu_seconds"])


def _before_after(run: Path, summary: dict[str, Any], control: dict[str, Any] | None) -> Table:
    name = f"control: {control_name(summary['control'], '')}, " if summary.get("control") else ""
    table = _table(f"{run}: {name}test split, greedy reports", "before", "after", "change")
    for name in (_control_column(control), "change") if control else ():
        table.add_column(name, justify="right")
    for key, after in summary["after"].items():
        before = (summary["before"] or {}).get(key)
        cells = [_number(before), _number(after), _change(before, after)]
        if control:
            cells += [_number(control["after"].get(key)), _change(before, control["after"].get(key))]
        if set(cells) != {"-"}:  # no held-out labeler, no drawn truth
            table.add_row(key, *cells)
    return table


def _gains(summaries: Sequence[dict[str, Any]], arm: str | None, others: Sequence[dict[str, Any]]) -> Table:
    columns = [control_name(summaries[0].get("control"), "GRPO")]
    if arm is not None:
        columns += [_control_column(others[0]) if arm == "control" else arm, "the one minus the other"]
    table = _table(f"gain over {len(summaries)} seeds: mean ± half of its 95 % t interval, seeds above 0", *columns)
    for key in summaries[0]["after"]:
        before = [(summary["before"] or {}).get(key) for summary in summaries]
        after = [summary["after"].get(key) for summary in summaries]
        cells = [_spread(before, after)]
        if arm is not None:
            values = [one["after"].get(key) for one in others]
            cells += [_spread(before, values), _spread(values, after)]
        if set(cells) != {"-"}:
            table.add_row(key, *cells)
    return table


def _control_column(control: dict[str, Any]) -> str:
    """Runs of older versions do not say which control they are: it was further SFT."""
    return f"control: {control_name(control.get('control'), 'further SFT')}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _spread(before: Sequence[float | None], after: Sequence[float | None]) -> str:
    """The changes' mean, its interval over seeds and how many are above 0; `-` where a run has no such number (no
    held-out labeler, no drawn truth).
    """
    values = [new - old for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    interval = t_interval(values)
    if len(values) < len(before) or interval is None:
        return "-"
    above = sum(value > 0 for value in values)
    half = (interval[1] - interval[0]) / 2
    return f"{statistics.mean(values):+.3f} ±{half:.3f}  {above}/{len(values)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.3f}"
