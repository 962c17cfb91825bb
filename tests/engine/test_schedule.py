"""Learning rates by step."""

import pytest

from mrg_r1.engine.zero import scheduled_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 8, 9])
def test_the_last_step_is_at_the_floor_and_the_warm_up_ends_at_the_peak(schedule, warmup):
    rates = [scheduled_rate(1.0, step, warmup=warmup, total=10, schedule=schedule) for step in range(10)]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[max(0, warmup - 1)] == 1.0
    assert all(later < earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_without_a_schedule_the_peak_stays():
    assert [scheduled_rate(2.0, step, warmup=2, total=4, schedule="constant") for step in range(4)] == [1, 2, 2, 2]


def test_a_single_step_has_the_peak():
    assert scheduled_rate(1.0, 0, warmup=0, total=1, schedule="cosine") == 1.0
