"""`mrg-r1 prepare tiny-policy`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_output, described, positive, seed


def add_command(kinds: Any) -> None:
    """`prepare tiny-policy`."""
    policy = described(
        kinds.add_parser,
        "tiny-policy",
        help="a random policy of one to two million parameters",
        description="Write a random policy in the layout of a published checkpoint. Its tokenizer is learned from "
        "the train reports of a\n"
        "manifest and the words of the prompts. It needs `sft.trainable: all` first.",
        examples="""
        mrg-r1 prepare tiny-policy -o data/five/policy --manifest data/five/manifest.jsonl
        """,
    )
    add_output(policy, "folder to write")
    policy.add_argument(
        "--manifest",
        type=Path,
        required=True,
        metavar="M.jsonl",
        help="the tokenizer is learned from its train reports",
    )
    policy.add_argument(
        "--side", type=positive, default=112, metavar="PIXELS", help="larger images are reduced to this (default: 112)"
    )
    policy.add_argument(
        "--family", default="qwen2_5_vl", metavar="TYPE", help="its model_type (default: qwen2_5_vl, a Qwen2.5-VL)"
    )
    policy.add_argument("--seed", type=seed, default=0, help="of the random weights (default: 0)")
    policy.set_defaults(run=_prepare_tiny_policy)


def _prepare_tiny_policy(arguments: argparse.Namespace) -> None:
    from mrg_r1.config.sections import PLAIN_INSTRUCTION, THINK_INSTRUCTION
    from mrg_r1.data.study import read_manifest
    from mrg_r1.labels.observations import OBSERVATIONS
    from mrg_r1.policy.family import find_family

    studies = read_manifest(arguments.manifest, split="train")
    reports = [study.report for study in studies if study.report is not None]
    if not reports:
        raise ValueError(
            f"{arguments.manifest}: no train study has a report, and the tokenizer is learned from reports; give some"
        )
    words = [
        THINK_INSTRUCTION,
        PLAIN_INSTRUCTION,
        "<think></think><report></report>",
        "Frontal view: Lateral view:",
        *OBSERVATIONS,
    ]
    family = find_family(arguments.family)
    family.create_tiny(arguments.output, [*reports, *words], image_side=arguments.side, seed=arguments.seed)
    print(f"{arguments.output}: a random policy; its tokenizer was learned from {len(reports):,} reports")
