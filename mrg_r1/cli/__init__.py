"""`mrg-r1`: prepare data, train and run a labeler, score reports, read a run.

One module a group of commands; each has `add_commands`. What a subcommand needs is imported inside it: `mrg-r1 --help`
must not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mrg_r1 import __version__
from mrg_r1.cli import (
    dashboard,
    doctor,
    export,
    labeler,
    prepare,
    probe,
    recipes,
    rehearse,
    reports,
    runs,
    scoring,
    tables,
)
from mrg_r1.cli.arguments import described


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; None takes sys.argv.

    Returns:
        0, or 1 where `doctor` finds a failure, or 2 after one message on stderr where the input is bad (a ValueError or
        OSError); anything else is a fault of ours and propagates.
    """
    parsed = _parser().parse_args(arguments)
    try:
        code: int | None = parsed.run(parsed)
        sys.stdout.flush()
    except OSError as error:
        name = "standard output" if error.filename is None and _stdout_fails() else error.filename
        named = name is not None and error.strerror is not None
        print(f"mrg-r1: {f'{name}: {error.strerror}' if named else error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"mrg-r1: {error}", file=sys.stderr)
        return 2
    return code or 0


def _stdout_fails() -> bool:
    """Whether it is what was printed that cannot be written; it waits there still, and is let go."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = described(
        argparse.ArgumentParser,
        prog="mrg-r1",
        description="Chest X-ray report generation by GRPO with a clinical reward: the tools around a run.\n"
        "Training itself is started by `deepspeed launch/train.py RECIPE.yaml`.",
        examples="""
        mrg-r1 prepare phantom -o data/five
        mrg-r1 labeler train data/five/reports.csv data/five/labels.csv -o data/five/labeler
        mrg-r1 prepare tiny-policy -o data/five/policy --manifest data/five/manifest.jsonl
        mrg-r1 score predicted.csv reference.csv --labeler data/five/labeler
        """,
    )
    parser.add_argument("--version", action="version", version=f"mrg-r1 {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (
        prepare,
        labeler,
        scoring,
        reports,
        runs,
        export,
        dashboard,
        tables,
        recipes,
        doctor,
        probe,
        rehearse,
    ):
        group.add_commands(commands)
    return parser
