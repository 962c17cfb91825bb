"""What a step's groups look like: rewards by term, signal, variety, agreement by observation, and what a constant
report earns.

All as (sum, count) pairs, so that ranks with unequal counts reduce to one mean (docs/traps.md #20).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mrg_r1.grpo.advantages import without_signal
from mrg_r1.grpo.loss import Metrics
from mrg_r1.labels.observations import NEGATIVE, NO_FINDING, OBSERVATIONS, POSITIVE, UNCERTAIN
from mrg_r1.metrics.wording import repeats_sentence, repetition
from mrg_r1.types import Completions, Rewards

_SQUARE = "_square"  # the mean of squares, from which a standard deviation is made after the reduction


def group_metrics(
    completions: Completions, rewards: Rewards, *, normalise: Literal["total", "per_term"] = "total"
) -> Metrics:
    """This rank's groups, as (sum, count) over completions, groups or studies.

    - `reward/TERM` before weights, `reward/total`, with the mean of squares beside each (`with_stds` makes `_std` of
      it); `reward/std`: of the total inside the groups.
    - `reward/constant`, `reward/constant_TERM`: what the best constant training report earns on the same studies.
    - `groups/zero_signal`: groups of equal totals, under `per_term` those in which every weighted term is
      equal; `groups/all_zero_mccs`: groups in which no report earns any MCCS.
    - `groups/distinct`: distinct reports over members; `groups/distinct_in_batch`: over all reports of a rank.
    - `groups/repeated_sentence`: readable reports in which a whole sentence stands twice; `groups/repetition`: the mean
      of `metrics.wording.repetition`; `groups/contradiction`, where sentences were read: readable reports with an
      observation that one sentence affirms and another denies.
    - `groups/malformed`, `truncated`, `length` in tokens, `no_finding`.
    - `agreement/OBSERVATION`: of the reports in which the report or its reference says something of it, the share in
      which both say the same (uncertain counts as positive). Malformed reports say nothing.
    """
    reports = [[text for text in group if text is not None] for group in rewards.report_texts]
    groups, members = rewards.total.shape
    count, rows = torch.tensor(float(groups * members)), torch.tensor(float(groups))

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.double().sum().cpu(), torch.tensor(float(values.numel()))

    metrics: Metrics = {}
    for name, values in {**rewards.terms, "total": rewards.total}.items():
        metrics[f"reward/{name}"] = mean(values)
        metrics[f"reward/{name}{_SQUARE}"] = mean(values.double() ** 2)
    metrics["reward/std"] = mean(rewards.total.std(dim=1))  # inside the groups
    for name, values in rewards.constant.items():
        metrics["reward/constant" if name == "total" else f"reward/constant_{name}"] = mean(values)
    metrics["groups/zero_signal"] = mean(
        without_signal(rewards.total, rewards.terms, rewards.weights, normalise=normalise)
    )
    if "mccs" in rewards.terms:
        metrics["groups/all_zero_mccs"] = mean((rewards.terms["mccs"] == 0).all(dim=1))
    metrics["groups/distinct"] = (torch.tensor(float(sum(len(set(group)) for group in reports))) / members, rows)
    everything = {text for group in reports for text in group}
    metrics["groups/distinct_in_batch"] = (torch.tensor(float(len(everything))), count)
    metrics["groups/malformed"] = (count - sum(len(group) for group in reports), count)
    written = [text for group in reports for text in group]
    readable = torch.tensor(float(len(written)))
    metrics["groups/repeated_sentence"] = (torch.tensor(float(sum(map(repeats_sentence, written)))), readable)
    metrics["groups/repetition"] = (torch.tensor(sum(map(repetition, written)), dtype=torch.float64), readable)
    if rewards.contradictions is not None:
        metrics["groups/contradiction"] = ((rewards.contradictions > 0).double().sum(), readable)
    metrics["groups/truncated"] = mean(~completions.ended)
    metrics["groups/length"] = mean(completions.lengths)
    metrics["groups/no_finding"] = mean(rewards.labels[..., NO_FINDING] == POSITIVE)
    return metrics | _agreement(rewards)


def _agreement(rewards: Rewards) -> Metrics:
    if not rewards.reference_labels.numel():  # a service that reads no labels
        return {}
    said = _signs(rewards.labels).flatten(0, 1)  # [R, 14]
    true = _signs(rewards.reference_labels).repeat_interleave(rewards.labels.shape[1], dim=0)
    mentioned = (said != 0) | (true != 0)
    both = ((said == true) & mentioned).double().sum(dim=0)
    counts = mentioned.double().sum(dim=0)
    return {f"agreement/{name}": (both[column], counts[column]) for column, name in enumerate(OBSERVATIONS)}


def _signs(labels: Tensor) -> Tensor:
    """Classes to signs: positive and uncertain 1, negative -1, blank and unlabelled 0."""
    return ((labels == POSITIVE) | (labels == UNCERTAIN)).int() - (labels == NEGATIVE).int()


def with_stds(metrics: dict[str, float | None]) -> dict[str, float | None]:
    """Reduced metrics with `reward/TERM_std`, over all completions of the step, in place of the means of squares."""
    result: dict[str, float | None] = {}
    for name, value in metrics.items():
        if not name.endswith(_SQUARE):
            result[name] = value
            continue
        stem = name.removesuffix(_SQUARE)
        mean = metrics[stem]
        result[f"{stem}_std"] = None if value is None or mean is None else math.sqrt(max(value - mean**2, 0.0))
    return result
