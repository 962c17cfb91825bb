"""`mrg-r1 export`: what a run has learned, to use elsewhere, with its model card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import described


def add_commands(commands: Any) -> None:
    """`export`."""
    export = described(
        commands.add_parser,
        "export",
        help="what a run has learned, for transformers or PEFT",
        description="Write what a run has learned for use without this project: the whole checkpoint with every "
        "adapter merged into its\n"
        "weights, which plain transformers loads, or one adapter for the published checkpoint, which "
        "plain PEFT loads. The run's\n"
        "cold-start adapter, where it had one, is in both. Beside the weights stands README.md, a model card of "
        "the run's own files; its licence\n"
        "is left for you to state. An existing folder is never overwritten.",
        examples="""
        mrg-r1 export runs/mine --merged exported/checkpoint
        mrg-r1 export runs/mine --adapter exported/adapter
        mrg-r1 export runs/mine --merged exported/checkpoint --policy /models/HuatuoGPT-Vision-7B-Qwen2.5VL
        """,
    )
    export.add_argument("folder", type=Path, metavar="RUN", help="output_dir of a GRPO run, or of an SFT run of LoRA")
    export.add_argument(
        "--merged", type=Path, metavar="DIR", help="folder to make: the whole checkpoint, in its own dtype"
    )
    export.add_argument(
        "--adapter", type=Path, metavar="DIR", help="folder to make: one PEFT adapter for the published checkpoint"
    )
    export.add_argument(
        "--policy", type=Path, metavar="DIR", help="where the recipe's policy.path lies now, if it has moved"
    )
    export.add_argument(
        "--cold-start", type=Path, metavar="DIR", help="where the recipe's policy.adapter lies now, if it has moved"
    )
    export.set_defaults(run=lambda arguments: _export(arguments, export))


def _export(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    outputs = [path for path in (arguments.merged, arguments.adapter) if path is not None]
    if not outputs:
        parser.error("nothing to write: give --merged DIR, --adapter DIR or both")
    from mrg_r1.config.recipe import check_checkpoint_directory, load_run
    from mrg_r1.policy.export.export import export
    from mrg_r1.tracking.card.card import model_card
    from mrg_r1.tracking.card.facts import read_facts

    recipe_file = arguments.folder / "config.yaml"
    whole = load_run(arguments.folder)
    recipe = whole.policy
    if arguments.cold_start is not None and recipe.adapter is None:
        raise ValueError(f"--cold-start {arguments.cold_start}: {recipe_file} names no policy.adapter; leave it out")
    policy, cold_start = arguments.policy or recipe.path, arguments.cold_start or recipe.adapter
    if not policy.is_dir():
        raise ValueError(
            f"{policy}: no such folder (policy.path of {recipe_file}); name the one where the checkpoint lies now "
            "with --policy"
        )
    if cold_start is not None and not cold_start.is_dir():
        raise ValueError(
            f"{cold_start}: no such folder (policy.adapter of {recipe_file}); name the one where it lies now with "
            "--cold-start"
        )
    check_checkpoint_directory(policy)
    facts = read_facts(arguments.folder, whole.model_dump(mode="json"), instruction=whole.prompt.words, policy=policy)
    export(
        arguments.folder,
        policy=policy,
        cold_start=cold_start,
        merged=arguments.merged,
        adapter=arguments.adapter,
        card=lambda record: model_card(facts, record),
    )
    for path in outputs:
        print(f"{path}: written, {sum(file.stat().st_size for file in path.rglob('*')) / 1e6:,.1f} MB")
