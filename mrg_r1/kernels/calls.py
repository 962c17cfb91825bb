"""The kernels as functions of tensors: float32 on a CPU, laid out densely. What each computes is said in its C.

Every function checks what it is given: C would read what lies behind a tensor.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

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
    _library().rms_norm(_at(x), _at(weight, size), epsilon, _at(y), _at(factors), _rows(x), size, _threads())
    return y, factors


def rms_norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `rms_norm`'s x [..., H]."""
    grad, x, size, rows = grad.contiguous(), x.contiguous(), x.shape[-1], _rows(x)
    d_x = torch.empty_like(x)
    arguments = _at(grad, rows * size), _at(x), _at(scales, rows), _at(weight, size), _at(d_x), rows, size
    _library().rms_norm_backward(*arguments, _threads())
    return d_x


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 * intermediate] -> [T, intermediate]."""
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    _library().swiglu(_at(gate_up, 2 * rows * size), _at(y), rows, size, _threads())
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `swiglu`'s input [T, 2 * intermediate]."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    rows, size = grad.shape
    d_gate_up = torch.empty_like(gate_up)
    _library().swiglu_backward(_at(grad), _at(gate_up, 2 * rows * size), _at(d_gate_up), rows, size, _threads())
    return d_gate_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding of [T, heads, D] by [T, 1, D / 2] into `out`, which may be `x`; `back` is its inverse."""
    tokens, heads, size = x.shape
    for tensor in (x, out):
        if tensor.shape != x.shape or tensor.stride(2) != 1 or (heads > 1 and tensor.stride(1) != size):
            raise ValueError(f"rotate: heads of {size} must lie behind one another, not {tensor.stride()}")
    if cos.stride(2) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if not cos.shape == sin.shape == (tokens, 1, size // 2):
        raise ValueError(f"rotate: angles [{tokens}, 1, {size // 2}] wanted, not {tuple(cos.shape)}")
    _library().rotate(
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), cos.data_ptr(), sin.data_ptr(), cos.stride(0),
        -1.0 if back else 1.0, tokens, heads, size, _threads(),
    )  # fmt: skip
    return out


def pack(matrices: Tensor) -> Tensor:
    """[K, N] or [batch, K, N], in any order of memory -> panels [..., N / panel, K, panel] for `linear` and
    `decode_attention`.
    """
    *batch, k, n = matrices.shape
    packed = matrices.new_empty(*batch, *packed_shape(k, n))
    count, apart = (batch[0], matrices.stride(0)) if batch else (1, 0)
    _library().pack(matrices.data_ptr(), count, apart, k, n, *matrices.stride()[-2:], packed.data_ptr())
    return packed


def packed_shape(k: int, n: int) -> tuple[int, int, int]:
    """The shape of a packed [K, N]."""
    panel = int(_library().panel_columns())
    return -(-n // panel), k, panel


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """[T, K] by a packed [K, N] matrix -> [T, N]."""
    x = x.contiguous()
    (rows, k), (panels, length, panel) = x.shape, packed.shape
    if length != k or not (panels - 1) * panel < out_features <= panels * panel:
        raise ValueError(f"linear: {k} -> {out_features} by a packed matrix {tuple(packed.shape)}")
    y = x.new_empty(rows, out_features)
    bias_at = None if bias is None else _at(bias, out_features)
    _library().linear(_at(x), _at(packed), bias_at, _at(y), rows, k, out_features, _threads())
    return y


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_bias: Tensor | None,
    own_keys: Tensor,
    own_values: Tensor,
    own_bias: Tensor | None,
    width: int,
    shared: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention of each row's newest token to its study's prompt and to its row's own tokens, itself among them.

    Args:
        q: [U, heads, D]; k, v: [U, key heads, D], of the rows that are computed.
        prompt_keys: packed [S * key heads, D, P]; prompt_values: packed [S * key heads, P, D].
        prompt_bias: [S, P] or [1, P], added to the scores.
        own_keys, own_values: packed [S, key heads, M, D, N] and [S, key heads, M, N, D]; k and v are written to column
            `width` - 1 of them. What was never written is never read.
        own_bias: [width], added to the scores.
        shared: places [U] int64 that the rows stand for, one study's after another's, and the row of each place
            [S * M] int64; None: row r stands for place r.

    Returns:
        [U, heads, D].
    """
    rows, heads, size = q.shape
    (studies, key_heads, members, _, _, panel), length = own_keys.shape, own_values.shape[4]
    prompt, of_size, prompts = prompt_values.shape[2], -(-size // panel), studies * key_heads
    places, of_place = (None, None) if shared is None else shared
    expected = (
        (q, (rows, heads, size)), (k, (rows, key_heads, size)), (v, (rows, key_heads, size)),
        (prompt_keys, (prompts, -(-prompt // panel), size, panel)), (prompt_values, (prompts, of_size, prompt, panel)),
        (own_keys, (studies, key_heads, members, -(-length // panel), size, panel)),
        (own_values, (studies, key_heads, members, of_size, length, panel)),
    )  # fmt: skip
    if any(tensor.shape != shape for tensor, shape in expected) or heads % key_heads or not 0 < width <= length:
        raise ValueError(f"decode_attention: {[(tuple(tensor.shape), shape) for tensor, shape in expected]}, {width}")
    if any(one.stride(2) != 1 or one.stride(1) != size for one in (q, k, v)):
        raise ValueError(f"decode_attention: heads apart, {q.stride()}, {k.stride()}, {v.stride()}")
    if prompt_bias is not None and (prompt_bias.shape[1] != prompt or len(prompt_bias) not in (1, studies)):
        raise ValueError(f"decode_attention: prompt_bias {tuple(prompt_bias.shape)}")
    out = q.new_empty(rows, heads, size)
    step = _Step(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0),
        _at(places, rows), _at(of_place, studies * members),
        rows, studies, members, heads, key_heads, size,
        _at(prompt_keys), _at(prompt_values), _at(prompt_bias),
        prompt, 0 if prompt_bias is None or len(prompt_bias) == 1 else prompt,
        _at(own_keys), _at(own_values), _at(own_bias, width), length, width, _at(out),
    )  # fmt: skip
    failed = _library().decode_attention(step, _threads())
    if failed:
        raise MemoryError("decode_attention: no memory") if failed == 1 else ValueError("decode_attention: places")
    return out


@dataclass(frozen=True)
class Paths:
    """Completions of S studies as paths through tokens, for `group_attention`; every tensor int64 on the CPU.

    Attributes:
        of_study: [S + 1], each study's first completion.
        prompts: [S + 1], the first token of each study's prompt.
        starts: [C + 1], where the path of each completion begins in `tokens`.
        begins: [C], where on it its own tokens begin, which lie behind one another on the packed axis.
        tokens: [sum of lengths], tokens of the packed axis, each behind what it sees.
        own: whether tokens see themselves and what came before them, not the prompt alone.
    """

    of_study: Tensor
    prompts: Tensor
    starts: Tensor
    begins: Tensor
    tokens: Tensor
    own: bool = True

    def check(self, tokens: int, prompt_tokens: int) -> None:
        """Raise ValueError for paths that lead out of an axis of `tokens` or of `prompt_tokens`."""
        lengths = self.starts.diff()
        rising = all(bool((one.diff() >= 0).all()) and int(one[0]) == 0 for one in self._counts())
        ends = (len(self.begins), prompt_tokens, len(self.tokens))
        if not rising or tuple(int(one[-1]) for one in self._counts()) != ends or len(lengths) != len(self.begins):
            raise ValueError(f"group_attention: paths end at {[int(one[-1]) for one in self._counts()]}, not {ends}")
        has_own = self.begins < lengths
        firsts = self.tokens[(self.starts[:-1] + self.begins)[has_own]]
        own = int((lengths - self.begins).clamp_min(0).sum())
        last = int((firsts + (lengths - self.begins)[has_own]).max()) if len(firsts) else 0
        inside = int(self.tokens.min()) >= 0 and int(self.tokens.max()) < tokens if len(self.tokens) else True
        if not inside or own != tokens or last > tokens or int(self.begins.min()) < 0:
            raise ValueError(f"group_attention: paths of {own} own tokens up to {last} for {tokens}")

    def _counts(self) -> tuple[Tensor, ...]:
        return self.of_study, self.prompts, self.starts


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, paths: Paths
) -> tuple[Tensor, Tensor]:
    """Attention of completions to their study's prompt and to what came before them.

    Args:
        q: [T, heads, D]; k, v: [T, key heads, D], of any length where nobody looks at them; prompt_k, prompt_v:
            [prompt tokens, key heads, D].
        paths: checked for these lengths.

    Returns:
        out [T, heads, D] and the log-sum-exp of scaled scores [T, heads].
    """
    tokens = [_dense_heads(one) for one in (q, k, v, prompt_k, prompt_v)]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    _group_attention(tokens, paths, out, lse)
    return out, lse


def group_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    out: Tensor,
    lse: Tensor,
    paths: Paths,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `group_attention`'s out with respect to q, k, v, prompt_k and prompt_v."""
    tokens = [_dense_heads(one) for one in (q, k, v, prompt_k, prompt_v)]
    given = (torch.empty_like, torch.zeros_like, torch.zeros_like, torch.empty_like, torch.empty_like)
    found = [make(one, memory_format=torch.contiguous_format) for make, one in zip(given, tokens, strict=True)]
    _group_attention(tokens, paths, out, lse, grad.contiguous(), *found)
    return found[0], found[1], found[2], found[3], found[4]


def _group_attention(tokens: list[Tensor], paths: Paths, out: Tensor, lse: Tensor, *backward: Tensor) -> None:
    q, k, v, prompt_k, prompt_v = tokens
    (count, heads, size), key_heads = q.shape, k.shape[1]
    own, shared = (count if paths.own else len(k), key_heads, size), (len(prompt_k), key_heads, size)
    shapes = [q.shape, own, own, shared, shared, *[q.shape] * 3, own, own, shared, shared]
    given = [*tokens, out, *backward]
    if heads % key_heads or any(one.shape != shape for one, shape in zip(given, shapes, strict=False)):
        raise ValueError(f"group_attention: {[tuple(one.shape) for one in given]}")
    indices = (paths.of_study, paths.prompts, paths.starts, paths.begins, paths.tokens)
    group = _Group(
        *(one.data_ptr() for one in tokens), *(one.stride(0) for one in tokens), *(_at(one) for one in indices),
        len(paths.of_study) - 1, heads, key_heads, size, paths.own, _at(out), _at(lse, count * heads),
        *(_at(one) for one in backward),
    )  # fmt: skip
    if _library().group_attention(group, bool(backward), _threads()):
        raise MemoryError("group_attention: no memory")


def _dense_heads(tokens: Tensor) -> Tensor:
    """[T, heads, D] with a token's heads behind one another."""
    return tokens if tokens.stride(2) == 1 and tokens.stride(1) == tokens.shape[2] else tokens.contiguous()


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
    if uniforms.dtype != torch.float64 or not 0 <= step < length or (of_place is None and rows != places):
        raise ValueError(f"sample: {rows} rows for {places} places, {uniforms.dtype}, step {step} of {length}")
    draw = _Draw(
        _at(logits), _at(sums), rows, tokens, _at(of_place, places), _at(uniforms, places * length), places, length,
        step, _at(eos), len(eos), pad_id, _at(drawn), _at(token_ids), _at(logp, places * length),
        _at(mask, places * length), _at(ended, places),
    )  # fmt: skip
    failed = _library().sample(draw, _threads())
    if failed < 0:
        raise ValueError(f"sample: a place of no row, of {rows}")
    if failed:
        raise FloatingPointError(f"logits of row {failed - 1} are no distribution: NaN, or nothing that can be drawn")
    return drawn


def _at(tensor: Tensor | None, elements: int | None = None) -> int | None:
    """Where a tensor begins, after a look at what C relies on."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or (elements is not None and tensor.numel() != elements):
        raise ValueError(f"a kernel was given {tuple(tensor.shape)} with strides {tensor.stride()}")
    return tensor.data_ptr()


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _threads() -> int:
    return torch.get_num_threads()


class _Step(Structure):
    """attention.c's Step."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_long) for name in ("q_row", "k_row", "v_row")),
        *((name, c_void_p) for name in ("places", "of_place")),
        *((name, c_long) for name in ("rows", "studies", "members", "heads", "key_heads", "size")),
        *((name, c_void_p) for name in ("prompt_keys", "prompt_values", "prompt_bias")),
        *((name, c_long) for name in ("prompt", "bias_row")),
        *((name, c_void_p) for name in ("own_keys", "own_values", "own_bias")),
        *((name, c_long) for name in ("length", "width")),
        ("out", c_void_p),
    ]


class _Group(Structure):
    """group.c's Group."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "prompt_k", "prompt_v")),
        *((name, c_long) for name in ("q_row", "k_row", "v_row", "prompt_k_row", "prompt_v_row")),
        *((name, c_void_p) for name in ("of_study", "prompts", "starts", "begins", "paths")),
        *((name, c_long) for name in ("studies", "heads", "key_heads", "size", "own")),
        *((name, c_void_p) for name in ("out", "lse", "grad", "dq", "dk", "dv", "d_prompt_k", "d_prompt_v")),
    ]


class _Draw(Structure):
    """sampling.c's Draw."""

    _fields_ = [
        *((name, c_void_p) for name in ("logits", "sums")),
        *((name, c_long) for name in ("rows", "tokens")),
        *((name, c_void_p) for name in ("of_place", "uniforms")),
        *((name, c_long) for name in ("places", "length", "step")),
        ("eos", c_void_p),
        *((name, c_long) for name in ("ends", "pad")),
        *((name, c_void_p) for name in ("drawn", "token_ids", "logp", "mask", "ended")),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = state().library
    if library is None:
        raise RuntimeError(f"no kernels here: {state().text}")
    pointer, number = c_void_p, c_long
    library.panel_columns.restype = c_long
    library.sample.restype = c_long
    library.rms_norm.argtypes = [pointer, pointer, c_float, pointer, pointer, number, number, c_int]
    library.rms_norm_backward.argtypes = [*[pointer] * 5, number, number, c_int]
    library.swiglu.argtypes = [pointer, pointer, number, number, c_int]
    library.swiglu_backward.argtypes = [pointer, pointer, pointer, number, number, c_int]
    library.rotate.argtypes = [
        pointer, number, pointer, number, pointer, pointer, number, c_float, number, number, number, c_int,
    ]  # fmt: skip
    library.pack.argtypes = [pointer, *[number] * 6, pointer]
    library.linear.argtypes = [pointer, pointer, pointer, pointer, number, number, number, c_int]
    library.decode_attention.argtypes = [POINTER(_Step), c_int]
    library.group_attention.argtypes = [POINTER(_Group), c_int, c_int]
    library.sample.argtypes = [POINTER(_Draw), c_int]
    return library
