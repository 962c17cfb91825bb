"""`mrg-r1 table`: a table whose rows are recipes over seeds, run and written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import described, positive, seed


def add_commands(commands: Any) -> None:
    """`table`."""
    table = described(
        commands.add_parser,
        "table",
        help="a table whose rows are recipes over seeds",
        description="Run every row of a table's file over its seeds and write the table as Markdown, CSV, LaTeX and "
        "JSON. Finished rows\n"
        "are kept and shared by tables; interrupted, the same command goes on. `--plan` shows what "
        "would be run, `--no-run` writes\n"
        "the table of what there is.",
        examples="""
        mrg-r1 table launch/recipes/tables/rewards-phantom.yaml --parallel 2
        mrg-r1 table launch/recipes/tables/rewards-phantom.yaml --plan
        mrg-r1 table launch/recipes/tables/main-iu.yaml data.manifest=iu/manifest.jsonl --launch 'deepspeed'
        """,
    )
    table.add_argument(
        "file", type=Path, metavar="TABLE.yaml", help="the table; launch/recipes/tables/ has those that come along"
    )
    table.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys for every row, over its own; before any option"
    )
    where = "where rows and tables go (default: runs/tables)"
    table.add_argument("-o", "--output", type=Path, default=Path("runs/tables"), metavar="DIR", help=where)
    table.add_argument("--seeds", type=_seeds, default=[], metavar="0,1,...", help="only these seeds of the file")
    table.add_argument("--parallel", type=positive, default=1, metavar="N", help="rows at a time (default: 1)")
    start = "how a row's ranks are started (default: deepspeed --num_gpus 1)"
    table.add_argument("--launch", default="deepspeed --num_gpus 1", metavar="COMMAND", help=start)
    instead = table.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="show the runs and which are finished, and run nothing")
    instead.add_argument("--no-run", action="store_true", help="write the table of the finished rows, and run nothing")
    table.set_defaults(run=_table)


def _seeds(text: str) -> list[int]:
    return [seed(part.strip()) for part in text.split(",")]


def _table(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from mrg_r1.tables.build import build_table, check_columns
    from mrg_r1.tables.plan import check_inputs, plan_table
    from mrg_r1.tables.render import plan_as_table, table_as_text, write_table
    from mrg_r1.tables.run import RowsFailed, run_rows

    plan = plan_table(
        arguments.file, rows_folder=arguments.output / "rows", overrides=arguments.overrides, seeds=arguments.seeds
    )
    check_columns(plan.spec.columns)  # before hours of rows
    console = Console(stderr=True)
    if arguments.plan:
        print(plan_as_table(plan))
        return
    failed: RowsFailed | None = None
    if not arguments.no_run:
        check_inputs(plan)
        try:
            run_rows(plan, launch=arguments.launch, parallel=arguments.parallel, console=console)
        except RowsFailed as error:  # the table of the others is still written
            failed = error
    table = build_table(plan)
    folder = arguments.output / arguments.file.stem
    write_table(folder, table)
    print(table_as_text(table))
    print(f"{folder}: table.md, table.csv, table.tex, table.json")
    if failed is not None:
        raise failed
