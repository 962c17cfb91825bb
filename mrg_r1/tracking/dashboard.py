"""A wandb workspace of some runs, and a report that compares them: layout alone. What it sends are the runs' wandb ids,
names of metrics and titles of plots; the numbers in the plots are those that the runs have given to wandb before.

wandb-workspaces, which is optional, is imported where a dashboard is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mrg_r1.tracking.page.reading import read_lines
from mrg_r1.tracking.panels import HIGHER_IS_BETTER, Plot, plots

# What wandb raises where there is no login, no network or no such project: a UsageError, a plain Exception, or an error
# of the library that it sends with.
_ANYTHING = Exception
_OPEN = 2  # groups that a workspace shows opened, the others under their titles


@dataclass(frozen=True)
class Layout:
    """What is to be shown.

    Attributes:
        ids: of the runs in wandb.
        groups: the plots by group, as docs/metrics.md heads them.
        compared: names in the summaries of what runs are compared by, one number a run.
    """

    entity: str
    project: str
    ids: list[str]
    groups: dict[str, list[Plot]]
    compared: list[str]


def check_workspaces() -> None:
    """Before anything is read.

    Raises:
        ValueError: wandb-workspaces is not there.
    """
    if find_spec("wandb_workspaces") is None:
        raise ValueError(
            "a dashboard is made by the package wandb-workspaces, which is optional and not installed here: "
            "pip install 'wandb-workspaces>=0.4.13'"
        )


def read_layout(runs: Sequence[Path], *, entity: str | None, project: str) -> Layout:
    """The layout for these runs: a plot for every metric that one of them has.

    Args:
        entity: the user or team that the project belongs to; None asks wandb, when the runs have been read.

    Raises:
        ValueError: a run that wandb was not given, or without a step; names it. wandb does not say which entity.
    """
    names: set[str] = set()
    for run in runs:
        rows = (row for _, row in read_lines(run / "metrics.jsonl", ["step"]))
        own = {name for row in rows for name, value in row.items() if value is not None} - {"step"}
        if not own:
            raise ValueError(f"{run}: no metrics.jsonl with a whole step in it; give the output_dir of a run")
        names |= own
    ids = list(dict.fromkeys(_wandb_id(run) for run in runs))
    return Layout(
        entity=_default_entity() if entity is None else entity,
        project=project,
        ids=ids,
        groups=plots(names, runs=len(runs)),
        # a metric that wandb keeps the highest value of is nested in a run's summary
        compared=[f"{name}.max" for name in HIGHER_IS_BETTER if name in names],
    )


def _wandb_id(run: Path) -> str:
    record = run / "wandb_run.json"
    if not record.is_file():
        raise ValueError(
            f"{run}: no wandb_run.json: this run was not given to wandb (tracking.wandb=online or offline)"
        )
    return str(json.loads(record.read_text(encoding="utf-8"))["id"])


def _default_entity() -> str:
    """The user or team that wandb takes where none is named.

    Raises:
        ValueError: no login, no network, or an account without one.
    """
    import wandb

    try:
        entity = wandb.Api().default_entity
    except _ANYTHING as error:
        raise _not_reached("which entity is yours", error) from error
    if not entity:
        raise ValueError("wandb names no default entity for this login; give the user or team with --entity")
    return str(entity)


def save_workspace(layout: Layout) -> str:
    """Make a new saved view of the project; others stay as they are. Returns its address.

    Raises:
        ValueError: wandb was not reached, or has no such project.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    workspace = workspaces.Workspace(
        entity=layout.entity,
        project=layout.project,
        name=_title(layout),
        sections=[
            workspaces.Section(name=group, is_open=number < _OPEN, panels=_line_plots(reports, shown))
            for number, (group, shown) in enumerate(layout.groups.items())
        ],
        settings=workspaces.WorkspaceSettings(max_runs=len(layout.ids)),
        runset_settings=workspaces.RunsetSettings(
            filters=_only(layout), pinned_columns=[f"summary:{name}" for name in layout.compared]
        ),
    )
    return _saved(workspace, "the workspace", layout)


def save_report(layout: Layout) -> str:
    """Make a new report that compares the runs. Returns its address.

    Raises:
        ValueError: wandb was not reached, or has no such project.
    """
    import wandb_workspaces.reports.v2 as reports

    def grid(panels: Iterable[Any]) -> Any:
        runset = reports.Runset(
            entity=layout.entity,
            project=layout.project,
            name="runs",
            filters=_only(layout),
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in layout.compared)],
        )
        return reports.PanelGrid(runsets=[runset], panels=list(panels))

    bars = [reports.BarPlot(title=name, metrics=[name]) for name in layout.compared]
    blocks = [
        reports.H1(text="Compared by one number a run"),
        reports.P(text="The highest value of each metric over the run, and what the runs' recipes have different."),
        grid([*bars, reports.RunComparer(diff_only="split")]),
    ]
    for group, shown in layout.groups.items():
        blocks += [reports.H1(text=group), grid(_line_plots(reports, shown))]
    report = reports.Report(
        entity=layout.entity, project=layout.project, title=_title(layout), width="fluid", blocks=blocks
    )
    return _saved(report, "the report", layout)


def _line_plots(reports: Any, shown: Sequence[Plot]) -> list[Any]:
    return [reports.LinePlot(title=plot.title, x="Step", y=list(plot.names)) for plot in shown]


def _only(layout: Layout) -> list[Any]:
    """wandb's filter for these runs."""
    from wandb_workspaces import expr

    return [expr.Metric("ID").isin(layout.ids)]


def _title(layout: Layout) -> str:
    """No name of a run: wandb refuses some characters here."""
    return f"mrg-r1: {len(layout.ids)} run{'s' * (len(layout.ids) != 1)}"


def _saved(made: Any, what: str, layout: Layout) -> str:
    try:
        made.save()
        return str(made.url)
    except _ANYTHING as error:
        raise _not_reached(f"{what} in {layout.entity}/{layout.project}", error) from error


def _not_reached(what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{what}: wandb says {type(error).__name__}: {error}; this needs a login (`wandb login`), the network, and a "
        "project that is there"
    )
