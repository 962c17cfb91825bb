"""`mrg-r1 doctor`: what this machine and a recipe lack for a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import described, positive

if TYPE_CHECKING:
    from mrg_r1.doctor.finding import Finding


def add_commands(commands: Any) -> None:
    """`doctor`."""
    doctor = described(
        commands.add_parser,
        "doctor",
        help="look whether a machine, and a recipe on it, can run",
        description="Look at this machine (Python, packages, devices, attention kernels, Java) and, with a recipe, "
        "at everything that it\n"
        "points at: splits and their first images, policy, texts that its tokenizer would misread or cut, "
        "labeler, who\n"
        "else is asked for rewards, memory by the formula of docs/memory.md, disk, wandb.\n"
        "Nothing is written, no policy is loaded, no report is shown; a module of reward terms is imported.\n"
        "\n"
        "Exit code: 0 where all is well or there are warnings only, 1 where something fails, 2 where "
        "the recipe itself is bad.",
        examples="""
        mrg-r1 doctor
        mrg-r1 doctor launch/recipes/iu_7b.yaml
        mrg-r1 doctor launch/recipes/iu_7b.yaml reward.device=cuda:7 --world-size 7
        mrg-r1 doctor runs/mine/config.yaml --json
        """,
    )
    doctor.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="the experiment; without one, the machine alone"
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="values to change, as in grpo.group_size=16")
    doctor.add_argument(
        "--world-size", type=positive, metavar="N", help="ranks, over all nodes (default: CUDA devices here, or 1)"
    )
    doctor.add_argument(
        "--task",
        choices=("grpo", "sft"),
        help="what the recipe is for (default: sft where it has a section sft and none grpo)",
    )
    doctor.add_argument("--json", action="store_true", help="findings as JSON, for scripts")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    recipe = None
    if arguments.recipe is not None:
        from mrg_r1.config.recipe import load_recipe  # a bad recipe is said before torch is imported

        recipe = load_recipe(arguments.recipe, arguments.overrides)
    from mrg_r1.doctor.finding import as_json, worst
    from mrg_r1.doctor.machine import cuda_devices, machine_findings

    devices = cuda_devices()
    findings = machine_findings(devices)
    if recipe is not None:
        from mrg_r1.doctor.checks import recipe_findings, task_of

        task = arguments.task or task_of(recipe)
        findings += recipe_findings(
            recipe, task=task, world_size=arguments.world_size or max(1, len(devices)), devices=devices
        )
    if arguments.json:
        print(as_json(findings))
    else:
        _print(findings)
    return 1 if worst(findings) == "failure" else 0


def _print(findings: list[Finding]) -> None:
    """A table on a terminal; a line a finding where it is piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for one in findings:
            print(f"{one.state:8} {one}")
        return
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    table = Table("", "", "", box=box.SIMPLE, show_header=False)
    for one in findings:
        said = Text(one.text)  # texts hold paths and brackets, which are no markup
        if one.remedy is not None:
            said.append(f"\n-> {one.remedy}", style="bold")
        table.add_row(Text(one.state, style=colours[one.state]), Text(one.name), said)
    console.print(table)
