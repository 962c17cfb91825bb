"""A group's attention to its prompt and to itself as batched products over padded rectangles.

For short completions in float32 on a CPU, where flash attention is a call for each of them that costs more than its
arithmetic. Here studies of like lengths are one rectangle, small enough for its scores to stay in the core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Self

import torch
from torch import Tensor

SCORES = 2**17  # of a rectangle, for each query head of a key head: with two of them 1 MiB in float32
# Beyond these the flash kernel's own blocking is as fast, and it holds no scores.
LONGEST_COMPLETION, LONGEST_PROMPT = 64, 256
TOKENS_OF_A_CALL = 64  # of the flash kernel, which takes neighbours of equal lengths together


def fits(groups: Sequence[Sequence[int]], prompts: Sequence[int]) -> bool:
    """Whether completions and prompts of these lengths are short enough."""
    longest = max((length for group in groups for length in group), default=0)
    return 0 < longest <= LONGEST_COMPLETION and max(prompts) <= LONGEST_PROMPT


@dataclass(frozen=True)
class Rectangle:
    """Studies that lie behind one another on both padded axes: completions [studies, key heads, members, length], and
    prompts [studies, key heads, prompt].
    """

    studies: int
    key_heads: int
    members: int
    length: int  # tokens of each completion
    prompt: int  # tokens of each prompt
    own: slice
    shared: slice
    later: Tensor  # [length, 1, length] float32, -inf where a key comes after its query
    absent: Tensor | None  # [studies, 1, prompt] float32, -inf where a prompt has ended; None where none is shorter

    def each(self, padded: Tensor, size: int) -> Tensor:
        """[studies * key heads * members, length * heads a key head, D] of the axis of completions."""
        return padded[self.own].view(self.studies * self.key_heads * self.members, -1, size)

    def together(self, padded: Tensor, size: int) -> Tensor:
        """[studies * key heads, members * length * heads a key head, D] of the axis of completions."""
        return padded[self.own].view(self.studies * self.key_heads, -1, size)

    def prompts(self, padded: Tensor, size: int) -> Tensor:
        """[studies * key heads, prompt, D] of the axis of prompts."""
        return padded[self.shared].view(self.studies * self.key_heads, -1, size)

    def split(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """[studies * key heads * members, length * heads a key head, prompt + length] -> views: [studies * key heads,
        members * length * heads a key head, prompt] and [studies * key heads * members, length * heads a key head,
        length].
        """
        together = scores.view(self.studies * self.key_heads, -1, scores.shape[2])
        return together[:, :, : self.prompt], scores[:, :, self.prompt :]


@dataclass(frozen=True)
class Axis:
    """How a packed axis [T, key heads] goes into rectangles and comes back."""

    into: Tensor  # [padded] int64, of packed rows; padding repeats one
    back: Tensor  # [T * key heads] int64, of padded rows
    padding: Tensor  # int64, the padded rows that stand for nothing, or for what another stands for
    outside: Tensor  # int64, the packed rows that are in no rectangle
    copies: Tensor  # int64, the padded rows that stand for what another stands for too

    def put(self, packed: Tensor, key_heads: int) -> Tensor:
        """[T, n * key heads, D] -> [padded, n * D]."""
        return packed.reshape(len(packed) * key_heads, -1).index_select(0, self.into)

    def take(self, padded: Tensor, key_heads: int, size: int) -> Tensor:
        """[padded, n * D] -> [T, n * key heads, D], 0 where there was none."""
        packed = padded.index_select(0, self.back).index_fill_(0, self.outside, 0.0)
        return packed.view(len(self.back) // key_heads, -1, size)

    def gather(self, padded: Tensor, key_heads: int, size: int) -> Tensor:
        """What `take` takes, copies added up."""
        packed = self.take(padded, key_heads, size)
        if len(self.copies):
            packed.view(len(self.back), -1).index_add_(0, self.into[self.copies], padded[self.copies])
        return packed


@dataclass(frozen=True)
class Rectangles:
    """Where each token of a pass lies; made once for all layers."""

    pieces: tuple[Rectangle, ...]
    completions: Axis
    prompts: Axis
    key_heads: int

    @classmethod
    def of_groups(
        cls,
        groups: Sequence[Sequence[int]],
        prompts: Sequence[int],
        *,
        key_heads: int,
        nodes: tuple[Tensor, Tensor] | None = None,
    ) -> Self | None:
        """
        Args:
            groups: of each study the lengths of its completions, in the order of the packed axis.
            prompts: tokens of each study's prompt.
            nodes: where completions share tokens, `PrefixTree.nodes`: which packed token each of them is, and whether
                it is this completion's own. Flash attention cannot read them: no other way is asked for then.

        Returns:
            None where flash attention is the better way.
        """
        members = [len(group) for group in groups]
        longest = [max(group, default=0) for group in groups]
        if nodes is None:
            if not fits(groups, prompts):
                return None
            calls = sum(1 for _ in groupby(length for group in groups for length in group))
            if sum(map(sum, groups)) > TOKENS_OF_A_CALL * calls:
                return None

        def shape(studies: Sequence[int]) -> tuple[int, int, int]:
            return tuple(max(sizes[study] for study in studies) for sizes in (prompts, longest, members))  # type: ignore[return-value]

        pieces: list[list[int]] = []
        for study in sorted(range(len(groups)), key=lambda study: (prompts[study], longest[study])):
            if pieces and longest[study]:
                prompt, length, rows = shape([*pieces[-1], study])
                if (len(pieces[-1]) + 1) * rows * length * key_heads * (prompt + length) <= SCORES:
                    pieces[-1].append(study)
                    continue
            if longest[study]:
                pieces.append([study])

        firsts = list(accumulate(map(sum, groups), initial=0))
        prompt_firsts = list(accumulate(prompts, initial=0))
        own, shared, rectangles = _AxisBuilder(key_heads), _AxisBuilder(key_heads), []
        for studies in pieces:
            prompt, length, rows = shape(studies)
            of_completions, of_prompts = [], []  # of each study (first token, tokens) of its sequences
            for study in studies:
                starts = accumulate(groups[study], initial=firsts[study])
                absent = [(0, 0)] * (rows - members[study])
                of_completions.append([*zip(starts, groups[study], strict=False), *absent])
                of_prompts.append([(prompt_firsts[study], prompts[study])])
            there = torch.tensor([prompts[study] for study in studies])[:, None] > torch.arange(prompt)
            later = torch.full((length, length), float("-inf")).triu(1)
            rectangles.append(
                Rectangle(
                    studies=len(studies),
                    key_heads=key_heads,
                    members=rows,
                    length=length,
                    prompt=prompt,
                    own=own.add(of_completions, length),
                    shared=shared.add(of_prompts, prompt),
                    later=later.unsqueeze(1),
                    absent=None if there.all() else torch.where(there, 0.0, float("-inf")).unsqueeze(1),
                )
            )
        return cls(tuple(rectangles), own.axis(firsts[-1], nodes), shared.axis(prompt_firsts[-1]), key_heads)


class RectangleAttention(torch.autograd.Function):
    """What `attention.GroupAttention` computes, with whole scores of a rectangle at a time, made again for the
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, plan: Rectangles
    ) -> Tensor:
        """q [T, heads, D], k and v [T, key heads, D]; prompt_k and prompt_v [prompt tokens, key heads, D]; all float32.
        A prompt whose study has no completion may be among them.
        """
        own, heads, size = plan.completions, plan.key_heads, q.shape[2]
        q, k, v = own.put(q, heads).mul_(size**-0.5), own.put(k, heads), own.put(v, heads)
        shared_k, shared_v = plan.prompts.put(prompt_k, heads), plan.prompts.put(prompt_v, heads)
        out = torch.empty_like(q)
        for piece in plan.pieces:
            to_prompt, to_own = piece.split(_weights(piece, q, k, shared_k, size))
            torch.bmm(to_own, piece.each(v, size), out=piece.each(out, size))
            piece.together(out, size).baddbmm_(to_prompt, piece.prompts(shared_v, size))
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v)
        ctx.plan = plan
        return own.take(out, heads, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prompt_k, prompt_v = ctx.saved_tensors
        plan: Rectangles = ctx.plan
        own, shared, heads, size = plan.completions, plan.prompts, plan.key_heads, grad.shape[2]
        shared_k, shared_v = shared.put(prompt_k, heads), shared.put(prompt_v, heads)
        grad = own.put(grad, heads).index_fill_(0, own.padding, 0.0)  # no key may hear of a query that is none
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_shared_k, d_shared_v = torch.empty_like(shared_k), torch.empty_like(shared_v)
        for piece in plan.pieces:
            weights = _weights(piece, q, k, shared_k, size)
            to_prompt, to_own = piece.split(weights)
            d_each, d_together = piece.each(grad, size), piece.together(grad, size)
            torch.bmm(to_own.transpose(1, 2), d_each, out=piece.each(dv, size))
            torch.bmm(to_prompt.transpose(1, 2), d_together, out=piece.prompts(d_shared_v, size))
            to_prompt = torch.bmm(d_together, piece.prompts(shared_v, size).transpose(1, 2))
            to_own = torch.bmm(d_each, piece.each(v, size).transpose(1, 2))
            d_weights = torch.cat([to_prompt.view(*to_own.shape[:2], -1), to_own], dim=2)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            to_prompt, to_own = piece.split(d_scores)
            torch.bmm(to_own.transpose(1, 2), piece.each(q, size), out=piece.each(dk, size))
            torch.bmm(to_prompt.transpose(1, 2), piece.together(q, size), out=piece.prompts(d_shared_k, size))
            torch.bmm(to_own, piece.each(k, size), out=piece.each(dq, size))
            piece.together(dq, size).baddbmm_(to_prompt, piece.prompts(shared_k, size))
        d_completions = own.take(dq.mul_(size**-0.5), heads, size), *(own.gather(d, heads, size) for d in (dk, dv))
        return *d_completions, *(shared.take(part, heads, size) for part in (d_shared_k, d_shared_v)), None


def _weights(piece: Rectangle, q: Tensor, k: Tensor, prompt_k: Tensor, size: int) -> Tensor:
    """Probabilities [studies * key heads * members, length * heads a key head, prompt + length]; `q` is scaled."""
    queries = piece.each(q, size)
    # not into one tensor at once: of parts of another tensor torch makes a product for each batch
    to_prompt = torch.bmm(piece.together(q, size), piece.prompts(prompt_k, size).transpose(1, 2))
    to_own = torch.bmm(queries, piece.each(k, size).transpose(1, 2))
    to_own.view(len(to_own), piece.length, -1, piece.length).add_(piece.later)
    if piece.absent is not None:
        to_prompt.view(piece.studies, -1, piece.prompt).add_(piece.absent)
    return torch.cat([to_prompt.view(*to_own.shape[:2], -1), to_own], dim=2).softmax(dim=2)


class _AxisBuilder:
    """Rectangles put behind one another on an axis."""

    def __init__(self, key_heads: int) -> None:
        self.heads = torch.arange(key_heads)[:, None, None]
        self.into: list[Tensor] = []
        self.real: list[Tensor] = []
        self.end = 0

    def add(self, sequences: Sequence[Sequence[tuple[int, int]]], length: int) -> slice:
        """Add a rectangle.

        Args:
            sequences: [studies][sequences] (first token, tokens).
        """
        first, tokens = torch.tensor(sequences)[:, None, :, :, None].unbind(dim=3)  # [studies, 1, sequences, 1]
        steps = torch.arange(length)
        real = (steps < tokens).expand(-1, len(self.heads), -1, -1)
        token = first + torch.minimum(steps, (tokens - 1).clamp_min(0))
        self.into.append((token * len(self.heads) + self.heads).flatten())
        self.real.append(real.flatten())
        start, self.end = self.end, self.end + real.numel()
        return slice(start, self.end)

    def axis(self, tokens: int, nodes: tuple[Tensor, Tensor] | None = None) -> Axis:
        into, real = torch.cat(self.into), torch.cat(self.real)
        copies = torch.zeros_like(real)
        if nodes is not None:
            node, is_own = nodes
            token, head = into // len(self.heads), into % len(self.heads)
            copies = real & ~is_own[token]
            into, real, tokens = node[token] * len(self.heads) + head, real & ~copies, int(node.max()) + 1
        back = torch.full((tokens * len(self.heads),), -1)
        back[into[real]] = real.nonzero().squeeze(1)
        outside = (back < 0).nonzero().squeeze(1)
        of_no_token, copied = ((~real).nonzero().squeeze(1), copies.nonzero().squeeze(1))
        return Axis(into, back.clamp_min(0), of_no_token, outside, copied)
