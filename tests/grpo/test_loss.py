"""The loss: hand-made numbers, the papers' formulas in loops, and numbers out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mrg_r1.grpo.loss import k3, loss_denominator, merge_metrics
from tests.grpo.batches import AGGREGATIONS, CLIP, by_hand, loss_of, mean
from tests.grpo.paper_loss import paper_loss


# Token losses: -1.25, -0.5 | min(1.5 * -2, 1.28 * -2) = -3 so +3 | -min(1.5, 1.28) = -1.28, -1
@pytest.mark.parametrize(
    ("aggregation", "denominator", "expected"),
    [
        ("grpo", 3, (-1.75 / 2 + 3 - 2.28 / 2) / 3),
        ("dapo", 5, (-1.75 + 3 - 2.28) / 5),
        ("dr_grpo", 3, (-1.75 + 3 - 2.28) / (3 * 4)),
    ],
)
def test_loss_by_hand(aggregation: Any, denominator: int, expected: float) -> None:
    batch = by_hand()
    assert loss_denominator(batch["mask"], aggregation).item() == denominator
    loss, _ = loss_of(**batch, aggregation=aggregation, denominator=denominator)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_by_hand() -> None:
    batch = by_hand()
    loss, _ = loss_of(**batch, aggregation="grpo", denominator=3)
    loss.backward()
    # -A r / (tokens * sequences); the fifth token is clipped, the fourth masked
    expected = [[-1.25 / 6, -0.5 / 6], [2 * 1.5 / 3, 0.0], [0.0, -1 / 6]]
    torch.testing.assert_close(batch["logp"].grad, torch.tensor(expected))


def test_metrics_by_hand() -> None:
    batch = by_hand()
    batch["sampled_logp"] = batch["old_logp"] - torch.tensor([[0.1, -0.1], [0.0, 9.0], [0.3, 0.0]])
    _, metrics = loss_of(**batch, aggregation="grpo", denominator=3)
    assert mean(metrics, "ratio") == pytest.approx((1.25 + 0.5 + 1.5 + 1.5 + 1) / 5)
    assert metrics["ratio_max"][0].item() == pytest.approx(1.5)
    # the third 1.5 pushes with its advantage, the second against it
    assert mean(metrics, "clip_high") == pytest.approx(1 / 5)
    assert mean(metrics, "clip_low") == 0.0
    assert mean(metrics, "logp_gap") == pytest.approx(0.5 / 5, rel=1e-4)
    assert metrics["logp_gap_max"][0].item() == pytest.approx(0.3, rel=1e-4)
    assert "kl" not in metrics
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)


def test_low_clip_acts_on_negative_advantages_only() -> None:
    logp = torch.tensor([[0.5], [0.5]]).log().requires_grad_()
    batch = by_hand() | {"logp": logp, "old_logp": torch.zeros(2, 1), "mask": torch.ones(2, 1, dtype=torch.bool)}
    loss, metrics = loss_of(**batch | {"advantages": torch.tensor([-1.0, 1.0])}, aggregation="dapo", denominator=2)
    loss.backward()
    assert loss.item() == pytest.approx((0.8 - 0.5) / 2)
    assert logp.grad is not None and logp.grad.flatten().tolist() == pytest.approx([0.0, -0.25])
    assert mean(metrics, "clip_low") == 0.5 and mean(metrics, "clip_high") == 0.0


def test_kl_by_hand() -> None:
    # reference twice as likely: k3 = 2 - ln 2 - 1; half as likely: 0.5 + ln 2 - 1
    logp = torch.tensor([[0.25, 0.5]]).log().requires_grad_()
    reference = torch.tensor([[0.5, 0.25]]).log()
    batch = by_hand() | {"logp": logp, "old_logp": None, "reference_logp": reference, "beta": 0.5}
    batch |= {"advantages": torch.zeros(1), "mask": torch.ones(1, 2, dtype=torch.bool)}
    loss, metrics = loss_of(**batch, aggregation="dapo", denominator=2)
    loss.backward()
    first, second = 1 - math.log(2), math.log(2) - 0.5
    assert mean(metrics, "kl") == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * (first + second) / 2, rel=1e-5)
    assert logp.grad is not None  # d k3 / d policy = 1 - exp(reference - policy)
    assert logp.grad.flatten().tolist() == pytest.approx([0.25 * (1 - 2), 0.25 * (1 - 0.5)], rel=1e-5)


def test_beta_zero_measures_the_kl_without_a_gradient() -> None:
    batch = by_hand()
    loss, _ = loss_of(**batch, aggregation="dapo", denominator=5)
    batch["reference_logp"] = batch["old_logp"] + 0.7
    with_reference, metrics = loss_of(**batch, aggregation="dapo", denominator=5)
    assert loss.item() == with_reference.item()
    assert metrics["kl"][0] > 0


def test_truncated_importance_weights_by_hand() -> None:
    # old / sampled = 4 (capped at 2), 0.5, 1; ratio 1 everywhere, A 1
    old = torch.tensor([[0.4, 0.2, 0.3]]).log()
    logp = old.clone().requires_grad_()
    batch = by_hand() | {
        "logp": logp,
        "old_logp": old,
        "advantages": torch.ones(1),
        "mask": torch.ones(1, 3, dtype=torch.bool),
    }
    batch |= {"sampled_logp": torch.tensor([[0.1, 0.4, 0.3]]).log(), "correction": "tis"}
    loss, metrics = loss_of(**batch, aggregation="dapo", denominator=3)
    loss.backward()
    assert loss.item() == pytest.approx(-3.5 / 3)
    assert mean(metrics, "tis_weight") == pytest.approx(3.5 / 3)
    assert logp.grad is not None  # the weight is detached: only the ratio has a gradient
    assert logp.grad.flatten().tolist() == pytest.approx([-2 / 3, -0.5 / 3, -1 / 3])


def test_importance_weights_leave_the_kl_term_alone() -> None:
    old = torch.tensor([[0.4]]).log()
    batch = by_hand() | {"logp": old, "old_logp": old, "reference_logp": torch.tensor([[0.8]]).log(), "beta": 1.0}
    batch |= {
        "advantages": torch.zeros(1),
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "sampled_logp": torch.tensor([[0.2]]).log(),
    }
    loss, _ = loss_of(**batch, correction="tis", aggregation="dapo", denominator=1)
    assert loss.item() == pytest.approx(1 - math.log(2), rel=1e-5)


def test_sequence_ratio_by_hand() -> None:
    batch = by_hand()
    loss, metrics = loss_of(
        **batch | {"clip_low": 0.3, "clip_high": 0.3}, ratio="sequence", aggregation="grpo", denominator=3
    )
    loss.backward()
    # geometric means: sqrt(1.25 * 0.5), 1.5, sqrt(1.5 * 1) = 1.2247 (inside 1.3)
    first, third = math.sqrt(0.625), math.sqrt(1.5)
    assert loss.item() == pytest.approx((-first + 3 - third) / 3, rel=1e-5)
    # -A s / (tokens * sequences) on every token
    expected = [[-first / 6, -first / 6], [1.0, 0.0], [-third / 6, -third / 6]]
    torch.testing.assert_close(batch["logp"].grad, torch.tensor(expected))
    assert metrics["ratio"][1].item() == 3
    assert mean(metrics, "ratio") == pytest.approx((first + 1.5 + third) / 3)


# --- a second formula -------------------------------------------------------------------------------------------------


def random_batch(seed: int, rows: int = 6, length: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64) - 0.05
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    return {
        "logp": old + 0.3 * torch.randn(rows, length, generator=generator, dtype=torch.float64),
        "old_logp": old,
        "reference_logp": old + 0.5 * torch.randn(rows, length, generator=generator, dtype=torch.float64),
        "sampled_logp": old + 0.6 * torch.randn(rows, length, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(rows, generator=generator, dtype=torch.float64),
        "mask": torch.arange(length) < lengths[:, None],
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    aggregation=st.sampled_from(AGGREGATIONS),
    ratio=st.sampled_from(["token", "sequence"]),
    correction=st.sampled_from(["none", "tis"]),
    beta=st.sampled_from([0.0, 0.04]),
)
def test_loss_and_gradient_equal_the_papers_formula_in_loops(
    seed: int, aggregation: Any, ratio: Any, correction: Any, beta: float
) -> None:
    batch = random_batch(seed)
    logp = batch["logp"].clone().requires_grad_()
    loss, _ = loss_of(
        **batch | {"logp": logp},
        aggregation=aggregation,
        denominator=loss_denominator(batch["mask"], aggregation).item(),
        max_length=7,
        beta=beta,
        ratio=ratio,
        correction=correction,
        **CLIP,
    )
    (gradient,) = torch.autograd.grad(loss, logp)

    def formula(policy: Tensor) -> float:
        return paper_loss(
            policy.tolist(),
            batch["old_logp"].tolist(),
            batch["reference_logp"].tolist(),
            batch["sampled_logp"].tolist(),
            batch["advantages"].tolist(),
            batch["mask"].tolist(),
            aggregation=aggregation,
            max_length=7,
            beta=beta,
            ratio=ratio,
            tis_cap=2.0 if correction == "tis" else None,
            **CLIP,
        )

    assert loss.item() == pytest.approx(formula(batch["logp"]), abs=2e-6)
    step = 1e-6
    for i in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            nudge = torch.zeros_like(batch["logp"])
            nudge[i, t] = step
            slope = (formula(batch["logp"] + nudge) - formula(batch["logp"] - nudge)) / (2 * step)
            assert gradient[i, t].item() == pytest.approx(slope, abs=1e-5)


def test_only_the_policys_own_log_probs_get_a_gradient() -> None:
    batch = random_batch(1)
    leaves: dict[str, Any] = {name: tensor.clone().requires_grad_() for name, tensor in batch.items() if name != "mask"}
    loss, _ = loss_of(
        **leaves,
        mask=batch["mask"],
        aggregation="dapo",
        denominator=1.0,
        max_length=5,
        beta=0.04,
        correction="tis",
        **CLIP,
    )
    loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"logp"}


# --- numbers out of range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [100.0, 1e4, -100.0, -1e4])
def test_k3_stays_finite_far_from_the_reference(difference: float) -> None:
    """Trap 15; and the gradient keeps pointing back to the reference."""
    logp = torch.tensor([-1.0], requires_grad=True)
    value = k3(torch.tensor([difference - 1.0]), logp)
    value.sum().backward()
    assert logp.grad is not None
    assert torch.isfinite(value).all() and value.item() > 0
    assert torch.isfinite(logp.grad).all()
    # descending moves the policy to the reference; never 0, or it would be let go
    assert logp.grad.item() * difference < 0


def test_k3_beyond_the_clamp_is_its_tangent() -> None:
    # clamp 2, d = 5: exp(2) (1 + 3) - 5 - 1, slope 1 - exp(2)
    logp = torch.tensor([-5.0], requires_grad=True)
    value = k3(torch.tensor([0.0]), logp, clamp=2.0)
    value.sum().backward()
    assert value.item() == pytest.approx(4 * math.exp(2) - 6, rel=1e-6)
    assert logp.grad is not None and logp.grad.item() == pytest.approx(1 - math.exp(2), rel=1e-6)


def test_k3_is_the_papers_below_the_clamp_and_exact_near_zero() -> None:
    for difference in (-9.0, -1.0, 0.0, 0.5, 3.0, 9.0):
        expected = math.exp(difference) - difference - 1
        assert k3(torch.tensor([difference]), torch.zeros(1)).item() == pytest.approx(expected, rel=1e-5)
    assert k3(torch.tensor([1e-4]), torch.zeros(1)).item() == pytest.approx(5.0e-9, rel=0.02)


@settings(deadline=None)
@given(st.floats(-60, 60), st.floats(-60, 60))
def test_k3_is_never_negative_and_grows_away_from_zero(a: float, b: float) -> None:
    values = k3(torch.tensor([a, b]), torch.zeros(2))
    assert (values >= -1e-9).all()
    if a * b >= 0 and abs(a) <= abs(b):
        assert values[0] <= values[1] * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("difference", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_loss_stays_finite_when_policy_and_old_are_far_apart(difference: float, advantage: float, ratio: Any) -> None:
    logp = torch.tensor([[difference - 101.0, -101.0]], requires_grad=True)
    batch = by_hand() | {
        "logp": logp,
        "old_logp": torch.full((1, 2), -101.0),
        "reference_logp": torch.full((1, 2), -1.0),
    }
    batch |= {"advantages": torch.tensor([advantage]), "mask": torch.ones(1, 2, dtype=torch.bool), "beta": 0.04}
    loss, metrics = loss_of(**batch, ratio=ratio, aggregation="dapo", denominator=2)
    loss.backward()
    assert torch.isfinite(loss)
    assert logp.grad is not None and torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(total) for total, _ in metrics.values())


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_denominators_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert loss_denominator(mask, "grpo").item() == 2
    assert loss_denominator(mask, "dr_grpo").item() == 2
    assert loss_denominator(mask, "dapo").item() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(3, 2)}, "bool"),
        ({"old_logp": torch.zeros(3, 1)}, "old_logp of shape"),
        ({"reference_logp": torch.zeros(2, 2)}, "reference_logp of shape"),
        ({"advantages": torch.zeros(3, 2)}, "advantages of shape"),
        ({"beta": 0.1}, "needs reference_logp"),
        ({"correction": "tis"}, "needs sampled_logp"),
        ({"correction": "is"}, "correction 'is'"),
        ({"ratio": "row"}, "ratio 'row'"),
        ({"aggregation": "mean"}, "aggregation 'mean'"),
        ({"denominator": -1.0}, "denominator -1"),
        ({"denominator": math.nan}, "denominator nan"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(**by_hand() | {"aggregation": "grpo", "denominator": 3} | change)


def test_metrics_that_differ_in_name_are_not_merged() -> None:
    zero = torch.zeros(())
    with pytest.raises(ValueError, match="names"):
        merge_metrics([{"a": (zero, zero)}, {"b": (zero, zero)}])
    with pytest.raises(ValueError, match="no metrics"):
        merge_metrics([])
    with pytest.raises(ValueError, match="aggregation 'mean'"):
        loss_denominator(torch.ones(1, 1, dtype=torch.bool), "mean")  # type: ignore[arg-type]
