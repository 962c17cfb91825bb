"""The term `additive` (ours): a sum over observations whose break-even is a number that is chosen (docs/method.md §2).

Signed vectors and thresholds in, one float32 a report out; and which threshold micro F1 over the 13 diseases wants.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, POSITIVE

FINDINGS = OBSERVATIONS[:NO_FINDING]
# What a denial is worth beside saying: 1/10. Large enough that a stated negative is told from silence, and so small
# that a report's denials together, four or five of them, weigh less than one finding.
DENIAL = 0.1


def additive(
    generated: NDArray[np.int8], reference: NDArray[np.int8], thresholds: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Mean over the 13 observations of a utility with threshold t, each observation's own.

    | the report | the reference says it | denies it | is silent |
    |---|---|---|---|
    | says it | 1 - t | -t | -t |
    | denies it | -0.1 (1 - t) | 0.1 t | 0 |
    | is silent | 0 | 0 | 0 |

    With p the probability that the reference says the finding, saying earns p - t, silence 0, and denying at most
    0.1 (t - p): below t saying earns less than silence, above t denying does. So saying pays from exactly p = t on,
    whatever the rest of the report and of the reference is, and however often references that do not say the finding
    deny it. Below t denying pays where t P(denied) > (1 - t) p, else silence.

    >>> vectors = np.array([[1, -1] + [0] * 11, [0] * 13], dtype=np.int8)
    >>> additive(vectors, vectors[[0, 0]], np.full(13, 0.4)) * 13
    array([0.64, 0.  ], dtype=float32)

    Args:
        generated: [N, 13] int8 in {-1, 0, 1}, from `mrg_r1.labels.observations.signed_vector`: uncertain is +1, said.
        reference: [N, 13] int8, likewise.
        thresholds: [13] t of each observation, 0 < t < 1.

    Returns:
        [N] float32 between -1 and 1. The sum is divided by 13 and by nothing else: a finding weighs the same in every
        report, at most 1/13.

    Raises:
        ValueError: shapes that are not equal [N, 13], or thresholds that are not 13 numbers between 0 and 1.
    """
    if generated.shape != reference.shape or generated.ndim != 2 or generated.shape[1] != NO_FINDING:
        raise ValueError(
            f"signed vectors of shape {generated.shape} and {reference.shape}; expected the same [N, {NO_FINDING}]"
        )
    if thresholds.shape != (NO_FINDING,) or not ((thresholds > 0) & (thresholds < 1)).all():
        raise ValueError(f"thresholds {thresholds}; expected {NO_FINDING} numbers between 0 and 1")
    there, denied = (reference > 0).astype(np.float64), (reference < 0).astype(np.float64)
    said = there - thresholds  # what saying earns
    denying = DENIAL * (thresholds * denied - (1 - thresholds) * there)
    utility = np.where(generated > 0, said, np.where(generated < 0, denying, 0.0))
    return (utility.sum(axis=1) / NO_FINDING).astype(np.float32)


def require_threshold(threshold: object) -> None:
    """Refuse what is no `reward.threshold`: None, "auto", a number between 0 and 1, or one for each observation.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if threshold is None or threshold == "auto":
        return
    if not isinstance(threshold, Mapping):
        _require_probability("reward.threshold", threshold)
        return
    unknown = [str(name) for name in threshold if name not in FINDINGS]
    missing = [name for name in FINDINGS if name not in threshold]
    if unknown:
        raise ValueError(
            f"reward.threshold: unknown observation {', '.join(unknown)}; the 13 are {', '.join(FINDINGS)}"
        )
    if missing:
        raise ValueError(
            f"reward.threshold: none for {', '.join(missing)}; give all 13 observations one, or one number for all"
        )
    for name, value in threshold.items():
        _require_probability(f"reward.threshold of {name}", value)


def _require_probability(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{what} {value!r}: expected a number above 0 and below 1, or auto for all observations")


def blind_f1(classes: NDArray[np.int64]) -> float:
    """The best micro F1 over the 13 diseases (`disease_micro13`) of one answer given to every study.

    Args:
        classes: [N, 14] classes of the references; positive is class 1 alone, as in that score.

    Returns:
        2 TP / (said + positives) of the observations that are best said of everybody, the k most frequent ones for some
        k; 0 where nothing is positive.
    """
    positives = np.sort((classes[:, :NO_FINDING] == POSITIVE).sum(axis=0))[::-1]  # [13]
    said = len(classes) * np.arange(1, NO_FINDING + 1)
    return float((2 * positives.cumsum() / (said + positives.sum())).max())


def attainable_f1(classes: NDArray[np.int64]) -> float:
    """What `disease_micro13` is taken to be within reach where nothing but labels is known: the middle between the best
    answer that does not look and 1 (ours). A number that was reached is better.

    Raises:
        ValueError: no reference has a positive finding.
    """
    blind = blind_f1(classes)
    if blind == 0:
        raise ValueError(
            "no reference has a positive finding, so that no F1 within reach can be taken from them; give a number "
            "instead (reward.threshold, --f1)"
        )
    return (blind + 1) / 2


def f1_threshold(f1: float) -> float:
    """The probability from which a score whose best micro F1 is `f1` wants a finding said: half of it.

    With D findings said or true and TP of them both, F = 2 TP / D. Saying one more of probability p makes it
    (2 TP + 2 p) / (D + 1), which is more just where 2 p > F. At the optimum that holds of all that are said and of
    none that are not.

    Source: Lipton, Elkan and Narayanaswamy, 2014 (arXiv 1402.1892), for calibrated probabilities. Micro F1 is the F1 of
    all pairs of a study and an observation, so that one threshold serves them all.
    """
    return f1 / 2
