"""Is the policy collapsing to one normal report? A watch over variety, length and the share of normal reports.

docs/traps.md #25.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WINDOW = 20  # steps: the first so many are what the latest so many are compared with
_WATCHED = ("groups/distinct_in_batch", "groups/length", "groups/no_finding")
_FELL = 0.5  # of the distinct-report share or the length at the start
_ROSE = 0.25  # of the share of reports that say No Finding, above the start's


class CollapseWatch:
    """Compares the latest `WINDOW` steps with the first ones.

    Args:
        state: of `state`, where a run goes on.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._first: list[list[float]] = list(state["first"]) if state else []
        self._latest: list[list[float]] = list(state["latest"]) if state else []
        self._quiet: int = state["quiet"] if state else 0

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return {"first": self._first, "latest": self._latest, "quiet": self._quiet}

    def update(self, metrics: Mapping[str, float | None]) -> str | None:
        """Take in a step.

        Returns:
            A warning, at most once in `WINDOW` steps, where the share of distinct reports or the length is under half
            of what it was in the first steps, or the share of reports that say No Finding has risen by a quarter of all
            reports.
        """
        row = [float(metrics[name] or 0.0) for name in _WATCHED]
        if len(self._first) < WINDOW:
            self._first = [*self._first, row]
            return None
        self._latest = [*self._latest, row][-WINDOW:]
        self._quiet -= 1
        if len(self._latest) < WINDOW or self._quiet > 0:
            return None
        distinct, length, normal = _means(self._first)
        distinct_now, length_now, normal_now = _means(self._latest)
        if distinct_now >= _FELL * distinct and length_now >= _FELL * length and normal_now <= normal + _ROSE:
            return None
        self._quiet = WINDOW
        return (
            f"the reports may be collapsing to one: over the last {WINDOW} steps {distinct_now:.0%} of a batch's "
            f"reports are distinct ({distinct:.0%} in the first), {length_now:.0f} tokens long ({length:.0f}), "
            f"{normal_now:.0%} say No Finding ({normal:.0%}); compare reward/mccs with reward/constant_mccs; a "
            "larger grpo.beta, a smaller learning rate or a larger reward.margin hold against it"
        )


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
