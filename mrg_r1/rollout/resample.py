"""Groups sampled again: a group whose rewards are all equal teaches nothing (docs/method.md §3, `max_resample`)."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from mrg_r1.policy.policy import Policy
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.types import Completions, Prompts, VisionFeatures


def resample_groups(
    policy: Policy,
    prompts: Prompts,
    vision: VisionFeatures,
    completions: Completions,
    rows: list[int],
    sampling: Sampling,
) -> Completions:
    """Completions in which the groups at `rows` are sampled anew; `sampling.attempt` makes their random numbers
    others.
    """
    fresh = rollout(policy, prompts.select(rows), vision.select(rows), sampling)
    return replace_groups(completions, rows, fresh, pad_id=policy.pad_id)


def replace_groups(completions: Completions, rows: list[int], fresh: Completions, *, pad_id: int) -> Completions:
    """`completions` with the groups at `rows` taken from `fresh`, padded to the longer of both."""
    length = max(completions.token_ids.shape[2], fresh.token_ids.shape[2])
    index = torch.tensor(rows, device=completions.token_ids.device)

    def merged(old: torch.Tensor, new: torch.Tensor, fill: float) -> torch.Tensor:
        result = pad(old, (0, length - old.shape[2]), value=fill)
        result[index] = pad(new, (0, length - new.shape[2]), value=fill)
        return result

    ended = completions.ended.clone()
    ended[index] = fresh.ended
    texts = list(completions.texts)
    for place, row in enumerate(rows):
        texts[row] = fresh.texts[place]
    return Completions(
        token_ids=merged(completions.token_ids, fresh.token_ids, pad_id),
        mask=merged(completions.mask, fresh.mask, False),
        logp=merged(completions.logp, fresh.logp, 0.0),
        ended=ended,
        texts=texts,
    )
