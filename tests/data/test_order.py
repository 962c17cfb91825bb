"""The order of studies: a pure function of seed and position, uniform or weighted by rare findings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrg_r1.data.order import StudyOrder, rare_finding_weights


def test_every_epoch_visits_every_study_once_in_another_order():
    stream = StudyOrder(10, seed=0).take(0, 30)
    epochs = [stream[:10], stream[10:20], stream[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_uniform_order_is_the_one_that_earlier_runs_had():
    expected = [int(index) for epoch in range(3) for index in np.random.default_rng([7, epoch]).permutation(11)]
    assert StudyOrder(11, seed=7).take(0, 33) == expected
    assert StudyOrder(11, seed=7).take(9, 6) == expected[9:15]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 9.0] + [1.0] * 10])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_global_batch_whatever_their_number(world_size, weights):
    """Trap 7: a study, and so its whole group, is on one rank; the batch is the same on 1, 2 and 4 ranks and after a
    resume.
    """
    for step in (0, 3, 7):
        together = []
        for rank in range(world_size):
            fresh = StudyOrder(13, seed=5, weights=weights)  # a resumed run's, which has taken nothing before
            together += fresh.share(8 * step, batch_size=8, rank=rank, world_size=world_size)
        assert together == StudyOrder(13, seed=5, weights=weights).take(0, 64)[8 * step : 8 * step + 8]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_a_study_comes_as_often_as_its_weight_says_rounded_down_or_up(weights, seed, epoch):
    count = len(weights)
    drawn = np.bincount(StudyOrder(count, seed=seed, weights=weights).take(epoch * count, count), minlength=count)
    expected = count * np.array(weights) / sum(weights)
    assert drawn.sum() == count
    assert (drawn >= np.floor(expected - 1e-6)).all() and (drawn <= np.ceil(expected + 1e-6)).all()


def test_over_epochs_frequencies_are_those_of_the_weights():
    weights = np.array([1.0, 1.0, 1.0, 2.5, 0.3, 4.0, 1.7, 1.0])
    drawn = np.bincount(StudyOrder(8, seed=0, weights=weights).take(0, 8 * 4000), minlength=8) / 4000
    np.testing.assert_allclose(drawn, 8 * weights / weights.sum(), atol=0.03)


def test_equal_weights_give_every_study_once_and_places_are_shuffled():
    order = StudyOrder(12, seed=0, weights=np.full(12, 3.0))
    epochs = [order.take(12 * epoch, 12) for epoch in range(400)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    places = np.array([epoch.index(5) for epoch in epochs])
    assert np.bincount(places, minlength=12).min() > 10  # 33 expected


def test_copies_of_a_study_lie_apart():
    weights = np.ones(1000)
    weights[17] = 10
    for epoch in range(5):
        drawn = StudyOrder(1000, seed=epoch, weights=weights).take(0, 1000)
        places = np.flatnonzero(np.array(drawn) == 17)
        assert len(places) in (9, 10) and np.diff(places).min() > 60


def test_rare_findings_weigh_by_the_root_of_their_share():
    classes = np.zeros((400, 14), dtype=np.int64)
    classes[:200, 1] = 1  # half of all: common
    classes[0:4, 8] = 1  # one in a hundred: the root of 0.1 / 0.01
    classes[4, 11] = 1  # the only one: the root of 0.1 * 400
    classes[5, 8] = 3  # uncertain is not positive
    classes[6, 8] = 2
    classes[398:, 13] = 1  # No Finding is no finding, however rare
    weights = rare_finding_weights(classes)
    assert weights[:4] == pytest.approx([np.sqrt(10)] * 4) and weights[4] == pytest.approx(np.sqrt(40))
    assert (weights[5:] == 1).all()
    assert (rare_finding_weights(np.zeros((3, 14), dtype=np.int64)) == 1).all()


def test_rare_findings_are_met_more_often():
    rng = np.random.default_rng(0)
    classes = np.zeros((2000, 14), dtype=np.int64)
    classes[rng.random(2000) < 0.4, 1] = 1
    classes[rng.choice(2000, 10, replace=False), 8] = 1
    drawn = classes[StudyOrder(2000, seed=0, weights=rare_finding_weights(classes)).take(0, 2000)]
    assert (drawn[:, 8] == 1).sum() > 3 * 10


def test_the_fingerprint_is_of_studies_and_weights():
    order, weighted = StudyOrder(2, seed=0), StudyOrder(2, seed=0, weights=[1, 2])
    assert order.fingerprint(["a", "b"]) == StudyOrder(2, seed=9).fingerprint(["a", "b"])
    prints = [order.fingerprint(["a", "b"]), order.fingerprint(["b", "a"]), weighted.fingerprint(["a", "b"])]
    assert len(set(prints)) == 3
