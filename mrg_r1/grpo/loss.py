"""The GRPO loss of one micro-batch and its metrics (docs/method.md §3).

Log-probs, advantages and a mask enter; this micro-batch's share of the global loss leaves, with metrics as (sum, count)
pairs. Pure: the global count is handed in, so that shares added over micro-batches and ranks are the loss of the whole
batch however it was cut (docs/traps.md #5), and metrics reduced as sums of both halves are true means (docs/traps.md
#20).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["grpo", "dapo", "dr_grpo"]
Ratio = Literal["token", "sequence"]
Correction = Literal["none", "tis"]
Kl = Literal["k3", "k3_unbiased"]
Metrics = dict[str, tuple[Tensor, Tensor]]

KL_CLAMP = 10.0
# exp(20) = 4.9e8 is far outside any clip range and far inside float32. Without it a ratio of inf on the clipped side
# would send 0 * inf = NaN into the gradient.
LOG_RATIO_CLAMP = 20.0
MAX_SUFFIX = "_max"  # metrics that are reduced by maximum, not by sum


@dataclass(frozen=True)
class LossConfig:
    """Which loss it is; the same for every micro-batch of a run.

    Attributes:
        aggregation: see `loss_denominator`.
        max_length: the most new tokens a completion may have; read by `dr_grpo` only.
        clip_low: epsilon below 1. For `ratio="sequence"` about 3e-4 (arXiv 2507.18071, section 5.1).
        clip_high: epsilon above 1.
        beta: KL coefficient. With 0 and a reference the KL is measured without a gradient.
        ratio: `token`, one ratio a token; `sequence` (GSPO), one ratio a row, `exp(mean over kept tokens of logp -
            old_logp)`, its gradient shared evenly by the row's tokens.
        correction: `tis` weighs each token's policy term by `w = min(exp(old_logp - sampled_logp), cap)`, detached;
            `none` leaves w at 1. The KL term is not weighted.
        correction_cap: the largest weight.
        kl_clamp: see `k3`.
        kl: `k3` as the paper has it; `k3_unbiased` weighs each token's k3 by its ratio, with its gradient, whose mean
            over sampled tokens then is the gradient of KL(policy || reference).
        likelihood: `-A * logp` in place of the clipped ratio: the negative log-likelihood of rows whose advantage is 1.
            The ratio's metrics then say how far the policy has moved, and no clip is active.
    """

    aggregation: Aggregation
    max_length: int
    clip_low: float
    clip_high: float
    beta: float
    ratio: Ratio = "token"
    correction: Correction = "none"
    correction_cap: float = 2.0
    kl_clamp: float = KL_CLAMP
    kl: Kl = "k3"
    likelihood: bool = False


def loss_denominator(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """This slice's part of the global denominator; to be summed over everything that shares one optimizer step.

    Args:
        mask: [R, C] bool, the tokens that are kept.
        aggregation: `dapo` counts kept tokens; `grpo` and `dr_grpo` count sequences with at least one kept token, so
            that a masked (truncated) completion is out of the denominator too.

    Returns:
        Scalar float64 (exact for any batch), on the device of `mask`.

    Raises:
        ValueError: a mask that is not [R, C] bool, or an unknown aggregation.
    """
    _check_mask(mask)
    if aggregation == "dapo":
        return mask.sum().double()
    if aggregation in ("grpo", "dr_grpo"):
        return mask.any(dim=1).sum().double()
    raise ValueError(f"aggregation {aggregation!r}; allowed are 'grpo', 'dapo' and 'dr_grpo'")


def k3(reference_logp: Tensor, logp: Tensor, clamp: float = KL_CLAMP) -> Tensor:
    """Per-token estimate of KL(policy || reference), `exp(d) - d - 1` with `d = reference - policy`, never negative.

    The exponent is clamped at `clamp`; beyond it the estimate goes on along its tangent, `exp(c) (1 + d - c) - d - 1`.
    Value and gradient are then finite for every finite d (docs/traps.md #15), and the gradient still points back to the
    reference: clamping d alone would switch the penalty off exactly where the policy is farthest away. Exact for d <=
    clamp, where every token that a policy is at all likely to sample lies.

    Args:
        reference_logp: [...] float.
        logp: [...] float, the policy's; gradients flow here.
        clamp: in nats.

    Returns:
        [...] float32.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3; DeepSeekMath (arXiv 2402.03300), equation
    4.
    """
    difference = reference_logp.detach().float() - logp.float()
    exponent = difference.clamp(max=clamp)
    # expm1 keeps the digits that exp(d) - d - 1 loses near 0, where a LoRA policy spends most of a run
    return torch.expm1(exponent) * (1 + difference - exponent) - exponent


def grpo_loss(
    *,
    logp: Tensor,
    old_logp: Tensor | None,
    reference_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    config: LossConfig,
    sampled_logp: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """This micro-batch's share of the global loss.

    Per token `-w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * k3`, with r = exp(logp - old_logp);
    `kl="k3_unbiased"` multiplies k3 by r. Summed over tokens (`dapo`, `dr_grpo`) or over sequences of token means
    (`grpo`), divided by `denominator` (times
    `max_length` for `dr_grpo`). Adding the shares of all micro-batches and ranks gives the loss of the whole batch; an
    engine that averages over ranks or accumulation steps must have that undone by its caller.

    Args:
        logp: [R, C] float, the policy's log-probs of the sampled tokens; the only input that gets a gradient. R rows
            are flattened (study, member) pairs, C completion tokens.
        old_logp: [R, C] float, those of the rollout's policy, the same for every inner iteration (docs/traps.md #16);
            None where they are `logp` itself, detached (one update a rollout).
        reference_logp: [R, C] float, the frozen reference's; None leaves KL out and needs `beta` 0.
        advantages: [R] float.
        mask: [R, C] bool. A row of False (a truncated or padding row) adds nothing to loss, gradient or metrics,
            whatever its other values are.
        denominator: `loss_denominator` summed over the global batch. 0 (nothing kept anywhere) gives a loss of 0.
        config: the loss's own settings, the same for every micro-batch.
        sampled_logp: [R, C] float, what the rollout's decoder gave its own tokens; the gap to `old_logp` is measured
            when given.

    Returns:
        The loss, a float32 scalar, and metrics: name -> (sum, count), float64 scalars without gradient. Means over kept
        tokens: `kl`, `ratio`, `clip_low`, `clip_high` (shares on which the clip is active: the ratio is out of range on
        the side that its advantage pushes to), `logp_gap` (nats, absolute), `tis_weight`; with `ratio="sequence"` the
        three of the ratio count sequences. `ratio_max` and `logp_gap_max` are (maximum, count) and reduce by maximum.
        `kl` is absent without a reference, the gap without `sampled_logp`. `merge_metrics` reduces them.

    Raises:
        ValueError: shapes that disagree, a mask that is not bool, `beta` without a reference, `tis` without
            `sampled_logp`, a negative or non-finite denominator, or an unknown aggregation, ratio or correction.

    Source: DeepSeekMath (arXiv 2402.03300), equation 3 (`grpo`); DAPO (arXiv 2503.14476), sections 3.1 and 3.3
    (clip_high, `dapo`); Dr. GRPO (arXiv 2503.20783), section 3 (`dr_grpo`); GSPO (arXiv 2507.18071), section 4
    (`sequence`); truncated importance sampling: F. Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training" (2025).
    """
    _check_mask(mask)
    for name, tensor in (
        ("logp", logp),
        ("old_logp", old_logp),
        ("reference_logp", reference_logp),
        ("sampled_logp", sampled_logp),
    ):
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, mask of shape {tuple(mask.shape)}; expected the same [R, C]"
            )
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages of shape {tuple(advantages.shape)}; expected [{mask.shape[0]}], one a row")
    if config.beta != 0 and reference_logp is None:
        raise ValueError(f"beta {config.beta} needs reference_logp; score the reference or set beta to 0")
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator {denominator}; expected the global count from loss_denominator")

    advantage = advantages.detach().float()[:, None]  # [R, 1]
    # Differences are masked before anything is exponentiated: padding may hold -inf or NaN.
    policy = logp.float().masked_fill(~mask, 0.0)  # [R, C]
    old = (logp if old_logp is None else old_logp).detach().float().masked_fill(~mask, 0.0)
    lengths = mask.sum(dim=1)  # [R]

    if config.ratio == "token":
        log_ratio, counted = policy - old, mask  # [R, C]
    elif config.ratio == "sequence":
        log_ratio = ((policy - old).sum(dim=1) / lengths.clamp_min(1))[:, None]  # [R, 1]
        counted = (lengths > 0)[:, None]
    else:
        raise ValueError(f"ratio {config.ratio!r}; allowed are 'token' and 'sequence'")
    ratios = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    clipped = ratios.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.likelihood:
        per_token = -policy * advantage  # [R, C]
    else:
        per_token = -torch.minimum(ratios * advantage, clipped * advantage).expand_as(policy)  # [R, C]

    metrics: Metrics = {
        "ratio": _mean(ratios, counted),
        "ratio" + MAX_SUFFIX: _maximum(ratios, counted),
        "clip_low": _mean((ratios < 1 - config.clip_low) & (advantage < 0), counted),
        "clip_high": _mean((ratios > 1 + config.clip_high) & (advantage > 0), counted),
    }
    weights = _correction_weights(old, sampled_logp, mask, config, metrics)
    if weights is not None:
        per_token = per_token * weights
    if reference_logp is not None:
        reference = reference_logp.detach().float().masked_fill(~mask, 0.0)
        kl = k3(reference, policy if config.beta != 0 else policy.detach(), config.kl_clamp)
        metrics["kl"] = _mean(kl, mask)
        if config.beta != 0:
            if config.kl not in ("k3", "k3_unbiased"):
                raise ValueError(f"kl {config.kl!r}; allowed are 'k3' and 'k3_unbiased'")
            per_token = per_token + config.beta * (kl * ratios if config.kl == "k3_unbiased" else kl)

    per_token = per_token.masked_fill(~mask, 0.0)
    if config.aggregation == "grpo":
        total = (per_token.sum(dim=1) / lengths.clamp_min(1)).sum()
    elif config.aggregation == "dapo":
        total = per_token.sum()
    elif config.aggregation == "dr_grpo":
        total = per_token.sum() / config.max_length
    else:
        raise ValueError(f"aggregation {config.aggregation!r}; allowed are 'grpo', 'dapo' and 'dr_grpo'")
    # A global count of 0 means that every total is 0: dividing by 1 keeps it 0 where 0 / 0 would be NaN.
    return total / (denominator or 1.0), metrics


def merge_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Metrics of several micro-batches (or ranks) as those of one: sums and counts added, `*_max` by maximum.

    Args:
        parts: the dicts of `grpo_loss`, all with the same names.

    Returns:
        name -> (sum or maximum, count); a mean is sum / count where count > 0.

    Raises:
        ValueError: no parts, or parts with different names.
    """
    if not parts:
        raise ValueError("no metrics to merge")
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            raise ValueError(
                f"metrics {sorted(part)} cannot be merged with {sorted(parts[0])}; the names must be the same"
            )
    merged: Metrics = {}
    for name in parts[0]:
        values, counts = torch.stack([part[name][0] for part in parts]), torch.stack([part[name][1] for part in parts])
        merged[name] = (values.amax() if name.endswith(MAX_SUFFIX) else values.sum(), counts.sum())
    return merged


def _correction_weights(
    old: Tensor, sampled_logp: Tensor | None, mask: Tensor, config: LossConfig, metrics: Metrics
) -> Tensor | None:
    """[R, C] truncated importance weights, or None; the gap between scorer and sampler goes into `metrics`."""
    if config.correction not in ("none", "tis"):
        raise ValueError(f"correction {config.correction!r}; allowed are 'none' and 'tis'")
    if sampled_logp is None:
        if config.correction == "tis":
            raise ValueError("correction 'tis' needs sampled_logp, the log-probs that the rollout recorded")
        return None
    gap = old - sampled_logp.detach().float().masked_fill(~mask, 0.0)
    metrics["logp_gap"] = _mean(gap.abs(), mask)
    metrics["logp_gap" + MAX_SUFFIX] = _maximum(gap.abs(), mask)
    if config.correction == "none":
        return None
    weights = gap.exp().clamp(max=config.correction_cap)
    metrics["tis_weight"] = _mean(weights, mask)
    return weights


def _mean(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    return values.detach().double().masked_fill(~counted, 0.0).sum(), counted.sum().double()


def _maximum(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    flat = values.detach().double().masked_fill(~counted, -math.inf).flatten()
    # the extra 0 is for a slice in which nothing counts; no metric with a maximum is ever negative
    return torch.cat([flat, flat.new_zeros(1)]).amax(), counted.sum().double()


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask of shape {tuple(mask.shape)} and dtype {mask.dtype}; expected [R, C] bool")
