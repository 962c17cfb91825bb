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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_where_a_time_ends_the_run_the_rate_falls_with_what_is_spent_of_it(schedule):
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    by_time = [
        scheduled_rate(1.0, step, warmup=0, total=1_000_000, schedule=schedule, spent=share)
        for step, share in enumerate(shares)
    ]
    by_steps = [scheduled_rate(1.0, step, warmup=0, total=5, schedule=schedule) for step in range(5)]
    assert by_time == pytest.approx(by_steps)
    assert scheduled_rate(1.0, 4, warmup=0, total=5, schedule=schedule, spent=0.2) == pytest.approx(0.1)  # steps end it
