"""Advantages: hand-made numbers, and what must hold for any rewards."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mrg_r1.grpo.advantages import (
    batch_moments,
    group_advantages,
    per_term_advantages,
    std_of_moments,
    without_signal,
    zero_signal,
)

SCALES = ["group", "batch", "none"]


def rows(low: float = -2.0, high: float = 2.0) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(2, 6).flatmap(
        lambda g: st.lists(st.lists(st.floats(low, high, width=32), min_size=g, max_size=g), min_size=1, max_size=4)
    )


def test_group_scale_by_hand() -> None:
    # 1, 2, 3: mean 2, unbiased std 1. 0, 0, 3: mean 1, squares 1 + 1 + 4 = 6, unbiased variance 3.
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))
    assert advantages[0].tolist() == pytest.approx([-0.9999000100, 0.0, 0.9999000100], rel=1e-6)
    assert advantages[1].tolist() == pytest.approx([-1 / 1.7321508076, -1 / 1.7321508076, 2 / 1.7321508076], rel=1e-6)
    assert advantages.dtype == torch.float32


def test_no_scale_and_batch_scale_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.25, 0.75]])
    assert group_advantages(rewards, scale="none").tolist() == [[-0.5, 0.5], [-0.25, 0.25]]
    wide, narrow = (group_advantages(rewards, scale="batch", batch_std=std) for std in (0.4999, torch.tensor(0.2499)))
    assert wide.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.5, 0.5])
    assert narrow.flatten().tolist() == pytest.approx([-2.0, 2.0, -1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 0.35, 0.7, 1 / 3, 1e-8, -0.1, 1e6, 0.0])
@pytest.mark.parametrize("group", [2, 3, 7, 8, 11])
def test_equal_rewards_give_zero_advantage(value: float, group: int, scale: str, dtype: torch.dtype) -> None:
    rewards = torch.full((3, group), value, dtype=dtype)
    advantages = group_advantages(rewards, scale=scale, batch_std=0.0)  # type: ignore[arg-type]
    assert torch.equal(advantages, torch.zeros(3, group))
    assert zero_signal(rewards).all()


def test_rewards_equal_up_to_float_rounding_give_zero_advantage() -> None:
    # the same three terms added in different orders
    a, b, c = torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.35)
    rewards = torch.stack([(a + b) + c, a + (b + c), (a + c) + b, (c + b) + a])[None]
    assert rewards.unique().numel() > 1, "the orders must round differently for this test to test anything"
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 4))
    assert zero_signal(rewards).tolist() == [True]


def test_a_small_but_real_difference_is_a_signal() -> None:
    rewards = torch.tensor([[0.5, 0.5001], [0.5, 0.5]])
    assert zero_signal(rewards).tolist() == [False, True]
    # difference d = 1e-4: half of it over std d / sqrt 2 + 1e-4
    assert group_advantages(rewards)[0, 1].item() == pytest.approx(0.5 / (1 / math.sqrt(2) + 1), rel=1e-3)


@settings(deadline=None)
@given(rows())
def test_advantages_sum_to_zero_and_keep_the_order(values: list[list[float]]) -> None:
    rewards = torch.tensor(values)
    advantages = group_advantages(rewards)
    assert torch.isfinite(advantages).all()
    assert advantages.sum(dim=1).abs().max() < 1e-5
    assert advantages.abs().max() <= math.sqrt(rewards.shape[1])
    for reward, advantage in zip(rewards, advantages, strict=True):
        assert (advantage[reward.argsort()].diff() >= 0).all()


@settings(deadline=None)
@given(rows(), st.randoms(use_true_random=False))
def test_groups_do_not_touch_each_other(values: list[list[float]], random: object) -> None:
    rewards = torch.tensor(values)
    order = torch.tensor(random.sample(range(len(values)), len(values)))  # type: ignore[attr-defined]
    together = group_advantages(rewards)[order]
    alone = torch.cat([group_advantages(rewards[b : b + 1]) for b in order.tolist()])
    assert torch.equal(together, alone)


@settings(deadline=None)
@given(rows())
def test_moments_added_over_ranks_give_the_global_std(values: list[list[float]]) -> None:
    ranks = [batch_moments(torch.tensor(row)) for row in values]
    expected = statistics.stdev([value for row in values for value in row])
    assert std_of_moments(torch.stack(ranks).sum(dim=0)).item() == pytest.approx(expected, abs=1e-6)


def test_std_of_one_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="1 rewards"):
        std_of_moments(batch_moments(torch.tensor([0.5])))


def test_per_term_advantages_by_hand() -> None:
    terms = {"mccs": torch.tensor([[1.0, 2.0, 3.0]]), "format": torch.tensor([[3.0, 0.0, 0.0]])}
    advantages = per_term_advantages(terms, {"mccs": 0.75, "format": 0.25})
    f = 1 / 1.7321508076
    m = 0.99990001
    assert advantages[0].tolist() == pytest.approx([-0.75 * m + 0.25 * 2 * f, -0.25 * f, 0.75 * m - 0.25 * f], rel=1e-5)


def test_per_term_advantages_keep_a_term_alive_beside_a_loud_one() -> None:
    """Normalised as a total, a term ten times as wide drowns the other; each for itself, both count as weighted."""
    quiet, loud = torch.tensor([[0.0, 0.01, 0.0, 0.01]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    advantages = per_term_advantages({"a": quiet, "b": loud}, {"a": 1.0, "b": 1.0}, scale="group")[0]
    assert (advantages[1] - advantages[0]).item() == pytest.approx((advantages[2] - advantages[0]).item(), rel=0.05)


def test_per_term_advantages_of_saturated_terms_are_zero() -> None:
    terms = {"mccs": torch.full((1, 8), 0.35), "format": torch.full((1, 8), 0.1)}
    assert torch.equal(per_term_advantages(terms, {"mccs": 0.75, "format": 0.25}), torch.zeros(1, 8))


def test_per_term_batch_scale_uses_each_terms_own_std() -> None:
    terms = {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[1.0, 0.0]])}
    advantages = per_term_advantages(terms, {"a": 1.0, "b": 2.0}, scale="batch", batch_stds={"a": 0.4999, "b": 1.9999})
    assert advantages[0].tolist() == pytest.approx([-1.0 + 2 * 0.25, 1.0 - 2 * 0.25])


@pytest.mark.parametrize(
    ("rewards", "scale", "message"),
    [
        (torch.zeros(2, 1), "group", "at least 2"),
        (torch.zeros(4), "group", r"\[B, G\]"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), "group", "study 1, member 1"),
        (torch.tensor([[0.0, math.inf]]), "none", "not finite"),
        (torch.tensor([[0.0, 1.0]]), "batch", "batch_std"),
        (torch.tensor([[0.0, 1.0]]), "rank", "scale 'rank'"),
    ],
)
def test_unusable_rewards_are_refused(rewards: Tensor, scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_std", [math.nan, -1.0, math.inf])
def test_unusable_batch_std_is_refused(batch_std: float) -> None:
    with pytest.raises(ValueError, match="batch_std"):
        group_advantages(torch.tensor([[0.0, 1.0]]), scale="batch", batch_std=batch_std)


def test_per_term_mistakes_name_the_term() -> None:
    good = torch.tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match="same names"):
        per_term_advantages({"a": good}, {"b": 1.0})
    with pytest.raises(ValueError, match="shape"):
        per_term_advantages({"a": good, "b": torch.zeros(2, 2)}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="'b'.*not finite"):
        per_term_advantages({"a": good, "b": torch.tensor([[0.0, math.nan]])}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="'a'.*batch_std"):
        per_term_advantages({"a": good}, {"a": 1.0}, scale="batch")


def test_under_per_term_a_group_is_silent_only_where_every_weighted_term_is():
    terms = {"a": torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([[1.0, 0.0], [0, 0], [0, 1.0]])}
    total = terms["a"] + terms["b"]
    weights = {"a": 1.0, "b": 1.0}
    assert without_signal(total, terms, weights, normalise="total").tolist() == [True, True, False]
    assert without_signal(total, terms, weights, normalise="per_term").tolist() == [False, True, False]
    weights["b"] = 0.0
    assert without_signal(total, terms, weights, normalise="per_term").tolist() == [False, True, True]
