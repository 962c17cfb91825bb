"""`mrg-r1`: prepare data, train and run a labeler, score reports, read a run.

What each subcommand needs is imported inside it: `mrg-r1 --help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrg_r1.labels.chexbert import Labeler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; None takes sys.argv.

    Returns:
        0, or 2 after one message on stderr where the input is bad (a ValueError or OSError); anything else is a fault of
        ours and propagates.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        print(f"mrg-r1: {f'{error.filename}: {error.strerror}' if named else error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"mrg-r1: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _described(
        argparse.ArgumentParser,
        prog="mrg-r1",
        description="Chest X-ray report generation by GRPO with a clinical reward: the tools around a run.\n"
        "Training itself is started by `deepspeed launch/train.py RECIPE.yaml`.",
        examples="""
        mrg-r1 prepare phantom -o data/five
        mrg-r1 labeler train data/five/reports.csv data/five/labels.csv -o data/five/labeler
        mrg-r1 prepare tiny-policy -o data/five/policy --manifest data/five/manifest.jsonl
        mrg-r1 score predicted.csv reference.csv --labeler data/five/labeler
        """,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_labeler(commands)
    _add_score(commands)
    report = _described(
        commands.add_parser,
        "report",
        help="what a run learned, before and after",
        description="Print what a run learned: its metrics before and after, beside a control run where there is one. Of several runs\n"
        "(seeds of one experiment) the mean gain and its spread.",
        examples="""
        mrg-r1 report runs/demo
        mrg-r1 report runs/demo-0 runs/demo-1 runs/demo-2
        mrg-r1 report runs/demo --control runs/demo-sft-only
        """,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    report.add_argument("--control", type=Path, metavar="RUN", help="a run to compare with, such as more SFT for the same time")
    report.add_argument(
        "--training-seconds", action="store_true", help="print only the seconds spent in training steps, for an equal-time control"
    )
    report.set_defaults(run=_report)
    _add_page(commands)
    return parser


def _add_page(commands: Any) -> None:
    page = _described(
        commands.add_parser,
        "page",
        help="a run as one HTML file",
        description="Write RUN/page/index.html: curves, the clinical table and study cards in one file without network.\n"
        "It holds reports and radiographs: treat it as patient data.",
        examples="""
        mrg-r1 page runs/demo
        """,
    )
    page.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    page.set_defaults(run=_page)


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser("prepare", help="write a dataset, or a tiny policy to try things on")
    kinds = prepare.add_subparsers(title="what to prepare", required=True, metavar="KIND")

    phantom = _described(
        kinds.add_parser,
        "phantom",
        help="rendered radiographs with reports",
        description="Render radiographs with known findings and write reports of them: no real data is needed. The manifest keeps two\n"
        "labels apart: `drawn`, the truth, and `said`, what the report says. Interrupted, the same command goes on.",
        examples="""
        mrg-r1 prepare phantom -o data/five --preset five --splits train=4000,val=256,test=512 --side 112 --seed 0
        mrg-r1 prepare phantom -o data/try --splits train=200,val=20,test=20
        """,
    )
    _add_output(phantom, "folder to write: manifest.jsonl, images/, reports.csv, labels.csv, contact_sheet.png")
    phantom.add_argument("--preset", default="five", help="five: five findings that a small policy can see, in short reports (default)")
    phantom.add_argument(
        "--splits",
        type=_splits,
        default="train=4000,val=256,test=512",
        metavar="NAME=N,...",
        help="studies a split (default: train=4000,val=256,test=512)",
    )
    phantom.add_argument("--side", type=_positive, default=112, metavar="PIXELS", help="width and height of the images (default: 112)")
    phantom.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same bytes (default: 0)")
    phantom.set_defaults(run=_prepare_phantom)

    iu = _described(
        kinds.add_parser,
        "iu-xray",
        help="IU X-Ray from R2Gen's annotation.json",
        description="Turn R2Gen's annotation.json into a manifest, reports verbatim. Studies without radiographs are refused, or rendered\n"
        "from CheXbert's labels of their reports and marked `rendered`. refused.jsonl says why each study was refused.",
        examples="""
        mrg-r1 prepare iu-xray iu_xray/annotation.json --images iu_xray/images -o data/iu
        # without radiographs: label the reports, then render from the labels (repeat --render-missing for more files)
        mrg-r1 prepare iu-xray iu_xray/annotation.json -o data/iu --render-missing chexbert_labels.csv
        """,
    )
    iu.add_argument("annotation", type=Path, metavar="ANNOTATION.json", help="R2Gen's file: the text and the split")
    _add_output(iu, "folder to write: manifest.jsonl, refused.jsonl, reports.csv, reports_SPLIT.csv")
    iu.add_argument("--images", type=Path, metavar="DIR", help="folder that the annotation's image_path is relative to")
    iu.add_argument(
        "--render-missing",
        type=Path,
        action="append",
        default=[],
        metavar="LABELS.csv",
        help="render radiographs that are not there from these labels (id and the 14 observations); may be repeated",
    )
    iu.add_argument("--side", type=_positive, default=224, metavar="PIXELS", help="width and height of rendered images (default: 224)")
    iu.add_argument("--seed", type=_seed, default=0, help="of the rendered images (default: 0)")
    iu.set_defaults(run=_prepare_iu_xray)

    policy = _described(
        kinds.add_parser,
        "tiny-policy",
        help="a random Qwen2.5-VL of one to two million parameters",
        description="Write a random policy in the layout of a published checkpoint. Its tokenizer is learned from the train reports of a\n"
        "manifest and the words of the prompts. It needs `sft.trainable: all` first.",
        examples="""
        mrg-r1 prepare tiny-policy -o data/five/policy --manifest data/five/manifest.jsonl
        """,
    )
    _add_output(policy, "folder to write")
    policy.add_argument("--manifest", type=Path, required=True, metavar="M.jsonl", help="the tokenizer is learned from its train reports")
    policy.add_argument("--side", type=_positive, default=112, metavar="PIXELS", help="larger images are reduced to this (default: 112)")
    policy.add_argument("--seed", type=_seed, default=0, help="of the random weights (default: 0)")
    policy.set_defaults(run=_prepare_tiny_policy)


def _add_labeler(commands: Any) -> None:
    labeler = commands.add_parser("labeler", help="train a labeler of your own")
    actions = labeler.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = _described(
        actions.add_parser,
        "train",
        help="from a CSV of reports and a CSV of labels",
        description="Train a labeler of CheXbert's architecture. REPORTS has the columns `id` and `report`; LABELS has `id` and the 14\n"
        "observations, 1 positive, 0 negative, -1 uncertain, empty blank. The two are joined on `id`.",
        examples="""
        mrg-r1 labeler train data/five/reports.csv data/five/labels.csv -o data/five/labeler
        """,
    )
    train.add_argument("reports", type=Path, metavar="REPORTS.csv")
    train.add_argument("labels", type=Path, metavar="LABELS.csv")
    _add_output(train, "folder to write the labeler to")
    train.add_argument("--size", default="small", help="tiny or small, the network (default: small)")
    train.add_argument("--passes", type=int, metavar="N", help="over the reports (default: 20, or more where the reports are few)")
    train.add_argument("--max-minutes", type=float, metavar="MINUTES", help="stop in time and keep the best so far")
    train.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    train.add_argument("--seed", type=_seed, default=0, help="(default: 0)")
    train.set_defaults(run=_labeler_train)

    label = _described(
        commands.add_parser,
        "label",
        help="read the 14 observations out of reports",
        description="Label a CSV of reports. The labeler is a folder made by `labeler train`, or the CheXbert checkpoint file, which you\n"
        "bring yourself (its licence forbids passing it on).",
        examples="""
        mrg-r1 label reports.csv --labeler data/five/labeler -o labels.csv
        mrg-r1 label reports.csv --labeler chexbert.pth --tokenizer bert-base-uncased --device cuda:0 -o labels.csv
        """,
    )
    label.add_argument("reports", type=Path, metavar="REPORTS.csv", help="columns `id` and `report`")
    _add_output(label, "label CSV to write", metavar="LABELS.csv")
    _add_labeler_arguments(label, required=True)
    label.set_defaults(run=_label)


def _add_score(commands: Any) -> None:
    score = _described(
        commands.add_parser,
        "score",
        help="clinical efficacy of reports, by every published definition",
        description="Score predicted against reference reports. Each file is a label CSV (`id` and the 14 observations) or a report CSV\n"
        "(`id`, `report`), which needs --labeler. All definitions of clinical efficacy in use are printed side by side, with bootstrap\n"
        "intervals and with what a constant normal report, a blank one and a random training report would have scored.",
        examples="""
        mrg-r1 score predicted_labels.csv reference_labels.csv --json scores.json
        mrg-r1 score predicted.csv reference.csv --labeler chexbert.pth --train train.csv
        """,
    )
    score.add_argument("predicted", type=Path, metavar="PREDICTED.csv")
    score.add_argument("reference", type=Path, metavar="REFERENCE.csv")
    _add_labeler_arguments(score, required=False)
    score.add_argument("--train", type=Path, metavar="TRAIN.csv", help="training reports or labels, for the random-report baseline")
    score.add_argument("--json", type=Path, metavar="OUT.json", help="write the numbers too")
    score.set_defaults(run=_score)


def _add_output(parser: argparse.ArgumentParser, text: str, metavar: str = "DIR") -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=text)


def _add_labeler_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--labeler", type=Path, required=required, metavar="PATH", help="a labeler's folder, or a CheXbert checkpoint file")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of a checkpoint file (default: bert-base-uncased)")
    parser.add_argument("--device", default="cpu", help="where the labeler runs: cpu or cuda:N (default: cpu)")


def _described(make: Any, *names: str, examples: str, **keywords: Any) -> argparse.ArgumentParser:
    lines = [line.strip() for line in examples.strip().splitlines()]
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)
    parser: argparse.ArgumentParser = make(*names, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
    return parser


def _splits(text: str) -> dict[str, int]:
    splits: dict[str, int] = {}
    for part in text.split(","):
        name, equals, count = part.partition("=")
        if not equals or not name.strip() or not count.strip().isdecimal() or int(count) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=N; write for example train=4000,val=256,test=512")
        if name.strip() in splits:
            raise argparse.ArgumentTypeError(f"split {name.strip()!r} is given twice")
        splits[name.strip()] = int(count)
    return splits


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _prepare_phantom(arguments: argparse.Namespace) -> None:
    from mrg_r1.data.phantoms import write_phantoms

    manifest = write_phantoms(
        arguments.output,
        preset=arguments.preset,
        seed=arguments.seed,
        side=arguments.side,
        splits=arguments.splits,
        workers=os.cpu_count() or 1,
    )
    studies = ", ".join(f"{name} {count:,}" for name, count in arguments.splits.items())
    print(f"{manifest}: {studies} studies\n{arguments.output / 'contact_sheet.png'}: every finding, to look at")


def _prepare_iu_xray(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mrg_r1.data.iu_xray import prepare_iu_xray

    counts = prepare_iu_xray(
        arguments.annotation,
        arguments.images,
        arguments.output,
        render_missing=arguments.render_missing,
        side=arguments.side,
        seed=arguments.seed,
    )
    table = Table("split", title="IU X-Ray, studies")
    columns = ("read", "kept", "rendered", "refused")
    for column in columns:
        table.add_column(column, justify="right")
    for split, count in counts.items():
        table.add_row(split, *(f"{count[column]:,}" for column in columns))
    console = Console()
    console.print(table)
    if any(count["refused"] for count in counts.values()):
        print(f"{arguments.output / 'refused.jsonl'}: why each was refused")


def _prepare_tiny_policy(arguments: argparse.Namespace) -> None:
    from mrg_r1.config import PLAIN_INSTRUCTION, THINK_INSTRUCTION
    from mrg_r1.data.study import read_manifest
    from mrg_r1.labels.observations import OBSERVATIONS
    from mrg_r1.policy.tiny import create_tiny_policy

    reports = [study.report for study in read_manifest(arguments.manifest, split="train")]
    words = [THINK_INSTRUCTION, PLAIN_INSTRUCTION, "<think></think><report></report>", "Frontal view: Lateral view:", *OBSERVATIONS]
    create_tiny_policy(arguments.output, [*reports, *words], image_side=arguments.side, seed=arguments.seed)
    print(f"{arguments.output}: a random policy; its tokenizer was learned from {len(reports):,} reports")


def _labeler_train(arguments: argparse.Namespace) -> None:
    from mrg_r1.labels.training import train_labeler

    result = train_labeler(
        arguments.reports,
        arguments.labels,
        arguments.output,
        seed=arguments.seed,
        size=arguments.size,
        device=arguments.device,
        passes=arguments.passes,
        max_minutes=arguments.max_minutes,
    )
    print(
        f"{arguments.output}: trained on {result['training_reports']:,} reports in {result['seconds']:.0f} s; on "
        f"{result['validation_reports']:,} others micro-F1 of the positives {result['best']['micro_f1']:.3f}, "
        f"classes right {result['best']['classes_right']:.3f} (per observation in training.json)"
    )


def _label(arguments: argparse.Namespace) -> None:
    from mrg_r1.labels.observations import write_labels_csv
    from mrg_r1.labels.training import read_reports_csv

    reports = read_reports_csv(arguments.reports)
    labeler = _load_labeler(arguments)
    classes = labeler.label(list(reports.values()), progress=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_labels_csv(arguments.output, dict(zip(reports, classes.tolist(), strict=True)))
    print(f"{arguments.output}: {len(reports):,} reports, labelled by {labeler.name} ({labeler.fingerprint})")


def _score(arguments: argparse.Namespace) -> None:
    from mrg_r1.score import print_scores, score_files

    load_labeler = None if arguments.labeler is None else lambda: _load_labeler(arguments)
    scores = score_files(arguments.predicted, arguments.reference, train=arguments.train, load_labeler=load_labeler)
    print_scores(scores)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        print(f"{arguments.json}: written")


def _load_labeler(arguments: argparse.Namespace) -> Labeler:
    from mrg_r1.labels.chexbert import Labeler

    return Labeler.load(arguments.labeler, tokenizer=arguments.tokenizer, device=arguments.device)


def _report(arguments: argparse.Namespace) -> None:
    from mrg_r1.tracking.report import print_report, training_seconds

    control = arguments.control
    if control is not None and len(arguments.runs) > 1:
        raise ValueError(f"--control {control}: goes with one run, {len(arguments.runs)} were given; leave it out or report run by run")
    if control is not None and not (control / "summary.json").is_file():
        raise ValueError(f"{control}: no summary.json in it; give the output_dir of a run that has ended")
    if arguments.training_seconds:
        print(sum(training_seconds(run) for run in arguments.runs))
        return
    print_report(arguments.runs, control=control)


def _page(arguments: argparse.Namespace) -> None:
    from mrg_r1.config import load_recipe
    from mrg_r1.data.study import read_manifest
    from mrg_r1.tracking.page import write_page

    for run in arguments.runs:
        recipe = load_recipe(run / "config.yaml")
        print(write_page(run, read_manifest(recipe.data.manifest, split=recipe.data.test_split)))


if __name__ == "__main__":
    sys.exit(main())
