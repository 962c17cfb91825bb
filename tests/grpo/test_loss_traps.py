"""The ways in which the loss goes silently wrong: dead gradients, cuts that matter, a moving denominator, means of
means.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mrg_r1.grpo.loss import Metrics, loss_denominator, merge_metrics
from tests.grpo.batches import AGGREGATIONS, CLIP, by_hand, loss_of, mean


class LinearPolicy:
    """logits = features @ weight; the token log-probs of a fixed batch under any weight."""

    def __init__(self, rows: int = 12, length: int = 6, width: int = 5, vocabulary: int = 7) -> None:
        generator = torch.Generator().manual_seed(3)
        self.features = torch.randn(rows, length, width, generator=generator)
        self.tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
        self.weight = torch.randn(width, vocabulary, generator=generator)
        lengths = torch.tensor([6, 1, 3, 6, 2, 5, 4, 6, 1, 2, 6, 3])[:rows]
        self.mask = torch.arange(length) < lengths[:, None]
        self.advantages = torch.randn(rows, generator=generator)

    def logp(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        return (self.features[rows] @ weight).log_softmax(-1).gather(-1, self.tokens[rows, :, None]).squeeze(-1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("old", ["its own, detached", "an equal tensor"])
def test_at_ratio_one_the_gradient_is_reinforce(aggregation: Any, ratio: Any, old: str) -> None:
    """Trap 4. REINFORCE by hand: -A sum_t x_t (onehot - softmax), each token weighted as its aggregation says."""
    policy = LinearPolicy()
    weight = policy.weight.clone().requires_grad_()
    logp = policy.logp(weight)
    loss, metrics = loss_of(
        logp=logp,
        old_logp=None if old.startswith("its") else logp.detach().clone(),
        reference_logp=policy.logp(policy.weight),
        advantages=policy.advantages,
        mask=policy.mask,
        aggregation=aggregation,
        denominator=loss_denominator(policy.mask, aggregation).item(),
        max_length=9,
        beta=0.04,
        ratio=ratio,
        **CLIP,
    )
    (gradient,) = torch.autograd.grad(loss, weight)

    tokens = int(policy.mask.sum())
    expected = torch.zeros_like(policy.weight)
    for i in range(12):
        length = int(policy.mask[i].sum())
        share = {"grpo": 1 / (12 * length), "dapo": 1 / tokens, "dr_grpo": 1 / (12 * 9)}[aggregation]
        for t in range(length):
            score = -torch.softmax(policy.features[i, t] @ policy.weight, dim=-1)
            score[policy.tokens[i, t]] += 1
            expected -= share * policy.advantages[i] * torch.outer(policy.features[i, t], score)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert mean(metrics, "ratio") == 1.0 and metrics["kl"][0] == 0.0


def cut(
    policy: LinearPolicy, parts: list[Tensor], *, aggregation: Any, ratio: Any, padding: int = 0
) -> tuple[float, Tensor, Metrics]:
    """Loss and gradient accumulated over micro-batches of these rows."""
    weight = (policy.weight + 0.1).requires_grad_()
    old = policy.logp(policy.weight)
    reference = old - 0.2
    denominator = sum(loss_denominator(policy.mask[rows], aggregation).item() for rows in parts)

    def padded(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, padding), value=value)

    total, metrics = 0.0, []
    for rows in parts:
        loss, found = loss_of(
            logp=padded(policy.logp(weight, rows), 0.0),
            old_logp=padded(old[rows], math.nan),
            reference_logp=padded(reference[rows], -math.inf),
            sampled_logp=padded(old[rows] + 0.05, 7.0),
            advantages=policy.advantages[rows],
            mask=padded(policy.mask[rows], False),
            aggregation=aggregation,
            denominator=denominator,
            max_length=6,
            beta=0.04,
            ratio=ratio,
            correction="tis",
            **CLIP,
        )
        loss.backward()
        total += loss.item()
        metrics.append(found)
    assert weight.grad is not None
    return total, weight.grad, merge_metrics(metrics)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_same_batch_cut_six_ways_gives_one_loss_and_gradient(aggregation: Any, ratio: Any) -> None:
    """Traps 5 and 20, at the level of functions: micro-batches, order and padding change nothing."""
    policy = LinearPolicy()
    every = torch.arange(12)
    loss, gradient, metrics = cut(policy, [every], aggregation=aggregation, ratio=ratio)
    ways = [
        (list(every.split(1)), 0),
        (list(every.split(5)), 0),
        (list(every.split([1, 7, 4])), 0),
        (list(every[torch.tensor([7, 2, 11, 0, 9, 4, 1, 10, 3, 8, 6, 5])].split(3)), 0),
        (list(every.split(6)), 4),
        ([every], 3),
    ]
    for parts, padding in ways:
        other_loss, other_gradient, other_metrics = cut(
            policy, parts, aggregation=aggregation, ratio=ratio, padding=padding
        )
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-7)
        assert other_metrics.keys() == metrics.keys()
        for name in metrics:
            for one, other in zip(metrics[name], other_metrics[name], strict=True):
                assert other.item() == pytest.approx(one.item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_all_masked_row_is_harmless(aggregation: Any, ratio: Any) -> None:
    """A truncated completion is out of numerator, denominator and metrics, even where its numbers are not finite."""
    policy = LinearPolicy()
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    loss, gradient, metrics = cut(policy, [kept], aggregation=aggregation, ratio=ratio)
    policy.mask[5] = False
    policy.advantages[5] = 1e4
    masked_loss, masked_gradient, masked_metrics = cut(policy, [torch.arange(12)], aggregation=aggregation, ratio=ratio)
    alone_loss, alone_gradient, _ = cut(policy, [kept, torch.tensor([5])], aggregation=aggregation, ratio=ratio)
    assert masked_loss == pytest.approx(loss, rel=1e-5) and alone_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(masked_gradient, gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(alone_gradient, gradient, rtol=1e-4, atol=1e-7)
    for name in metrics:
        assert [value.item() for value in masked_metrics[name]] == pytest.approx(
            [value.item() for value in metrics[name]], rel=1e-5
        )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_with_nothing_kept_has_loss_and_gradient_zero(aggregation: Any, ratio: Any, rows: int) -> None:
    logp = torch.full((rows, 4), math.nan, requires_grad=True)
    mask = torch.zeros(rows, 4, dtype=torch.bool)
    loss, metrics = loss_of(
        logp=logp,
        old_logp=torch.full((rows, 4), -math.inf),
        reference_logp=torch.full((rows, 4), math.inf),
        advantages=torch.ones(rows),
        mask=mask,
        aggregation=aggregation,
        denominator=loss_denominator(mask, aggregation).item(),
        max_length=4,
        beta=0.04,
        ratio=ratio,
        **CLIP,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad is not None and torch.equal(logp.grad, torch.zeros(rows, 4))
    assert all(total.item() == 0.0 and count.item() == 0.0 for total, count in metrics.values())


def test_with_three_inner_iterations_the_denominator_stays_the_rollouts() -> None:
    """Trap 16: after each step the ratio is current over rollout, from probabilities computed here."""
    policy = LinearPolicy()
    rollout = policy.logp(policy.weight)
    weight = policy.weight.clone().requires_grad_()
    maxima = []
    for _ in range(3):
        probabilities = torch.softmax(policy.features @ weight.detach(), dim=-1).gather(-1, policy.tokens[..., None])[
            ..., 0
        ]
        before = torch.softmax(policy.features @ policy.weight, dim=-1).gather(-1, policy.tokens[..., None])[..., 0]
        expected = (probabilities / before)[policy.mask]
        loss, metrics = loss_of(
            logp=policy.logp(weight),
            old_logp=rollout,
            reference_logp=None,
            advantages=policy.advantages,
            mask=policy.mask,
            aggregation="dapo",
            denominator=int(policy.mask.sum()),
            max_length=6,
            beta=0.0,
            **CLIP,
        )
        assert mean(metrics, "ratio") == pytest.approx(expected.mean().item(), rel=1e-5)
        assert metrics["ratio_max"][0].item() == pytest.approx(expected.max().item(), rel=1e-5)
        maxima.append(metrics["ratio_max"][0].item())
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    assert maxima[0] == 1.0 and maxima[1] > 1.01 and maxima[2] > maxima[1]


def test_two_ranks_with_unequal_counts_reduce_to_the_mean_of_all_tokens() -> None:
    """Trap 20. One token of ratio 2 on one rank, three of ratio 1 on the other: the mean is 1.25, not 1.5."""
    parts = []
    for ratios in ([2.0], [1.0, 1.0, 1.0]):
        logp = torch.tensor([ratios]).log()
        batch = by_hand() | {
            "logp": logp,
            "old_logp": torch.zeros_like(logp),
            "mask": torch.ones_like(logp, dtype=torch.bool),
        }
        parts.append(loss_of(**batch | {"advantages": torch.ones(1)}, aggregation="dapo", denominator=4)[1])
    merged = merge_metrics(parts)
    assert mean(merged, "ratio") == pytest.approx(1.25)
    assert mean(merged, "clip_high") == pytest.approx(0.25)
    assert merged["ratio_max"][0].item() == pytest.approx(2.0)
