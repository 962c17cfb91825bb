"""Percentile intervals by multinomial weights equal those of resampled arrays."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mrg_r1.metrics import bootstrap
from mrg_r1.metrics.bootstrap import bootstrap_intervals
from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores
from tests.metrics.test_clinical import drawn_classes


def test_intervals_equal_those_of_arrays_resampled_one_by_one() -> None:
    predicted, reference = drawn_classes(25, 0), drawn_classes(25, 1)
    predicted[:12] = reference[:12]
    intervals = bootstrap_intervals(predicted, reference, samples=60, seed=7)
    drawn = np.random.default_rng(7).integers(25, size=(60, 25))
    strict = [(reference == 1).astype(int), (predicted == 1).astype(int)]
    lenient = [np.isin(reference, (1, 3)).astype(int), np.isin(predicted, (1, 3)).astype(int)]
    for name, pair, mean in (
        ("r2gen_micro14", strict, "micro"),
        ("r2gen_macro14", strict, "macro"),
        ("example14", strict, "samples"),
        ("chexbert_weighted14", lenient, "weighted"),
    ):
        resampled = [f1_score(pair[0][rows], pair[1][rows], average=mean, zero_division=0) for rows in drawn]
        assert intervals[name] == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5]))), name


def test_chunks_do_not_change_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, reference = drawn_classes(37, 2), drawn_classes(37, 3)
    whole = bootstrap_intervals(predicted, reference, samples=50, seed=1)
    monkeypatch.setattr(bootstrap, "_CELLS", 37 * 7)
    assert bootstrap_intervals(predicted, reference, samples=50, seed=1) == whole


def test_the_seed_decides_and_the_estimate_lies_inside() -> None:
    predicted, reference = drawn_classes(200, 4), drawn_classes(200, 5)
    predicted[:100] = reference[:100]
    intervals = bootstrap_intervals(predicted, reference, samples=300, seed=0)
    assert intervals == bootstrap_intervals(predicted, reference, samples=300, seed=0)
    assert intervals != bootstrap_intervals(predicted, reference, samples=300, seed=1)
    scores = clinical_scores(predicted, reference)
    assert list(intervals) == list(DEFINITIONS)
    for name, (low, high) in intervals.items():
        assert low < scores[name].f1 < high, name


def test_a_certain_score_has_an_interval_of_no_width() -> None:
    reference = np.ones((10, 14), dtype=np.int64)
    for interval in bootstrap_intervals(reference, reference, samples=20).values():
        assert interval == pytest.approx((1.0, 1.0))


def test_a_test_split_takes_well_under_two_seconds() -> None:
    predicted, reference = drawn_classes(590, 6), drawn_classes(590, 7)
    began = time.process_time()
    bootstrap_intervals(predicted, reference, samples=1000)
    assert time.process_time() - began < 2.0


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        bootstrap_intervals(drawn_classes(3, 0), drawn_classes(3, 1), samples=0)
