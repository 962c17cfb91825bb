"""The kernels' two attentions as functions of tensors: of a decode step, and of whole passes with their gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrg_r1.kernels.bindings import Group, Step, at, heads_at, library, threads

_WIDE = 256  # keys that a token sees, about, for a guess at the work


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
    if shared is None and rows != studies * members:
        raise ValueError(f"decode_attention: {rows} rows for {studies * members} places")
    if prompt_bias is not None and (prompt_bias.shape[1] != prompt or len(prompt_bias) not in (1, studies)):
        raise ValueError(f"decode_attention: prompt_bias {tuple(prompt_bias.shape)}")
    out = q.new_empty(rows, heads, size)
    step = Step(
        heads_at(q), heads_at(k), heads_at(v), q.stride(0), k.stride(0), v.stride(0),
        at(places, rows, torch.long), at(of_place, studies * members, torch.long),
        rows, studies, members, heads, key_heads, size,
        at(prompt_keys), at(prompt_values), at(prompt_bias),
        prompt, 0 if prompt_bias is None or len(prompt_bias) == 1 else prompt,
        at(own_keys), at(own_values), at(own_bias, width), length, width, at(out),
    )  # fmt: skip
    failed = library().decode_attention(step, threads(rows * heads * size * (prompt + width) * 2))
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
        axes: T and the prompts' tokens, which the paths are for.
        own: whether tokens see themselves and what came before them, not the prompt alone.

    Raises:
        ValueError: paths that lead out of their axes.
    """

    of_study: Tensor
    prompts: Tensor
    starts: Tensor
    begins: Tensor
    tokens: Tensor
    axes: tuple[int, int]
    own: bool = True

    def __post_init__(self) -> None:
        (tokens, prompt_tokens), lengths = self.axes, self.starts.diff()
        rising = all(bool((one.diff() >= 0).all()) and int(one[0]) == 0 for one in self._counts())
        ends = (len(self.begins), prompt_tokens, len(self.tokens))
        if not rising or tuple(int(one[-1]) for one in self._counts()) != ends or len(lengths) != len(self.begins):
            raise ValueError(f"group_attention: paths end at {[int(one[-1]) for one in self._counts()]}, not {ends}")
        has_own = self.begins < lengths
        firsts = self.tokens[(self.starts[:-1] + self.begins)[has_own]]
        own = int((lengths - self.begins).clamp_min(0).sum())
        last = int((firsts + (lengths - self.begins)[has_own]).max()) if len(firsts) else 0
        inside = int(self.tokens.min()) >= 0 and int(self.tokens.max()) < tokens if len(self.tokens) else True
        if not inside or own != tokens or last > tokens or bool((self.begins < 0).any()):
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
        paths: of axes of these lengths.

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
    if (
        (count, len(prompt_k)) != paths.axes
        or heads % key_heads
        or any(one.shape != shape for one, shape in zip(given, shapes, strict=False))
    ):
        raise ValueError(f"group_attention: {[tuple(one.shape) for one in given]}")
    indices = (paths.of_study, paths.prompts, paths.starts, paths.begins, paths.tokens)
    group = Group(
        *(heads_at(one) for one in tokens), *(one.stride(0) for one in tokens),
        *(at(one, dtype=torch.long) for one in indices),
        len(paths.of_study) - 1, heads, key_heads, size, paths.own, at(out), at(lse, count * heads),
        *(at(one) for one in backward),
    )  # fmt: skip
    if library().group_attention(group, bool(backward), threads(count * heads * size * _WIDE)):
        raise MemoryError("group_attention: no memory")


def _dense_heads(tokens: Tensor) -> Tensor:
    """[T, heads, D] with a token's heads behind one another."""
    return tokens if tokens.stride(2) == 1 and tokens.stride(1) == tokens.shape[2] else tokens.contiguous()
