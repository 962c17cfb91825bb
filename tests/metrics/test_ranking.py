"""Areas under the ROC curve, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mrg_r1.metrics.ranking import auc


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_is_scikit_learns_with_and_without_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(20):
        truth = rng.random(60) < 0.3
        scores = rng.integers(levels, size=60) + truth
        assert auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_auc_of_extremes() -> None:
    assert auc([0.1, 0.2, 0.9], [False, False, True]) == 1.0
    assert auc([0.9, 0.2, 0.1], [False, False, True]) == 0.0
    assert auc([1.0, 1.0, 1.0, 1.0], [True, False, True, False]) == 0.5
    assert auc([0.1, 0.2], [True, True]) is None and auc([], []) is None


@pytest.mark.parametrize(
    ("scores", "truth", "said"),
    [([0.1], [True, False], "shape"), ([[0.1]], [[True]], "shape"), ([0.1, float("nan")], [True, False], "finite")],
)
def test_what_has_no_order_is_refused(scores: list[float], truth: list[bool], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        auc(scores, truth)
