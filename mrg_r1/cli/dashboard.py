"""`mrg-r1 dashboard`: a wandb workspace of some runs, with the panel groups of docs/metrics.md, and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import described


def add_commands(commands: Any) -> None:
    """`dashboard`."""
    dashboard = described(
        commands.add_parser,
        "dashboard",
        help="a wandb workspace of some runs, and a report that compares them",
        description="Make a saved view in a wandb project: a section for each group of docs/metrics.md, a plot for "
        "every metric of the runs,\n"
        "and of the project's runs only these. With --report also a report that compares them. It needs the package "
        "wandb-workspaces\n"
        "(pip install 'wandb-workspaces>=0.4.13'), a login (`wandb login`) and the network; the runs must be in wandb "
        "(tracking.wandb=online,\n"
        "or `wandb sync`). Layout alone is sent: wandb ids of the runs, names of metrics, titles; no texts, no "
        "images, no numbers.",
        examples="""
        mrg-r1 dashboard runs/mine --project mrg-r1
        mrg-r1 dashboard runs/demo-0 runs/demo-1 runs/demo-2 --project mrg-r1 --entity my-team --report
        """,
    )
    dashboard.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run that wandb has")
    dashboard.add_argument("--project", required=True, metavar="P", help="wandb project that the runs are in")
    dashboard.add_argument(
        "--entity", metavar="E", help="user or team that the project belongs to (default: the login's own)"
    )
    dashboard.add_argument("--report", action="store_true", help="also a report that compares the runs")
    dashboard.set_defaults(run=_dashboard)


def _dashboard(arguments: argparse.Namespace) -> None:
    from mrg_r1.tracking.dashboard import check_workspaces, read_layout, save_report, save_workspace

    check_workspaces()
    for run in arguments.runs:
        _say_where_it_is(run, arguments.project)
    layout = read_layout(arguments.runs, entity=arguments.entity, project=arguments.project)
    print(f"{save_workspace(layout)}: workspace of {len(layout.ids)} run(s)")
    if arguments.report:
        print(f"{save_report(layout)}: report")


def _say_where_it_is(run: Path, project: str) -> None:
    """Notes where a run may not be where it is looked for; plots would be empty, without a word of wandb's."""
    from mrg_r1.config.recipe import load_run

    tracking = load_run(run).tracking
    if tracking.wandb == "offline":
        print(f"note: {run} was tracked offline; `wandb sync {run}/wandb/offline-run-*` brings it", file=sys.stderr)
    if tracking.wandb_project != project:
        print(
            f"note: {run} was tracked in the project {tracking.wandb_project}; is it in {project} too?",
            file=sys.stderr,
        )
