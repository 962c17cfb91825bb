"""The reward card: what a policy can earn without looking at a radiograph (docs/method.md §2).

Classes of the reference reports enter, what constant and random answers earn at every margin leaves. Pure numbers:
tables are in `card_tables`, the picture in `card_picture`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, signed_vector
from mrg_r1.metrics.clinical import check_classes
from mrg_r1.reward.card.search import (
    ZERO,
    Distinct,
    additive_of_constants,
    ce_f1_of_constants,
    distinct,
    earned_by_constants,
    earned_under_weights,
)
from mrg_r1.reward.terms import ccs, mccs

MARGINS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(20))
SUGGESTION = (
    "the smallest multiple of 0.05 at which a random report (another study's reference) earns zero for at least "
    "half of the pairs: a policy that does not look samples such reports, and on average half of each of its "
    "groups is then told from the other half"
)
_STATES = ("blank", "positive", "negative", "uncertain")  # by class
_FEW_VECTORS = 3000  # distinct references, of which all pairs take less time (0.4 s) than all 3^13 reports (3 s)
# arXiv 2512.16145's weights; a constant report always keeps the format
_MCCS_WEIGHT, _FORMAT_WEIGHT = 0.75, 0.25


@dataclass(frozen=True)
class Constant:
    """One report given to every study."""

    says: tuple[str, ...]  # "Cardiomegaly" or "no Cardiomegaly", in CheXbert's order
    vector: tuple[int, ...]  # 13 signs
    mean: float  # mean MCCS
    zeros: float  # share of the references for which it earns zero
    total: float  # mean reward, 0.75 MCCS + 0.25 format
    study: str | None = None  # id of a study whose reference says just this; None for the best of all vectors


@dataclass(frozen=True)
class AtMargin:
    """What not looking earns at one margin."""

    margin: float
    constant: Constant  # the best of all 3^13
    real: Constant  # the best of the reports; of the references where labels are all that there is
    random_mean: float | None  # mean MCCS of another study's reference; None where there is one study only
    random_zeros: float | None  # share of those pairs that earn zero


@dataclass(frozen=True)
class RewardCard:
    """What a policy can earn without looking.

    Attributes:
        n: studies.
        distinct: different signed vectors among their references.
        silent: share of the references whose signed vector is zero.
        both_silent: share of the pairs of different studies in which both are; None where there is one study only.
        random_ccs: mean CCS over those pairs, or None.
        suggested_margin: by `SUGGESTION`; None where no margin reaches it (more than half of the pairs agree nearly or
            altogether).
        margins: in rising order.
        prevalence: observation -> counts of positive, negative, uncertain and blank.
    """

    n: int
    distinct: int
    silent: float
    both_silent: float | None
    random_ccs: float | None
    suggested_margin: float | None
    margins: tuple[AtMargin, ...]
    prevalence: dict[str, dict[str, int]]

    def at(self, margin: float) -> AtMargin:
        """The row of a margin; ValueError where the card was made without it."""
        for row in self.margins:
            if row.margin == margin:
                return row
        raise ValueError(f"margin {margin}: not on this card, which has {[row.margin for row in self.margins]}")


def reward_card(
    classes: NDArray[np.int64], ids: Sequence[str], texts: Sequence[str | None], margins: Sequence[float] = ()
) -> RewardCard:
    """What constant and random reports earn against these references, exactly.

    Args:
        classes: [N, 14] integer classes of the references.
        ids: N study ids.
        texts: N reference reports, None where a study has labels alone: it counts like any other, and the best real
            report is another's, if there is any report. They choose between studies that say the same.
        margins: further ones than the grid `MARGINS`, each 0 <= m < 1.

    Returns:
        The card. Expectations over random reports are over all ordered pairs of different studies.

    Raises:
        ValueError: no studies, wrong shapes or classes, unequal numbers of studies, or a margin outside [0, 1).
    """
    _check(classes, texts)
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} ids and {len(texts)} texts; give one of each a study")
    margins = sorted({*MARGINS, *margins})
    vectors = signed_vector(classes)
    references = distinct(vectors)
    earned = earned_by_constants(references, margins)
    n, counts = len(vectors), references.counts
    rows = []
    for m, margin in enumerate(margins):
        study = _best_study(earned.mean[:, m], references, texts)
        rows.append(
            AtMargin(
                margin=margin,
                constant=_constant(earned.best[m], vectors, margin),
                real=_constant(vectors[study], vectors, margin, study=ids[study]),
                random_mean=_of_another(earned.mean[:, m], counts, itself=1.0),
                random_zeros=_of_another(earned.zeros[:, m], counts, itself=0.0),
            )
        )
    silent = int((~vectors.any(axis=1)).sum())
    return RewardCard(
        n=n,
        distinct=len(counts),
        silent=silent / n,
        both_silent=silent * (silent - 1) / (n * (n - 1)) if n > 1 else None,
        random_ccs=_of_another(earned.ccs, counts, itself=1.0),
        suggested_margin=next(
            (row.margin for row in rows if row.margin in MARGINS and (row.random_zeros or 0) >= 0.5), None
        ),
        margins=tuple(rows),
        prevalence=_prevalence(classes),
    )


def best_real_constants(
    classes: NDArray[np.int64],
    texts: Sequence[str | None],
    margins: Sequence[float],
    *,
    ccs_weights: NDArray[np.float64] | None = None,
    of_mccs: float = 1.0,
    of_ccs: float = 0.0,
    of_ce_f1: float = 0.0,
    of_additive: float = 0.0,
    thresholds: NDArray[np.float64] | None = None,
) -> list[int]:
    """The references that earn the most when every study is answered with one of them, one for each margin.

    Args:
        classes: [N, 14] integer classes of the references.
        texts: N reference reports, None where a study has labels alone.
        margins: each 0 <= m < 1.
        ccs_weights: [13, 2] of `terms.ccs`; None: equal.
        of_mccs, of_ccs, of_ce_f1, of_additive: what counts is `of_mccs` MCCS + `of_ccs` CCS + `of_ce_f1` CE-F1 +
            `of_additive` additive.
        thresholds: [13] of `additive`; needed where `of_additive` is not 0.

    Returns:
        The studies they belong to, 0 to N - 1; of those that have a report, if any has one. What a study's own report
        earns of itself is in its mean. Of the studies with the best vector, the one with the most frequent text, then
        the shortest, then the first. A few seconds for 200,000 studies.

    Raises:
        ValueError: no studies, wrong shapes or classes, unequal numbers, or a margin outside [0, 1).
    """
    _check(classes, texts)
    references = distinct(signed_vector(classes))
    if ccs_weights is None and len(references.counts) > _FEW_VECTORS:
        earned = earned_by_constants(references, margins)
        mean, cosine = earned.mean, earned.ccs
    else:
        equal = np.ones((NO_FINDING, 2))
        mean, cosine = earned_under_weights(references, margins, equal if ccs_weights is None else ccs_weights)
    scores = of_mccs * mean + of_ccs * cosine[:, None]
    if of_additive:
        if thresholds is None:
            raise ValueError(f"of_additive {of_additive} without thresholds")
        scores = scores + of_additive * additive_of_constants(references, thresholds)[:, None]
    if of_ce_f1:
        # an uncertain finding has the sign of a positive one and is none to CE-F1: vectors are told apart by that too
        f1, sets = ce_f1_of_constants(classes)
        _, first, row_of_study, counts = np.unique(
            references.row_of_study * 2**NO_FINDING + sets, return_index=True, return_inverse=True, return_counts=True
        )
        of_first = references.row_of_study[first]
        scores = scores[of_first] + of_ce_f1 * f1[first, None]
        references = Distinct(references.vectors[of_first], counts, row_of_study)
    return [_best_study(scores[:, m], references, texts) for m in range(len(margins))]


def says(vector: Sequence[int]) -> tuple[str, ...]:
    """What 13 signs say: "Cardiomegaly" for a positive, "no Cardiomegaly" for a negative, nothing for a blank."""
    names = zip(OBSERVATIONS[:NO_FINDING], vector, strict=True)
    return tuple(name if sign > 0 else f"no {name}" for name, sign in names if sign)


def _check(classes: NDArray[np.int64], texts: Sequence[str | None]) -> None:
    check_classes(classes, classes)
    if len(texts) != len(classes):
        raise ValueError(f"{len(texts)} texts and {len(classes)} rows of classes; give one of each a study")


def _constant(vector: NDArray[np.int8], vectors: NDArray[np.int8], margin: float, study: str | None = None) -> Constant:
    """What `vector` [13] earns against [N, 13], by the reward's own functions."""
    rewards = mccs(ccs(np.broadcast_to(vector, vectors.shape), vectors), margin)
    mean = float(rewards.mean(dtype=np.float64))
    return Constant(
        says=says(vector.tolist()),
        vector=tuple(vector.tolist()),
        mean=mean,
        zeros=float((rewards <= ZERO).mean()),
        total=_MCCS_WEIGHT * mean + _FORMAT_WEIGHT,
        study=study,
    )


def _best_study(mean: NDArray[np.float64], references: Distinct, texts: Sequence[str | None]) -> int:
    """Whose vector earns the most, by [D] means; of equal vectors the one that most studies have. Of its studies the
    one whose text is the most frequent, then the shortest, then the first. Only what has a report can be the answer to
    every study; where nothing has one, every vector counts.
    """
    candidates = np.array([text is not None for text in texts])
    if not candidates.any():
        candidates[:] = True
    possible = np.unique(references.row_of_study[candidates])
    equals = possible[mean[possible] > mean[possible].max() - 1e-9]
    row = equals[np.argmax(references.counts[equals])]
    studies = np.flatnonzero((references.row_of_study == row) & candidates).tolist()
    frequency = Counter(texts[study] for study in studies)
    return int(min(studies, key=lambda study: (-frequency[texts[study]], len(texts[study] or ""), study)))


def _of_another(mean: NDArray[np.float64], counts: NDArray[np.int64], *, itself: float) -> float | None:
    """Means over all N references [D] -> the mean over ordered pairs of different studies: each study's pair with
    itself taken out.
    """
    n = int(counts.sum())
    if n == 1:
        return None
    # the rounding turns what is zero but for its last bit into 0
    return round((float(mean @ counts) - itself) / (n - 1), 12) + 0.0


def _prevalence(classes: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    shown = ("positive", "negative", "uncertain", "blank")
    return {
        name: {state: int((classes[:, column] == _STATES.index(state)).sum()) for state in shown}
        for column, name in enumerate(OBSERVATIONS)
    }
