"""`mrg-r1 prepare tiny-policy`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import add_output, described, positive, seed

if TYPE_CHECKING:
    from mrg_r1.types import Study


def add_command(kinds: Any) -> None:
    """`prepare tiny-policy`."""
    policy = described(
        kinds.add_parser,
        "tiny-policy",
        help="a random policy of one to two million parameters",
        description="Write a random policy in the layout of a published checkpoint. Its tokenizer is learned from "
        "the train reports of a\n"
        "manifest and the words of the prompts. It needs `sft.trainable: all` first.\n"
        "With --teach-tower its vision tower is taught to see: a linear head on its features learns the labels of a "
        "manifest's studies\n"
        "(drawn, else said), in minutes. How well it tells each finding apart stands in training.json.",
        examples="""
        mrg-r1 prepare tiny-policy -o data/five/policy --manifest data/five/manifest.jsonl
        mrg-r1 prepare tiny-policy -o data/five/seeing --manifest data/five/manifest.jsonl --teach-tower \\
          data/five/manifest.jsonl --side 84
        """,
    )
    add_output(policy, "folder to write")
    policy.add_argument(
        "--manifest",
        type=Path,
        required=True,
        metavar="M.jsonl",
        help="the tokenizer is learned from its reports",
    )
    policy.add_argument(
        "--split", default="train", metavar="NAME", help="whose reports the tokenizer is learned from (default: train)"
    )
    policy.add_argument(
        "--side", type=positive, default=112, metavar="PIXELS", help="larger images are reduced to this (default: 112)"
    )
    policy.add_argument(
        "--family", default="qwen2_5_vl", metavar="TYPE", help="its model_type (default: qwen2_5_vl, a Qwen2.5-VL)"
    )
    policy.add_argument(
        "--teach-tower",
        type=Path,
        metavar="M.jsonl",
        help="teach the vision tower to tell the findings of these studies apart, stopped early on AUC by finding",
    )
    policy.add_argument(
        "--teach-split",
        metavar="NAME",
        help="its studies that are taught (default: train); its split val is what is looked at, or a tenth where there "
        "is none",
    )
    policy.add_argument("--teach-steps", type=positive, metavar="N", help="steps of 64 images at most (default: 600)")
    policy.add_argument(
        "--teach-head",
        choices=("tokens", "mean"),
        help="what the linear head reads: every image token in its place (default), or their mean: slower to teach, "
        "so that each token tells of the whole film",
    )
    policy.add_argument("--seed", type=seed, default=0, help="of the random weights (default: 0)")
    policy.set_defaults(run=_prepare_tiny_policy)


def _prepare_tiny_policy(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from mrg_r1.config.sections import PLAIN_INSTRUCTION, THINK_INSTRUCTION
    from mrg_r1.data.study import read_manifest
    from mrg_r1.files import folder_filled
    from mrg_r1.labels.observations import OBSERVATIONS
    from mrg_r1.policy.family import find_family

    studies = read_manifest(arguments.manifest, split=arguments.split)
    reports = [study.report for study in studies if study.report is not None]
    if not reports:
        raise ValueError(
            f"{arguments.manifest}: no {arguments.split} study has a report, and the tokenizer is learned from "
            "reports; give some, or name another split with --split"
        )
    words = [
        THINK_INSTRUCTION,
        PLAIN_INSTRUCTION,
        "<think></think><report></report>",
        "Frontal view: Lateral view:",
        *OBSERVATIONS,
    ]
    if arguments.teach_tower is None and (arguments.teach_steps or arguments.teach_split or arguments.teach_head):
        raise ValueError(
            "--teach-steps, --teach-split and --teach-head say how --teach-tower teaches; give it, or leave them out"
        )
    family = find_family(arguments.family)
    taught, watched = _studies_to_see(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own calls of its own old names
    logging.disable_progress_bar()
    summary: dict[str, Any] | None = None
    with folder_filled(arguments.output) as fresh:  # taught or not there: what is half taught would be gone on with
        family.create_tiny(fresh, [*reports, *words], image_side=arguments.side, seed=arguments.seed)
        if taught:
            from mrg_r1.training import seeing

            steps = arguments.teach_steps or seeing.STEPS
            summary = seeing.teach_tower(
                fresh,
                taught,
                watched,
                image_side=arguments.side,
                steps=steps,
                seed=arguments.seed,
                head=arguments.teach_head or "tokens",
            )
    if summary is None:
        (arguments.output / "training.json").unlink(missing_ok=True)  # of a tower that stood here before
    print(f"{arguments.output}: a random policy; its tokenizer was learned from {len(reports):,} reports")
    if summary is not None:
        areas = ", ".join(f"{name} {area:.2f}" for name, area in summary["auc"].items())
        print(
            f"{arguments.output}: its tower was taught on {summary['images']:,} images by {summary['labels']} labels "
            f"for {summary['steps']} steps ({summary['seconds']:.0f} s); mean AUC {summary['mean_auc']:.3f} on "
            f"{summary['watched_studies']:,} other studies: {areas}"
        )


def _studies_to_see(arguments: argparse.Namespace) -> tuple[list[Study], list[Study]]:
    """Those that the tower is taught with, and those that are looked at; checked before anything is written."""
    from mrg_r1.data.study import read_manifest
    from mrg_r1.training.seeing import labels_of

    if arguments.teach_tower is None:
        return [], []
    split = arguments.teach_split or "train"
    studies = read_manifest(arguments.teach_tower)
    taught = [study for study in studies if study.split == split]
    watched = [study for study in studies if study.split == "val" != split]
    if not taught:
        there = ", ".join(sorted({study.split for study in studies}))
        raise ValueError(f"{arguments.teach_tower}: no study of split {split!r}; --teach-split names one of {there}")
    labels_of([*taught, *watched])
    return taught, watched
