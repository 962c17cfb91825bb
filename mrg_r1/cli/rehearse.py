"""`mrg-r1 rehearse`: one whole step of a recipe, before anything is downloaded or queued."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import described, positive

if TYPE_CHECKING:
    from rich.table import Table


def add_commands(commands: Any) -> None:
    """`rehearse`."""
    command = described(
        commands.add_parser,
        "rehearse",
        help="one whole step at a checkpoint's real widths with few layers, before it is downloaded",
        description="Take one step of a recipe as launch/train.py takes it (load, vision, rollout, reward, reference, "
        "update,\n"
        "checkpoint), and export what it learned, at the real widths, vocabulary and prompts with random weights "
        "and\n"
        "few layers. policy.path needs config, tokenizer and processor, and no weights; manifest and labeler are "
        "the\n"
        "recipe's. The step is taken at two depths, and from both follows what all layers will take: a straight "
        "line\n"
        "through them, times the studies of a rank. Memory is the formula's (docs/memory.md).\n"
        "\n"
        "Random weights do not end a report: all have the length of --new-tokens. Without a GPU everything is "
        "computed in\n"
        "float32, whatever policy.dtype says, and the times are this machine's and not a cluster's. policy.adapter is "
        "left out.",
        examples="""
        mrg-r1 rehearse launch/recipes/iu_7b.yaml
        mrg-r1 rehearse launch/recipes/qwen3_vl_8b.yaml policy.path=configs/Qwen3-VL-8B --world-size 7
        mrg-r1 rehearse my_recipe.yaml grpo.group_size=4 --new-tokens 16 --json rehearsal.json
        """,
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a GRPO recipe")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values to change, as in grpo.group_size=4; before any option"
    )
    command.add_argument(
        "--studies", type=positive, metavar="N", help="studies of the step (default: 1, or grpo.minibatches)"
    )
    command.add_argument(
        "--new-tokens", type=positive, metavar="N", help="tokens a report (default: the recipe's; 32 without a GPU)"
    )
    command.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="ranks of the whole step (default: 1)"
    )
    command.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the random checkpoint lies meanwhile (default: a temporary one)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    command.set_defaults(run=_rehearse)


def _rehearse(arguments: argparse.Namespace) -> None:
    from mrg_r1.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # a bad one is said before torch is imported
    import json
    import signal
    import sys
    import tempfile

    from mrg_r1.console import wide_console
    from mrg_r1.files import write_text_atomically
    from mrg_r1.training.rehearse import rehearse

    # a queue's signal must not leave a checkpoint of many GB behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="mrg-r1-rehearsal-", dir=arguments.folder) as folder:
        result = rehearse(
            recipe,
            [str(arguments.recipe), *arguments.overrides],
            studies=arguments.studies or recipe.grpo.minibatches,
            new_tokens=arguments.new_tokens,
            world_size=arguments.world_size,
            folder=Path(folder),
        )
    console = wide_console()
    console.print(_table(result))
    if result["depths"][-1]["memory_gib_by_phase"]:
        console.print(_memory(result))
    for line in _words(result):
        console.print(line, markup=False, highlight=False)
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
        print(f"{arguments.json}: written")


def _table(result: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    whole = result["whole"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("seconds")
    for one in result["depths"]:
        table.add_column(f"{one['decoder']} + {one['tower']} layers", justify="right")
    table.add_column(f"all {whole['decoder']} + {whole['tower']}, a rank's step", justify="right")
    for name, seconds in whole["seconds"].items():
        measured = (one["seconds"][name] for one in result["depths"])
        table.add_row(name, *(f"{value:.2f}" for value in measured), f"{seconds:.1f}")
    table.add_section()
    total = (sum(one["seconds"].values()) for one in result["depths"])
    table.add_row("a step", *(f"{value:.2f}" for value in total), f"{sum(whole['seconds'].values()):.1f}")
    reckoned = {"reward_exposed": "", **{name: f"{whole[f'{name}_seconds']:.1f}" for name in ("start", "checkpoint")}}
    for name, seconds in reckoned.items():
        table.add_row(name, *(f"{one[name]:.2f}" for one in result["depths"]), seconds)
    return table


def _memory(result: dict[str, Any]) -> Table:
    """The most of each phase, beside the formula's."""
    from rich import box
    from rich.table import Table

    depths, memory, whole = result["depths"], result["memory"], result["whole"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("GiB at most")
    for one in depths:
        table.add_column(f"{one['decoder']} + {one['tower']} layers", justify="right")
    table.add_column("by formula", justify="right")
    table.add_column(f"all {whole['decoder']} + {whole['tower']} on a GPU, by formula", justify="right")
    for name in depths[-1]["memory_gib_by_phase"]:
        reckoned = (memory[key].get(name) for key in ("formula_gib_by_phase", "whole_gpu_gib_by_phase"))
        values = [*(one["memory_gib_by_phase"].get(name) for one in depths), *reckoned]
        table.add_row(name, *("" if value is None else f"{value:.2f}" for value in values))
    return table


def _words(result: dict[str, Any]) -> list[str]:
    whole, memory = result["whole"], result["memory"]
    step = sum(whole["seconds"].values())
    said = [
        f"rehearsed on {result['device']}, {result['dtype']}: {result['studies']} studies x G {result['group_size']} x "
        f"{result['new_tokens']} new tokens; export of the deepest {result['depths'][-1]['export_seconds']:.1f} s",
        f"reckoned: {result['rank_studies']} studies a rank ({result['world_size']} ranks), "
        f"{result['recipe_new_tokens']} new tokens each, prompts of at most {result['prompt_tokens']}: {step:,.0f} s "
        f"a step on this device, {step * result['steps'] / 3600:,.1f} h for {result['steps']} steps, without "
        "evaluations and the wait for rewards, which come while the reference pass runs",
        f"memory: {memory['measured_gib']:.2f} GiB measured at the deepest, {memory['formula_gib']:.2f} by formula for "
        f"all but the libraries; all layers on a GPU in {result['recipe_dtype']}: {memory['whole_gpu_gib']:.1f} GiB by "
        f"formula, in {memory['whole_gpu_phase']}",
    ]
    deepest = result["depths"][-1]
    share = "" if deepest["update_mfu"] is None else f", {deepest['update_mfu']:.1%} of this card's peak"
    said.insert(1, f"the deepest one's update: {deepest['update_tflops']:.3g} TFLOP/s{share} (docs/metrics.md)")
    if result["device"] == "cpu":
        said.append("a CPU's seconds say nothing about a GPU's; that every part ran at these shapes does")
    return said
