"""What `grpo.advantage_scale` leaves of a reward's break-evens: groups of reports are simulated, and the trainer's own
advantages taken of their rewards (docs/method.md §2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mrg_r1.grpo.advantages import Scale, group_advantages
from mrg_r1.labels.observations import BLANK, NEGATIVE, NO_FINDING, POSITIVE, UNCERTAIN
from mrg_r1.metrics.clinical import check_classes
from mrg_r1.reward.additive import FINDINGS
from mrg_r1.reward.card.break_evens import Classes, LabelTerm, classes_of_signs

GROUPS = 2000  # simulated, each with its reference
GroupRest = Literal["right", "constant", "drawn"]
GROUP_RESTS: tuple[GroupRest, ...] = ("right", "constant", "drawn")
_RARE = 1e-3  # a say-rate is taken to be at least this, and at most 1 less this

METHOD = (
    "groups of G reports of one study; k of them say the observation, k binomial of the policy's say-rate, neither 0 "
    "nor G, and the others all deny it or all pass over it. A finding pays for being said where the advantages of the "
    "k, summed, are above 0 on average, against either: in expectation that is the push on its probability. The rest "
    "of the reports is their reference's (right), the constant's (constant), or a report of the policy drawn for each "
    f"(drawn). {GROUPS} groups with the observation in the reference and {GROUPS} without, seeded. `batch` divides all "
    "groups by one number, which leaves the sign and so the break-even of `none`"
)


@dataclass(frozen=True)
class AfterScale:
    """Of one term.

    Attributes:
        group, unscaled: rest -> observation -> the p from which saying is pushed up, under `advantage_scale: group`,
            and under `batch` and `none`; None where it never is, or where no reference says it, or all do.
    """

    term: str
    group: Mapping[GroupRest, dict[str, float | None]]
    unscaled: Mapping[GroupRest, dict[str, float | None]]


def say_rates(policy: Classes) -> NDArray[np.float64]:
    """[13] how often each observation is said, uncertain too, of [N, 14] classes of a policy's reports."""
    rates: NDArray[np.float64] = np.isin(policy[:, :NO_FINDING], (POSITIVE, UNCERTAIN)).mean(axis=0)
    return rates


def after_scale(
    classes: Classes,
    terms: Sequence[LabelTerm],
    constant: Sequence[int],
    *,
    policy: Classes | None = None,
    group_size: int = 8,
    seed: int = 0,
) -> list[AfterScale]:
    """The break-evens of `break_evens.break_evens` as GRPO sees them, by `METHOD`.

    Args:
        classes: [N, 14] of the references.
        terms: from `break_evens.label_terms`.
        constant: 13 signs of the constant report.
        policy: [M, 14] classes of reports of a policy: its say-rates, and where the rest is drawn from. None: the
            references', as of a policy that knows how reports are worded and not what is on the film.
        group_size: G, at least 2.
        seed: of the groups.

    Raises:
        ValueError: no studies, wrong shapes or classes, or G below 2.
    """
    if group_size < 2:
        raise ValueError(f"group size {group_size}: a group of one has no baseline; take at least 2")
    drawn_from = classes if policy is None else policy
    check_classes(classes, classes)
    check_classes(drawn_from, drawn_from)
    fixed, rates = classes_of_signs(constant), say_rates(drawn_from)
    answers = []
    for term in terms:
        found: dict[Scale, dict[GroupRest, dict[str, float | None]]] = {
            scale: {rest: {} for rest in GROUP_RESTS} for scale in ("group", "none")
        }
        for column, name in enumerate(FINDINGS):
            rng = np.random.default_rng([seed, column])  # the same groups for every term
            there = np.isin(classes[:, column], term.present)
            if there.all() or not there.any():
                for by_rest in found.values():
                    for rest in GROUP_RESTS:
                        by_rest[rest][name] = None
                continue
            sayers = _sayers(rng, rates[column], group_size)
            states = []
            for rows in (np.flatnonzero(there), np.flatnonzero(~there)):
                references = classes[np.resize(rng.permutation(rows), GROUPS)]
                states.append((references, drawn_from[rng.integers(len(drawn_from), size=(GROUPS, group_size))]))
            for rest in GROUP_RESTS:
                pushes: list[list[dict[Scale, float]]] = [[], []]  # by what the others do, by state
                for references, reports in states:
                    if rest != "drawn":
                        reports = references if rest == "right" else np.broadcast_to(fixed, references.shape)
                    for other, label in enumerate((NEGATIVE, BLANK)):
                        pushes[other].append(_pushes(term, reports, references, sayers, column, label))
                for scale in found:
                    found[scale][rest][name] = _from([[push[scale] for push in of_states] for of_states in pushes])
        answers.append(AfterScale(term.name, group=found["group"], unscaled=found["none"]))
    return answers


def _sayers(rng: np.random.Generator, rate: float, group_size: int) -> NDArray[np.bool_]:
    """[GROUPS, G] which members say the observation: the first k, 1 <= k < G."""
    rate = min(max(rate, _RARE), 1 - _RARE)
    k = np.arange(1, group_size)
    # of a binomial, all but what k does not change
    odds = np.cumsum(np.log((group_size - k + 1) / k)) + k * np.log(rate / (1 - rate))
    chances = np.exp(odds - odds.max())
    drawn = rng.choice(k, p=chances / chances.sum(), size=GROUPS)
    said: NDArray[np.bool_] = np.arange(group_size) < drawn[:, None]
    return said


def _pushes(
    term: LabelTerm, rest: Classes, references: Classes, sayers: NDArray[np.bool_], column: int, other: int
) -> dict[Scale, float]:
    """By scale, the mean over groups of the summed advantages of those that say the observation.

    Args:
        rest: [GROUPS, G, 14] the reports but for the observation, or [GROUPS, 14] where a group's are alike.
        other: what the others say of it, a class.
    """
    reports = rest.copy()
    if rest.ndim == 2:  # a group's rewards are two
        scored = []
        for label in (POSITIVE, other):
            reports[:, column] = label
            scored.append(term.score(reports, references)[:, None])
        rewards = torch.from_numpy(np.where(sayers, *scored))
    else:
        reports[..., column] = np.where(sayers, POSITIVE, other)
        against = np.repeat(references, reports.shape[1], axis=0)
        rewards = torch.from_numpy(term.score(reports.reshape(-1, reports.shape[2]), against)).reshape(sayers.shape)
    scales: tuple[Scale, ...] = ("group", "none")
    return {
        scale: float((group_advantages(rewards, scale=scale).numpy() * sayers).sum(axis=1).mean(dtype=np.float64))
        for scale in scales
    }


def _from(pushes: Sequence[Sequence[float]]) -> float | None:
    """The p from which saying is pushed up against both alternatives, of the pushes where the finding is there and
    where it is not.
    """
    crossings = []
    for of_states in pushes:
        there, not_there = of_states
        if there <= 0:
            return None
        crossings.append(0.0 if not_there >= 0 else not_there / (not_there - there))
    return max(crossings)
