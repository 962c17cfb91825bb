"""Evaluation: greedy reports over the ranks, then every definition of clinical efficacy with its baselines (spec section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mrg_r1.data.loader import PromptBuilder, prompts_ahead
from mrg_r1.engine.ranks import Ranks, shard
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import BLANK, NO_FINDING, POSITIVE, classes_of_values, values_of_classes
from mrg_r1.metrics.baselines import baselines
from mrg_r1.metrics.bootstrap import bootstrap_intervals
from mrg_r1.metrics.clinical import clinical_scores, per_observation, support, truth_scores
from mrg_r1.policy.load import Policy
from mrg_r1.reward.service import RewardService
from mrg_r1.reward.stage import Judging
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
)


@torch.no_grad()
def evaluate(
    policy: Policy,
    studies: Sequence[Study],
    *,
    build: PromptBuilder,
    rewards: RewardService,
    judging: Callable[[Sequence[str]], Judging],
    labeler: Mapping[str, str],
    ranks: Ranks,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    bootstrap_samples: int,
    train: NDArray[np.int64] | None = None,
    title: str = "evaluating",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy reports of `studies`, spread over the ranks, and what they are worth. All ranks call it and all get the result.

    Args:
        judging: study ids to how their reports are judged.
        labeler: name and fingerprint of what reads the reports.
        train: [M, 14] classes of training reports, for the baseline that gives each study a random one of them; None leaves it out.

    Returns:
        The result (the content of evaluation/SPLIT.json) and one prediction a study, in the order of `studies`.

    Raises:
        ValueError: no studies.
    """
    if not studies:
        raise ValueError("no studies to evaluate: the split is empty; set data.val_split or data.test_split to one that the manifest has")
    mine = shard(studies, ranks)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rows: list[dict[str, Any]] = []
    with policy.held(images=True):  # ranks have unequal numbers of batches
        shown = track(batches, title, console=Console(stderr=True), disable=not ranks.is_main, transient=True)
        for batch, prompts in zip(shown, prompts_ahead(build, batches), strict=True):
            ranks.beat(title)
            rows += _predict(policy, batch, prompts.to(policy.device), rewards=rewards, judging=judging, max_new_tokens=max_new_tokens)
    by_id = {row["id"]: row for part in ranks.gather(rows) for row in part}
    predictions = [by_id[study.id] for study in studies]
    result: dict[str, Any] | None = None
    if ranks.is_main:
        result = summarise(predictions, studies, train=train, seed=seed, bootstrap_samples=bootstrap_samples)
        result["labeler"] = dict(labeler)
    return ranks.agree(result), predictions


def _predict(
    policy: Policy,
    batch: list[Study],
    prompts: Prompts,
    *,
    rewards: RewardService,
    judging: Callable[[Sequence[str]], Judging],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    completions = greedy(policy, prompts, policy.encode_images(prompts), max_new_tokens=max_new_tokens)
    ids = prompts.study_ids
    judged = rewards.result(rewards.submit(completions.texts, completions.ended.cpu(), ids, prompts.references, judging(ids)))
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


def summarise(
    predictions: Sequence[dict[str, Any]],
    studies: Sequence[Study],
    *,
    train: NDArray[np.int64] | None,
    seed: int,
    bootstrap_samples: int,
) -> dict[str, Any]:
    """Every definition with its interval, the baselines, the drawn truth where there is one, and the health of the reports.

    Args:
        predictions: rows with `labels`, `reference_labels` (14 file values), `report`, `terms`, `total`, `constant`; one a study.
        train: [M, 14] classes of training reports, or None.
    """
    predicted = np.array([classes_of_values(row["labels"]) for row in predictions])
    reference = np.array([classes_of_values(row["reference_labels"]) for row in predictions])
    scores = clinical_scores(predicted, reference)
    intervals = bootstrap_intervals(predicted, reference, samples=bootstrap_samples, seed=seed)
    reports = [row["report"] for row in predictions if row["report"] is not None]
    result: dict[str, Any] = {
        "n": len(predictions),
        "rendered": sum(study.rendered for study in studies),
        "definitions": {name: {**asdict(score), "f1_ci": list(intervals[name])} for name, score in scores.items()},
        "support": support(reference),
        "observations": {name: asdict(score) for name, score in per_observation(predicted, reference).items()},
        "baselines": {
            name: None if entry is None else {key: asdict(score) for key, score in entry.items()}
            for name, entry in baselines(reference, train=train, seed=seed).items()
        },
        "mean_reward": float(np.mean([row["total"] for row in predictions])),
        "terms": {name: float(np.mean([row["terms"][name] for row in predictions])) for name in predictions[0]["terms"]},
        # what the best constant training report earns on these studies (spec section 2): a policy that does not beat it has learned nothing
        "constant": {name: float(np.mean([row["constant"][name] for row in predictions])) for name in predictions[0]["constant"]},
        "format_rate": float(np.mean([row["terms"].get("format", float("nan")) for row in predictions])),
        "distinct_share": len(set(reports)) / len(predictions),
        "no_finding_rate": float((predicted[:, NO_FINDING] == POSITIVE).mean()),
        "mean_words": float(np.mean([len(report.split()) for report in reports])) if reports else 0.0,
        "disease_micro13": scores["disease_micro13"].f1,
        "disease_macro13": scores["disease_macro13"].f1,
        "disease_micro13_truth": None,
        "disease_macro13_truth": None,
        "labeler_gap": None,
    }
    drawn_rows = [row["drawn"] for row in predictions]
    if all(row is not None for row in drawn_rows):
        truth = truth_scores(predicted, drawn_rows)
        result["truth"] = {name: asdict(score) for name, score in truth.items()}
        result["disease_micro13_truth"], result["disease_macro13_truth"] = truth["disease_micro13"].f1, truth["disease_macro13"].f1
        # a policy that fools its labeler widens this (trap 26)
        result["labeler_gap"] = result["disease_micro13"] - result["disease_micro13_truth"]
    return result


def short_summary(result: dict[str, Any]) -> dict[str, float | None]:
    """The keys that summary.json's `before` and `after` hold."""
    return {key: result[key] for key in SUMMARY_KEYS}


def write_evaluation(directory: Path, name: str, result: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> None:
    """Write `directory/NAME.json` and `directory/NAME_predictions.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(
        directory / f"{name}_predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    )
    write_text_atomically(directory / f"{name}.json", json.dumps(result, indent=1) + "\n")


def evaluation_table(result: dict[str, Any], title: str) -> Table:
    """Every definition with its interval, beside the baselines."""
    table = Table(title=f"{title}: F1 by definition, {result['n']} studies" + (", rendered phantoms" if result["rendered"] else ""))
    table.add_column("definition", no_wrap=True)
    for name in ("P", "R", "F1", "95 % of F1", "normal", "blank", "random", "itself"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = "right: F1 of every report No Finding, every report blank, a random training report, the references against themselves"
    if result["constant"]:
        constant = result["constant"]["total"]
        table.caption += f"\nmean reward {result['mean_reward']:.3f}; of the best constant training report {constant:.3f}"
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
    return table
