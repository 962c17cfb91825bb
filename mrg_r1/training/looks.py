"""How sure the choice of the best adapter is: validations of the same studies, compared study by study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import classes_of_values
from mrg_r1.metrics.identity import ids_hash
from mrg_r1.metrics.standard_error import f1_without_each, mean_without_each, standard_error


class Looks:
    """The first, the best and the last validation of a run: each its step, its score by `evaluation.select`, and the
    score without each study, of which differences between them have their standard error.

    Where the studies are others than before (a resume may change them), nothing can be compared with what was.

    Args:
        select: the score that chooses.
        state: of `state`, where a run goes on.
    """

    def __init__(self, select: str, state: Mapping[str, Any] | None = None) -> None:
        self._select = select
        self.state: dict[str, Any] = dict(state or {})  # plain JSON values, for a checkpoint

    def take(
        self, step: int, score: float, rows: Sequence[Mapping[str, Any]], *, best: bool
    ) -> dict[str, float | None]:
        """Take in a validation.

        Args:
            rows: its predictions.
            best: it is the best so far.

        Returns:
            Metrics: the score's standard error, its difference to the best before it, and the difference's standard
            error; None where there is nothing to compare with.
        """
        rows = sorted(rows, key=lambda row: str(row["id"]))
        studies = ids_hash([row["id"] for row in rows])
        if self.state.get("studies") != studies:
            self.state = {"studies": studies}
        look = {"step": step, "score": score, "without": _without_each(rows, self._select).tolist()}
        before = self.state.get("best")
        over = {"difference": None, "standard_error": None} if before is None else _over(look, before)
        self.state |= {"start": self.state.get("start", look), "last": look, "best": look if best else before}
        return {
            "validation/standard_error": standard_error(np.array(look["without"])),
            "validation/over_best": over["difference"],
            "validation/over_best_standard_error": over["standard_error"],
        }

    def closing(self, best: Mapping[str, Any]) -> dict[str, Any]:
        """What summary.json says of the best adapter besides step and score: the score's standard error, and what the
        choice gained over the last validation and over the first, each with its `step`, `difference` and
        `standard_error`; nothing where these validations cannot be compared.
        """
        chosen = self.state.get("best")
        if chosen is None or chosen["step"] != best["step"]:
            return {}
        return {
            "studies": len(chosen["without"]),
            "standard_error": standard_error(np.array(chosen["without"])),
            "over_last": _over(chosen, self.state["last"]),
            "over_first": _over(chosen, self.state["start"]),
        }


def in_words(best: Mapping[str, Any], select: str) -> str:
    """The choice and how sure it is, of a `best` that has what `Looks.closing` adds."""
    over = {
        name: f"{gain['difference']:+.3f}{plus_minus(gain['standard_error'])} over the {what}, step {gain['step']}"
        for name, what in (("over_last", "last"), ("over_first", "first"))
        if (gain := best[name])["step"] != best["step"]
    }
    text = f"best adapter: step {best['step']}, validation's {select} {best['score']:.3f}"
    text = "; ".join([text + plus_minus(best["standard_error"]), *over.values()])
    gain = best["over_first"]
    difference, error = gain["difference"], gain["standard_error"]
    if "over_first" in over and error is not None and 0 < difference <= error:
        enough = math.ceil(best["studies"] * (2 * error / difference) ** 2)
        text += (
            f". The best is within one standard error of the first: {best['studies']} validation studies do not tell "
            f"them apart, about {enough:,} would (evaluation.max_studies)"
        )
    return text


def plus_minus(error: float | None) -> str:
    return "" if error is None else f" (standard error {error:.3f})"


def _without_each(rows: Sequence[Mapping[str, Any]], select: str) -> NDArray[np.float64]:
    """[N] scores without each of N studies."""
    if select == "mean_reward":
        return mean_without_each(np.array([row["total"] for row in rows], dtype=np.float64))
    predicted, reference = (
        np.array([classes_of_values(row[key]) for row in rows], dtype=np.int64)
        for key in ("labels", "reference_labels")
    )
    return f1_without_each(predicted, reference, select)


def _over(look: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """By how much a validation is above another of the same studies, and how sure that is."""
    return {
        "step": other["step"],
        "difference": look["score"] - other["score"],
        "standard_error": standard_error(np.array(look["without"]) - np.array(other["without"])),
    }
