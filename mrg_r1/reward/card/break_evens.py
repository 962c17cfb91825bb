"""At which probability a reward wants a finding said, denied, or passed over in silence (docs/method.md §2).

Labels of references enter, ranges of probabilities leave: a range an action, an observation, a term and a rest. Pure
numbers, no policy: tables are in `break_even_tables`, what is left of them under `grpo.advantage_scale` is in
`after_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import BLANK, NEGATIVE, NO_FINDING, POSITIVE, UNCERTAIN, signed_vector
from mrg_r1.metrics.clinical import check_classes
from mrg_r1.reward.additive import FINDINGS, additive
from mrg_r1.reward.terms import Floats, ccs, ce_f1, mccs

Classes = NDArray[np.int64]
Rest = Literal["right", "constant"]
Range = tuple[float, float]

RESTS: tuple[Rest, ...] = ("right", "constant")
ACTIONS = {"say": POSITIVE, "deny": NEGATIVE, "silence": BLANK}
_TIE = 1e-6  # rewards are float32: what differs by less is equal


@dataclass(frozen=True)
class LabelTerm:
    """A reward term that is a function of labels.

    Attributes:
        name: with its parameter, such as "mccs 0.5".
        score: [N, 14] classes of reports and of references -> [N] rewards.
        present: the classes of a reference in which a finding is there, by this term.
    """

    name: str
    score: Callable[[Classes, Classes], Floats]
    present: tuple[int, ...] = (POSITIVE, UNCERTAIN)


@dataclass(frozen=True)
class BreakEven:
    """What pays for one observation, by the probability p that its reference says it.

    Attributes:
        say_from: the p from which saying earns more than denying and than silence; None where it never does.
        say, deny, silence: the range of p in which that earns the most (of equals each does), or None.
    """

    say_from: float | None
    say: Range | None
    deny: Range | None
    silence: Range | None


# observation -> break-even; None where no reference says it, or all do
ByObservation = dict[str, BreakEven | None]


@dataclass(frozen=True)
class BreakEvens:
    """Of one term: by the rest of the report, by observation."""

    term: str
    by_rest: Mapping[Rest, ByObservation]


def label_terms(margins: Sequence[float], threshold: float) -> list[LabelTerm]:
    """MCCS at each margin, CCS, CE-F1, and additive at a threshold for all observations."""
    thresholds = np.full(NO_FINDING, threshold)
    return [
        *(LabelTerm(f"mccs {margin:g}", _mccs_at(margin)) for margin in margins),
        LabelTerm("ccs", lambda a, b: ccs(signed_vector(a), signed_vector(b))),
        LabelTerm("ce_f1", ce_f1, present=(POSITIVE,)),
        LabelTerm(f"additive {threshold:.3g}", lambda a, b: additive(signed_vector(a), signed_vector(b), thresholds)),
    ]


def break_evens(classes: Classes, terms: Sequence[LabelTerm], constant: Sequence[int]) -> list[BreakEvens]:
    """Where each term's actions pay, exactly.

    With probability p a study's reference says the observation: then it is one of the references that do. Else it is
    one of the others, which deny it or do not name it as often as in the data. Earnings are means over those
    references, and so straight lines in p.

    Args:
        classes: [N, 14] of the references.
        terms: from `label_terms`.
        constant: 13 signs of the constant report.

    Returns:
        One a term. Rest `right`: of every other observation the report says what its reference says; `constant`: what
        the constant report says.

    Raises:
        ValueError: no studies, wrong shapes or classes.
    """
    check_classes(classes, classes)
    references, counts = np.unique(classes, axis=0, return_counts=True)
    rests = {"right": references, "constant": np.broadcast_to(classes_of_signs(constant), references.shape)}
    return [
        BreakEvens(
            term.name,
            {
                rest: {
                    name: _break_even(term, references, counts, rests[rest], column)
                    for column, name in enumerate(FINDINGS)
                }
                for rest in RESTS
            },
        )
        for term in terms
    ]


def classes_of_signs(signs: Sequence[int]) -> Classes:
    """13 signs -> 14 classes: said, denied, blank."""
    return np.array([*({1: POSITIVE, -1: NEGATIVE, 0: BLANK}[int(sign)] for sign in signs), BLANK], dtype=np.int64)


def ranges(lines: Mapping[str, tuple[float, float]]) -> BreakEven:
    """Where each of say, deny and silence earns the most.

    Args:
        lines: action -> what it earns where the finding is there (p = 1) and where it is not (p = 0).
    """
    best = {action: _best_range(action, lines) for action in ACTIONS}
    there = lines["say"][0]
    pays = best["say"] is not None and all(there > lines[other][0] + _TIE for other in ("deny", "silence"))
    return BreakEven(say_from=best["say"][0] if pays and best["say"] else None, **best)


def _mccs_at(margin: float) -> Callable[[Classes, Classes], Floats]:
    return lambda a, b: mccs(ccs(signed_vector(a), signed_vector(b)), margin)


def _break_even(
    term: LabelTerm, references: Classes, counts: NDArray[np.int64], rest: Classes, column: int
) -> BreakEven | None:
    there = np.isin(references[:, column], term.present)
    if there.all() or not there.any():
        return None
    lines = {}
    for action, label in ACTIONS.items():
        reports = rest.copy()
        reports[:, column] = label
        earned = term.score(reports, references).astype(np.float64)
        with_it, without = (float(np.average(earned[rows], weights=counts[rows])) for rows in (there, ~there))
        lines[action] = (with_it, without)
    return ranges(lines)


def _best_range(action: str, lines: Mapping[str, tuple[float, float]]) -> Range | None:
    low, high = 0.0, 1.0
    for other in lines.keys() - {action}:
        ahead = [mine - its for mine, its in zip(lines[action], lines[other], strict=True)]  # at p = 1 and at p = 0
        at_one, at_zero = (0.0 if abs(by) <= _TIE else by for by in ahead)
        if at_one < 0 and at_zero < 0:
            return None
        if at_one >= 0 and at_zero >= 0:
            continue
        crossing = at_zero / (at_zero - at_one)
        low, high = (max(low, crossing), high) if at_one > at_zero else (low, min(high, crossing))
    return (low, high) if high - low > _TIE else None
