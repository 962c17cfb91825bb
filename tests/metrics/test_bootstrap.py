"""Percentile intervals by multinomial weights equal those of resampled arrays."""

from __future__ import annotations

import numpy as np
import pytest

from mrg_r1.metrics import bootstrap
from mrg_r1.metrics.bootstrap import bootstrap_intervals, paired_differences
from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores
from tests.metrics.test_clinical import NAMES, drawn_classes, oracle


def test_intervals_equal_those_of_arrays_resampled_one_by_one() -> None:
    predicted, reference = drawn_classes(25, 0), drawn_classes(25, 1)
    predicted[:12] = reference[:12]
    intervals = bootstrap_intervals(predicted, reference, samples=60, seed=7)
    resampled = [
        oracle(predicted[rows], reference[rows]) for rows in np.random.default_rng(7).integers(25, size=(60, 25))
    ]
    for name in NAMES:
        expected = np.percentile([scores[name][2] for scores in resampled], [2.5, 97.5])
        assert intervals[name] == pytest.approx(tuple(expected), abs=1e-12), name


def test_differences_equal_those_of_arrays_resampled_one_by_one() -> None:
    reference, first, second = (drawn_classes(30, seed) for seed in (1, 2, 3))
    second[:15] = reference[:15]
    first[:9] = reference[:9]
    found = paired_differences(first, second, reference, samples=40, seed=5)
    drawn = np.random.default_rng(5).integers(30, size=(40, 30))
    resampled = [(oracle(first[rows], reference[rows]), oracle(second[rows], reference[rows])) for rows in drawn]
    assert list(found) == NAMES
    for name in NAMES:
        differences = np.array([b[name][2] - a[name][2] for a, b in resampled])
        assert found[name].ci == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), abs=1e-12), name
        tail = 1 + min((differences <= 1e-13).sum(), (differences >= -1e-13).sum())
        assert found[name].p == pytest.approx(min(1, 2 * tail / 41)), name
        a, b = (oracle(system, reference)[name][2] for system in (first, second))
        assert (found[name].first, found[name].second, found[name].difference) == pytest.approx((a, b, b - a)), name


def test_a_system_against_itself_differs_by_exactly_nothing() -> None:
    predicted, reference = drawn_classes(40, 1), drawn_classes(40, 2)
    for difference in paired_differences(predicted, predicted, reference, samples=50).values():
        assert (difference.difference, difference.ci, difference.p, difference.excludes_zero) == (0, (0, 0), 1, False)


def test_the_two_systems_share_their_resamples() -> None:
    """One study more that is right moves every resample one way; unpaired, the interval would be as wide as the F1's
    own.
    """
    reference = drawn_classes(300, 1, positive=0.3)
    first = np.where(np.arange(300)[:, None] < 150, reference, drawn_classes(300, 2, positive=0.3))
    second = np.where(np.arange(300)[:, None] < 190, reference, first)
    found = paired_differences(first, second, reference, samples=400, seed=3)["r2gen_micro14"]
    own = bootstrap_intervals(second, reference, samples=400, seed=3)["r2gen_micro14"]
    assert (
        found.excludes_zero
        and found.p == pytest.approx(2 / 401)
        and found.ci[1] - found.ci[0] < 1.2 * (own[1] - own[0])
    )
    turned = paired_differences(second, first, reference, samples=400, seed=3)["r2gen_micro14"]
    assert turned.ci == pytest.approx((-found.ci[1], -found.ci[0])) and turned.p == found.p


def test_an_interval_that_ends_at_zero_does_not_exclude_it() -> None:
    reference = np.zeros((40, 14), dtype=np.int64)
    reference[:, 1] = 1
    first, second = reference.copy(), reference.copy()
    first[0, 1] = 0  # in a third of the resamples this study is not there, and the systems are equal
    found = paired_differences(first, second, reference, samples=400, seed=0)["chexbert_micro5"]
    assert found.difference > 0 and found.ci[0] == 0 and not found.excludes_zero and found.p > 0.5


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


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        bootstrap_intervals(drawn_classes(3, 0), drawn_classes(3, 1), samples=0)


def test_systems_of_unequal_studies_are_refused() -> None:
    with pytest.raises(ValueError, match="4 .*3 "):
        paired_differences(drawn_classes(3, 0), drawn_classes(4, 1), drawn_classes(3, 2), samples=2)


def test_every_sample_is_shown_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_CELLS", 10 * 4)
    seen: list[int] = []

    def shown(chunks):  # type: ignore[no-untyped-def]
        seen.extend(chunks)
        return chunks

    bootstrap_intervals(drawn_classes(10, 0), drawn_classes(10, 1), samples=9, shown=shown)
    assert seen == [0, 4, 8]
