"""Keyed sampling: a completion's random numbers depend on (seed, step, study, member), for a study that
comes more than once in a step on which time it is, and on nothing else.

The same study gets the same numbers on any rank, in any batch and any order, so a run can be cut differently, resumed
or replayed member by member.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a batch of studies is sampled.

    Attributes:
        group_size: G, reports a study.
        max_new_tokens: of the longest completion.
        seed: of the run.
        step: the outer step that samples, counted from 0.
        attempt: 0, or the how-many-th resampling of a zero-signal group.
        cache_tokens: tokens whose keys and values are held at a time, prompts once a study and completions at full
            length; more are sampled in parts, the largest first, which changes nothing, since sampling is keyed. None:
            all studies together.
    """

    group_size: int
    max_new_tokens: int
    seed: int
    step: int
    attempt: int = 0
    cache_tokens: int | None = None


def keyed_uniforms(
    *,
    seed: int,
    step: int,
    study_ids: Sequence[str],
    group_size: int,
    length: int,
    attempt: int = 0,
    occurrences: Sequence[int] | None = None,
) -> Tensor:
    """Uniform numbers of each completion, one a token.

    Args:
        attempt: 0, or the how-many-th resampling of a zero-signal group.
        occurrences: of each study, how often it came before in the step, on all ranks; None: never.

    Returns:
        [B * group_size, length] float64 in [0, 1), on the CPU; member g of study b is row b * group_size + g.
    """
    rows = []
    for study_id, occurrence in zip(study_ids, occurrences or [0] * len(study_ids), strict=True):
        again = f"|{occurrence}" if occurrence else ""
        for member in range(group_size):
            key = hashlib.sha256(f"{seed}|{step}|{study_id}|{member}|{attempt}{again}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") & (2**63 - 1))
            rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample_tokens(log_probs: Tensor, uniforms: Tensor, of_row: Tensor | None = None) -> Tensor:
    """Draw one token a row by inverting the distribution function.

    Args:
        log_probs: [U, V] normalised; -inf where a token can never be drawn.
        uniforms: [R] in [0, 1).
        of_row: [R] int64, which distribution is each row's; None: its own.

    Returns:
        [R] int64. A token of probability 0 is never drawn, also where rounding puts u at the very end.
    """
    cumulative = log_probs.exp().double().cumsum_(dim=-1)
    if of_row is not None:
        cumulative = cumulative.index_select(0, of_row)
    total = cumulative[:, -1:]
    # The last ids may be banned: their cumulative equals the total, so u * total must stay strictly below it.
    target = torch.minimum(
        uniforms.to(cumulative).unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
