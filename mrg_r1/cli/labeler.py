"""`mrg-r1 labeler` and `mrg-r1 label`: train a labeler, read the observations out of reports."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mrg_r1.cli.arguments import add_labeler_arguments, add_output, described, load_labeler, seed, use_cores


def add_commands(commands: Any) -> None:
    """`labeler train`, `labeler convert` and `label`."""
    labeler = commands.add_parser("labeler", help="train a labeler of your own, or convert CheXbert's file")
    actions = labeler.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = described(
        actions.add_parser,
        "train",
        help="from a CSV of reports and a CSV of labels",
        description="Train a labeler of CheXbert's architecture. REPORTS has the columns `id` and `report`; LABELS "
        "has `id` and the 14\n"
        "observations, 1 positive, 0 negative, -1 uncertain, empty blank. The two are joined on `id`.",
        examples="""
        mrg-r1 labeler train data/five/reports.csv data/five/labels.csv -o data/five/labeler
        mrg-r1 labeler train reports.csv labels.csv -o data/ours --start bert-base-uncased/ --device cuda:0
        """,
    )
    train.add_argument("reports", type=Path, metavar="REPORTS.csv")
    train.add_argument("labels", type=Path, metavar="LABELS.csv")
    add_output(train, "folder to write the labeler to")
    train.add_argument(
        "--size", help="tiny or small, the network from random weights (default: small); not with --start"
    )
    train.add_argument(
        "--start",
        type=Path,
        metavar="PATH",
        help="fine-tune from a folder of a BERT (transformers' files), a labeler's folder, or a CheXbert checkpoint "
        "file (default: random weights and a vocabulary of the reports' own)",
    )
    train.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="of --start, where it carries none: a folder or a hub name (a CheXbert file: bert-base-uncased's)",
    )
    train.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help="over the reports (default: until 50,000 reports are read, at least 6, and fewer than 4,000 reports "
        "are read by two teachers first; with --start 16,000, 4 and no teachers)",
    )
    train.add_argument(
        "--max-minutes", type=float, metavar="MINUTES", help="stop in time and keep the best so far; without teachers"
    )
    train.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    train.add_argument("--seed", type=seed, default=0, help="(default: 0)")
    train.set_defaults(run=_labeler_train)

    convert = described(
        actions.add_parser,
        "convert",
        help="CheXbert's published checkpoint into a folder or a safetensors file",
        description="Read a CheXbert checkpoint once and write it in a format that loads without pickle: a folder "
        "with its tokenizer, or\n"
        "the weights alone where the output ends in .safetensors. Nothing is overwritten. "
        "docs/labelers.md says where the file is.",
        examples="""
        mrg-r1 labeler convert chexbert.pth -o data/chexbert --tokenizer bert-base-uncased
        mrg-r1 labeler convert chexbert.pth -o data/chexbert.safetensors
        """,
    )
    convert.add_argument(
        "checkpoint", type=Path, metavar="CHEXBERT.pth", help="the published file, or a .safetensors copy of it"
    )
    add_output(convert, "folder to make, or a file whose name ends in .safetensors")
    convert.add_argument(
        "--tokenizer", metavar="DIR", help="folder or hub name (default: bert-base-uncased); for a folder only"
    )
    convert.set_defaults(run=_labeler_convert)

    label = described(
        commands.add_parser,
        "label",
        help="read the 14 observations out of reports",
        description="Label a CSV of reports. The labeler is a folder made by `labeler train`, or the CheXbert "
        "checkpoint file, which you\n"
        "bring yourself (its licence forbids passing it on).",
        examples="""
        mrg-r1 label reports.csv --labeler data/five/labeler -o labels.csv
        mrg-r1 label reports.csv --labeler chexbert.pth --tokenizer bert-base-uncased --device cuda:0 -o labels.csv
        """,
    )
    label.add_argument("reports", type=Path, metavar="REPORTS.csv", help="columns `id` and `report`")
    add_output(label, "label CSV to write", metavar="LABELS.csv")
    add_labeler_arguments(label, required=True)
    label.set_defaults(run=_label)


def _labeler_train(arguments: argparse.Namespace) -> None:
    from mrg_r1.labels.training import train_labeler

    if arguments.device == "cpu":
        use_cores()
    result = train_labeler(
        arguments.reports,
        arguments.labels,
        arguments.output,
        seed=arguments.seed,
        size=arguments.size,
        start=arguments.start,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        passes=arguments.passes,
        max_minutes=arguments.max_minutes,
    )
    print(
        f"{arguments.output}: trained on {result['training_reports']:,} reports in {result['seconds']:.0f} s; on "
        f"{result['validation_reports']:,} others micro-F1 of the positives {result['best']['micro_f1']:.3f}, "
        f"classes right {result['best']['classes_right']:.3f} (per observation in training.json)"
    )


def _labeler_convert(arguments: argparse.Namespace) -> None:
    from mrg_r1.labels.convert import convert

    fingerprint = convert(arguments.checkpoint, arguments.output, tokenizer=arguments.tokenizer)
    print(f"{arguments.output}: written, fingerprint {fingerprint}")


def _label(arguments: argparse.Namespace) -> None:
    from mrg_r1.labels.observations import write_labels_csv
    from mrg_r1.labels.reports import read_reports_csv

    reports = read_reports_csv(arguments.reports)
    labeler = load_labeler(arguments)
    classes = labeler.label(list(reports.values()), progress=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_labels_csv(arguments.output, dict(zip(reports, classes.tolist(), strict=True)))
    print(f"{arguments.output}: {len(reports):,} reports, labelled by {labeler.name} ({labeler.fingerprint})")
