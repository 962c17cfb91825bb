"""`mrg-r1 prepare mimic-cxr`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_image_arguments, add_output, described


def add_command(kinds: Any) -> None:
    """`prepare mimic-cxr`."""
    parser = described(
        kinds.add_parser,
        "mimic-cxr",
        help="MIMIC-CXR-JPG with the reports of MIMIC-CXR, both your own download",
        description="Turn MIMIC-CXR-JPG 2.x and the reports of MIMIC-CXR into a manifest: the published split, one "
        "section of each\n"
        "report, chosen views, prior studies by patient and time. ROOT holds the tables "
        "(mimic-cxr-2.0.0-split.csv.gz and others) and\n"
        "files/p10/p10000032/s50414267/*.jpg. Interrupted, the same command goes on; finished, it is "
        "done anew. refused.jsonl says\n"
        "why each study was refused. docs/mimic-cxr.md: what to download, and what the data use "
        "agreement asks for.",
        examples="""
        mrg-r1 prepare mimic-cxr physionet/mimic-cxr-jpg-2.1.0 --reports physionet/mimic-cxr-reports.zip -o data/mimic
        mrg-r1 prepare mimic-cxr ROOT --reports ROOT --report both --views all --labels chexpert -o data/mimic-both
        mrg-r1 prepare mimic-cxr ROOT --labels chexbert -o data/mimic-labelled   # of mimic-cxr-2.0.0-chexbert.csv
        mrg-r1 prepare mimic-cxr ROOT --check-images none -o data/mimic-texts   # the images are elsewhere
        """,
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder of MIMIC-CXR-JPG: files/ and the tables")
    add_output(parser, "folder to write: manifest.jsonl, refused.jsonl, reports.csv, reports_SPLIT.csv")
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="PATH",
        help="mimic-cxr-reports.zip, or the folder it was unpacked into, which holds "
        "files/p10/p10000032/s50414267.txt (default: ROOT)",
    )
    parser.add_argument(
        "--report",
        choices=("findings", "impression", "both"),
        default="findings",
        help="the section to learn (default: findings); a report without it is refused; the others are kept in "
        "their fields",
    )
    add_image_arguments(parser)
    parser.add_argument(
        "--labels",
        choices=("none", "chexpert", "chexbert"),
        default="none",
        help="labels.said from mimic-cxr-2.0.0-chexpert.csv.gz, which are the CheXpert labeler's, or from your "
        "mimic-cxr-2.0.0-chexbert.csv (or .csv.gz), which are CheXbert's (default: none)",
    )
    parser.add_argument(
        "--no-headings",
        choices=("refuse", "last-paragraph"),
        default="refuse",
        help="a report with neither findings nor an impression: refuse it (default), or learn its last paragraph",
    )
    parser.set_defaults(run=_prepare_mimic_cxr)


def _prepare_mimic_cxr(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.conversion import print_outcome
    from mrg_r1.data.prepare.mimic_cxr.convert import Choices, prepare_mimic_cxr

    choices = Choices(
        report=arguments.report,
        views=arguments.views,
        max_images=arguments.max_images,
        labels=arguments.labels,
        no_headings=arguments.no_headings,
        check_images=arguments.check_images,
    )
    prepared = prepare_mimic_cxr(arguments.root, arguments.output, reports=arguments.reports, choices=choices)
    if prepared.found:
        print(f"{arguments.output}: went on after the {prepared.found:,} studies of the run that was interrupted")
    print_outcome("MIMIC-CXR, studies", prepared.counts, arguments.output)
    prepared.headings.show()
    if prepared.not_utf8:
        print(
            f"reports that were not UTF-8 and were read as Windows-1252: {len(prepared.not_utf8):,}, the first "
            f"{prepared.not_utf8[0]}"
        )
