"""Rotary embedding of queries and keys (RoFormer, arXiv 2104.09864), with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mrg_r1.kernels import calls as kernels


class Rotated(torch.autograd.Function):
    """[T, heads + 2 * key heads, D] as it leaves the projection -> rotated queries and keys, and values."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key_heads = (qkv.shape[1] - heads) // 2
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.split([heads, key_heads, key_heads], dim=1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v.clone()  # a view would keep the other two in memory

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        sizes = [dq.shape[1], dk.shape[1], dv.shape[1]]
        grad = dq.new_empty(dq.shape[0], sum(sizes), dq.shape[2])
        q, k, v = grad.split(sizes, dim=1)
        rotate(dq, cos, sin, out=q, back=True)
        rotate(dk, cos, sin, out=k, back=True)
        v.copy_(dv)
        return grad, None, None, None


def rotated_heads(qkv: Tensor, heads: int, key_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads + 2 * key heads, D] as it leaves the projection -> rotated queries and keys, and values.

    Without gradients they are views of one rotated tensor and of `qkv`, which costs the decode step two kernels less.
    """
    if torch.is_grad_enabled():
        q, k, v = Rotated.apply(qkv, heads, cos, sin)
        return q, k, v
    qk = rotate(qkv[:, : heads + key_heads], cos, sin)
    return qk[:, :heads], qk[:, heads:], qkv[:, heads + key_heads :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    """Rotary embedding of [T, heads, D] by [T, 1, D / 2] float32: pairs (i, i + D / 2); `back` is its inverse."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if kernels.ready(x, cos):
        return kernels.rotate(_dense(x), cos, sin, out, back=back)
    sin = -sin if back else sin
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    if x.dtype == torch.float32:
        torch.mul(x, torch.cat([cos, cos], dim=-1), out=out)  # of whole heads: longer rows, fewer of them
        out_first.addcmul_(second, sin, value=-1)
        out_second.addcmul_(first, sin)
    else:
        torch.addcmul(first * cos, second, sin, value=-1, out=out_first)  # float32 inside: the angles are
        torch.addcmul(second * cos, first, sin, out=out_second)
    return out


def _dense(x: Tensor) -> Tensor:
    """[T, heads, D] with a token's heads behind one another, as the kernel wants them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
