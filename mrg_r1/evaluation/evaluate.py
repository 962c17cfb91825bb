"""Evaluation: greedy reports over the ranks, then every definition of clinical efficacy with its baselines (spec
section 4).

Beside the rewarded labeler stand those that the policy is not paid by: a held-out labeler where there is one, and what
a phantom was drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mrg_r1.data.loader import PromptBuilder, prompts_ahead
from mrg_r1.engine.ranks import Ranks, shard
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import BLANK, NO_FINDING, POSITIVE, classes_of_values, values_of_classes
from mrg_r1.metrics import lexical
from mrg_r1.metrics.baselines import baselines
from mrg_r1.metrics.bootstrap import bootstrap_intervals
from mrg_r1.metrics.clinical import clinical_scores, per_observation, support, truth_scores
from mrg_r1.metrics.identity import ids_hash, labels_hash
from mrg_r1.policy.load import Policy
from mrg_r1.progress import progress
from mrg_r1.reward.compute import RewardContext, RewardError
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.reward.service.interface import RewardService, RewardsMissing
from mrg_r1.rollout.decode import greedy
from mrg_r1.types import Prompts, Study

SUMMARY_KEYS = (
    "disease_micro13",
    "disease_macro13",
    "disease_micro13_truth",
    "disease_macro13_truth",
    "mean_reward",
    "format_rate",
    "distinct_share",
    "held_out_disease_micro13",
    "hacking_gap",
)
HACKING_GAP_IS = (
    "disease_micro13 (strict, 13 observations, micro F1) by the rewarded labeler, minus the same by the held-out "
    "labeler; each reads reports and references itself. Its growth says more than its size (docs/rewards.md)"
)


@torch.no_grad()
def evaluate(
    policy: Policy,
    studies: Sequence[Study],
    *,
    build: PromptBuilder,
    rewards: RewardService,
    context_of: Callable[[Sequence[str]], RewardContext],
    labeler: Mapping[str, str],
    ranks: Ranks,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    bootstrap_samples: int,
    train: NDArray[np.int64] | None = None,
    held_out: HeldOutLabeler | None = None,
    cleaning: lexical.Cleaning | None = None,
    title: str = "evaluating",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy reports of `studies`, spread over the ranks, and what they are worth. All ranks call it and all get the
    result.

    Args:
        context_of: study ids to how their reports are rewarded.
        labeler: name and fingerprint of what reads the reports.
        train: [M, 14] classes of training reports, for the baseline that gives each study a random one of them; None
            leaves it out.
        held_out: a second labeler, on rank 0 alone, which reads the same reports.
        cleaning: of the texts before lexical metrics; None leaves these out.

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
    mine = shard(studies, ranks)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rows: list[dict[str, Any]] = []
    with policy.whole_decoder(images=True):  # ranks have unequal numbers of batches
        shown = progress(batches, title, quiet=not ranks.is_main)
        for batch, prompts in zip(shown, prompts_ahead(build, batches), strict=True):
            ranks.beat(title)
            rows += _predict(
                policy,
                batch,
                prompts.to(policy.device),
                rewards=rewards,
                context_of=context_of,
                max_new_tokens=max_new_tokens,
            )
            if held_out is not None:
                # read while the next batch is written
                held_out.service.hint([row["text"] for row in rows[-len(batch) :]])
    by_id = {row["id"]: row for part in ranks.gather(rows) for row in part}
    predictions = [by_id[study.id] for study in studies]
    by_held_out = _add_held_out_labels(predictions, held_out, ranks)
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
    return ranks.agree(result), predictions


def _predict(
    policy: Policy,
    batch: list[Study],
    prompts: Prompts,
    *,
    rewards: RewardService,
    context_of: Callable[[Sequence[str]], RewardContext],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    completions = greedy(policy, prompts, policy.encode_images(prompts), max_new_tokens=max_new_tokens)
    ids = prompts.study_ids
    judged = rewards.result(
        rewards.submit(completions.texts, completions.ended.cpu(), ids, prompts.references, context_of(ids))
    )
    return [
        {
            "id": study.id,
            "text": completions.texts[b][0],
            "report": judged.report_texts[b][0],
            "reference": study.report,
            "ended": bool(completions.ended[b, 0]),
            "total": float(judged.total[b, 0]),
            "terms": {name: float(values[b, 0]) for name, values in judged.terms.items()},
            # a malformed report says nothing: blank labels count as misses, never left out
            "constant": {name: float(values[b]) for name, values in judged.constant.items()},
            "labels": values_of_classes(judged.labels[b, 0].clamp_min(BLANK).tolist()),
            "reference_labels": values_of_classes(judged.reference_labels[b].tolist()),
            "drawn": None if study.drawn is None else list(study.drawn),
        }
        for b, study in enumerate(batch)
    ]


def _add_held_out_labels(
    predictions: list[dict[str, Any]], held_out: HeldOutLabeler | None, ranks: Ranks
) -> dict[str, str] | None:
    """Put the held-out labeler's reading into every row, on every rank; None where there is no held-out labeler.
    Returns the held-out labeler's name and fingerprint.

    Raises:
        RewardsMissing: it cannot read; never a silent null.
    """
    answer, problem = None, None
    if held_out is not None:

        def shown(starts: Sequence[int]) -> Iterator[int]:
            for start in progress(starts, "the held-out labeler reads"):
                ranks.beat("the held-out labeler reads")
                yield start

        try:
            classes = held_out.read([row["report"] for row in predictions], shown)
            answer = (held_out.labeler, classes.tolist(), [held_out.references[row["id"]] for row in predictions])
        except RewardError as error:
            problem = str(error)
    answer, problem = ranks.agree((answer, problem))
    if problem is not None:
        raise RewardsMissing(
            f"evaluation.held_out_labeler: {problem}; the same command goes on, with "
            "evaluation.held_out_labeler=null without a held-out labeler"
        )
    for number, row in enumerate(predictions):
        row["held_out_labels"] = None if answer is None else values_of_classes(answer[1][number])
        row["held_out_reference_labels"] = None if answer is None else values_of_classes(answer[2][number])
    return None if answer is None else answer[0]


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
        by_held_out = _classes(predictions, "held_out_labels"), _classes(predictions, "held_out_reference_labels")
        result["held_out"] = {
            "labeler": dict(held_out),
            **_clinical(*by_held_out, samples=bootstrap_samples, seed=seed),
            "reference_labels_sha256": labels_hash(ids, by_held_out[1]),
            # of the 14 classes of each reference, the share in which both labelers read the same
            "agreement_on_references": float((by_held_out[1] == reference).mean()),
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


def _lexical(predictions: Sequence[dict[str, Any]], cleaning: lexical.Cleaning) -> dict[str, Any]:
    """Lexical metrics of what may be labelled: the report inside its tags, nothing where it is malformed."""

    def shown(names: Sequence[str]) -> Iterable[str]:
        return progress(names, "lexical metrics")

    ordered = sorted(predictions, key=lambda row: str(row["id"]))  # as in a score card, so that both have one hash
    said, true = {row["id"]: row["report"] or "" for row in ordered}, {row["id"]: row["reference"] for row in ordered}
    return lexical.described_scores(said, true, cleaning, shown=shown)


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


def evaluation_table(result: dict[str, Any], title: str) -> Table:
    """Every definition with its interval, beside the baselines; under it the drawn truth and the held-out labeler,
    where there are any.
    """
    table = Table(
        title=f"{title}: F1 by definition, {result['n']} studies"
        + (", rendered phantoms" if result["rendered"] else "")
    )
    table.add_column("definition", no_wrap=True)
    for name in ("P", "R", "F1", "95 % of F1", "normal", "blank", "random", "itself"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = (
        "right: F1 of every report No Finding, every report blank, a random training report, the references "
        "against themselves"
    )
    if result["constant"]:
        constant = result["constant"]["total"]
        table.caption += (
            f"\nmean reward {result['mean_reward']:.3f}; of the best constant training report {constant:.3f}"
        )
    for name, score in result["definitions"].items():
        compared = [result["baselines"][key] for key in ("constant_normal", "blank", "random_train", "reference")]
        low, high = score["f1_ci"]
        table.add_row(
            name,
            *(f"{score[key]:.3f}" for key in ("precision", "recall", "f1")),
            f"{low:.3f}-{high:.3f}",
            *("-" if entry is None else f"{entry[name]['f1']:.3f}" for entry in compared),
        )
    for name, score in result.get("truth", {}).items():
        table.add_row(f"{name} (truth)", *(f"{score[key]:.3f}" for key in ("precision", "recall", "f1")), *["-"] * 5)
    held_out = result.get("held_out")
    if held_out is not None:
        table.add_section()
        for name, score in held_out["definitions"].items():
            low, high = score["f1_ci"]
            cells = (f"{score[key]:.3f}" for key in ("precision", "recall", "f1"))
            table.add_row(f"{name} (held-out)", *cells, f"{low:.3f}-{high:.3f}", *["-"] * 4)
        table.caption += (
            f"\nhacking gap {result['hacking_gap']:+.3f}: disease_micro13 by {result['labeler']['name']}, which is "
            f"rewarded, minus by the held-out labeler {held_out['labeler']['name']}; they agree on "
            f"{held_out['agreement_on_references']:.1%} of the references' classes"
        )
    return table


def lexical_table(result: dict[str, Any]) -> Table | None:
    """The lexical metrics under their cleaning's name; None where there are none."""
    found = result.get("lexical")
    if found is None:
        return None
    table = Table(title=f"Lexical metrics, cleaning {found['cleaning']}, {found['package']}, {result['n']} studies")
    for name in found["scores"]:
        table.add_column(lexical.TITLES[name], justify="right", no_wrap=True)
    table.add_row(*(f"{value:.4f}" for value in found["scores"].values()))
    lines = [f"cleaning {found['cleaning']}: {found['cleaning_is']}", *found["left_out"].values()]
    if found["empty_predictions"]:
        lines.append(f"{found['empty_predictions']} reports are empty or malformed; they count")
    table.caption = "\n".join(lines)
    return table


def print_evaluation(console: Console, result: dict[str, Any], title: str) -> None:
    """A closing evaluation's tables."""
    console.print(evaluation_table(result, title))
    words = lexical_table(result)
    if words is not None:
        console.print(words)
