"""Clinical efficacy under every published definition (docs/method.md §4): label arrays enter, named precision, recall
and F1 leave.

Everything is computed from counts per study and observation (true positives, false positives, false negatives), so that
the bootstrap is a product of study weights and the same counts. Where each definition is from stands with it, in
`DEFINITIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import (
    BLANK,
    CLASSES_PER_OBSERVATION,
    FIVE,
    NO_FINDING,
    OBSERVATIONS,
    POSITIVE,
    UNCERTAIN,
    classes_of_values,
)

ALL = tuple(range(len(OBSERVATIONS)))
DISEASES = tuple(range(NO_FINDING))  # without No Finding

Average = Literal["micro", "macro", "weighted", "example"]


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1, each in [0, 1]; 0/0 is 0. `f1` is the mean of per-label (per-report) F1 where the
    average is a mean.
    """

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Definition:
    """How a published number is computed."""

    labels: tuple[int, ...]
    positive: tuple[int, ...]  # the classes that count as positive, `STRICT` or `LENIENT`
    average: Average
    source: str

    def described(self) -> dict[str, object]:
        """The definition in words, as a score card has it; two numbers are comparable only if these are equal."""
        return {
            "observations": [OBSERVATIONS[label] for label in self.labels],
            "uncertain": "positive" if UNCERTAIN in self.positive else "not positive",
            "average": self.average,
            "zero_division": 0,
            "source": self.source,
        }


STRICT: tuple[int, ...] = (POSITIVE,)
LENIENT: tuple[int, ...] = (POSITIVE, UNCERTAIN)
_R2GEN = "R2Gen, compute_ce.py: uncertain and blank become 0, scikit-learn's mean over 14 labels"
_EXAMPLE = "PromptMRG and CvT2DistilGPT2: mean over reports of per-report values, 0/0 = 0"
_CHEXBERT = "f1chexbert 0.0.2 and RadEval: scikit-learn's classification_report, uncertain becomes 1"
_DISEASE = "ours: without No Finding, which hides misses where most studies are normal"

DEFINITIONS: dict[str, Definition] = {
    "r2gen_macro14": Definition(ALL, STRICT, "macro", _R2GEN),
    "r2gen_micro14": Definition(ALL, STRICT, "micro", _R2GEN),
    "example14": Definition(ALL, STRICT, "example", _EXAMPLE),
    "chexbert_micro14": Definition(ALL, LENIENT, "micro", _CHEXBERT),
    "chexbert_macro14": Definition(ALL, LENIENT, "macro", _CHEXBERT),
    "chexbert_micro5": Definition(FIVE, LENIENT, "micro", _CHEXBERT),
    "chexbert_macro5": Definition(FIVE, LENIENT, "macro", _CHEXBERT),
    "chexbert_weighted14": Definition(ALL, LENIENT, "weighted", _CHEXBERT),
    "disease_micro13": Definition(DISEASES, STRICT, "micro", _DISEASE),
    "disease_macro13": Definition(DISEASES, STRICT, "macro", _DISEASE),
}


def clinical_scores(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> dict[str, Score]:
    """Every definition of docs/method.md §4.

    Args:
        predicted: [N, 14] integer classes (0 blank, 1 positive, 2 negative, 3 uncertain) of the generated reports.
        reference: [N, 14], of the radiologists' reports, in the same order.

    Returns:
        Score by definition, in `DEFINITIONS`' order.

    Raises:
        ValueError: no study, unequal or wrong shapes, or a class that an observation does not have.
    """
    check_classes(predicted, reference)
    counts = {positive: study_counts(predicted, reference, positive) for positive in (STRICT, LENIENT)}
    scores = {}
    for name, definition in DEFINITIONS.items():
        of_studies = counts[definition.positive]
        if definition.average == "example":
            rates = example_rates(of_studies[:, :, list(definition.labels)])
            scores[name] = Score(*(float(rate.mean()) for rate in rates))
        else:
            totals = of_studies.sum(axis=1, dtype=np.float64)[:, None]  # [3, 1, 14]
            scores[name] = Score(*(float(rate[0]) for rate in average_totals(totals, definition)))
    return scores


def support(reference: NDArray[np.int64]) -> dict[str, int]:
    """The number of studies in which each observation is positive (class 1), of [N, 14] classes."""
    check_classes(reference, reference)
    return dict(zip(OBSERVATIONS, (reference == POSITIVE).sum(axis=0).tolist(), strict=True))


def per_observation(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> dict[str, Score]:
    """Precision, recall and F1 of each observation alone, class 1 as positive, of [N, 14] classes each."""
    check_classes(predicted, reference)
    totals = study_counts(predicted, reference, STRICT).sum(axis=1, dtype=np.float64)  # [3, 14]
    rates = zip(*(rate.tolist() for rate in _rates(*totals)), strict=True)
    return {name: Score(*rate) for name, rate in zip(OBSERVATIONS, rates, strict=True)}


def truth_scores(predicted: NDArray[np.int64], drawn: Sequence[Sequence[int | None]]) -> dict[str, Score]:
    """`disease_micro13` and `disease_macro13` against what a phantom was rendered from rather than what a labeler
    reads.

    A policy that fools its labeler (docs/traps.md #26) scores high in `clinical_scores` and low here.

    Args:
        predicted: [N, 14] integer classes of the generated reports.
        drawn: N rows of 14 file values: 1 is there, 0 is not, -1 uncertain (no positive, as class 3 under class 1),
            None unknown and left out of the counts of its study.

    Raises:
        ValueError: as `clinical_scores`, or a value other than 1, 0, -1 and None.
    """
    blanked, truth = known_truth(predicted, drawn)
    scores = clinical_scores(blanked, truth)
    return {name: scores[name] for name in ("disease_micro13", "disease_macro13")}


def known_truth(
    predicted: NDArray[np.int64], drawn: Sequence[Sequence[int | None]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[N, 14] predicted and [N, 14] true classes, both blank where the truth is not known; arguments and errors as
    `truth_scores`.
    """
    # [N, 14]
    truth = np.array([classes_of_values(row) for row in drawn], dtype=np.int64).reshape(-1, len(OBSERVATIONS))
    known = np.array([[value is not None for value in row] for row in drawn], dtype=bool).reshape(-1, len(OBSERVATIONS))
    check_classes(predicted, truth)
    return np.where(
        known, predicted, BLANK
    ), truth  # there neither a true nor a false positive, and the truth is blank already


def study_counts(
    predicted: NDArray[np.int64], reference: NDArray[np.int64], positive: tuple[int, ...]
) -> NDArray[np.bool_]:
    """[3, N, 14] true positives, false positives and false negatives of each study and observation, `positive` the
    classes that count.
    """
    said, true = np.isin(predicted, positive), np.isin(reference, positive)
    return np.stack([said & true, said & ~true, ~said & true])


def average_totals(
    totals: NDArray[np.float64], definition: Definition
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and F1 of counts that are summed over studies: every average but `example`.

    Args:
        totals: [3, S, 14] float64, S sums of `study_counts` over studies.
        definition: micro (of the labels' summed counts), macro (mean over labels) or weighted (mean over labels by
            their positives in the reference).

    Returns:
        Three arrays [S].
    """
    tp, fp, fn = totals[:, :, list(definition.labels)]  # [S, L]
    if definition.average == "micro":
        return _rates(tp.sum(axis=1), fp.sum(axis=1), fn.sum(axis=1))
    rates = _rates(tp, fp, fn)
    if definition.average == "macro":
        return rates[0].mean(axis=1), rates[1].mean(axis=1), rates[2].mean(axis=1)
    positives = tp + fn
    share = _divide(positives, positives.sum(axis=1, keepdims=True))
    return (rates[0] * share).sum(axis=1), (rates[1] * share).sum(axis=1), (rates[2] * share).sum(axis=1)


def example_rates(counts: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and F1 [N] of each study alone, of its `study_counts` [3, N, L]; 0/0 is 0."""
    return _rates(*counts.sum(axis=2, dtype=np.float64))


def check_classes(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> None:
    """Raise ValueError unless both are [N, 14] integer classes, N > 0, that the observations have."""
    for name, classes in (("predicted", predicted), ("reference", reference)):
        if classes.ndim != 2 or classes.shape[1] != len(OBSERVATIONS):
            raise ValueError(f"{name}: shape {classes.shape}; expected [N, {len(OBSERVATIONS)}]")
        if not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(f"{name}: dtype {classes.dtype}; expected integer classes")
        wrong = (classes < 0) | (classes >= np.array(CLASSES_PER_OBSERVATION))
        if wrong.any():
            row, column = (int(index) for index in np.argwhere(wrong)[0])
            raise ValueError(
                f"{name}: study {row}, {OBSERVATIONS[column]}: class {classes[row, column]}; "
                f"it has the classes 0 to {CLASSES_PER_OBSERVATION[column] - 1}"
            )
    if len(predicted) != len(reference):
        raise ValueError(
            f"{len(predicted)} predicted and {len(reference)} reference studies; they are compared row by row"
        )
    if len(predicted) == 0:
        raise ValueError("no study to score")


def _rates(
    tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    return _divide(tp, tp + fp), _divide(tp, tp + fn), _divide(2 * tp, 2 * tp + fp + fn)


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient with 0/0 = 0."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
