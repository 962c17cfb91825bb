"""Is the policy collapsing to one normal report, or does it begin to say things twice? Watches over a run's steps.

docs/traps.md #25.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 20  # steps: the first so many are what the latest so many are compared with
_FELL = 0.5  # of the distinct-report share or the length at the start
_ROSE = 0.25  # of the share of reports that say No Finding, above the start's
_WORDING = {  # metric -> what it is, in words
    "groups/repeated_sentence": "a whole sentence stands twice in {now:.1%} of the reports ({first:.1%} in the first)",
    "groups/repetition": "{now:.1%} of a report's sentences or phrases were said before ({first:.1%} in the first)",
    "groups/contradiction": "{now:.1%} of the reports affirm and deny one observation ({first:.1%} in the first)",
}
WORDING_REMEDY = (
    "weights for the reward terms repetition and contradiction, a larger grpo.beta or an earlier adapter may help"
)
WORDING_FIRST, WORDING_WINDOW = 5, 10  # steps: in runs that were looked at, the rise came in the first twenty
WORDING_ROSE = 0.05  # of reports, or of a report, above the start's


class _Windows:
    """The first and the latest steps of some metrics.

    Args:
        state: of `state`, where a run goes on.
    """

    first_steps = WINDOW
    latest_steps = WINDOW

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._first: list[list[float | None]] = list(state["first"]) if state else []
        self._latest: list[list[float | None]] = list(state["latest"]) if state else []
        self._quiet: int = state["quiet"] if state else 0

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return {"first": self._first, "latest": self._latest, "quiet": self._quiet}

    def _take(self, row: list[float | None]) -> bool:
        """Take in a step; whether there are two windows to compare, and no warning within the latest one."""
        if len(self._first) < self.first_steps:
            self._first = [*self._first, row]
            return False
        self._latest = [*self._latest, row][-self.latest_steps :]
        self._quiet -= 1
        return len(self._latest) == self.latest_steps and self._quiet <= 0


class CollapseWatch(_Windows):
    """Compares variety, length and the share of normal reports of the latest `WINDOW` steps with the first ones."""

    def update(self, metrics: Mapping[str, float | None]) -> str | None:
        """Take in a step.

        Returns:
            A warning, at most once in `WINDOW` steps, where the share of distinct reports or the length is under half
            of what it was in the first steps, or the share of reports that say No Finding has risen by a quarter of all
            reports.
        """
        watched = ("groups/distinct_in_batch", "groups/length", "groups/no_finding")
        if not self._take([metrics[name] or 0.0 for name in watched]):
            return None
        distinct, length, normal = (mean or 0.0 for mean in _means(self._first))
        distinct_now, length_now, normal_now = (mean or 0.0 for mean in _means(self._latest))
        if distinct_now >= _FELL * distinct and length_now >= _FELL * length and normal_now <= normal + _ROSE:
            return None
        self._quiet = WINDOW
        return (
            f"the reports may be collapsing to one: over the last {WINDOW} steps {distinct_now:.0%} of a batch's "
            f"reports are distinct ({distinct:.0%} in the first), {length_now:.0f} tokens long ({length:.0f}), "
            f"{normal_now:.0%} say No Finding ({normal:.0%}); compare reward/mccs with reward/constant_mccs; a "
            "larger grpo.beta, a smaller learning rate or a larger reward.margin hold against it"
        )


class WordingWatch(_Windows):
    """Compares repetition and contradiction (docs/metrics.md, Wording) of the latest steps with the first ones."""

    first_steps = WORDING_FIRST
    latest_steps = WORDING_WINDOW

    def update(self, metrics: Mapping[str, float | None]) -> str | None:
        """Take in a step; a metric that it does not have is not watched.

        Returns:
            A warning, at most once in 20 steps, where one of them has risen by more than `WORDING_ROSE`.
        """
        if not self._take([metrics.get(name) for name in _WORDING]):
            return None
        risen = [
            words.format(first=first, now=now)
            for words, first, now in zip(_WORDING.values(), _means(self._first), _means(self._latest), strict=True)
            if first is not None and now is not None and now > first + WORDING_ROSE
        ]
        if not risen:
            return None
        self._quiet = 2 * WORDING_WINDOW
        return (
            f"the reports begin to say things twice, which no clinical score sees: over the last {WORDING_WINDOW} "
            f"steps {'; '.join(risen)}; {WORDING_REMEDY}"
        )


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of each column's values; None where a column has none."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [sum(column) / len(column) if column else None for column in columns]
