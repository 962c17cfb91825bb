"""`mrg-r1 prepare nih`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_check_images, add_output, described, seed


def add_command(kinds: Any) -> None:
    """`prepare nih`."""
    parser = described(
        kinds.add_parser,
        "nih",
        help="NIH's ChestX-ray14, your own download: labels and no reports",
        description="Turn Data_Entry_2017.csv of NIH's ChestX-ray14 into a manifest of studies with labels and without "
        "reports: GRPO\n"
        "learns from them, SFT leaves them out. Every image is a study. A label that an image has is positive, one "
        "that it has not\n"
        "is not mentioned, and not denied. Labels that none of the 14 observations is of are counted and named. "
        "test_list.txt is\n"
        "split test; of the patients of train_val_list.txt a tenth is val, the others train. Interrupted, the same "
        "command goes\n"
        "on. refused.jsonl says why each study was refused. docs/labelled-data.md: which label is which observation.",
        examples="""
        mrg-r1 prepare nih ChestXray-NIHCC -o data/nih
        mrg-r1 prepare nih tables --images /mnt/nih/images --seed 1 -o data/nih
        mrg-r1 prepare nih tables --check-images none -o data/nih   # the images are elsewhere
        """,
    )
    parser.add_argument(
        "root",
        type=Path,
        metavar="ROOT",
        help="the folder of Data_Entry_2017.csv (or .csv.gz, or _v2020), train_val_list.txt and test_list.txt",
    )
    add_output(parser, "folder to write: manifest.jsonl, refused.jsonl")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="the folder that holds the images, at any depth (default: ROOT)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the tenth that is val (default: 0)")
    add_check_images(parser)
    parser.set_defaults(run=_prepare_nih)


def _prepare_nih(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.labelled import ImageChoices
    from mrg_r1.data.prepare.nih import prepare_nih

    choices = ImageChoices(check_images=arguments.check_images)
    prepared = prepare_nih(
        arguments.root, arguments.output, images=arguments.images, seed=arguments.seed, choices=choices
    )
    prepared.show("NIH ChestX-ray14, studies", arguments.output)
