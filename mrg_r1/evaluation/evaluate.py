"""Evaluation: greedy reports over the ranks, then every definition of clinical efficacy with its baselines
(docs/method.md §4).

Beside the rewarded labeler stand those that the policy is not paid by: a held-out labeler where there is one, and what
a phantom was drawn from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.console import progress
from mrg_r1.data.loader import PromptBuilder
from mrg_r1.engine.ranks import Ranks
from mrg_r1.evaluation.generate import Row, greedy_rows
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import BLANK, NO_FINDING, POSITIVE, classes_of_values, values_of_classes
from mrg_r1.metrics import lexical
from mrg_r1.metrics.baselines import baselines
from mrg_r1.metrics.bootstrap import bootstrap_intervals
from mrg_r1.metrics.clinical import clinical_scores, per_observation, support, truth_scores
from mrg_r1.metrics.identity import ids_hash, labels_hash
from mrg_r1.metrics.radeval import RadEval, RadEvalError, described_scores
from mrg_r1.metrics.wording import wording
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.compute import RewardContext, RewardError
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.reward.references import label_sources
from mrg_r1.reward.service.interface import RewardService, RewardsMissing
from mrg_r1.types import Completions, Prompts, Rewards, Study

SUMMARY_KEYS = (
    "disease_micro13",
    "disease_macro13",
    "disease_micro13_truth",
    "disease_macro13_truth",
    "mean_reward",
    "format_rate",
    "distinct_share",
    "repeated_sentence",
    "repetition",
    "contradiction",
    "held_out_disease_micro13",
    "hacking_gap",
)
HACKING_GAP_IS = (
    "disease_micro13 (strict, 13 observations, micro F1) by the rewarded labeler, minus the same by the held-out "
    "labeler; each reads reports and references itself. Its growth says more than its size (docs/rewards.md)"
)


def evaluate(
    policy: Policy,
    studies: Sequence[Study],
    *,
    build: PromptBuilder,
    reward_service: RewardService,
    context_of: Callable[[Sequence[str]], RewardContext],
    labeler: Mapping[str, str],
    ranks: Ranks,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    bootstrap_samples: int,
    said_first: bool,
    train: NDArray[np.int64] | None = None,
    held_out: HeldOutLabeler | None = None,
    cleaning: lexical.Cleaning | None = None,
    start_radeval: Callable[[], RadEval] | None = None,
    title: str = "evaluating",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy reports of `studies`, spread over the ranks, and what they are worth. All ranks call it and all get the
    result.

    Args:
        context_of: study ids to how their reports are rewarded.
        labeler: name and fingerprint of what reads the reports.
        said_first: whether the labels that a study says count before the labeler's reading of its reference.
        train: [M, 14] classes of training reports, for the baseline that gives each study a random one of them; None
            leaves it out.
        held_out: a second labeler, on rank 0 alone, which reads the same reports.
        cleaning: of the texts before lexical metrics; None leaves these out.
        start_radeval: starts RadEval's process, on rank 0; None leaves its metrics out.

    Returns:
        The result (the content of evaluation/SPLIT.json) and one prediction a study, in the order of `studies`.

    Raises:
        ValueError: no studies.
        RewardsMissing: the held-out labeler cannot read the reports; all ranks raise it.
    """
    if not studies:
        raise ValueError(
            "no studies to evaluate: the split is empty; set data.val_split or data.test_split to one that the "
            "manifest has"
        )

    def rewarded(batch: list[Study], prompts: Prompts, completions: Completions) -> list[Row]:
        context = context_of(prompts.study_ids)
        ticket = reward_service.submit(
            completions.texts, completions.ended.cpu(), prompts.study_ids, prompts.references, context
        )
        rows = _predictions(batch, completions, reward_service.result(ticket))
        if held_out is not None:
            held_out.service.hint([row["text"] for row in rows])  # read while the next batch is written
        return rows

    predictions = greedy_rows(
        policy,
        studies,
        rewarded,
        build=build,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        ranks=ranks,
        title=title,
    )
    by_held_out = _add_held_out_labels(predictions, held_out, ranks)
    by_radeval = None
    if start_radeval is not None:
        by_radeval = _add_radeval(predictions, start_radeval, ranks, samples=bootstrap_samples, seed=seed)
    result: dict[str, Any] | None = None
    if ranks.is_main:
        result = summarise(
            predictions,
            studies,
            train=train,
            seed=seed,
            bootstrap_samples=bootstrap_samples,
            held_out=by_held_out,
            cleaning=cleaning,
        )
        result["labeler"] = dict(labeler)
        result["radeval"] = by_radeval
        result["reference_labels"] = label_sources(studies, labeler, said_first=said_first)
        if by_held_out is not None:  # which reads every reference that has words
            result["held_out"]["reference_labels"] = label_sources(studies, by_held_out, said_first=False)
    return ranks.agree(result), predictions


def _predictions(batch: list[Study], completions: Completions, rewards: Rewards) -> list[Row]:
    """What is kept of each report: a line of evaluation/SPLIT_predictions.jsonl, without the held-out labeler's."""
    return [
        {
            "id": study.id,
            "text": completions.texts[b][0],
            "report": rewards.report_texts[b][0],
            "reference": study.report,
            "ended": bool(completions.ended[b, 0]),
            "total": float(rewards.total[b, 0]),
            "terms": {name: float(values[b, 0]) for name, values in rewards.terms.items()},
            # a malformed report says nothing: blank labels count as misses, never left out
            "constant": {name: float(values[b]) for name, values in rewards.constant.items()},
            "labels": values_of_classes(rewards.labels[b, 0].clamp_min(BLANK).tolist()),
            "reference_labels": values_of_classes(rewards.reference_labels[b].tolist()),
            "contradictions": _count(rewards, b),
            "drawn": None if study.drawn is None else list(study.drawn),
        }
        for b, study in enumerate(batch)
    ]


def _count(rewards: Rewards, study: int) -> int | None:
    """Contradictions of a study's only report; None where it is malformed or its sentences were not read."""
    count = -1 if rewards.contradictions is None else int(rewards.contradictions[study, 0])
    return None if count < 0 else count


def _add_held_out_labels(
    predictions: list[dict[str, Any]], held_out: HeldOutLabeler | None, ranks: Ranks
) -> dict[str, str] | None:
    """Put the held-out labeler's reading into every row, on every rank; None where there is no held-out labeler.
    Returns the held-out labeler's name and fingerprint.

    Raises:
        RewardsMissing: it cannot read; never a silent null.
    """

    def shown(starts: Sequence[int]) -> Iterator[int]:
        for start in progress(starts, "the held-out labeler reads"):
            ranks.beat("the held-out labeler reads")
            yield start

    def read() -> tuple[dict[str, str], list[list[int]], list[Sequence[int]]] | None:
        if held_out is None:
            return None
        try:
            classes = held_out.read([row["report"] for row in predictions], shown)
        except RewardError as error:
            raise RewardsMissing(
                f"evaluation.held_out_labeler: {error}; the same command goes on, with "
                "evaluation.held_out_labeler=null without a held-out labeler"
            ) from error
        return held_out.labeler, classes.tolist(), [held_out.references[row["id"]] for row in predictions]

    answer = ranks.from_main(read, RewardsMissing)
    for number, row in enumerate(predictions):
        row["held_out_labels"] = None if answer is None else values_of_classes(answer[1][number])
        row["held_out_reference_labels"] = None if answer is None else values_of_classes(answer[2][number])
    return None if answer is None else answer[0]


def _add_radeval(
    predictions: list[dict[str, Any]], start: Callable[[], RadEval], ranks: Ranks, *, samples: int, seed: int
) -> dict[str, Any] | None:
    """Put RadEval's values into every row, on every rank, and return what they are; null in rows whose reference has
    no words, None where none has any. A metric that fails costs the evaluation nothing but itself.
    """

    def ask() -> tuple[dict[str, Any] | None, dict[str, dict[str, float]]]:
        worded = sorted((row for row in predictions if row["reference"] is not None), key=lambda row: str(row["id"]))
        if not worded:
            return None, {}
        ranks.beat("RadEval starts")
        try:
            described, values = described_scores(
                start(),
                {row["id"]: row["report"] or "" for row in worded},
                {row["id"]: row["reference"] for row in worded},
                samples=samples,
                seed=seed,
                beat=lambda: ranks.beat("RadEval scores"),
                shown=lambda names: progress(names, "RadEval's metrics"),
            )
        except RadEvalError as error:  # it could not even be started
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return {"scores": {}, "left_out": {"radeval": error.text}}, {}
        for reason in described["left_out"].values():
            print(f"warning: RadEval: {reason}", file=sys.stderr, flush=True)
        ids = [row["id"] for row in worded]
        return described, {
            study: {output: float(column[number]) for output, column in values.items()}
            for number, study in enumerate(ids)
        }

    described, by_study = ranks.from_main(ask)
    for row in predictions:
        row["radeval"] = by_study.get(row["id"])
    return described


def summarise(
    predictions: Sequence[dict[str, Any]],
    studies: Sequence[Study],
    *,
    train: NDArray[np.int64] | None,
    seed: int,
    bootstrap_samples: int,
    held_out: Mapping[str, str] | None = None,
    cleaning: lexical.Cleaning | None = None,
) -> dict[str, Any]:
    """Every definition with its interval, the baselines, the held-out labeler and the drawn truth where they are, and
    the health of the reports.

    Args:
        predictions: rows with `labels`, `reference_labels` (14 file values), `report`, `terms`, `total`, `constant`;
            one a study.
        train: [M, 14] classes of training reports, or None.
        held_out: name and fingerprint of who read `held_out_labels` and `held_out_reference_labels` of the rows.
        cleaning: of the texts before lexical metrics; None leaves these out.
    """
    ids = [row["id"] for row in predictions]
    predicted, reference = _classes(predictions, "labels"), _classes(predictions, "reference_labels")
    scores = clinical_scores(predicted, reference)
    reports = [row["report"] for row in predictions if row["report"] is not None]
    result: dict[str, Any] = {
        "n": len(predictions),
        "ids_sha256": ids_hash(ids),
        "reference_labels_sha256": labels_hash(ids, reference),
        "rendered": sum(study.rendered for study in studies),
        **_clinical(predicted, reference, samples=bootstrap_samples, seed=seed),
        "support": support(reference),
        "baselines": {
            name: None if entry is None else {key: asdict(score) for key, score in entry.items()}
            for name, entry in baselines(reference, train=train, seed=seed).items()
        },
        "mean_reward": float(np.mean([row["total"] for row in predictions])),
        "terms": {
            name: float(np.mean([row["terms"][name] for row in predictions])) for name in predictions[0]["terms"]
        },
        # what the best constant training report earns on these studies (docs/method.md §2): a policy that does not beat
        # it has learned nothing
        "constant": {
            name: float(np.mean([row["constant"][name] for row in predictions])) for name in predictions[0]["constant"]
        },
        "format_rate": float(np.mean([row["terms"].get("format", float("nan")) for row in predictions])),
        "distinct_share": len(set(reports)) / len(predictions),
        "no_finding_rate": float((predicted[:, NO_FINDING] == POSITIVE).mean()),
        # what the labeler reads as if nothing were wrong (docs/metrics.md, Wording)
        **asdict(wording([row["report"] for row in predictions], [row.get("contradictions") for row in predictions])),
        # what the radiologists do themselves; a labeler has not read their sentences
        "references_wording": asdict(wording([row.get("reference") for row in predictions], [None] * len(predictions))),
        "mean_words": float(np.mean([len(report.split()) for report in reports])) if reports else 0.0,
        "disease_micro13": scores["disease_micro13"].f1,
        "disease_macro13": scores["disease_macro13"].f1,
        "disease_micro13_truth": None,
        "disease_macro13_truth": None,
        "labeler_gap": None,
        "held_out": None,
        "held_out_disease_micro13": None,
        "hacking_gap": None,
        "hacking_gap_is": HACKING_GAP_IS,
        "lexical": None if cleaning is None else _lexical(predictions, cleaning),
    }
    if held_out is not None:
        worded = np.array([row["reference"] is not None for row in predictions])
        by_held_out = _classes(predictions, "held_out_labels"), _classes(predictions, "held_out_reference_labels")
        result["held_out"] = {
            "labeler": dict(held_out),
            **_clinical(*by_held_out, samples=bootstrap_samples, seed=seed),
            "reference_labels_sha256": labels_hash(ids, by_held_out[1]),
            # of the 14 classes of each reference report, the share in which both labelers read the same
            "agreement_on_references": float((by_held_out[1] == reference)[worded].mean()) if worded.any() else None,
        }
        own = result["held_out"]["disease_micro13"] = result["held_out"]["definitions"]["disease_micro13"]["f1"]
        result["held_out_disease_micro13"], result["hacking_gap"] = own, result["disease_micro13"] - own
    drawn_rows = [row["drawn"] for row in predictions]
    if all(row is not None for row in drawn_rows):
        truth = truth_scores(predicted, drawn_rows)
        result["truth"] = {name: asdict(score) for name, score in truth.items()}
        result["disease_micro13_truth"], result["disease_macro13_truth"] = (
            truth["disease_micro13"].f1,
            truth["disease_macro13"].f1,
        )
        # a policy that fools its labeler widens this (docs/traps.md #26)
        result["labeler_gap"] = result["disease_micro13"] - result["disease_micro13_truth"]
    return result


def _classes(predictions: Sequence[dict[str, Any]], key: str) -> NDArray[np.int64]:
    """[N, 14] classes of the rows' file values."""
    return np.array([classes_of_values(row[key]) for row in predictions])


def _clinical(predicted: NDArray[np.int64], reference: NDArray[np.int64], *, samples: int, seed: int) -> dict[str, Any]:
    """What one labeler's reading, [N, 14] classes of both sides, is worth under every definition and for each
    observation.
    """
    intervals = bootstrap_intervals(predicted, reference, samples=samples, seed=seed)
    scores = clinical_scores(predicted, reference)
    return {
        "definitions": {name: {**asdict(score), "f1_ci": list(intervals[name])} for name, score in scores.items()},
        "observations": {name: asdict(score) for name, score in per_observation(predicted, reference).items()},
    }


def _lexical(predictions: Sequence[dict[str, Any]], cleaning: lexical.Cleaning) -> dict[str, Any] | None:
    """Lexical metrics of what may be labelled: the report inside its tags, nothing where it is malformed. Over the
    studies whose reference has words, which are counted where they are not all; None where none has.
    """

    def shown(names: Sequence[str]) -> Iterable[str]:
        return progress(names, "lexical metrics")

    worded = [row for row in predictions if row["reference"] is not None]
    if not worded:
        return None
    ordered = sorted(worded, key=lambda row: str(row["id"]))  # as in a score card, so that both have one hash
    said, true = {row["id"]: row["report"] or "" for row in ordered}, {row["id"]: row["reference"] for row in ordered}
    counted = {} if len(worded) == len(predictions) else {"studies": len(worded)}
    return lexical.described_scores(said, true, cleaning, shown=shown) | counted


def short_summary(result: dict[str, Any]) -> dict[str, float | None]:
    """The keys that summary.json's `before` and `after` hold; None also where `result` was read from a file that is
    older than the key.
    """
    return {key: result.get(key) for key in SUMMARY_KEYS}


def write_evaluation(directory: Path, name: str, result: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> None:
    """Write `directory/NAME.json` and `directory/NAME_predictions.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(
        directory / f"{name}_predictions.jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions),
    )
    write_text_atomically(directory / f"{name}.json", json.dumps(result, indent=1) + "\n")
