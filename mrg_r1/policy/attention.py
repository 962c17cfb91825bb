"""Attention over packed sequences, and the shared-prefix attention that scoring a group is made of.

Packed: the tokens of many sequences lie behind one another on a single axis, without padding. `attend` and its backward are
the device's own flash kernels; what is written here is how a completion sees its study's prompt and itself: two
attentions, merged by their log-sum-exp, so that the prompt is computed once and shared by its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# Private names of torch, so they may go: `_plain` takes their place (on the CPU it costs memory, not exactness).
_CPU_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_CPU_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_CUDA_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Runs:
    """Consecutive sequences on a packed axis; a run may be empty."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def starts(self) -> list[int]:
        """One more than there are runs; the last is the length of the axis."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def cumulative(self) -> Tensor:
        """[runs + 1] int32, what the CUDA kernels want."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        return self.starts[-1]


def attend(q: Tensor, k: Tensor, v: Tensor, q_runs: Runs, k_runs: Runs, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of each run of queries to the run of keys of the same number.

    Args:
        q: [Tq, heads, D]; k, v: [Tk, key heads, D], key heads dividing heads (grouped-query attention).
        causal: query i sees keys 0..i of its run; the runs of both are then equally long.

    Returns:
        out [Tq, heads, D] and log-sum-exp of the scaled scores [heads, Tq] float32. A run without keys is not allowed to have queries.
    """
    if q.is_cuda and q.dtype in _CUDA_TYPES:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, q_runs.cumulative, k_runs.cumulative, q_runs.longest, k_runs.longest, 0.0, causal, False
        )
        return out, lse
    outs, lses = [], []
    for queries, keys, count in _equal_runs(q_runs, k_runs):
        piece, lse = _forward(_heads_first(q[queries], count), *_expanded(k[keys], v[keys], count, q.shape[1]), causal)
        outs.append(piece.transpose(1, 2).reshape(-1, *q.shape[1:]))
        lses.append(lse.transpose(0, 1).reshape(q.shape[1], -1))
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses, dim=1)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_runs: Runs, k_runs: Runs, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to q, k and v.

    `out` and `lse` may be those of a larger attention of which these keys are a part: a score's probability is exp(score - lse) and
    its gradient needs sum(grad * out) besides, nothing else, so a part of the keys gets its exact share of the gradient
    (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    if q.is_cuda and q.dtype in _CUDA_TYPES:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # there is no dropout to replay
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, q_runs.cumulative, k_runs.cumulative, q_runs.longest, k_runs.longest, 0.0, causal,
            rng_state, unused,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, count in _equal_runs(q_runs, k_runs):
        pieces = _backward(
            _heads_first(grad[queries], count),
            _heads_first(q[queries], count),
            *_expanded(k[keys], v[keys], count, q.shape[1]),
            _heads_first(out[queries], count),
            lse[:, queries].reshape(q.shape[1], count, -1).transpose(0, 1),
            causal,
        )
        dq[queries], dk[keys], dv[keys] = (_summed(piece, like) for piece, like in zip(pieces, (q[queries], k[keys], v[keys]), strict=True))
    return dq, dk, dv


def _equal_runs(q_runs: Runs, k_runs: Runs) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring runs of equal lengths are one call on a batch: (queries, keys, how many runs)."""
    pairs = list(zip(q_runs.lengths, k_runs.lengths, strict=True))
    first = 0
    for index in range(1, len(pairs) + 1):
        if index == len(pairs) or pairs[index] != pairs[first]:
            if pairs[first][0]:
                yield (
                    slice(q_runs.starts[first], q_runs.starts[index]),
                    slice(k_runs.starts[first], k_runs.starts[index]),
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


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
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
    """(out, scores, lse) from whole score matrices: where there is no flash kernel (fp32 on CUDA), and the tests' oracle."""
    scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), scores, lse


@dataclass(frozen=True)
class Layout:
    """Where prompts and completions lie on the packed axis: all prompts first, then all completions, study by study."""

    prompts: Runs  # a run a study
    groups: Runs  # a run a study: all its completions' input tokens
    completions: Runs  # a run a completion: its input tokens
    cos: Tensor  # [T, 1, D / 2] float32, rotation of each token
    sin: Tensor  # [T, 1, D / 2] float32

    @cached_property
    def last_prompt(self) -> Tensor:
        """[B] int64, the last token of each prompt."""
        return self.prompts.cumulative[1:].long() - 1

    @cached_property
    def ones(self) -> Runs:
        """One query a study."""
        return Runs((1,) * len(self.prompts.lengths), self.prompts.device)


class SharedPrefixAttention(torch.autograd.Function):
    """Rotate, then attend: prompts causally to themselves, completions to their prompt and causally to themselves.

    With `final` (the last layer) a prompt is asked for its last token's output alone: its other tokens only give keys and values.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, heads: int, final: bool, found: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """qkv [T, heads + 2 * key heads, D] -> [T, heads, D], or [B + completion tokens, heads, D] where `final`.

        Rotated keys and values [T, key heads, D] are appended to `found` where it is given (a prefill).
        """
        key_heads = (qkv.shape[1] - heads) // 2
        qk = rotate(qkv[:, : heads + key_heads], layout.cos, layout.sin)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, heads + key_heads :]
        if found is not None:
            found.append((k, v))
        prompt = layout.prompts.total
        kp, vp, prompt_keys = k[:prompt], v[:prompt], layout.prompts
        if final:
            out_p, lse_p = attend(q[layout.last_prompt], kp, vp, layout.ones, prompt_keys, causal=False)
        else:
            out_p, lse_p = attend(q[:prompt], kp, vp, layout.prompts, prompt_keys, causal=True)
        if layout.completions.total:
            out_1, lse_1 = attend(q[prompt:], kp, vp, layout.groups, prompt_keys, causal=False)
            out_2, lse_2 = attend(q[prompt:], k[prompt:], v[prompt:], layout.completions, layout.completions, causal=True)
            lse_c = torch.logaddexp(lse_1, lse_2)
            out_c = merge_parts(out_1, lse_1 - lse_c, out_2, lse_2 - lse_c)
        else:
            out_c, lse_c = q[prompt:], lse_p[:, :0]
        out = torch.cat([out_p, out_c])
        ctx.save_for_backward(qk, v, out, lse_p, lse_c)
        ctx.layout, ctx.heads, ctx.final = layout, heads, final
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        qk, v, out, lse_p, lse_c = ctx.saved_tensors
        layout, heads, final = ctx.layout, ctx.heads, ctx.final
        q, k, prompt, prompt_keys = qk[:, :heads], qk[:, heads:], layout.prompts.total, layout.prompts
        rows = len(layout.ones.lengths) if final else prompt  # of prompts in the output
        kp, vp = k[:prompt], v[:prompt]
        if final:
            dq_p, dk_p, dv_p = attend_backward(
                grad[:rows], q[layout.last_prompt], kp, vp, out[:rows], lse_p, layout.ones, prompt_keys, causal=False
            )
        else:
            dq_p, dk_p, dv_p = attend_backward(grad[:rows], q[:prompt], kp, vp, out[:rows], lse_p, layout.prompts, prompt_keys, causal=True)
        d_qkv = qk.new_zeros(qk.shape[0], qk.shape[1] + v.shape[1], qk.shape[2])
        dq, dk, dv = d_qkv.split([heads, v.shape[1], v.shape[1]], dim=1)
        if final:
            dq[layout.last_prompt] = dq_p
        else:
            dq[:prompt] = dq_p
        dk[:prompt], dv[:prompt] = dk_p, dv_p
        if layout.completions.total:
            done = (grad[rows:], q[prompt:])
            dq_1, dk_1, dv_1 = attend_backward(*done, kp, vp, out[rows:], lse_c, layout.groups, prompt_keys, causal=False)
            own = (k[prompt:], v[prompt:], out[rows:], lse_c, layout.completions, layout.completions)
            dq_2, dk_2, dv_2 = attend_backward(*done, *own, causal=True)
            torch.add(dq_1, dq_2, out=dq[prompt:])
            dk[:prompt] += dk_1
            dv[:prompt] += dv_1
            dk[prompt:], dv[prompt:] = dk_2, dv_2
        turned = d_qkv[:, : heads + v.shape[1]]
        turned.copy_(rotate(turned, layout.cos, -layout.sin))
        return d_qkv, None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D] by [T, 1, D / 2] float32: pairs (i, i + D / 2). The inverse is the same with -sin."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    if x.dtype == torch.float32:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    else:
        out_first.copy_(first * cos - second * sin)  # float32 inside: the angles are
        out_second.copy_(second * cos + first * sin)
    return out


def merge_parts(first: Tensor, first_log_weight: Tensor, second: Tensor, second_log_weight: Tensor) -> Tensor:
    """Two outputs [T, heads, D] over parts of the keys as one, weighted by exp of [heads, T]; summed in float32."""
    first_weight, second_weight = (weight.t().exp().unsqueeze(-1) for weight in (first_log_weight, second_log_weight))
    return (first * first_weight).addcmul_(second.float(), second_weight).to(first.dtype)
