"""Scoring by the checkpoint's own modules, one padded row [prompt | completion] for each completion.

The naive pass that the fast ones (`logprobs.py`, and `logprobs_trained.py` with a gradient for every weight) are tested
and measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrg_r1.policy.images import put_features
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Prompts, VisionFeatures


def completion_logprobs_plain(
    policy: PolicyWeights,
    prompts: Prompts,
    vision: VisionFeatures,
    token_ids: Tensor,
    mask: Tensor,
    study_of_row: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token given its study's prompt and the tokens before it.

    Args:
        prompts, vision: B studies.
        token_ids: [R, C] int64 completions of any of these studies, padded on the right.
        mask: [R, C] bool, True on real tokens (EOS included).
        study_of_row: [R] int64, the study in 0..B-1 that each completion belongs to.

    Returns:
        logp [R, C] float32 and entropy [R, C] float32 (nats, detached), both 0 where masked, of the distribution that
        `PolicyWeights.next_token_logits` defines: the same one that the rollout samples from (docs/traps.md #2).
    """
    length = int(mask.sum(dim=1).max()) if mask.any() else 1  # columns that are padding in every row cost nothing
    ids, kept = token_ids[:, :length], mask[:, :length]
    embeddings, added = put_features(
        policy.embed(prompts.input_ids), prompts.input_ids == policy.image_token_id, torch.cat(vision.per_study)
    )  # [B, P, H]
    steps = torch.arange(length - 1, device=ids.device)
    positions = prompts.next_position[study_of_row, None] + steps  # [R, length - 1]; text goes on after the prompt
    hidden = policy.family.run_modules(
        policy.base,
        # the last token predicts nothing that is scored, so it is never an input
        torch.cat([embeddings[study_of_row], policy.embed(ids[:, :-1])], dim=1),
        torch.cat([prompts.attention_mask[study_of_row], kept[:, :-1].long()], dim=1),
        prompts.positions[study_of_row],
        positions,
        [part[study_of_row] for part in added],
    )[:, -length:]  # [R, length, H]; the last prompt token predicts the first completion token
    logp, entropy = _token_logp(policy, hidden[kept], ids[kept])
    return _scatter(logp, kept, token_ids.shape), _scatter(entropy, kept, token_ids.shape)


def _token_logp(policy: PolicyWeights, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H] hidden states and [T] ids -> [T] log-probs (with gradient) and [T] entropies (without)."""
    log_probs = policy.next_token_logits(hidden).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs.masked_fill(policy.banned, 0.0)).sum(dim=-1)
    return log_probs.gather(1, ids.unsqueeze(1)).squeeze(1), entropy


def _scatter(values: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Put [T] values back at the True places of kept [R, length], in a zero tensor of `shape` [R, C]."""
    full = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return full.masked_scatter(torch.nn.functional.pad(kept, (0, shape[1] - kept.shape[1])), values)
