"""`mrg-r1 summary` and `mrg-r1 page`: what a run left, to read and to look at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_output, described, positive


def add_commands(commands: Any) -> None:
    """`summary` and `page`."""
    summary = described(
        commands.add_parser,
        "summary",
        help="what a run learned, before and after",
        description="Print what a run learned: its metrics before and after, beside a control run where there is "
        "one. Of several runs\n"
        "(seeds of one experiment) the mean gain, its 95 % t interval over seeds and how many seeds rose.",
        examples="""
        mrg-r1 summary runs/demo
        mrg-r1 summary runs/demo-0 runs/demo-1 runs/demo-2
        mrg-r1 summary runs/demo --control runs/demo-sft-only
        mrg-r1 summary runs/demo-0 runs/demo-1 runs/demo-2 --json seeds.json
        mrg-r1 summary runs/demo-0 runs/demo-1 runs/demo-2 --arm control --arm rft
        """,
    )
    summary.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    summary.add_argument(
        "--control", type=Path, metavar="RUN", help="a run to compare with, such as more SFT for the same time"
    )
    summary.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help="of several runs: compare with RUN/NAME of each, a run from the same start; may be repeated (default: "
        "control, where every RUN has one)",
    )
    summary.add_argument(
        "--training-seconds",
        action="store_true",
        help="print only the seconds spent in training steps",
    )
    summary.add_argument(
        "--training-cpu-seconds",
        action="store_true",
        help="print only the processor seconds of training steps, rank 0's and its share of the labeler's, for an "
        "equal-time control",
    )
    summary.add_argument(
        "--json", type=Path, metavar="FILE", help="also write before, after and control of each run, by seed"
    )
    summary.set_defaults(run=_summary)

    page = described(
        commands.add_parser,
        "page",
        help="a run as one HTML file, to look at in a browser",
        description="Write RUN/page/index.html: the clinical table before and after with its baselines, bars of "
        "each observation,\n"
        "curves, and studies with their radiographs, references and reports, findings marked as agreed, "
        "missed, invented or of wrong\n"
        "polarity; with search, filters and keys (? on the page). One file of less than 15 MB, opened "
        "from disk, that fetches nothing.\n"
        "A run writes it when it ends; while it goes on, this command shows how far it has come. Of "
        "several runs, the first has the\n"
        "tables and studies, all have their curves. The file holds reports and radiographs: treat it as "
        "patient data.",
        examples="""
        mrg-r1 page runs/demo
        mrg-r1 page runs/demo runs/demo-seed1 runs/demo-seed2 -o seeds.html
        mrg-r1 page runs/mine --watch 60
        """,
    )
    page.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run, finished or not; then others to overlay"
    )
    add_output(page, "the file to write (default: RUN/page/index.html of the first run)", "FILE", required=False)
    page.add_argument(
        "--watch", type=positive, metavar="SECONDS", help="write it again and again until the first run has ended"
    )
    page.set_defaults(run=_page)


def _summary(arguments: argparse.Namespace) -> None:
    from mrg_r1.files import write_text_atomically
    from mrg_r1.tracking.report import print_report, seeds_as_json, training_cpu_seconds, training_seconds

    control = arguments.control
    if control is not None and len(arguments.runs) > 1:
        raise ValueError(
            f"--control {control}: goes with one run, {len(arguments.runs)} were given; leave it out or report run "
            "by run"
        )
    if arguments.arm and len(arguments.runs) == 1:
        name = arguments.arm[0]
        raise ValueError(f"--arm {name}: of several runs; beside one run give --control {arguments.runs[0] / name}")
    if control is not None and not (control / "summary.json").is_file():
        raise ValueError(f"{control}: no summary.json in it; give the output_dir of a run that has ended")
    if arguments.training_seconds:
        print(sum(training_seconds(run) for run in arguments.runs))
        return
    if arguments.training_cpu_seconds:
        print(sum(training_cpu_seconds(run) for run in arguments.runs))
        return
    print_report(arguments.runs, control=control, arms=arguments.arm)
    if arguments.json is not None:
        text = json.dumps(seeds_as_json(arguments.runs, arguments.arm), indent=2) + "\n"
        write_text_atomically(arguments.json, text)
        print(f"{arguments.json}: the same by seed")


def _page(arguments: argparse.Namespace) -> None:
    import time

    print(_write_page(arguments))
    while arguments.watch is not None and not (arguments.runs[0] / "summary.json").is_file():
        time.sleep(arguments.watch)
        _write_page(arguments)


def _write_page(arguments: argparse.Namespace) -> Path:
    from mrg_r1.config.recipe import load_run
    from mrg_r1.data.study import read_manifest
    from mrg_r1.tracking.page import write_page

    run, *others = arguments.runs
    recipe = load_run(run)
    data = recipe.data
    if not data.manifest.is_file():
        raise ValueError(
            f"{data.manifest}: no such file (data.manifest of {run / 'config.yaml'}); go to the folder that the run "
            "was started in"
        )
    studies = [study for study in read_manifest(data.manifest) if study.split in (data.test_split, data.train_split)]
    references = {} if recipe.reward.references == "said" else _references(run, data.manifest)
    return write_page(run, studies, others=others, references=references, output=arguments.output)


def _references(run: Path, manifest: Path) -> dict[str, list[int | None]]:
    """The references' labels that the run's labeler has read, where an evaluation says which one that was."""
    from mrg_r1.labels.observations import values_of_classes
    from mrg_r1.reward.references import kept_reference_labels
    from mrg_r1.tracking.page.reading import read_json

    for name in ("test", "test_before"):
        labeler = (read_json(run / "evaluation" / f"{name}.json") or {}).get("labeler")
        if labeler is not None:
            kept = kept_reference_labels(manifest, labeler, run / "reference_labels")
            return {study_id: values_of_classes(classes) for study_id, classes in kept.items()}
    return {}
