"""`mrg-r1 prepare phantom`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import add_labeler_arguments, add_output, described, load_labeler, positive, seed

if TYPE_CHECKING:
    from mrg_r1.phantom.recombined import Sentences


def add_command(kinds: Any) -> None:
    """`prepare phantom`."""
    phantom = described(
        kinds.add_parser,
        "phantom",
        help="rendered radiographs with reports",
        description="Render radiographs with known findings and write reports of them: no real data is needed. The "
        "manifest keeps two\n"
        "labels apart: `drawn`, the truth, and `said`, what the report says. Interrupted, the same "
        "command goes on.",
        examples="""
        mrg-r1 prepare phantom -o data/five --preset five --splits train=4000,val=256,test=512 --side 112 --seed 0
        mrg-r1 prepare phantom -o data/try --splits train=200,val=20,test=20
        mrg-r1 prepare phantom -o data/full --preset full --side 224
        """,
    )
    add_output(phantom, "folder to write: manifest.jsonl, images/, reports.csv, labels.csv, contact_sheet.png")
    phantom.add_argument(
        "--preset",
        default="five",
        metavar="five|full|balanced",
        help="five: five findings that a small policy can see, in short reports (default). full: all 13 as often, "
        "as seldom and together as IU X-Ray's reports say them, mild to severe, frontal and lateral, with "
        "indications and earlier studies. balanced: all 13, each in 20 %% of studies, frontal: to learn to see and to "
        "name before real reports, whose findings are rare",
    )
    phantom.add_argument(
        "--splits",
        type=_splits,
        default="train=4000,val=256,test=512",
        metavar="NAME=N,...",
        help="studies a split (default: train=4000,val=256,test=512)",
    )
    phantom.add_argument(
        "--without-reports",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="splits whose studies get labels and no report, as CheXpert and NIH have them: GRPO learns from them, SFT "
        "leaves them out (default: none)",
    )
    phantom.add_argument(
        "--side", type=positive, default=112, metavar="PIXELS", help="width and height of the images (default: 112)"
    )
    phantom.add_argument(
        "--prevalence",
        type=_prevalence,
        default={},
        metavar="NAME=SHARE,...",
        help="of five: findings that are to be in another share of the studies than 35 %%, as in 'Pneumothorax=0.05'",
    )
    phantom.add_argument(
        "--faint",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of five: share of the findings that are there which are drawn faintly, some of them hardly (default: 0)",
    )
    habits = phantom.add_argument_group("the radiologists' habits, of five")
    habits.add_argument(
        "--writers", type=positive, default=1, metavar="N", help="so many, each with wording of his own (default: 1)"
    )
    habits.add_argument(
        "--negatives-stated",
        type=float,
        default=0.85,
        metavar="SHARE",
        help="of the findings that are not there, those that a report denies (default: 0.85)",
    )
    habits.add_argument(
        "--passed-over",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="of the findings that are there, those that a report does not mention (default: 0.02)",
    )
    habits.add_argument(
        "--normal-alike",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the denials, those worded in the one stock way, 'No pneumothorax.' (default: 0); findings keep their "
        "many wordings, so that who imitates words leans to the normal",
    )
    words = phantom.add_argument_group("real wording, of balanced")
    words.add_argument(
        "--sentences",
        type=Path,
        metavar="REPORTS.csv",
        help="put the reports together from sentences of these (`id` and `report`), by what --labeler reads in each: "
        "films that show every finding often, in the words of a collection in which findings are rare",
    )
    add_labeler_arguments(words, required=False)
    phantom.add_argument("--seed", type=seed, default=0, help="the same seed gives the same bytes (default: 0)")
    phantom.set_defaults(run=_prepare_phantom)


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


def _prevalence(text: str) -> dict[int, float]:
    from mrg_r1.labels.observations import OBSERVATIONS

    shares: dict[int, float] = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        if not equals or name.strip() not in OBSERVATIONS:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not OBSERVATION=SHARE; write for example 'Pneumothorax=0.05'"
            )
        try:
            shares[OBSERVATIONS.index(name.strip())] = float(share)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r}: {share!r} is not a share; write a number between 0 and 1"
            ) from None
    return shares


def _sentences(arguments: argparse.Namespace) -> Sentences | None:
    """Those of the reports, as the labeler reads each; says what no sentence affirms."""
    from mrg_r1.labels.reports import read_reports_csv
    from mrg_r1.labels.sentences import sentences
    from mrg_r1.phantom.recombined import sort_sentences, unsaid

    if (arguments.sentences is None) != (arguments.labeler is None):
        raise ValueError("--sentences REPORTS.csv and --labeler PATH go together: the labeler reads each sentence")
    if arguments.sentences is None:
        return None
    if arguments.preset != "balanced":
        raise ValueError(f"--sentences with --preset {arguments.preset}; it is for --preset balanced")
    reports = read_reports_csv(arguments.sentences).values()
    texts = list(dict.fromkeys(sentence for report in reports for sentence in sentences(report)))
    found = sort_sentences(texts, load_labeler(arguments).label(texts, progress=True).tolist())
    affirming, denying = sum(map(len, found.affirming)), len(found.denying)
    print(f"{arguments.sentences}: {affirming:,} sentences that affirm one finding, {denying:,} that deny some")
    if unsaid(found):
        print(f"drawn and passed over, since no sentence affirms it alone: {', '.join(unsaid(found))}")
    return found


def _prepare_phantom(arguments: argparse.Namespace) -> None:
    from mrg_r1.cores import read_cores
    from mrg_r1.data.prepare.phantoms import write_phantoms
    from mrg_r1.phantom.habits import Habits

    habits = Habits(
        writers=arguments.writers,
        negatives_stated=arguments.negatives_stated,
        passed_over=arguments.passed_over,
        normal_alike=arguments.normal_alike,
    )

    manifest = write_phantoms(
        arguments.output,
        preset=arguments.preset,
        seed=arguments.seed,
        side=arguments.side,
        splits=arguments.splits,
        workers=read_cores().usable,
        prevalence=arguments.prevalence,
        faint=arguments.faint,
        habits=habits,
        sentences=_sentences(arguments),
        without_reports=arguments.without_reports,
    )
    studies = ", ".join(f"{name} {count:,}" for name, count in arguments.splits.items())
    print(f"{manifest}: {studies} studies\n{arguments.output / 'contact_sheet.png'}: every finding, to look at")
