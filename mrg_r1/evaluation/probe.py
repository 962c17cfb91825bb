"""What RL can gain from a start, told from samples: a group and a greedy report of each study go in, numbers and a
verdict in words come out (docs/debugging.md).

RL makes likelier what is sampled and earns more than its group. What is never sampled it cannot find; where all earn
the same it learns nothing; where the best of a group earns no more than the greedy report, nothing is to be had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import BLANK, NO_FINDING, OBSERVATIONS, POSITIVE
from mrg_r1.metrics.clinical import Score, clinical_scores
from mrg_r1.metrics.ranking import auc

# Ours, as everything the verdict compares with.
FEW = 3  # true studies of an observation, below which nothing is said of it
SEEN = 0.7  # AUC of the say-rate from which an observation counts as seen
UNSAID = 0.5  # greedy recall below which a seen observation counts as not said
LITTLE = 0.1  # of the std of rewards in a group, below which two mean rewards count as equal
SILENT = 0.5  # share of groups without signal from which it is named
FORM = 0.05  # share of reports that are truncated or malformed from which it is named
ALIKE = 0.05  # different texts over samples, below which it is named
_Z = 1.64  # one-sided 95 %

Outlook = Literal["nothing", "little", "something"]


@dataclass(frozen=True)
class Sample:
    """Reports of N studies: G sampled ones and a greedy one each; classes -1 where a report is malformed.

    Attributes:
        reference: [N, 14] classes.
        labels, greedy_labels: [N, G, 14] and [N, 14] classes.
        total, greedy_total: [N, G] and [N] rewards.
        constant: [N] rewards of the best constant training report, or None.
        other_total: [N, G] rewards of each group for another study, or None: what many tries earn without looking.
        silent: [N] bool, groups without signal.
        texts, greedy_texts: N lists of G reports, N reports; None where malformed.
        lengths, greedy_lengths: [N, G] and [N] tokens.
        ended: [N, G] bool.
    """

    reference: NDArray[np.int64]
    labels: NDArray[np.int64]
    greedy_labels: NDArray[np.int64]
    total: NDArray[np.float64]
    greedy_total: NDArray[np.float64]
    constant: NDArray[np.float64] | None
    other_total: NDArray[np.float64] | None
    silent: NDArray[np.bool_]
    texts: Sequence[Sequence[str | None]]
    greedy_texts: Sequence[str | None]
    lengths: NDArray[np.int64]
    greedy_lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]


def measure(sample: Sample) -> dict[str, Any]:
    """The numbers of a probe, plain values for JSON. `best` is the report of each group that earns most."""
    groups, members = sample.total.shape
    rows, other = np.arange(groups), sample.other_total
    best = sample.labels[rows, sample.total.argmax(axis=1)]
    said = sample.labels.reshape(groups * members, len(OBSERVATIONS))
    f1 = {
        "greedy": _disease(sample.greedy_labels, sample.reference),
        "sampled": _disease(said, np.repeat(sample.reference, members, axis=0)),
        "best": _disease(best, sample.reference),
    }
    written = [text for group in sample.texts for text in group if text is not None]
    return {
        "studies": groups,
        "group_size": members,
        "reward": {
            "greedy": float(sample.greedy_total.mean()),
            "sampled": float(sample.total.mean()),
            "best": float(sample.total.max(axis=1).mean()),
            "constant": None if sample.constant is None else float(sample.constant.mean()),
            "sampled_for_another_study": None if other is None else float(other.mean()),
            "best_for_another_study": None
            if sample.other_total is None
            else float(sample.other_total.max(axis=1).mean()),
            "std_in_group": float(sample.total.std(axis=1, ddof=1).mean()),
        },
        "disease_micro13": {name: asdict(score) for name, score in f1.items()},
        "all_findings_right": _right(sample),
        "zero_signal": float(sample.silent.mean()),
        "observations": {name: _observation(sample, k) for k, name in enumerate(OBSERVATIONS) if k != NO_FINDING},
        "reports": {
            "tokens_greedy": float(sample.greedy_lengths.mean()),
            "tokens_sampled": float(sample.lengths.mean()),
            "truncated": float(1 - sample.ended.mean()),
            "malformed": 1 - len(written) / (groups * members),
            "distinct_in_group": float(np.mean([len(set(group)) for group in sample.texts])) / members,
            "different_sampled": len(set(written)),
            "different_greedy": len(set(sample.greedy_texts)),
        },
    }


def _disease(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> Score:
    return clinical_scores(predicted.clip(min=BLANK), reference)["disease_micro13"]


def _right(sample: Sample) -> dict[str, float]:
    """Shares of studies whose positive findings, of all 13, are exactly the reference's: of the greedy report, of a
    sampled one, of any of the group; and the share of studies in which some samples are right and some are not.
    """
    true = sample.reference[:, :NO_FINDING] == POSITIVE  # [N, 13]
    written = sample.labels[..., 0] >= 0  # a malformed report is right about nothing
    hits = ((sample.labels[..., :NO_FINDING] == POSITIVE) == true[:, None]).all(axis=-1) & written  # [N, G]
    same = (sample.greedy_labels[:, :NO_FINDING] == POSITIVE) == true
    greedy = same.all(axis=-1) & (sample.greedy_labels[:, 0] >= 0)
    return {
        "greedy": float(greedy.mean()),
        "sampled": float(hits.mean()),
        "any": float(hits.any(axis=1).mean()),
        "mixed": float((hits.any(axis=1) & ~hits.all(axis=1)).mean()),
    }


def _observation(sample: Sample, column: int) -> dict[str, Any]:
    """How often one observation is said where it is true and where it is not; all None where nothing can be said."""
    true = sample.reference[:, column] == POSITIVE
    said = sample.labels[..., column] == POSITIVE  # [N, G]
    greedy = sample.greedy_labels[:, column] == POSITIVE
    rate = said.mean(axis=1)

    def mean(values: NDArray[Any]) -> float | None:
        return float(values.mean()) if len(values) else None

    return {
        "true": int(true.sum()),
        "false": int((~true).sum()),
        "greedy_recall": mean(greedy[true]),
        "greedy_said_when_false": mean(greedy[~true]),
        "said_when_true": mean(rate[true]),
        "said_when_false": mean(rate[~true]),
        "recall_at_group": mean(said.any(axis=1)[true]),
        "auc": auc(rate, true),
    }


def outlook(result: Mapping[str, Any]) -> Outlook:
    """Whether RL has anything to learn from: nothing where no group has a signal; little where the best of a group
    earns hardly more than the greedy report, or where a sample earns hardly more than one of another study would.
    """
    reward = result["reward"]
    if result["zero_signal"] == 1.0:
        return "nothing"
    return "something" if _above(reward, "best", "greedy") and _looks(reward) else "little"


def _above(reward: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether a mean reward lies above another by more than `LITTLE`, whatever a reward's scale is."""
    return bool(reward[one] - reward[other] > LITTLE * reward["std_in_group"])


def _looks(reward: Mapping[str, Any]) -> bool:
    return reward["sampled_for_another_study"] is None or _above(reward, "sampled", "sampled_for_another_study")


def verdict(result: Mapping[str, Any]) -> list[str]:
    """What the numbers of `measure` mean, a sentence each with its number, the most telling first."""
    return [
        *_of_variety(result),
        *_of_reward(result),
        *_of_findings(result["observations"]),
        *_of_form(result["reports"]),
    ]


def _of_variety(result: Mapping[str, Any]) -> list[str]:
    studies, reports = result["studies"], result["reports"]
    samples, different = studies * result["group_size"], reports["different_sampled"]
    if different <= 1:
        return [
            f"the policy always writes one report: all {samples} samples are the same. No group has a signal and RL "
            "learns nothing from this start; a higher rollout.temperature, or an earlier step of SFT"
        ]
    lines = []
    if different < ALIKE * samples:
        lines.append(
            f"samples hardly differ: {different} texts among {samples}; a higher rollout.temperature or an earlier "
            "step of SFT would give RL more to choose from"
        )
    if reports["different_greedy"] == 1 and studies > 1:
        lines.append(
            f"the greedy report is one and the same for all {studies} studies, and samples differ: whether they differ "
            "with the radiograph is what the AUCs say"
        )
    return lines


def _of_reward(result: Mapping[str, Any]) -> list[str]:
    reward, silent, group = result["reward"], result["zero_signal"], result["group_size"]
    lines = []
    gain = reward["best"] - reward["greedy"]
    if _above(reward, "best", "greedy"):
        luck = reward["best_for_another_study"]
        lines.append(
            f"the best of {group} earns {reward['best']:.3f}, the greedy report {reward['greedy']:.3f}: at most "
            f"{gain:.3f} is within reach of what is sampled already"
            + ("" if luck is None else f"; the best of {group} of another study, luck alone, earns {luck:.3f}")
        )
    elif silent < 1:
        lines.append(
            f"the best of {group} earns {reward['best']:.3f}, the greedy report {reward['greedy']:.3f}: sampling finds "
            "hardly anything better, so RL can hardly gain by this reward"
        )
    if not _looks(reward):
        lines.append(
            f"a sample earns {reward['sampled']:.3f}, and {reward['sampled_for_another_study']:.3f} for another study: "
            "what is sampled hardly depends on the radiograph, so RL can only find the best report for everybody; a "
            "tower that sees first"
        )
    noise = reward["greedy"] - reward["sampled"]
    if _above(reward, "greedy", "sampled"):
        lines.append(
            f"a sample earns {noise:.3f} less than the greedy report: RL will first remove that noise, and "
            "reward/total in training rises by it without any greedy report getting better"
        )
    if silent >= SILENT:
        lines.append(
            f"{silent:.0%} of groups have no signal and are paid for all the same: a larger grpo.group_size, "
            "grpo.max_resample, a lower margin or a higher temperature"
        )
    if reward["constant"] is not None and reward["greedy"] <= reward["constant"]:
        lines.append(
            f"one training report for every study earns {reward['constant']:.3f}, the greedy reports "
            f"{reward['greedy']:.3f}: RL can rise by writing that report, so look at findings and not at reward alone"
        )
    return lines


def _of_findings(observations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    judged = {name: one for name, one in observations.items() if one["true"] >= FEW}
    never = [name for name, one in judged.items() if one["recall_at_group"] == 0]
    unseen = [name for name, one in judged.items() if name not in never and not _told_apart(one)]
    told = {name: one for name, one in judged.items() if name not in never and name not in unseen}
    unsaid = [name for name, one in told.items() if (one["auc"] or 0) >= SEEN and one["greedy_recall"] < UNSAID]
    few = [name for name, one in observations.items() if 0 < one["true"] < FEW]
    lines = []
    if never:
        lines.append(
            f"{len(never)} of {len(judged)} findings are never sampled where they are true ({_named(never)}): RL "
            "cannot find them; a longer SFT on reports that say them, or a tower that sees first"
        )
    if unseen:
        lines.append(
            f"{len(unseen)} of {len(judged)} findings are sampled about as often where they are absent "
            f"({_named(unseen)}): RL will sooner drop them or say them always than tell them apart; a tower that sees "
            "first, or more studies to be sure"
        )
    if unsaid:
        recalls = ", ".join(f"{name} {judged[name]['greedy_recall']:.2f}" for name in unsaid)
        lines.append(
            f"{len(unsaid)} of {len(judged)} findings are seen and not said: samples follow the truth (AUC {SEEN} or "
            f"more), greedy reports mostly leave them out (recall: {recalls}). This is what RL mends best"
        )
    if judged and not never and not unseen and not unsaid:
        lines.append(
            f"all {len(judged)} findings with {FEW} true studies or more are sampled and follow the truth: RL can "
            "sharpen them, and finds nothing new"
        )
    if few:
        lines.append(f"{_named(few)}: fewer than {FEW} true studies, too few to say anything; more --studies")
    if not judged and not few:
        lines.append("no reference has a positive finding: nothing is known of what RL could find; other studies")
    return lines


def _of_form(reports: Mapping[str, Any]) -> list[str]:
    lines = []
    if reports["malformed"] >= FORM:
        lines.append(
            f"{reports['malformed']:.0%} of samples hold no report that can be read and earn nothing clinical: RL will "
            "spend its first steps on the format, which SFT teaches faster"
        )
    if reports["truncated"] >= FORM:
        lines.append(
            f"{reports['truncated']:.0%} of samples are cut off at rollout.max_new_tokens: raise it, or they learn "
            "from what they could not finish"
        )
    return lines


def _told_apart(one: Mapping[str, Any]) -> bool:
    """Whether the say-rate's AUC is above one half by more than chance, by Hanley and McNeil's standard error."""
    area, true, false = one["auc"], one["true"], one["false"]
    if area is None:  # true everywhere: there is nothing to tell it from
        return True
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (true - 1) * (first - area**2) + (false - 1) * (second - area**2)
    return bool(area - _Z * math.sqrt(max(spread, 0.0) / (true * false)) > 0.5)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names)
