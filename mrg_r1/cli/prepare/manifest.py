"""`mrg-r1 prepare manifest`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_output, described


def add_command(kinds: Any) -> None:
    """`prepare manifest`."""
    manifest = described(
        kinds.add_parser,
        "manifest",
        help="studies of your own, from a CSV or JSONL file",
        description="Check a table of your own studies into a manifest: every image is read once, every row kept or "
        "refused.\n"
        "  id, images, report, split     needed; without a report (empty, or no such column) the labels are\n"
        "  patient_id                    left out: every study is a patient of its own\n"
        "  findings, impression, indication, comparison, prior (an earlier study's id), view, labels, "
        "rendered: taken where present\n"
        "  the 14 observations, a column each (1, 0, -1 or nothing): the labels of the report\n"
        "Several images in a CSV cell stand apart by `;` or `|`, each perhaps with its view: "
        "frontal:a/1.png;lateral:a/2.png.\n"
        "`view` may have them instead, in the same order: frontal;lateral. In JSONL `images` is such a "
        "text, a list of paths, or a\n"
        "list of {path, view}. PNG, JPEG, DICOM and others. UTF-8, commas. Other columns are named "
        "and left out.\n"
        "Interrupted, the same command goes on.",
        examples="""
        mrg-r1 prepare manifest studies.csv --images radiographs -o data/mine
        mrg-r1 prepare manifest studies.jsonl -o data/mine --splits train,val,test,external
        """,
    )
    manifest.add_argument("source", type=Path, metavar="STUDIES", help="CSV or JSONL, one study a row")
    add_output(manifest, "folder to write: manifest.jsonl, refused.jsonl, reports.csv, reports_SPLIT.csv")
    manifest.add_argument(
        "--images", type=Path, metavar="DIR", help="what image paths are relative to (default: the folder of STUDIES)"
    )
    manifest.add_argument(
        "--splits",
        type=_names,
        default=("train", "val", "test"),
        metavar="NAME,...",
        help="names a split may have (default: train,val,test)",
    )
    manifest.set_defaults(run=_prepare_manifest)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: an empty name; write for example train,val,test")
    return names


def _prepare_manifest(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.conversion import print_outcome
    from mrg_r1.data.prepare.own_studies import prepare_manifest

    prepared = prepare_manifest(arguments.source, arguments.images, arguments.output, splits=arguments.splits)
    print_outcome(f"{arguments.source.name}, studies", prepared.counts, arguments.output)
    if prepared.left_out:
        print(f"left out, as a study has no place for them: {', '.join(prepared.left_out)}")
    if prepared.never_silent:
        print(
            f"note: not one label of {' and '.join(prepared.never_silent)} is empty, so each 0 is a denial to CCS and "
            "MCCS, reward and score alike. Where 0 stands for not mentioned, or not seen, write nothing instead; F1 of "
            "findings does not read denials"
        )
    if prepared.shared_patients:
        patient, splits = next(iter(prepared.shared_patients.items()))
        first = f"the first is {patient!r}, in {' and '.join(splits)}"
        print(
            f"warning: {len(prepared.shared_patients):,} patients have studies in several splits, so a test sees "
            f"what was learned; {first}"
        )
