"""The additive term: its break-even is the threshold, whatever else a report and its reference say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.reward.additive import (
    FINDINGS,
    additive,
    attainable_f1,
    blind_f1,
    f1_threshold,
    require_threshold,
)
from mrg_r1.reward.card.card import best_real_constants
from mrg_r1.reward.compute import RewardContext
from mrg_r1.reward.service.wire import context_of, pack, score_request, unpack
from mrg_r1.reward.terms import BUILT_IN, Scored

VECTORS = st.lists(st.sampled_from([-1, 0, 1]), min_size=13, max_size=13)
THRESHOLDS = st.lists(st.floats(0.02, 0.98), min_size=13, max_size=13)
SHARES = st.floats(0, 1)


def of(generated: list[int], reference: list[int], thresholds: list[float]) -> float:
    """One report's reward, before rounding to float32 and the mean over 13 spoil small differences."""
    vectors = (np.array([one], dtype=np.int8) for one in (generated, reference))
    return 13 * float(additive(*vectors, np.array(thresholds))[0])


def replaced(values: list[int], place: int, sign: int) -> list[int]:
    return [*values[:place], sign, *values[place + 1 :]]


@settings(deadline=None)
@given(VECTORS, VECTORS, THRESHOLDS, st.integers(0, 12), SHARES, SHARES)
def test_saying_pays_exactly_from_the_threshold_on_whatever_the_rest_is(
    rest: list[int], reference: list[int], thresholds: list[float], j: int, p: float, denied: float
) -> None:
    """p: the reference says observation j; else it denies it with probability `denied`, or is silent."""
    t = thresholds[j]
    assume(abs(p - t) > 1e-3)
    chances = {1: p, -1: (1 - p) * denied, 0: (1 - p) * (1 - denied)}

    def earns(action: int) -> float:
        return sum(
            chance * of(replaced(rest, j, action), replaced(reference, j, truth), thresholds)
            for truth, chance in chances.items()
        )

    say, silence, deny = earns(1), earns(0), earns(-1)
    assert say - silence == pytest.approx(p - t, abs=1e-5)
    assert (say > max(silence, deny)) == (p > t)
    if p > t:
        assert deny < silence + 1e-5  # never better than silence there
    paid = 0.1 * (t * (1 - p) * denied - (1 - t) * p)
    assert deny - silence == pytest.approx(paid, abs=1e-5)


@settings(deadline=None)
@given(VECTORS, VECTORS, THRESHOLDS)
def test_it_is_bounded_and_no_report_is_beyond_the_reference_itself(
    generated: list[int], reference: list[int], thresholds: list[float]
) -> None:
    value = of(generated, reference, thresholds)
    assert -13 < value < 13
    assert value <= of(reference, reference, thresholds) + 1e-5
    assert of([0] * 13, reference, thresholds) == 0


@settings(deadline=None)
@given(VECTORS, VECTORS, VECTORS, THRESHOLDS, st.integers(0, 12))
def test_a_finding_weighs_the_same_in_a_short_report_and_in_a_long_one(
    short: list[int], long: list[int], reference: list[int], thresholds: list[float], j: int
) -> None:
    def gain(rest: list[int]) -> float:
        return of(replaced(rest, j, 1), reference, thresholds) - of(replaced(rest, j, 0), reference, thresholds)

    assert gain(short) == pytest.approx(gain(long), abs=1e-5)


def scored(labels: list[int], reference: list[int], thresholds: NDArray[np.float64] | None) -> Scored:
    rows = [np.array([row + [0] * (14 - len(row))]) for row in (labels, reference)]
    return Scored(["a"], ["b"], *rows, np.ones(1, dtype=np.float32), 0.5, None, thresholds)


def test_uncertain_counts_as_said_on_both_sides_as_in_the_signed_vector() -> None:
    thresholds = np.full(13, 0.3)
    term = BUILT_IN["additive"]
    assert term.score(scored([3], [3], thresholds)) * 13 == pytest.approx([0.7])
    assert term.score(scored([1], [3], thresholds)) * 13 == pytest.approx([0.7])
    assert term.score(scored([3], [0], thresholds)) * 13 == pytest.approx([-0.3])
    assert not term.scores_malformed  # a malformed report earns 0


def test_without_thresholds_it_says_so() -> None:
    with pytest.raises(ValueError, match="reward.threshold"):
        BUILT_IN["additive"].score(scored([1], [1], None))


@pytest.mark.parametrize("thresholds", [np.full(14, 0.4), np.full(13, 1.0), np.full(13, 0.0), np.full(13, math.nan)])
def test_wrong_thresholds_are_refused(thresholds: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        additive(np.zeros((1, 13), dtype=np.int8), np.zeros((1, 13), dtype=np.int8), thresholds)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "reward.threshold 0"),
        (1.0, "reward.threshold 1.0"),
        (True, "reward.threshold True"),
        ("often", "reward.threshold 'often'"),
        ([0.4], "0.4"),
        ({"Cardiomegaly": 0.3}, "none for Enlarged Cardiomediastinum, Lung Opacity"),
        ({**dict.fromkeys(FINDINGS, 0.3), "No Finding": 0.3}, "unknown observation No Finding"),
        ({**dict.fromkeys(FINDINGS, 0.3), "Edema": 1.2}, "reward.threshold of Edema 1.2"),
    ],
)
def test_what_is_no_threshold_is_refused_by_name(value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_threshold(value)


def test_thresholds_reach_the_reward_service() -> None:
    for thresholds in (None, np.linspace(0.1, 0.9, 13)):
        asked = score_request("1", [["a"]], torch.ones(1, 1), ["s"], ["b"], RewardContext(thresholds=thresholds))
        arrived = context_of(unpack(pack(asked))).thresholds
        assert (arrived is None) if thresholds is None else np.array_equal(arrived, thresholds)


def micro_f1(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return 2 * (said & true).sum() / (said.sum() + true.sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_best_answer_without_looking_is_the_best_of_all(seed: int) -> None:
    classes = np.random.default_rng(seed).choice(4, p=[0.5, 0.2, 0.2, 0.1], size=(20, 14))
    classes[:, 4:] = 0
    true = classes[:, :4] == 1
    answers = itertools.product((False, True), repeat=4)
    best = max(micro_f1(np.broadcast_to(answer, true.shape), true) for answer in answers)
    assert blind_f1(classes) == pytest.approx(best)
    assert attainable_f1(classes) == pytest.approx((best + 1) / 2)


def test_a_score_that_cannot_be_reached_is_no_threshold() -> None:
    with pytest.raises(ValueError, match="no reference has a positive finding"):
        attainable_f1(np.full((5, 14), 2) * (np.arange(14) < 13))


def test_half_of_the_best_f1_is_the_threshold_that_reaches_it() -> None:
    """Expected counts over calibrated posteriors: no other threshold gives a higher F1."""
    posteriors = np.random.default_rng(0).beta(0.3, 1.5, size=20_000)

    def f1(threshold: float) -> float:
        said = posteriors >= threshold
        return 2 * posteriors[said].sum() / (said.sum() + posteriors.sum())

    grid = np.linspace(0.01, 0.99, 99)
    best = max(f1(threshold) for threshold in grid)
    assert f1(f1_threshold(best)) == pytest.approx(best, abs=1e-4)
    assert grid[np.argmax([f1(threshold) for threshold in grid])] == pytest.approx(f1_threshold(best), abs=0.015)


@settings(deadline=None, max_examples=40)
@given(st.lists(VECTORS, min_size=1, max_size=12), THRESHOLDS)
def test_the_best_constant_follows_it(rows: list[list[int]], thresholds: list[float]) -> None:
    classes = np.array([[{0: 0, 1: 1, -1: 2}[sign] for sign in row] + [0] for row in rows])
    assert classes.shape[1] == len(OBSERVATIONS) == NO_FINDING + 1
    (study,) = best_real_constants(
        classes, ["text"] * len(rows), [0.5], of_mccs=0.0, of_additive=1.0, thresholds=np.array(thresholds)
    )
    means = [np.mean([of(row, reference, thresholds) for reference in rows]) for row in rows]
    assert means[study] == pytest.approx(max(means), abs=1e-5)
