"""Rollout: one prefill a study, its keys and values shared by the group, tokens sampled by hand.

The checkpoint's generation config is never consulted (docs/traps.md #1): what is sampled is
`PolicyWeights.next_token_logits`, which is also what is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mrg_r1.kernels import calls as kernels
from mrg_r1.policy.language import LanguageModel, PromptCache
from mrg_r1.policy.layers import Projection
from mrg_r1.policy.packing import pack_prompts
from mrg_r1.policy.policy import Policy
from mrg_r1.rollout.decoder import Answers, Decoder
from mrg_r1.rollout.sampling import Sampling, keyed_uniforms
from mrg_r1.types import Completions, Prompts, VisionFeatures, to_device

_CHECK_EVERY = {"cpu": 1, "cuda": 16}  # tokens between two looks at who has ended: a look waits for the device
_COMPACT_BELOW = 0.75  # of the rectangle's places, what a smaller one would have: less is not worth the copying


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Prompts,
    vision: VisionFeatures,
    sampling: Sampling,
    *,
    states: PromptCache | None = None,
    on_ended: Callable[[list[str]], None] | None = None,
) -> Completions:
    """Sample a group of reports for each study.

    Args:
        states: the prompts' states, where a prefill was made already.
        on_ended: is given texts of completions that have ended while others go on, so that their labels can be read
            meanwhile.

    Returns:
        Completions [B, G, C] with C at most `sampling.max_new_tokens`.
    """
    group_size, max_new_tokens = sampling.group_size, sampling.max_new_tokens
    own, tokens = group_size * max_new_tokens, prompts.lengths
    cut = _parts(prompts, own=own, cache_tokens=sampling.cache_tokens)
    # largest first: what does not fit into memory shows now, and not when the last part's turn comes
    turns = sorted(range(len(cut)), key=lambda part: -sum(tokens[study] + own for study in cut[part]))
    parts: dict[int, Completions] = {}
    with policy.sampler() as language:
        for turn in turns:
            rows = cut[turn]
            if parts and on_ended is not None:
                on_ended([text for group in parts[next(reversed(parts))].texts for text in group])
            some = prompts if len(rows) == len(prompts) else prompts.select(rows)
            uniforms = keyed_uniforms(
                seed=sampling.seed,
                step=sampling.step,
                study_ids=some.study_ids,
                group_size=group_size,
                length=max_new_tokens,
                attempt=sampling.attempt,
                occurrences=some.occurrences,
            )
            known = None if states is None else states.select(rows)
            parts[turn] = _decode(
                policy, language, some, vision.select(rows), group_size, max_new_tokens, uniforms, known, on_ended
            )
    return (
        parts[0]
        if len(parts) == 1
        else Completions.join([parts[part] for part in range(len(cut))], pad_id=policy.pad_id)
    )


@torch.no_grad()
def greedy(policy: Policy, prompts: Prompts, vision: VisionFeatures, *, max_new_tokens: int) -> Completions:
    """The most probable next token each time: one report a study, [B, 1, C]; for evaluation."""
    with policy.sampler() as language:
        return _decode(policy, language, prompts, vision, 1, max_new_tokens, None)


def _parts(prompts: Prompts, *, own: int, cache_tokens: int | None) -> list[list[int]]:
    """Studies in order, cut where another one's prompt and `own` completion tokens would exceed `cache_tokens`."""
    parts: list[list[int]] = [[]]
    used = 0
    for study, tokens in enumerate(prompts.lengths):
        if parts[-1] and cache_tokens is not None and used + tokens + own > cache_tokens:
            parts.append([])
            used = 0
        parts[-1].append(study)
        used += tokens + own
    return parts


def _decode(
    policy: Policy,
    language: LanguageModel,
    prompts: Prompts,
    vision: VisionFeatures,
    group_size: int,
    max_new_tokens: int,
    uniforms: Tensor | None,
    states: PromptCache | None = None,
    on_ended: Callable[[list[str]], None] | None = None,
) -> Completions:
    studies, device = len(prompts), policy.device
    rows = studies * group_size
    states = language.prompt_pass(pack_prompts(policy, language, prompts, vision)) if states is None else states
    answers = Answers.empty(rows, max_new_tokens, pad_id=policy.pad_id, device=device)
    kept = prompts.attention_mask.bool()
    places = _places(prompts)
    decoder = Decoder(
        language,
        embed=policy.language_model.embed_tokens,
        logits=partial(policy.next_token_logits, head=_head(policy)),
        prompt_cache=[(_padded(keys, places, kept), _padded(values, places, kept)) for keys, values in states.layers],
        prompt_mask=None if min(prompts.lengths) == kept.shape[1] else kept,
        rows=torch.arange(rows, device=device).view(studies, group_size),
        next_position=prompts.next_position,
        uniforms=None if uniforms is None else to_device(torch.cat([uniforms, uniforms[:1]]), device),
        eos=to_device(torch.tensor(policy.eos_ids), device),
        pad_id=policy.pad_id,
        answers=answers,
    )
    decoder.start(states.last)
    del states  # the decoder has its own layout of them
    texts: dict[int, str] = {}  # row -> what it says

    def read(ended: Tensor) -> list[str]:
        """The texts of rows that were not read yet, where `ended` [R] says so."""
        written = torch.where(answers.mask, answers.token_ids, -1)[:rows]
        table = torch.cat([ended.unsqueeze(1), written], dim=1).tolist()  # in one piece: a copy waits for the device
        fresh = [row for row, (over, *_) in enumerate(table) if over and row not in texts]
        ids = [[token for token in table[row][1:] if token >= 0] for row in fresh]
        said: list[str] = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts.update(zip(fresh, said, strict=True))
        return said

    for written in range(1, max_new_tokens):
        if written % _CHECK_EVERY[device.type] == 0:
            running = decoder.running()
            smallest = int(running.any(dim=1).sum() * running.sum(dim=1).max())
            if smallest == 0:
                break
            if smallest <= _COMPACT_BELOW * running.numel():  # stop paying for rows that have ended
                decoder.compact(running)
                if on_ended is not None:
                    on_ended(read(answers.ended[:rows]))
        decoder.advance(written)
    decoder.finish()

    length = int(answers.mask.sum(dim=1).max())
    shape = (studies, group_size, length)
    token_ids, mask, logp = (tensor[:rows, :length] for tensor in (answers.token_ids, answers.mask, answers.logp))
    read(torch.ones(rows, dtype=torch.bool, device=device))
    return Completions(
        token_ids=token_ids.reshape(shape).contiguous(),
        mask=mask.reshape(shape).contiguous(),
        logp=logp.reshape(shape).contiguous(),
        ended=answers.ended[:rows].view(shape[:2]),
        texts=[[texts[b * group_size + g] for g in range(group_size)] for b in range(studies)],
    )


def _head(policy: Policy) -> Callable[[Tensor], Tensor] | None:
    """The head laid out for few rows where that is faster; None: the module as it is."""
    module = policy.base.lm_head
    if type(module) is not torch.nn.Linear or not kernels.ready(module.weight):
        return None
    return Projection.read([module]).for_few_tokens()


def _places(prompts: Prompts) -> Tensor:
    """[T] int64: of prompts behind one another, where each token lies among the B * P padded ones."""
    width = prompts.input_ids.shape[1]
    ends = range(width, width * len(prompts) + 1, width)
    places = [torch.arange(end - length, end) for end, length in zip(ends, prompts.lengths, strict=True)]
    return to_device(torch.cat(places), prompts.input_ids.device)


def _padded(packed: Tensor, places: Tensor, kept: Tensor) -> Tensor:
    """[T, K, D] of prompts behind one another -> [B, K, P, D], padded on the left as `kept` [B, P] says."""
    padded = packed.new_zeros(kept.numel(), *packed.shape[1:]).index_copy_(0, places, packed)
    return padded.view(*kept.shape, *packed.shape[1:]).transpose(1, 2)
