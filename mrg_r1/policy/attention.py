"""Attention over packed sequences, and the group's attention to a prompt that it shares.

Packed: the tokens of many sequences lie behind one another on a single axis, without padding. `attend` and its backward
are the device's own flash kernels; what is written here is how a completion sees its study's prompt and itself: two
attentions, merged by their log-sum-exp, so that the prompt is computed once and shared by its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mrg_r1.kernels import attention as compiled
from mrg_r1.kernels import calls as kernels
from mrg_r1.policy import flash_attention
from mrg_r1.types import to_device

# Private names of torch, so they may go: `_plain` takes their place (on the CPU it costs memory, not exactness).
_CPU_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_CPU_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_CUDA_TYPES = (torch.bfloat16, torch.float16)


def has_cpu_kernels() -> bool:
    """Whether this torch has flash attention for CPUs, forward and backward."""
    return _CPU_FORWARD is not None and _CPU_BACKWARD is not None


@dataclass(frozen=True)
class SeqLens:
    """Lengths of the sequences behind one another on a packed axis; one may be empty."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def starts(self) -> list[int]:
        """One more than there are sequences; the last is the length of the axis."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[sequences + 1] int32, what the CUDA kernels want."""
        return to_device(torch.tensor(self.starts, dtype=torch.int32), self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        return self.starts[-1]

    @cached_property
    def last_tokens(self) -> Tensor:
        """[sequences] int64, where the last token of each lies."""
        return self.cu_seqlens[1:].long() - 1

    @cached_property
    def ones(self) -> SeqLens:
        """As many sequences of one token."""
        return SeqLens((1,) * len(self.lengths), self.device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_lens: SeqLens, k_lens: SeqLens, *, causal: bool, by_kernel: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence of queries to the sequence of keys of the same number.

    Args:
        q: [Tq, heads, D]; k, v: [Tk, key heads, D], key heads dividing heads (grouped-query attention).
        causal: query i sees keys 0..i of its sequence; both are then equally long.
        by_kernel: by this project's, where it is there.

    Returns:
        out [Tq, heads, D] and log-sum-exp of the scaled scores [heads, Tq] float32. A sequence without keys is not
        allowed to have queries.
    """
    if q.is_cuda and q.dtype in _CUDA_TYPES:
        package = flash_attention.in_use()
        if package is not None:
            starts, most = (q_lens.cu_seqlens, k_lens.cu_seqlens), (q_lens.longest, k_lens.longest)
            return package.forward(q, k, v, *starts, *most, causal)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, q_lens.cu_seqlens, k_lens.cu_seqlens, q_lens.longest, k_lens.longest, 0.0, causal, False
        )
        return out, lse
    if by_kernel and kernels.ready(q, k, v):
        nothing = k[:0]
        seen = (k, v, nothing, nothing) if causal else (nothing, nothing, k, v)
        out, lse = compiled.group_attention(q, *seen, _sequences(q_lens.lengths, k_lens.lengths, causal))
        return out, lse.t()
    outs, lses = [], []
    for queries, keys, count in _equal_lengths(q_lens, k_lens):
        piece, lse = _forward(_heads_first(q[queries], count), *_expanded(k[keys], v[keys], count, q.shape[1]), causal)
        outs.append(piece.transpose(1, 2).reshape(-1, *q.shape[1:]))
        lses.append(lse.transpose(0, 1).reshape(q.shape[1], -1))
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses, dim=1)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lens: SeqLens,
    k_lens: SeqLens,
    *,
    causal: bool,
    by_kernel: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to q, k and v.

    `out` and `lse` may be those of a larger attention of which these keys are a part: a score's probability is
    exp(score - lse) and its gradient needs sum(grad * out) besides, nothing else, so a part of the keys gets its exact
    share of the gradient (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    if q.is_cuda and q.dtype in _CUDA_TYPES:
        package = flash_attention.in_use()
        if package is not None:
            starts, most = (q_lens.cu_seqlens, k_lens.cu_seqlens), (q_lens.longest, k_lens.longest)
            return package.backward(grad, q, k, v, out, lse, *starts, *most, causal)
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout to replay
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, q_lens.cu_seqlens, k_lens.cu_seqlens, q_lens.longest, k_lens.longest,
            0.0, causal, rng_state, unused,
        )  # fmt: skip
        return dq, dk, dv
    if by_kernel and kernels.ready(grad, q, k, v):
        nothing, paths = k[:0], _sequences(q_lens.lengths, k_lens.lengths, causal)
        seen = (k, v, nothing, nothing) if causal else (nothing, nothing, k, v)
        dq, *found = compiled.group_attention_backward(grad, q, *seen, out, lse.t().contiguous(), paths)
        return (dq, found[0], found[1]) if causal else (dq, found[2], found[3])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, count in _equal_lengths(q_lens, k_lens):
        pieces = _backward(
            _heads_first(grad[queries], count),
            _heads_first(q[queries], count),
            *_expanded(k[keys], v[keys], count, q.shape[1]),
            _heads_first(out[queries], count),
            lse[:, queries].reshape(q.shape[1], count, -1).transpose(0, 1),
            causal,
        )
        dq[queries], dk[keys], dv[keys] = (
            _summed(piece, like) for piece, like in zip(pieces, (q[queries], k[keys], v[keys]), strict=True)
        )
    return dq, dk, dv


@lru_cache(maxsize=64)
def _sequences(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], causal: bool) -> compiled.Paths:
    """Sequences behind one another as the kernel takes them: seeing themselves, or keys as if those were prompts."""
    sequences = torch.arange(len(q_lengths) + 1)
    starts = torch.tensor([0, *accumulate(q_lengths)])
    prompts = torch.zeros_like(starts) if causal else torch.tensor([0, *accumulate(k_lengths)])
    begins = torch.zeros(len(q_lengths), dtype=torch.long)
    axes = int(starts[-1]), int(prompts[-1])
    return compiled.Paths(sequences, prompts, starts, begins, torch.arange(axes[0]), axes, own=causal)


def _equal_lengths(q_lens: SeqLens, k_lens: SeqLens) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring sequences of equal lengths are one call on a batch: (queries, keys, how many sequences)."""
    pairs = list(zip(q_lens.lengths, k_lens.lengths, strict=True))
    first = 0
    for index in range(1, len(pairs) + 1):
        if index == len(pairs) or pairs[index] != pairs[first]:
            if pairs[first][0]:
                yield (
                    slice(q_lens.starts[first], q_lens.starts[index]),
                    slice(k_lens.starts[first], k_lens.starts[index]),
                    index - first,
                )
            first = index


def _heads_first(packed: Tensor, count: int) -> Tensor:
    """[count * L, heads, D] -> [count, heads, L, D], a view where it can be."""
    return packed.reshape(count, -1, *packed.shape[1:]).transpose(1, 2)


def _expanded(k: Tensor, v: Tensor, count: int, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values once a query head: the CPU kernels know no grouped heads."""
    repeat = heads // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    return _heads_first(k, count), _heads_first(v, count)


def _summed(piece: Tensor, like: Tensor) -> Tensor:
    """[count, heads, L, D] gradients -> packed, summed over the query heads that shared a key head."""
    packed = piece.transpose(1, 2).reshape(like.shape[0], piece.shape[1], -1)
    if packed.shape[1] == like.shape[1]:
        return packed
    return packed.reshape(like.shape[0], like.shape[1], -1, packed.shape[2]).sum(dim=2)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and _CPU_FORWARD is not None:
        out, lse = _CPU_FORWARD(q, k, v, 0.0, causal)
        return out, lse
    out, _, lse = _plain(q, k, v, causal)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu" and _CPU_BACKWARD is not None:
        dq, dk, dv = _CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, causal)
        return dq, dk, dv
    scale = q.shape[-1] ** -0.5
    _, scores, _ = _plain(q, k, v, causal)
    probability = (scores - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    dv = probability.transpose(2, 3) @ grad
    inner = probability * (grad @ v.float().transpose(2, 3) - (grad * out.float()).sum(dim=-1, keepdim=True)) * scale
    return (inner @ k.float()).to(q.dtype), (inner.transpose(2, 3) @ q.float()).to(k.dtype), dv.to(v.dtype)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, scores, lse) from whole score matrices: where there is no flash kernel (fp32 on CUDA), and the tests'
    oracle.
    """
    scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), scores, lse


class PackedAttention(torch.autograd.Function):
    """`attend` with its gradient: prompts causally to themselves, or their last tokens to all of them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_lens: SeqLens, k_lens: SeqLens, causal: bool) -> Tensor:
        # A tower's scores may be so alike that their gradient is mostly rounding: it shall be that of the checkpoint's
        # modules, whose kernel is torch's
        by_kernel = causal or not any(ctx.needs_input_grad)
        out, lse = attend(q, k, v, q_lens, k_lens, causal=causal, by_kernel=by_kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = q_lens, k_lens, causal, by_kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        q_lens, k_lens, causal, by_kernel = ctx.arguments
        grads = attend_backward(grad, q, k, v, out, lse, q_lens, k_lens, causal=causal, by_kernel=by_kernel)
        return *grads, None, None, None
