"""Is the policy learning to please its labeler? A watch over the distance between the rewarded labeler and those that
it is not paid by.

docs/traps.md #26: optimised against one labeler, a policy finds the words that this labeler misreads. That labeler's
score then rises and that of a reader which was never rewarded does not: `hacking_gap` against the held-out labeler
(`evaluation.held_out_labeler`), `labeler_gap` against what phantoms were drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import classes_of_values
from mrg_r1.metrics.clinical import known_truth
from mrg_r1.metrics.gap import disease_counts, gap_change
from mrg_r1.metrics.identity import ids_hash

GREW = 0.03  # of disease_micro13
_TITLES = {
    "hacking_gap": "by the rewarded labeler minus by the held-out labeler",
    "labeler_gap": "by the labeler minus against the drawn truth",
}


class GapWatch:
    """Compares the gaps of each evaluation with those of the first one that it was given.

    It warns where a gap has grown by more than `GREW` and the 99 % paired bootstrap interval of the growth, over the
    same studies, lies above 0. Both are needed: with many studies a growth of no importance is significant, with few a
    large one is chance. The first evaluation and not 0 is the measure, since two labelers differ on honest reports too.
    99 % because a run asks many times: a policy whose gap does not move is above the interval in one validation of 200
    where sampling is all that moves it. It warns again only once the gap has grown by another `GREW`.

    Where the studies, the rewarded labeler or the held-out labeler are others than at first (a resume may change them),
    that gap's watch begins anew.

    Args:
        state: of `state`, where a run goes on.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._first: dict[str, dict[str, Any]] = {name: dict(first) for name, first in (state or {}).items()}

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint: a gap's first counts, six small numbers a study."""
        return self._first

    def update(self, rows: Sequence[Mapping[str, Any]], readers: str, *, when: str) -> list[str]:
        """Take in an evaluation.

        Args:
            rows: its predictions; those without `held_out_labels` or `drawn` have no such gap.
            readers: names the labelers that read them.
            when: the evaluation, in words, such as `after step 20`.

        Returns:
            A warning for each gap that has widened.
        """
        warnings = []
        studies = ids_hash([row["id"] for row in rows])
        for name, counts in _counts(rows).items():
            first = self._first.get(name)
            if first is None or (first["studies"], first["readers"]) != (studies, readers):
                self._first[name] = {
                    "studies": studies,
                    "readers": readers,
                    "when": when,
                    "counts": counts.tolist(),
                    "warned": 0.0,
                }
                continue
            found = gap_change(np.array(first["counts"], dtype=np.int64), counts)
            if found.ci[0] <= 0 or found.change <= first["warned"] + GREW:
                continue
            first["warned"] = found.change
            warnings.append(
                f"{name} has widened: disease_micro13 {_TITLES[name]} is {found.now:+.3f} {when}, "
                f"{found.first:+.3f} {first['when']} (99 % of the change {found.ci[0]:+.3f} to {found.ci[1]:+.3f}, "
                f"{len(rows)} studies): the policy may be learning what its labeler misreads. Read reports that "
                "the two read differently; an earlier adapter, a larger grpo.beta or fewer steps hold against it, "
                "and a labeler that was taught on such reports cures it (docs/rewards.md)"
            )
        return warnings


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.int64]]:
    """By gap, [N, 6] counts of the rewarded labeler and of the other reader, studies sorted by id."""
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    predicted = _classes(ordered, "labels")
    rewarded = disease_counts(predicted, _classes(ordered, "reference_labels"))
    others = {}
    if all(row.get("held_out_labels") is not None for row in ordered):
        others["hacking_gap"] = disease_counts(
            _classes(ordered, "held_out_labels"), _classes(ordered, "held_out_reference_labels")
        )
    if all(row["drawn"] is not None for row in ordered):
        others["labeler_gap"] = disease_counts(*known_truth(predicted, [row["drawn"] for row in ordered]))
    return {name: np.concatenate([rewarded, counts], axis=1) for name, counts in others.items()}


def _classes(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.int64]:
    return np.array([classes_of_values(row[key]) for row in rows], dtype=np.int64)
