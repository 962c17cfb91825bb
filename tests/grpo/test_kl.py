"""`grpo.kl`: what its gradient is in expectation, by summing over a whole tiny vocabulary."""

import math

import pytest
import torch

from mrg_r1.grpo.loss import LossConfig, grpo_loss


def loss_of(logp, old, ref, kl):
    config = LossConfig(aggregation="dapo", max_length=1, clip_low=0.2, clip_high=0.28, beta=1.0, kl=kl)
    return grpo_loss(
        logp=logp[None], old_logp=None if old is None else old[None], reference_logp=ref[None],
        advantages=torch.zeros(1), mask=torch.ones(1, len(logp), dtype=torch.bool), denominator=1.0, config=config,
    )  # fmt: skip


def expected_gradient(theta, ref, kl):
    """Sum over tokens of probability times the gradient of the token's penalty: the sampler is the policy itself."""
    total = torch.zeros_like(theta)
    for token, probability in enumerate(theta.softmax(0)):
        free = theta.clone().requires_grad_()
        loss, _ = loss_of(free.log_softmax(0)[token : token + 1], None, ref[token : token + 1], kl)
        total += probability * torch.autograd.grad(loss, free)[0]
    return total


def test_unbiased_has_the_gradient_of_the_exact_kl_and_k3_has_not():
    theta, ref = torch.tensor([0.3, -1.0, 0.8, 0.1]), torch.tensor([0.9, 0.2, -0.4, 0.0]).log_softmax(0)
    free = theta.clone().requires_grad_()
    logp = free.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), free)[0]
    assert torch.allclose(expected_gradient(theta, ref, "k3_unbiased"), exact, atol=1e-6)
    # k3's own is that of KL(reference || policy)
    other = torch.autograd.grad(-(ref.exp() * theta.requires_grad_().log_softmax(0)).sum(), theta)[0]
    assert torch.allclose(expected_gradient(theta.detach(), ref, "k3"), other, atol=1e-6)
    assert not torch.allclose(exact, other, atol=1e-2)


def test_by_hand_the_ratio_multiplies_k3_and_the_metric_stays_k3():
    logp, old, ref = (torch.tensor([math.log(p)]) for p in (0.5, 0.25, 1.0))
    k3 = 2 - math.log(2) - 1
    for kl, factor in (("k3", 1), ("k3_unbiased", 2)):
        loss, metrics = loss_of(logp, old, ref, kl)
        assert loss.item() == pytest.approx(factor * k3)
        assert metrics["kl"][0].item() == pytest.approx(k3)
