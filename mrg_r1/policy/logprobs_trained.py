"""Log-probs with a gradient for every weight: the pass of SFT of all parameters.

Each prompt and its completion are one causal sequence, all of them behind one another on a packed axis; the layers are
those of every other pass (`families/`), read with their gradients. `logprobs_plain.py` is the same by the checkpoint's
own modules, and what this is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import SeqLens
from mrg_r1.policy.images import put_features
from mrg_r1.policy.language import LanguageModel, Packed
from mrg_r1.policy.logprobs import CHUNK_ELEMENTS
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Prompts, VisionFeatures, to_device


def trained_logprobs(
    policy: PolicyWeights,
    prompts: Prompts,
    vision: VisionFeatures,
    token_ids: Tensor,
    mask: Tensor,
    study_of_row: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token given its prompt and the tokens before it, with a graph to every weight.

    The weights must be whole on this rank: SFT of every parameter runs at ZeRO stages 1 and 2.

    Args:
        prompts, vision: B studies; `policy.encode_images(prompts)` with gradients enabled carries them on to the tower.
        token_ids: [R, C] int64 completions, padded on the right.
        mask: [R, C] bool, True on real tokens (EOS included): a prefix of each row, which may be empty.
        study_of_row: [R] int64, the study in 0..B-1 of each row; a prompt is run once for each of its rows.

    Returns:
        logp [R, C] float32 and entropy [R, C] float32 (nats, detached), both 0 where masked, of the distribution that
        `PolicyWeights.next_token_logits` defines (docs/traps.md #2). The loss of SFT is `-logp.sum() / tokens`.
    """
    lengths, study_list = torch.stack([mask.sum(dim=1), study_of_row]).tolist()  # the device is waited for once
    prompt_lengths = prompts.lengths
    rows = [row for row, length in enumerate(lengths) if length]
    if not rows:
        nothing = torch.zeros(mask.shape, device=mask.device)
        return nothing, nothing.clone()
    # longest first, so that sequences of like lengths are neighbours
    rows.sort(key=lambda row: -(prompt_lengths[study_list[row]] + lengths[row]))
    language = LanguageModel.read(policy.family, policy.base)
    packed, predicting = _pack(policy, language, prompts, vision, token_ids, rows, study_list, lengths)
    hidden = _run(language, packed, predicting, recompute=policy.recompute)
    columns = token_ids.shape[1]
    index = to_device(torch.cat([torch.arange(lengths[row]) + row * columns for row in rows]), hidden.device)
    logp, entropy = _TargetLogp.apply(
        hidden, policy.base.lm_head.weight, token_ids.flatten()[index], policy.banned, policy.temperature
    )
    empty = torch.zeros(mask.numel(), device=hidden.device)
    return empty.index_copy(0, index, logp).view(mask.shape), empty.index_copy(0, index, entropy).view(mask.shape)


def _pack(
    policy: PolicyWeights,
    language: LanguageModel,
    prompts: Prompts,
    vision: VisionFeatures,
    token_ids: Tensor,
    rows: Sequence[int],
    study_of_row: Sequence[int],
    lengths: Sequence[int],
) -> tuple[Packed, Tensor]:
    """[prompt | completion without its last token] of each row, and where on that axis the tokens are predicted."""
    device, width = token_ids.device, prompts.input_ids.shape[1]
    studies = [study_of_row[row] for row in rows]
    starts = [width - length for length in prompts.lengths]
    steps = torch.arange(max(lengths), device=device)
    ids, text_positions = [], []
    for row, study in zip(rows, studies, strict=True):
        ids += [prompts.input_ids[study, starts[study] :], token_ids[row, : lengths[row] - 1]]
        text_positions.append(prompts.next_position[study] + steps[: lengths[row] - 1])
    seq_lens = SeqLens(tuple(len(a) + len(b) for a, b in zip(ids[::2], ids[1::2], strict=True)), device)
    # prompts may have several axes of positions where text has one: rotated apart, then brought into the rows' order
    places = torch.arange(seq_lens.total, device=device).split([len(part) for part in ids])
    order = torch.empty(seq_lens.total, dtype=torch.long, device=device)
    order[torch.cat([*places[::2], *places[1::2]])] = torch.arange(seq_lens.total, device=device)
    of_prompts = language.rotation(torch.cat([prompts.positions[study, starts[study] :] for study in studies]))
    of_text = language.rotation(torch.cat(text_positions))
    cos, sin = (torch.cat(pair)[order] for pair in zip(of_prompts, of_text, strict=True))
    flat = torch.cat(ids)
    features = torch.cat([vision.per_study[study] for study in studies])
    embeddings, added = put_features(policy.embed(flat), flat == policy.image_token_id, features)
    predicting = [
        torch.arange(end - lengths[row], end, device=device) for row, end in zip(rows, seq_lens.starts[1:], strict=True)
    ]
    numbers = None
    if policy.family.image_numbers is not None:
        numbers = torch.zeros(seq_lens.total, dtype=torch.long, device=device)
        for row_starts, study in zip(seq_lens.starts[:-1], studies, strict=True):
            own = policy.family.image_numbers(prompts.positions[study, starts[study] :])
            numbers[row_starts : row_starts + len(own)] = own
    return Packed(embeddings, cos, sin, seq_lens, added, numbers), torch.cat(predicting)


def _run(language: LanguageModel, packed: Packed, predicting: Tensor, *, recompute: bool) -> Tensor:
    """[T, H] -> [predicting tokens, H] normalised hidden states; the last layer ends for those alone."""

    def run_layer(number: int, x: Tensor) -> Tensor:
        layer = language.layers[number]
        q, k, v = layer.heads(x, packed.cos, packed.sin)
        attended = packed.sight.attend(q, k, v, layer.window)
        if number == language.depth - 1:
            return layer.finish(x[predicting], attended[predicting])
        x = layer.finish(x, attended)
        return x + packed.added[number] if number < len(packed.added) else x

    x = packed.embeddings
    for number in range(language.depth):
        x = checkpoint(run_layer, number, x, use_reentrant=False) if recompute else run_layer(number, x)
    return language.norm(x)


class _TargetLogp(torch.autograd.Function):
    """Log-softmax of a trained head that never holds more than a chunk of tokens times the vocabulary.

    The head's gradient needs what the loss makes of each log-prob, so it is taken in the backward pass: a single chunk
    keeps its probabilities until then, of several each is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, banned: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        chunks = _chunks(len(ids), len(head))
        logp, entropy = hidden.new_empty(len(ids), dtype=torch.float32), hidden.new_empty(len(ids), dtype=torch.float32)
        probs = None
        for chunk in chunks:
            log_probs = _log_probs(hidden[chunk], head, banned, temperature)
            logp[chunk] = log_probs.gather(1, ids[chunk].unsqueeze(1)).squeeze(1)
            probs = log_probs.exp()
            entropy[chunk] = -torch.linalg.vecdot(probs, log_probs.masked_fill_(banned, 0.0))
        ctx.save_for_backward(hidden, head, ids, banned, probs if len(chunks) == 1 else None)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, ids, banned, kept = ctx.saved_tensors
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for chunk in _chunks(len(ids), len(head)):
            probs = kept if kept is not None else _log_probs(hidden[chunk], head, banned, ctx.temperature).exp_()
            share = grad[chunk].unsqueeze(1).float() / ctx.temperature
            d_logits = (probs * -share).scatter_add_(1, ids[chunk].unsqueeze(1), share).to(head.dtype)
            d_hidden[chunk] = d_logits @ head
            d_head += d_logits.t() @ hidden[chunk]
        return d_hidden, d_head.to(head.dtype), None, None, None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _log_probs(hidden: Tensor, head: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """[tokens, vocabulary] float32, as `PolicyWeights.next_token_logits` defines them."""
    logits = F.linear(hidden, head).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.masked_fill_(banned, float("-inf")).log_softmax(dim=-1)
