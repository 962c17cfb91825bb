"""`mrg-r1 score` and `mrg-r1 reward-card`: what reports are worth, and what they would be worth without looking."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.cli.arguments import (
    add_labeler_arguments,
    add_output,
    between_0_and_1,
    described,
    load_labeler,
    margin,
    positive,
    seed,
)

if TYPE_CHECKING:
    from mrg_r1.metrics.radeval import RadEval
    from mrg_r1.types import Study

_SHOWN_IDS = 10


def add_commands(commands: Any) -> None:
    """`score` and `reward-card`."""
    score = described(
        commands.add_parser,
        "score",
        help="clinical and lexical metrics of reports, by every published definition, as a score card; compare two "
        "cards",
        description="Score predicted against reference reports. Each file holds labels (CSV: `id` and the 14 "
        "observations) or reports,\n"
        "which need --labeler: CSV (`id`, `report`), JSON or JSONL of objects with an id and a report "
        "(R2Gen's annotation.json, a run's\n"
        "SPLIT_predictions.jsonl, which has both sides), or .txt with one report a line. All "
        "definitions of clinical efficacy in use are\n"
        "printed side by side, with bootstrap intervals and with what a constant normal report, a blank "
        "one and a random training report\n"
        "would have scored. The card written by -o also holds the study ids and the labels of each "
        "study, and no report.",
        examples="""
        mrg-r1 score predicted_labels.csv reference_labels.csv --labels-by CheXbert -o card.json
        mrg-r1 score predicted.csv reference.csv --labeler chexbert.pth --train train.csv -o ours.json
        mrg-r1 score RUN/evaluation/test_predictions.jsonl -o ours.json
        mrg-r1 score predictions.json annotation.json --split test --labeler chexbert.pth --cleaning r2gen-iu
        mrg-r1 score res.txt gts.txt --labeler chexbert.pth
        mrg-r1 score predicted.csv reference.csv --labeler chexbert.pth --with radeval --python .venv-radeval/bin/python
        mrg-r1 score --compare theirs.json ours.json
        """,
    )
    score.add_argument("predicted", type=Path, nargs="?", metavar="PREDICTED")
    score.add_argument(
        "reference", type=Path, nargs="?", metavar="REFERENCE", help="left out where PREDICTED has both sides"
    )
    add_labeler_arguments(score, required=False)
    score.add_argument("--labels-by", metavar="NAME", help="who read the labels that are given as labels, for the card")
    score.add_argument(
        "--train", type=Path, metavar="TRAIN.csv", help="training reports or labels, for the random-report baseline"
    )
    score.add_argument(
        "--split", metavar="NAME", help="only the studies of this split, where a JSON or JSONL file names splits"
    )
    score.add_argument(
        "--cleaning",
        default="raw",
        choices=("raw", "r2gen-iu", "r2gen-mimic"),
        help="of the texts before BLEU, ROUGE-L, CIDEr and METEOR: as they are, or as R2Gen does on IU X-Ray or "
        "MIMIC-CXR (default: raw)",
    )
    score.add_argument(
        "--samples", type=positive, default=1000, metavar="N", help="bootstrap resamples (default: 1000)"
    )
    score.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the bootstrap and the random reports (default: 0)"
    )
    _add_radeval(score)
    score.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="CARD",
        help="two cards: the second system less the first, study by study",
    )
    score.add_argument("-o", "--json", type=Path, metavar="CARD.json", help="write the score card, or the comparison")
    score.set_defaults(run=_score)
    _add_reward_card(commands)


def _add_radeval(score: argparse.ArgumentParser) -> None:
    from mrg_r1.metrics.radeval_names import DEFAULT

    others = score.add_argument_group("metrics of RadEval, in an environment of its own (docs/scores.md)")
    others.add_argument(
        "--with",
        dest="radeval",
        type=_radeval_metrics,
        metavar="radeval[:NAME,NAME]",
        help=f"take its metrics in; without names {', '.join(DEFAULT)}. They run on --device",
    )
    others.add_argument(
        "--python", metavar="PATH", help="the interpreter of an environment that has RadEval (`make radeval` makes one)"
    )
    others.add_argument(
        "--download", action="store_true", help="let it fetch weights that are not in the hub's cache yet"
    )
    others.add_argument(
        "--send-text-to",
        action="append",
        default=[],
        metavar="NAME",
        help="let this metric send the reports to its API, which is refused otherwise",
    )


def _add_reward_card(commands: Any) -> None:
    card = described(
        commands.add_parser,
        "reward-card",
        help="what a policy can earn without looking, and from which probability a reward wants a finding said",
        description="Before a GPU is spent: what the best constant report and a random one earn of the clinical "
        "reward, at every margin.\n"
        "A run that does not rise above them has learned nothing from the images. Then, for every "
        "term that compares labels and every\n"
        "observation: from which probability saying the finding pays over denying it and over "
        "silence, also after\n"
        "grpo.advantage_scale. The labels of the manifest's reports come from one of --labeler, --labels and --said.",
        examples="""
        mrg-r1 reward-card data/five/manifest.jsonl --said
        mrg-r1 reward-card data/iu/manifest.jsonl --labeler chexbert.pth --split train -o cards/iu
        mrg-r1 reward-card data/iu/manifest.jsonl --labels chexbert_labels.csv --margin 0.4 --margin 0.7
        mrg-r1 reward-card data/iu/manifest.jsonl --labels chexbert_labels.csv --for disease_micro13 --f1 0.5
        """,
    )
    card.add_argument("manifest", type=Path, metavar="MANIFEST.jsonl")
    add_labeler_arguments(card, required=False)
    card.add_argument(
        "--labels", type=Path, metavar="LABELS.csv", help="labels that were read before: `id` and the 14 observations"
    )
    card.add_argument("--said", action="store_true", help="the manifest's own labels of its reports, `labels.said`")
    card.add_argument("--split", metavar="NAME", help="only the studies of this split, such as train (default: all)")
    card.add_argument(
        "--margin",
        type=margin,
        action="append",
        metavar="M",
        help="a margin of MCCS to show the break-evens of, 0 <= M < 1; may be repeated, the first is summed up for "
        "(default: 0.5)",
    )
    card.add_argument(
        "--threshold",
        type=between_0_and_1,
        metavar="T",
        help="t of the term additive (default: half of the F1 within reach, as reward.threshold auto)",
    )
    card.add_argument(
        "--for",
        dest="score",
        choices=("disease_micro13",),
        help="show beside them from which probability this score wants a finding said, and say where a reward teaches "
        "something else",
    )
    card.add_argument(
        "--f1",
        type=between_0_and_1,
        metavar="F",
        help="what that score can reach (default: midway between the best answer without looking and 1)",
    )
    card.add_argument(
        "--policy-labels",
        type=Path,
        metavar="LABELS.csv",
        help="labels of reports that a policy wrote: its say-rates for the break-evens after the scale (default: the "
        "references')",
    )
    card.add_argument(
        "--group-size", type=positive, default=8, metavar="G", help="of the break-evens after the scale (default: 8)"
    )
    add_output(card, "folder to write reward_card.json and reward_card.png to (default: only print)", required=False)
    card.set_defaults(run=_reward_card)


def _score(arguments: argparse.Namespace) -> None:
    from mrg_r1.score.card import score_files, write_card
    from mrg_r1.score.compare import compare_cards, write_comparison
    from mrg_r1.score.tables import print_card, print_comparison

    if arguments.compare is not None:
        if arguments.predicted is not None:
            raise ValueError(
                f"--compare reads two cards and nothing else; leave {arguments.predicted} out, or score it first (-o "
                "CARD.json)"
            )
        comparison = compare_cards(*arguments.compare, samples=arguments.samples, seed=arguments.seed)
        print_comparison(comparison)
        if arguments.json is not None:
            write_comparison(arguments.json, comparison)
    elif arguments.predicted is None:
        raise ValueError("nothing to score; name PREDICTED and REFERENCE, or --compare CARD CARD")
    elif (arguments.radeval is None) != (arguments.python is None):
        raise ValueError("--with radeval and --python PATH go together: the metrics, and the interpreter that has them")
    else:
        card = score_files(
            arguments.predicted,
            arguments.reference,
            train=arguments.train,
            split=arguments.split,
            load_labeler=None if arguments.labeler is None else lambda: load_labeler(arguments),
            labels_by=arguments.labels_by,
            cleaning=arguments.cleaning,
            samples=arguments.samples,
            seed=arguments.seed,
            radeval=None if arguments.radeval is None else _start_radeval(arguments),
        )
        print_card(card)
        if arguments.json is not None:
            write_card(arguments.json, card)
    if arguments.json is not None:
        print(f"{arguments.json}: written")
    if arguments.compare is None and (left_out := (card["radeval"] or {}).get("left_out")):
        raise ValueError("\n".join(["metrics that were asked for are not in the card:", *left_out.values()]))


def _start_radeval(arguments: argparse.Namespace) -> RadEval:
    from mrg_r1.cores import physical_device, read_cores
    from mrg_r1.metrics.radeval import RadEval, RadEvalSettings
    from mrg_r1.metrics.radeval_names import require_metrics

    require_metrics(arguments.radeval, arguments.send_text_to, how="; `--send-text-to NAME` allows it")
    settings = RadEvalSettings(
        python=arguments.python,
        metrics=arguments.radeval,
        device=physical_device(arguments.device),
        threads=read_cores().usable,
        download=arguments.download,
        send_text_to=tuple(arguments.send_text_to),
    )
    return RadEval(settings)


def _radeval_metrics(text: str) -> tuple[str, ...]:
    """`radeval`, or `radeval:NAME,NAME`."""
    from mrg_r1.metrics.radeval_names import DEFAULT, METRICS

    package, separator, names = text.partition(":")
    metrics = tuple(dict.fromkeys(name.strip() for name in names.split(","))) if separator else DEFAULT
    if package != "radeval" or not set(metrics) <= METRICS.keys():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not radeval or radeval:NAME,NAME; names are {', '.join(METRICS)}"
        )
    return metrics


def _reward_card(arguments: argparse.Namespace) -> None:
    import numpy as np

    from mrg_r1.data.study import read_manifest
    from mrg_r1.files import write_text_atomically
    from mrg_r1.labels.observations import read_labels_csv
    from mrg_r1.reward.card.break_even_tables import (
        break_even_card,
        break_evens_json,
        print_break_evens,
        wanted_by_f1,
    )
    from mrg_r1.reward.card.card import reward_card
    from mrg_r1.reward.card.picture import write_picture
    from mrg_r1.reward.card.tables import LabelSource, Source, card_json, print_card

    chosen = [name for name in ("labeler", "labels", "said") if getattr(arguments, name)]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ValueError(
            f"labels come from one of --labeler PATH, --labels LABELS.csv and --said; {given} given, give one"
        )
    if arguments.f1 is not None and arguments.score is None:
        raise ValueError(f"--f1 {arguments.f1} says what a score can reach; name the score, --for disease_micro13")
    margins = list(dict.fromkeys(arguments.margin or [0.5]))
    policy = None
    if arguments.policy_labels is not None:
        policy = (str(arguments.policy_labels), np.array(list(read_labels_csv(arguments.policy_labels).values())))
        if not len(policy[1]):
            raise ValueError(f"{arguments.policy_labels}: no row; give the labels of a policy's reports")
    studies = read_manifest(arguments.manifest, split=arguments.split)
    classes, name, fingerprint = _classes(arguments, studies)
    ids, texts = [study.id for study in studies], [study.report for study in studies]
    card = reward_card(np.array(classes), ids, texts, margins)
    pays = break_even_card(
        np.array(classes),
        card.at(0.0).constant.vector,
        margins=margins,
        threshold=arguments.threshold,
        wanted=None if arguments.score is None else wanted_by_f1(np.array(classes), arguments.score, arguments.f1),
        policy=policy,
        group_size=arguments.group_size,
    )
    rendered = sum(study.rendered for study in studies)
    kinds: dict[str, LabelSource] = {"labeler": "labeler", "labels": "file", "said": "said"}
    source = Source(str(arguments.manifest), arguments.split, kinds[chosen[0]], rendered, name, fingerprint)
    print_card(card, source, margins[0])
    print_break_evens(pays)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        written = arguments.output / "reward_card.json"
        content = {**card_json(card, source, margins[0]), "break_evens": break_evens_json(pays)}
        write_text_atomically(written, json.dumps(content, indent=2) + "\n")
        write_picture(arguments.output / "reward_card.png", card, source, margins[0], pays)
        print(f"{written}: written, with reward_card.png")


def _classes(arguments: argparse.Namespace, studies: Sequence[Study]) -> tuple[list[list[int]], str | None, str | None]:
    """The classes of every study's report, and the name and the fingerprint of what they are from; a study without a
    report has those that the manifest says.
    """
    from mrg_r1.labels.observations import classes_of_values, read_labels_csv

    if arguments.said:
        silent = [study.id for study in studies if study.said is None]
        if silent:
            raise ValueError(
                f"{arguments.manifest}, field `labels.said`: null for {_named(silent)}; give --labeler or --labels "
                "instead"
            )
        return [classes_of_values(study.said) for study in studies if study.said is not None], None, None
    if arguments.labels is not None:
        said = {study.id: classes_of_values(study.said) for study in studies if study.report is None and study.said}
        by_id = said | read_labels_csv(arguments.labels)
        missing = [study.id for study in studies if study.id not in by_id]
        if missing:
            remedy = "label every report of the manifest (`mrg-r1 label`), or choose a --split that is labelled"
            raise ValueError(f"{arguments.labels}: no row for {_named(missing)} of {arguments.manifest}; {remedy}")
        return [by_id[study.id] for study in studies], str(arguments.labels), None
    labeler = load_labeler(arguments)
    read = iter(labeler.label([study.report for study in studies if study.report is not None], progress=True).tolist())
    classes = [next(read) if study.report is not None else classes_of_values(study.said or ()) for study in studies]
    return classes, labeler.name, labeler.fingerprint


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN_IDS:,} more" if len(ids) > _SHOWN_IDS else ""
    return f"{len(ids):,} {'study' if len(ids) == 1 else 'studies'}: {', '.join(ids[:_SHOWN_IDS])}{more}"
