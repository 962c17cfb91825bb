"""`mrg-r1 report` and `mrg-r1 page`: what a run left, to read and to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import described


def add_commands(commands: Any) -> None:
    """`report` and `page`."""
    report = described(
        commands.add_parser,
        "report",
        help="what a run learned, before and after",
        description="Print what a run learned: its metrics before and after, beside a control run where there is one. Of several runs\n"
        "(seeds of one experiment) the mean gain and its spread.",
        examples="""
        mrg-r1 report runs/demo
        mrg-r1 report runs/demo-0 runs/demo-1 runs/demo-2
        mrg-r1 report runs/demo --control runs/demo-sft-only
        """,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    report.add_argument("--control", type=Path, metavar="RUN", help="a run to compare with, such as more SFT for the same time")
    report.add_argument(
        "--training-seconds", action="store_true", help="print only the seconds spent in training steps, for an equal-time control"
    )
    report.set_defaults(run=_report)

    page = described(
        commands.add_parser,
        "page",
        help="a run as one HTML file",
        description="Write RUN/page/index.html: curves, the clinical table and study cards in one file without network.\n"
        "It holds reports and radiographs: treat it as patient data.",
        examples="""
        mrg-r1 page runs/demo
        """,
    )
    page.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    page.set_defaults(run=_page)


def _report(arguments: argparse.Namespace) -> None:
    from mrg_r1.tracking.report import print_report, training_seconds

    control = arguments.control
    if control is not None and len(arguments.runs) > 1:
        raise ValueError(f"--control {control}: goes with one run, {len(arguments.runs)} were given; leave it out or report run by run")
    if control is not None and not (control / "summary.json").is_file():
        raise ValueError(f"{control}: no summary.json in it; give the output_dir of a run that has ended")
    if arguments.training_seconds:
        print(sum(training_seconds(run) for run in arguments.runs))
        return
    print_report(arguments.runs, control=control)


def _page(arguments: argparse.Namespace) -> None:
    from mrg_r1.config import load_recipe
    from mrg_r1.data.study import read_manifest
    from mrg_r1.tracking.page import write_page

    for run in arguments.runs:
        recipe = load_recipe(run / "config.yaml")
        print(write_page(run, read_manifest(recipe.data.manifest, split=recipe.data.test_split)))
