"""From rewards to advantages: each report against the other reports of its group (docs/method.md §3).

Rewards [B, G] enter, advantages [B, G] leave. Pure: what must be global (the batch's std) is made from moments that the
caller sums over ranks and hands back in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4  # docs/method.md §3, as TRL's
# Rewards of one group that lie this close (relative to their size) differ by float32 rounding only, as the same sum
# taken in another order would: a few units in the last place. Divided by a tiny std they would become a gradient (trap
# 6).
_EQUAL_WITHIN = 8 * torch.finfo(torch.float32).eps


def group_advantages(rewards: Tensor, *, scale: Scale = "group", batch_std: Tensor | float | None = None) -> Tensor:
    """In-group normalised advantages, `(r - mean of the group) / (std + 1e-4)`.

    >>> group_advantages(torch.tensor([[0.0, 1.0], [0.35, 0.35]]), scale="none")
    tensor([[-0.5000,  0.5000],
            [ 0.0000,  0.0000]])

    Args:
        rewards: [B, G] float, one row a study, one column a sampled report.
        scale: divide by the group's unbiased std, by the global batch's (`batch_std`), or not at all (Dr. GRPO).
        batch_std: scalar, the unbiased std of every reward of the global batch (`std_of_moments`); read for
            `scale="batch"` only, and needed there.

    Returns:
        [B, G] float32, on the device of `rewards`; exactly zero where a group's rewards are equal (up to float32
        rounding).

    Raises:
        ValueError: not [B, G]; G < 2 (a group of one has no baseline); a reward that is not finite; `scale="batch"`
            without a finite, non-negative `batch_std`; an unknown scale.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2; `none` from Dr. GRPO (arXiv 2503.20783); `batch` from
    REINFORCE++ (arXiv 2501.03262).
    """
    equal = zero_signal(rewards)
    # float64, so that subtracting the mean of nearly equal rewards leaves their difference and not its rounding
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = centred / (rewards.double().std(dim=1, keepdim=True) + STD_EPSILON)
    elif scale == "batch":
        advantages = centred / (_checked_batch_std(batch_std) + STD_EPSILON)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f"scale {scale!r}; allowed are 'group', 'batch' and 'none'")
    return advantages.masked_fill(equal[:, None], 0.0).float()


def per_term_advantages(
    terms: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    scale: Scale = "group",
    batch_stds: Mapping[str, Tensor | float] | None = None,
) -> Tensor:
    """Each reward term normalised in its group, then weighted and summed.

    A term that is equal over a group (format, once it has saturated) then no longer shrinks the others, as it would
    when the weighted total is normalised.

    Args:
        terms: name -> [B, G] float, before weights.
        weights: name -> weight, exactly the names of `terms`.
        scale: as in `group_advantages`, for every term.
        batch_stds: name -> that term's std over the global batch; needed for `scale="batch"`, not read otherwise.

    Returns:
        [B, G] float32.

    Raises:
        ValueError: no terms, names that differ between `terms` and `weights`, or what `group_advantages` refuses (the
            term is named).

    Source: GDPO, reward-decoupled normalisation (arXiv 2601.05242), without its last normalisation over the batch.
    """
    if not terms or set(terms) != set(weights):
        raise ValueError(f"terms {sorted(terms)} and weights {sorted(weights)} must carry the same names, at least one")
    if len({tuple(values.shape) for values in terms.values()}) != 1:
        raise ValueError(f"terms differ in shape: { {name: tuple(values.shape) for name, values in terms.items()} }")
    parts = []
    for name, values in terms.items():
        try:
            advantages = group_advantages(values, scale=scale, batch_std=(batch_stds or {}).get(name))
        except ValueError as error:
            raise ValueError(f"reward term {name!r}: {error}") from error
        parts.append(weights[name] * advantages.double())
    return torch.stack(parts).sum(dim=0).float()


def without_signal(
    total: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float], *, normalise: Literal["total", "per_term"]
) -> Tensor:
    """[B] bool, the groups whose advantages are all 0: equal totals, or, where each term is normalised by itself, every
    weighted term equal.
    """
    if normalise == "total":
        return zero_signal(total)
    return torch.stack([zero_signal(values) for name, values in terms.items() if weights[name] != 0]).all(dim=0)


def zero_signal(rewards: Tensor) -> Tensor:
    """Groups from which nothing can be learned, because their rewards are equal (up to float32 rounding).

    Args:
        rewards: [B, G] float.

    Returns:
        [B] bool.

    Raises:
        ValueError: not [B, G], G < 2, or a reward that is not finite.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}; expected [B, G]")
    if rewards.shape[1] < 2:
        raise ValueError(
            f"group of {rewards.shape[1]}: a group needs at least 2 reports to have a baseline; raise grpo.group_size"
        )
    if not torch.isfinite(rewards).all():
        study, member = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise ValueError(f"reward {rewards[study, member].item()} of study {study}, member {member} is not finite")
    values = rewards.double()
    spread = values.amax(dim=1) - values.amin(dim=1)
    return spread <= _EQUAL_WITHIN * values.abs().amax(dim=1)


def batch_moments(rewards: Tensor) -> Tensor:
    """Count, sum and sum of squares of this rank's rewards; summed over ranks they give the global std.

    Args:
        rewards: any shape, float.

    Returns:
        [3] float64.
    """
    values = rewards.double()
    return torch.stack(
        [torch.full((), values.numel(), dtype=torch.float64, device=values.device), values.sum(), values.square().sum()]
    )


def std_of_moments(moments: Tensor) -> Tensor:
    """Unbiased std from `batch_moments` summed over ranks.

    Args:
        moments: [3] float64.

    Returns:
        Scalar float64.

    Raises:
        ValueError: fewer than 2 rewards.
    """
    count, total, squares = moments.unbind()
    if count < 2:
        raise ValueError(f"std of {int(count)} rewards: at least 2 are needed")
    return ((squares - total * total / count) / (count - 1)).clamp_min(0.0).sqrt()


def _checked_batch_std(batch_std: Tensor | float | None) -> float:
    if batch_std is None:
        raise ValueError(
            "scale 'batch' needs batch_std, the global batch's std (batch_moments summed over ranks, then "
            "std_of_moments)"
        )
    value = float(batch_std)
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"batch_std {value}; expected a finite number >= 0")
    return value
