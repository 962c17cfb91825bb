"""`mrg-r1 score` and `mrg-r1 reward-card`: what reports are worth, and what they would be worth without looking."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import add_labeler_arguments, add_output, described, load_labeler, margin

if TYPE_CHECKING:
    from mrg_r1.types import Study

_SHOWN_IDS = 10


def add_commands(commands: Any) -> None:
    """`score` and `reward-card`."""
    score = described(
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
    add_labeler_arguments(score, required=False)
    score.add_argument("--train", type=Path, metavar="TRAIN.csv", help="training reports or labels, for the random-report baseline")
    score.add_argument("--json", type=Path, metavar="OUT.json", help="write the numbers too")
    score.set_defaults(run=_score)
    _add_reward_card(commands)


def _add_reward_card(commands: Any) -> None:
    card = described(
        commands.add_parser,
        "reward-card",
        help="what a policy can earn without looking",
        description="Before a GPU is spent: what the best constant report and a random one earn of the clinical reward, at every margin.\n"
        "A run that does not rise above them has learned nothing from the images. The labels of the manifest's reports come from one\n"
        "of --labeler, --labels and --said.",
        examples="""
        mrg-r1 reward-card data/five/manifest.jsonl --said
        mrg-r1 reward-card data/iu/manifest.jsonl --labeler chexbert.pth --split train -o cards/iu
        mrg-r1 reward-card data/iu/manifest.jsonl --labels chexbert_labels.csv --margin 0.4
        """,
    )
    card.add_argument("manifest", type=Path, metavar="MANIFEST.jsonl")
    add_labeler_arguments(card, required=False)
    card.add_argument("--labels", type=Path, metavar="LABELS.csv", help="labels that were read before: `id` and the 14 observations")
    card.add_argument("--said", action="store_true", help="the manifest's own labels of its reports, `labels.said`")
    card.add_argument("--split", metavar="NAME", help="only the studies of this split, such as train (default: all)")
    card.add_argument("--margin", type=margin, default=0.5, metavar="M", help="the margin to sum up for, 0 <= M < 1 (default: 0.5)")
    add_output(card, "folder to write reward_card.json and reward_card.png to (default: only print)", required=False)
    card.set_defaults(run=_reward_card)


def _score(arguments: argparse.Namespace) -> None:
    from mrg_r1.score import print_scores, score_files

    load = None if arguments.labeler is None else lambda: load_labeler(arguments)
    scores = score_files(arguments.predicted, arguments.reference, train=arguments.train, load_labeler=load)
    print_scores(scores)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        print(f"{arguments.json}: written")


def _reward_card(arguments: argparse.Namespace) -> None:
    import numpy as np

    from mrg_r1.data.study import read_manifest
    from mrg_r1.reward.card import reward_card
    from mrg_r1.reward.card_picture import write_picture
    from mrg_r1.reward.card_tables import LabelSource, Source, card_json, print_card

    chosen = [name for name in ("labeler", "labels", "said") if getattr(arguments, name)]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ValueError(f"labels come from one of --labeler PATH, --labels LABELS.csv and --said; {given} given, give one")
    studies = read_manifest(arguments.manifest, split=arguments.split)
    classes, name, fingerprint = _classes(arguments, studies)
    ids, texts = [study.id for study in studies], [study.report for study in studies]
    card = reward_card(np.array(classes), ids, texts, [arguments.margin])
    rendered = sum(study.rendered for study in studies)
    kinds: dict[str, LabelSource] = {"labeler": "labeler", "labels": "file", "said": "said"}
    source = Source(str(arguments.manifest), arguments.split, kinds[chosen[0]], rendered, name, fingerprint)
    print_card(card, source, arguments.margin)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        written = arguments.output / "reward_card.json"
        written.write_text(json.dumps(card_json(card, source, arguments.margin), indent=2) + "\n", encoding="utf-8")
        write_picture(arguments.output / "reward_card.png", card, source, arguments.margin)
        print(f"{written}: written, with reward_card.png")


def _classes(arguments: argparse.Namespace, studies: Sequence[Study]) -> tuple[list[list[int]], str | None, str | None]:
    """The classes of every study's report, and the name and the fingerprint of what they are from."""
    from mrg_r1.labels.observations import classes_of_values, read_labels_csv

    if arguments.said:
        silent = [study.id for study in studies if study.said is None]
        if silent:
            raise ValueError(f"{arguments.manifest}, field `labels.said`: null for {_named(silent)}; give --labeler or --labels instead")
        return [classes_of_values(study.said) for study in studies if study.said is not None], None, None
    if arguments.labels is not None:
        by_id = read_labels_csv(arguments.labels)
        missing = [study.id for study in studies if study.id not in by_id]
        if missing:
            remedy = "label every report of the manifest (`mrg-r1 label`), or choose a --split that is labelled"
            raise ValueError(f"{arguments.labels}: no row for {_named(missing)} of {arguments.manifest}; {remedy}")
        return [by_id[study.id] for study in studies], str(arguments.labels), None
    labeler = load_labeler(arguments)
    return labeler.label([study.report for study in studies], progress=True).tolist(), labeler.name, labeler.fingerprint


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN_IDS:,} more" if len(ids) > _SHOWN_IDS else ""
    return f"{len(ids):,} {'study' if len(ids) == 1 else 'studies'}: {', '.join(ids[:_SHOWN_IDS])}{more}"
