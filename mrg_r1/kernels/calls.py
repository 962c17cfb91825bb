"""The kernels as functions of tensors: float32 on a CPU, laid out densely. What each computes is said in its C.

Every function checks what it is given: C would read what lies behind a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrg_r1.kernels.bindings import OF_AN_ELEMENT, Draw, at, heads_at, library, threads
from mrg_r1.kernels.library import state


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels are there for these: float32 on a CPU."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    return state().library is not None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, scales: bool = False) -> tuple[Tensor, Tensor | None]:
    """RMSNorm of [..., H] by [H]; also the factors [..., 1] before the weight, where `scales` are wanted."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    factors = x.new_empty(*x.shape[:-1], 1) if scales else None
    library().rms_norm(at(x), at(weight, size), epsilon, at(y), at(factors), _rows(x), size, _threads(x))
    return y, factors


def rms_norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `rms_norm`'s x [..., H]."""
    grad, x, size, rows = grad.contiguous(), x.contiguous(), x.shape[-1], _rows(x)
    d_x = torch.empty_like(x)
    arguments = at(grad, rows * size), at(x), at(scales, rows), at(weight, size), at(d_x), rows, size
    library().rms_norm_backward(*arguments, _threads(x))
    return d_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 * intermediate] -> [T, intermediate]."""
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    library().swiglu(at(gate_up, 2 * rows * size), at(y), rows, size, _threads(gate_up))
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `swiglu`'s input [T, 2 * intermediate]."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    rows, size = grad.shape
    d_gate_up = torch.empty_like(gate_up)
    library().swiglu_backward(at(grad), at(gate_up, 2 * rows * size), at(d_gate_up), rows, size, _threads(gate_up))
    return d_gate_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding of [T, heads, D] by [T, 1, D / 2] into `out`, which may be `x`; `back` is its inverse."""
    tokens, heads, size = x.shape
    if cos.stride(2) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if not cos.shape == sin.shape == (tokens, 1, size // 2) or out.shape != x.shape or size % 2:
        raise ValueError(f"rotate: {tuple(x.shape)} by angles {tuple(cos.shape)} into {tuple(out.shape)}")
    library().rotate(
        heads_at(x), x.stride(0), heads_at(out), out.stride(0), heads_at(cos), heads_at(sin), cos.stride(0),
        -1.0 if back else 1.0, tokens, heads, size, _threads(x),
    )  # fmt: skip
    return out


def pack(matrices: Tensor) -> Tensor:
    """[K, N] or [batch, K, N], in any order of memory -> panels [..., N / panel, K, panel] for `linear` and
    `decode_attention`.
    """
    *batch, k, n = matrices.shape
    if len(batch) > 1 or matrices.dtype != torch.float32 or matrices.device.type != "cpu":
        raise ValueError(f"pack: {matrices.dtype} {tuple(matrices.shape)} on {matrices.device}")
    packed = matrices.new_empty(*batch, *packed_shape(k, n))
    count, apart = (batch[0], matrices.stride(0)) if batch else (1, 0)
    library().pack(matrices.data_ptr(), count, apart, k, n, *matrices.stride()[-2:], packed.data_ptr())
    return packed


def packed_shape(k: int, n: int) -> tuple[int, int, int]:
    """The shape of a packed [K, N]."""
    panel = int(library().panel_columns())
    return -(-n // panel), k, panel


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """[T, K] by a packed [K, N] matrix -> [T, N]."""
    x = x.contiguous()
    (rows, k), (panels, length, panel) = x.shape, packed.shape
    if length != k or not (panels - 1) * panel < out_features <= panels * panel:
        raise ValueError(f"linear: {k} -> {out_features} by a packed matrix {tuple(packed.shape)}")
    y = x.new_empty(rows, out_features)
    bias_at = None if bias is None else at(bias, out_features)
    library().linear(at(x), at(packed), bias_at, at(y), rows, k, out_features, threads(rows * k * out_features))
    return y


def sample(
    logits: Tensor,
    uniforms: Tensor,
    of_place: Tensor | None,
    *,
    step: int,
    eos: Tensor,
    pad_id: int,
    token_ids: Tensor,
    logp: Tensor,
    mask: Tensor,
    ended: Tensor,
) -> Tensor:
    """Draw a token for each place by inverting the distribution function, and write down what it is.

    Args:
        logits: [U, V], -inf where a token can never be drawn; overwritten.
        uniforms: [R, N] float64 in [0, 1), of which column `step` is taken.
        of_place: [R] int64, the row of `logits` that each place is drawn from; None: its own.
        eos: [E] int64.
        token_ids, logp, mask: [R, N] int64, float32 and bool; column `step` is written, where a place has ended before
            with `pad_id`, 0 and False.
        ended: [R] bool, set where an EOS was drawn.

    Returns:
        [R] int64, what was drawn.

    Raises:
        FloatingPointError: logits that are no distribution: NaN, or -inf throughout.
    """
    (rows, tokens), (places, length) = logits.shape, token_ids.shape
    drawn, sums = torch.empty(places, dtype=torch.long), torch.empty(rows, -(-tokens // 64) + 1, dtype=torch.float64)
    if not 0 <= step < length or (of_place is None and rows != places) or not tokens:
        raise ValueError(f"sample: {rows} rows of {tokens} tokens for {places} places, step {step} of {length}")
    draw = Draw(
        at(logits), at(sums, dtype=torch.float64), rows, tokens, at(of_place, places, torch.long),
        at(uniforms, places * length, torch.float64), places, length, step, at(eos, dtype=torch.long), len(eos), pad_id,
        at(drawn, dtype=torch.long), at(token_ids, dtype=torch.long), at(logp, places * length),
        at(mask, places * length, torch.bool), at(ended, places, torch.bool),
    )  # fmt: skip
    failed = library().sample(draw, _threads(logits))
    if failed < 0:
        raise ValueError(f"sample: a place of no row, of {rows}")
    if failed:
        raise FloatingPointError(f"logits of row {failed - 1} are no distribution: NaN, or nothing that can be drawn")
    return drawn


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _threads(elements: Tensor) -> int:
    return threads(elements.numel() * OF_AN_ELEMENT)
