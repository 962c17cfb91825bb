"""The loss once more, written from the papers with loops over plain floats: no tensors, nothing shared with the
package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def paper_loss(
    logp: Rows,
    old: Rows,
    reference: Rows | None,
    sampled: Rows | None,
    advantages: Sequence[float],
    mask: Sequence[Sequence[bool]],
    *,
    aggregation: str,
    max_length: int,
    clip_low: float,
    clip_high: float,
    beta: float,
    ratio: str,
    tis_cap: float | None,
) -> float:
    """Loss of a whole batch. Weights of importance sampling only where `tis_cap` is a number."""
    sequence_losses: list[list[float]] = []
    for i in range(len(logp)):
        tokens = [t for t in range(len(logp[i])) if mask[i][t]]
        if not tokens:
            continue
        if ratio == "sequence":  # GSPO: (pi(y) / pi_old(y)) ** (1 / |y|)
            whole = math.prod(math.exp(logp[i][t]) / math.exp(old[i][t]) for t in tokens)
            ratios = {t: whole ** (1 / len(tokens)) for t in tokens}
        else:
            ratios = {t: math.exp(logp[i][t]) / math.exp(old[i][t]) for t in tokens}
        losses = []
        for t in tokens:
            clipped = min(max(ratios[t], 1 - clip_low), 1 + clip_high)
            objective = min(ratios[t] * advantages[i], clipped * advantages[i])
            if tis_cap is not None:
                assert sampled is not None
                objective *= min(math.exp(old[i][t]) / math.exp(sampled[i][t]), tis_cap)
            if reference is not None:
                quotient = math.exp(reference[i][t]) / math.exp(logp[i][t])
                objective -= beta * (quotient - math.log(quotient) - 1)
            losses.append(-objective)
        sequence_losses.append(losses)
    if not sequence_losses:
        return 0.0
    if aggregation == "grpo":
        return sum(sum(losses) / len(losses) for losses in sequence_losses) / len(sequence_losses)
    if aggregation == "dapo":
        return sum(sum(losses) for losses in sequence_losses) / sum(len(losses) for losses in sequence_losses)
    assert aggregation == "dr_grpo"
    return sum(sum(losses) for losses in sequence_losses) / (len(sequence_losses) * max_length)
