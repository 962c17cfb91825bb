"""The gap of two readers and its change, against counts done by hand and an interval that is known."""

from __future__ import annotations

import numpy as np
import pytest

from mrg_r1.metrics.clinical import clinical_scores
from mrg_r1.metrics.gap import disease_counts, gap_change


def test_counts_are_those_of_disease_micro13():
    rng = np.random.default_rng(0)
    predicted, reference = (
        np.concatenate([rng.integers(0, 4, (40, 13)), rng.integers(0, 2, (40, 1))], axis=1) for _ in range(2)
    )
    hits, invented, missed = disease_counts(predicted, reference).sum(axis=0)
    assert 2 * hits / (2 * hits + invented + missed) == pytest.approx(
        clinical_scores(predicted, reference)["disease_micro13"].f1
    )
    only_no_finding = np.zeros((1, 14), dtype=int)
    only_no_finding[0, 13] = 1
    assert disease_counts(only_no_finding, only_no_finding).tolist() == [[0, 0, 0]]  # No Finding is no disease


def test_the_change_is_a_difference_of_differences():
    hit, missed = [1, 0, 0], [0, 0, 1]
    first = np.array([hit + hit, missed + missed])  # both read 2/3
    now = np.array([hit + missed, hit + hit])  # 1 by the first, 2/3 by the second
    found = gap_change(first, now)
    assert (found.first, found.now, found.change) == (pytest.approx(0), pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_what_both_evaluations_share_is_no_uncertainty_of_the_change():
    """Paired: studies on which the readers differ at first as now have a wide gap, and no change at all, whichever are
    drawn.
    """
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, (60, 6))
    found = gap_change(counts, counts)
    assert found.first != 0 and found.change == 0 and found.ci == (0, 0)


def test_the_interval_is_that_of_the_binomial_where_f1_is_linear():
    """The second reader loses every hit of a share p of the studies; with 2 hits + misses fixed, F1 is linear in the
    sum of losses.
    """
    studies, lost = 400, 100
    first = np.tile([1, 0, 1, 1, 0, 1], (studies, 1))  # F1 = 2 / 3 by both
    now = first.copy()
    now[:lost, 3:] = [0, 2, 1]  # 2 tp + fp + fn stays 3: F1 falls by 2/3 a study lost, over all studies
    found = gap_change(first, now)
    share, normal = lost / studies, 2.5758
    half = normal * 2 / 3 * np.sqrt(share * (1 - share) / studies)
    assert found.change == pytest.approx(2 / 3 * share) and found.ci == pytest.approx(
        (found.change - half, found.change + half), abs=0.004
    )


def test_other_studies_are_refused():
    with pytest.raises(ValueError):
        gap_change(np.zeros((3, 6), dtype=int), np.zeros((4, 6), dtype=int))
