"""`mrg-r1 prepare chexpert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_image_arguments, add_output, described


def add_command(kinds: Any) -> None:
    """`prepare chexpert`."""
    parser = described(
        kinds.add_parser,
        "chexpert",
        help="CheXpert, your own download: labels and no reports",
        description="Turn CheXpert's train.csv and valid.csv into a manifest of studies with labels and without "
        "reports: GRPO learns\n"
        "from them, SFT leaves them out. The rows of a study's views become one study; 1.0 is positive, 0.0 negative, "
        "-1.0\n"
        "uncertain, empty not mentioned. train.csv is split train, valid.csv val. Interrupted, the same command goes "
        "on.\n"
        "refused.jsonl says why each study was refused. docs/labelled-data.md: what the labels mean.",
        examples="""
        mrg-r1 prepare chexpert CheXpert-v1.0-small -o data/chexpert
        mrg-r1 prepare chexpert tables --images /mnt/chexpert --views all -o data/chexpert
        mrg-r1 prepare chexpert CheXpert-v1.0-small --check-images none -o data/chexpert   # the images are elsewhere
        """,
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder of train.csv and valid.csv (or .csv.gz)")
    add_output(parser, "folder to write: manifest.jsonl, refused.jsonl")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the folder that holds train/patient00001/study1, or CheXpert-v1.0-small with it (default: ROOT)",
    )
    add_image_arguments(parser)
    parser.set_defaults(run=_prepare_chexpert)


def _prepare_chexpert(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.chexpert import prepare_chexpert
    from mrg_r1.data.prepare.labelled import ImageChoices

    choices = ImageChoices(arguments.views, arguments.max_images, arguments.check_images)
    prepared = prepare_chexpert(arguments.root, arguments.output, images=arguments.images, choices=choices)
    prepared.show("CheXpert, studies", arguments.output)
