"""`mrg-r1 prepare iu-xray`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_output, described, positive, seed


def add_command(kinds: Any) -> None:
    """`prepare iu-xray`."""
    iu = described(
        kinds.add_parser,
        "iu-xray",
        help="IU X-Ray: Open-i's XMLs, Kaggle's CSVs or R2Gen's annotation.json",
        description="Turn IU X-Ray into a manifest, texts verbatim. The layout is recognised by its content:\n"
        "  Open-i   NLMCXR_reports.tgz (read as it is, nothing is unpacked) or a folder of its XMLs; "
        "views from --projections\n"
        "  Kaggle   indiana_reports.csv, and indiana_projections.csv beside it\n"
        "  R2Gen    annotation.json: findings and split of 2,955 studies\n"
        "Images are found by name at any depth of --images (PNG or DICOM, Open-i's names or Kaggle's); "
        "R2Gen's under their path.\n"
        "Studies without radiographs are refused, or rendered from CheXbert's labels of their reports "
        "and marked `rendered`.\n"
        "refused.jsonl says why each study was refused. Interrupted, the same command goes on.",
        examples="""
        mrg-r1 prepare iu-xray NLMCXR_reports.tgz --images NLMCXR_png --projections indiana_projections.csv -o data/iu
        mrg-r1 prepare iu-xray kaggle/indiana_reports.csv --images kaggle/images --report both -o data/iu
        mrg-r1 prepare iu-xray NLMCXR_reports.tgz --images NLMCXR_png --split iu_xray/annotation.json -o data/iu
        mrg-r1 prepare iu-xray iu_xray/annotation.json --images iu_xray/images -o data/iu
        # without radiographs: label the reports, then render from the labels (repeat --render-missing for more files)
        mrg-r1 prepare iu-xray iu_xray/annotation.json -o data/iu --render-missing chexbert_labels.csv
        """,
    )
    iu.add_argument(
        "source", type=Path, metavar="SOURCE", help="archive, folder, indiana_reports.csv or annotation.json"
    )
    add_output(iu, "folder to write: manifest.jsonl, refused.jsonl, reports.csv, reports_SPLIT.csv")
    iu.add_argument("--images", type=Path, metavar="DIR", help="folder of the radiographs")
    iu.add_argument(
        "--projections", type=Path, metavar="CSV", help="indiana_projections.csv: which image is frontal, which lateral"
    )
    iu.add_argument(
        "--report",
        choices=("findings", "impression", "both"),
        default="findings",
        help="the text to learn (default: findings); both: findings, a line break, impression, or the one that "
        "there is",
    )
    iu.add_argument(
        "--split",
        metavar="seeded|FILE",
        help="seeded: 8:1:1 by patient (default of Open-i and Kaggle); or R2Gen's split: its annotation.json, or "
        "JSON of\n"
        "{split: [ids]}; studies outside of it are refused (default of R2Gen: its own)",
    )
    iu.add_argument(
        "--render-missing",
        type=Path,
        action="append",
        default=[],
        metavar="LABELS.csv",
        help="render radiographs that are not there from these labels (id and the 14 observations); may be repeated",
    )
    iu.add_argument(
        "--side",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="width and height of rendered images (default: 224)",
    )
    iu.add_argument(
        "--films",
        type=positive,
        default=1,
        metavar="N",
        help="rendered radiographs of each train report, each another chest, so that no film is learned by heart "
        "(default: 1)",
    )
    iu.add_argument("--seed", type=seed, default=0, help="of the seeded split and the rendered images (default: 0)")
    iu.set_defaults(run=_prepare_iu_xray)


def _prepare_iu_xray(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.prepare.conversion import print_outcome
    from mrg_r1.data.prepare.iu_xray.convert import convert_iu_xray, read_iu_xray

    collection = read_iu_xray(arguments.source, arguments.projections)
    print(f"{collection.source}: {collection.title}, {len(collection.studies):,} studies")
    counts = convert_iu_xray(
        collection,
        arguments.images,
        arguments.output,
        report=arguments.report,
        split=arguments.split,
        render_missing=arguments.render_missing,
        side=arguments.side,
        films=arguments.films,
        seed=arguments.seed,
    )
    print_outcome("IU X-Ray, studies", counts, arguments.output)
    collection.headings.show()
