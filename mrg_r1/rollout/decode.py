"""Rollout: one prefill a study, its key-value cache expanded over the group, tokens sampled by hand.

The checkpoint's generation config is never consulted (trap 1): what is sampled is `Policy.next_token_logits`, which is also
what is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from mrg_r1.policy.load import Policy
from mrg_r1.policy.vision import embed_prompts
from mrg_r1.rollout.sampling import keyed_uniforms, sample_tokens
from mrg_r1.types import Completions, Prompts, VisionFeatures


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Prompts,
    vision: VisionFeatures,
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    step: int,
    attempt: int = 0,
) -> Completions:
    """Sample `group_size` reports a study.

    Returns:
        Completions [B, G, C] with C at most `max_new_tokens`.
    """
    uniforms = keyed_uniforms(
        seed=seed, step=step, study_ids=prompts.study_ids, group_size=group_size, length=max_new_tokens, attempt=attempt
    ).to(policy.device)
    return _decode(policy, prompts, vision, group_size=group_size, max_new_tokens=max_new_tokens, uniforms=uniforms)


@torch.no_grad()
def greedy(policy: Policy, prompts: Prompts, vision: VisionFeatures, *, max_new_tokens: int) -> Completions:
    """The most probable next token each time: one report a study, [B, 1, C]; for evaluation."""
    return _decode(policy, prompts, vision, group_size=1, max_new_tokens=max_new_tokens, uniforms=None)


def _decode(
    policy: Policy, prompts: Prompts, vision: VisionFeatures, *, group_size: int, max_new_tokens: int, uniforms: Tensor | None
) -> Completions:
    was_training = policy.training
    policy.eval()  # gradient checkpointing in training mode would switch the cache off (trap 17)
    rows = len(prompts) * group_size
    token_ids = torch.full((rows, max_new_tokens), policy.pad_id, device=policy.device)
    logp = torch.zeros(rows, max_new_tokens, device=policy.device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=policy.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=policy.device)
    eos = torch.tensor(policy.eos_ids, device=policy.device)

    cache = DynamicCache(config=policy.base.config.text_config)
    hidden = policy.language_model(
        inputs_embeds=embed_prompts(policy, prompts, vision),
        attention_mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]  # [B, H]; prompts end on the right, so the last column is the last token
    cache.batch_repeat_interleave(group_size)
    hidden = hidden.repeat_interleave(group_size, dim=0)  # [R, H]
    position = prompts.next_position.repeat_interleave(group_size)  # [R]
    prompt_mask = prompts.attention_mask.repeat_interleave(group_size, dim=0)  # [R, P]
    padded = not bool(prompt_mask.all())
    active = torch.arange(rows, device=policy.device)  # the rows still in the cache, in its order

    for step in range(max_new_tokens):
        log_probs = policy.next_token_logits(hidden).log_softmax(dim=-1)  # [A, V]
        token = log_probs.argmax(dim=-1) if uniforms is None else sample_tokens(log_probs, uniforms[active, step])
        going = ~ended[active]
        writing = active[going]
        token_ids[writing, step] = token[going]
        logp[writing, step] = log_probs[going].gather(1, token[going].unsqueeze(1)).squeeze(1)
        mask[writing, step] = True  # the EOS itself is a token that was chosen, and is scored (trap 8)
        ended[writing] = torch.isin(token[going], eos)
        going = ~ended[active]
        if step + 1 == max_new_tokens or not going.any():
            break
        if int(going.sum()) * 4 <= 3 * len(active):  # a quarter has ended: stop paying for it
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            active, token = active[kept], token[kept]
        seen = torch.cat([prompt_mask[active], prompt_mask.new_ones(len(active), step + 1)], dim=1) if padded else None
        hidden = policy.language_model(
            input_ids=token.unsqueeze(1),
            attention_mask=seen,
            position_ids=(position[active] + step).expand(3, -1).unsqueeze(2),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    policy.train(was_training)
    length = int(mask.sum(dim=1).max())
    shape = (len(prompts), group_size, length)
    token_ids, mask, logp = token_ids[:, :length], mask[:, :length], logp[:, :length]
    texts = policy.tokenizer.batch_decode([row[kept].tolist() for row, kept in zip(token_ids, mask, strict=True)], skip_special_tokens=True)
    return Completions(
        token_ids=token_ids.view(shape).contiguous(),
        mask=mask.view(shape).contiguous(),
        logp=logp.view(shape).contiguous(),
        ended=ended.view(shape[:2]),
        texts=[texts[b * group_size : (b + 1) * group_size] for b in range(len(prompts))],
    )
