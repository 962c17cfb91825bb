"""`mrg-r1 prepare padchest`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_image_arguments, add_output, described, seed


def add_command(kinds: Any) -> None:
    """`prepare padchest`."""
    parser = described(
        kinds.add_parser,
        "padchest",
        help="PadChest, your own download: labels and Spanish reports",
        description="Turn PadChest's table into a manifest: the rows of a study's images become one study, its labels "
        "those of the 14\n"
        "observations that they are of, the others counted and named. A label that a study has is positive, one that "
        "it has not\n"
        "is not mentioned, and not denied. Its report is the published text: Spanish, without capitals, words cut to "
        "their stems.\n"
        "There is no published split: patients go 8:1:1. Interrupted, the same command goes on. refused.jsonl says "
        "why each\n"
        "study was refused. docs/labelled-data.md: which label is which observation.",
        examples="""
        mrg-r1 prepare padchest PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv --images images -o data/padchest
        mrg-r1 prepare padchest TABLE.csv.gz --images images --report none -o data/padchest   # labels alone
        mrg-r1 prepare padchest TABLE.csv --images images --views all --seed 1 -o data/padchest
        """,
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="the table of images, .csv or .csv.gz")
    add_output(parser, "folder to write: manifest.jsonl, refused.jsonl, reports.csv, reports_SPLIT.csv")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the folder that holds 0/NAME.png (ImageDir, ImageID), or NAME.png (default: the folder of TABLE)",
    )
    parser.add_argument(
        "--report",
        choices=("spanish", "none"),
        default="spanish",
        help="the text to learn: the published one (default), or none, for a policy that writes another language",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the split (default: 0)")
    add_image_arguments(parser)
    parser.set_defaults(run=_prepare_padchest)


def _prepare_padchest(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.labelled import ImageChoices
    from mrg_r1.data.prepare.padchest import prepare_padchest

    choices = ImageChoices(arguments.views, arguments.max_images, arguments.check_images)
    prepared = prepare_padchest(
        arguments.table,
        arguments.output,
        images=arguments.images,
        report=arguments.report,
        seed=arguments.seed,
        choices=choices,
    )
    prepared.show("PadChest, studies", arguments.output)
