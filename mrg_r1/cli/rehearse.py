"""`mrg-r1 rehearse`: one step of a recipe before its weights are downloaded or a card is queued for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import described, positive

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STEP = (  # a program of its own for each step: it has the memory to itself, and DeepSpeed starts once
    "from mrg_r1.cli.launch import run_on_ranks\n"
    "from mrg_r1.training.rehearsed_step import rehearsed_step\n"
    "run_on_ranks(rehearsed_step, None, labeler_beside=True)"
)
_WORDS = {
    "start": "start (weights, labeler, DeepSpeed)",
    "reward_exposed": "reward (waited for)",
    "old": "log-probs before",
}


def add_commands(commands: Any) -> None:
    """`rehearse`."""
    rehearse = described(
        commands.add_parser,
        "rehearse",
        help="one whole step of a recipe with random weights and few layers, before anything is downloaded",
        description="Take one whole step of a GRPO recipe (load, vision, rollout, reward, reference, update, "
        "checkpoint, export) at the\n"
        "checkpoint's widths, vocabulary and prompts, with random weights and few layers, by the code that trains, on "
        "whatever device\n"
        "there is; then say what all layers and the recipe's whole step will take.\n"
        "\n"
        "policy.path is the checkpoint's folder: config.json, tokenizer and processor; its weights are not read and "
        "need not be there.\n"
        "Manifest, images and labeler are the recipe's own. Nothing is left in output_dir.\n"
        "\n"
        "  measured      the step at two depths, N and 2 N layers, each in a process of its own\n"
        "  all layers    what the two differ by, added up to all layers: this device, these studies and tokens\n"
        "  recipe's step the same for the recipe's studies on one rank and its rollout.max_new_tokens, in proportion;\n"
        "                rows that decode together take less, so the rollout's is a bound from above\n"
        "  memory        most of a phase as measured, beside the formula's (docs/memory.md) for the same, and the "
        "formula's for\n"
        "                all layers and the recipe's whole step\n"
        "\n"
        "Random weights end no report: each has all its tokens. On a CPU these are 64 unless you ask for more. "
        "Weights and their\n"
        "export lie in TMPDIR meanwhile.",
        examples="""
        mrg-r1 rehearse launch/recipes/iu_7b.yaml
        mrg-r1 rehearse launch/recipes/iu_7b.yaml policy.path=models/config-only reward.labeler=data/chexbert
        mrg-r1 rehearse launch/recipes/qwen3_vl_8b.yaml --layers 4 --new-tokens 512 --output rehearsal.json
        mrg-r1 rehearse my_recipe.yaml --layers 1 --new-tokens 8 --world-size 7
        """,
    )
    rehearse.add_argument("recipe", type=Path, metavar="RECIPE", help="a GRPO recipe")
    rehearse.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values to change, as in grpo.group_size=4; before any option"
    )
    rehearse.add_argument(
        "--layers", type=positive, default=2, metavar="N", help="decoder layers of the first step (default: 2)"
    )
    rehearse.add_argument(
        "--vision-layers", type=positive, default=2, metavar="N", help="the tower's of the first step (default: 2)"
    )
    rehearse.add_argument(
        "--studies",
        type=positive,
        metavar="N",
        help="of a step, those with the most images (default: one, or grpo.minibatches)",
    )
    rehearse.add_argument(
        "--new-tokens",
        type=positive,
        metavar="N",
        help="of each report (default: the recipe's rollout.max_new_tokens; on a CPU at most 64)",
    )
    rehearse.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="ranks of the run that is foretold (default: 1)"
    )
    rehearse.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    rehearse.set_defaults(run=_rehearse)


def _rehearse(arguments: argparse.Namespace) -> None:
    from mrg_r1.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # a bad one is said before torch is imported
    import json

    from mrg_r1.cli.arguments import use_cores
    from mrg_r1.console import watched, wide_console
    from mrg_r1.files import write_text_atomically
    from mrg_r1.training.rehearse import Sizes, rehearse

    use_cores()
    sizes = Sizes(
        layers=arguments.layers,
        vision_layers=arguments.vision_layers,
        studies=arguments.studies,
        new_tokens=arguments.new_tokens,
        world_size=arguments.world_size,
    )
    command = [sys.executable, "-c", _STEP]
    console = wide_console(stderr=True)
    if watched():
        with console.status("") as status:
            result = rehearse(recipe, sizes, command=command, say=status.update)
    else:
        result = rehearse(recipe, sizes, command=command)
    _print(wide_console(), result)
    if arguments.output is not None:
        write_text_atomically(arguments.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{arguments.output}: written")


def _print(console: Console, result: dict[str, Any]) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    whole, depths, recipe = result["whole"], result["depths"], result["recipe"]
    say(
        f"{result['policy']}: {whole['language']} layers, {whole['vision']} of the tower, "
        f"{whole['parameters'] / 1e9:.2f} billion parameters; rehearsed on {result['device']} in {result['dtype']}"
    )
    say(
        f"{result['studies']} study or studies x G {result['group_size']}, prompts of about {result['prompt_tokens']} "
        f"tokens, reports of {result['new_tokens'][-1]:.0f}"
    )
    console.print(_times(result))
    console.print(
        f"a step: {_seconds(sum(one['all_layers'] for one in result['phases'].values() if one['in_step']))} with all "
        f"layers, {_seconds(sum(one['recipe'] for one in result['phases'].values() if one['in_step']))} for "
        f"{recipe['studies']} studies of {recipe['new_tokens']} new tokens, on such a device",
        style="bold",
        highlight=False,
    )
    console.print()
    console.print(_memory(result))
    peak = max(one["recipe"] for one in result["memory"].values())
    rank = "a rank" if recipe["world_size"] == 1 else f"each of {recipe['world_size']} ranks"
    where = "its GPU" if recipe["device"] == "cuda" else "its process"
    console.print(f"{rank} of the recipe needs {peak / 2**30:.1f} GiB of {where}", style="bold", highlight=False)
    layers = " and ".join(str(one["language"]) for one in depths)
    if len(depths) == 1:
        say(f"- one depth, {layers} layers: all there are" if depths[0]["language"] == whole["language"] else "")
    for line in result["changed"]:
        say(f"- {line}")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _times(result: dict[str, Any]) -> Table:
    depths = [f"{one['language']} layers" for one in result["depths"]]
    table = _table("time", *depths, f"all {result['whole']['language']}", "recipe's step")
    for name, one in result["phases"].items():
        whole = _seconds(one["recipe"]) if one["in_step"] else ""
        table.add_row(_WORDS.get(name, name), *map(_seconds, one["seconds"]), _seconds(one["all_layers"]), whole)
    return table


def _memory(result: dict[str, Any]) -> Table:
    depth = result["depths"][-1]["language"]
    table = _table("memory", f"{depth} layers, measured", "by the formula", "recipe's step, all layers")
    for name, one in result["memory"].items():
        measured = "-" if one["measured"] is None else f"{one['measured'] / 2**30:.2f} GiB"
        table.add_row(name, measured, *(f"{one[key] / 2**30:.2f} GiB" for key in ("formula", "recipe")))
    return table


def _seconds(value: float) -> str:
    if value >= 600:
        return f"{value / 60:,.0f} min"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"
