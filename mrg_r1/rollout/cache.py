"""Keys and values of a decode step: those of a prompt once for its group, those of each row's own tokens; and the
attention that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrg_r1.kernels import calls as kernels
from mrg_r1.kernels.attention import decode_attention


@dataclass(frozen=True)
class SharedStates:
    """Which places a step computes: the others have ended, or have read the same prompt and tokens as one of these."""

    places: Tensor  # [U] int64, one study's after another's
    of_place: Tensor  # [S * M] int64, which of them stands for each place; any of them for one that has ended


@dataclass(frozen=True)
class Sight:
    """What a step's tokens see, and whose they are.

    Attributes:
        members: M of the rectangle [S, M].
        width: own tokens that are read, the fed one's at most; on a CPU it is the last of them.
        step: [1] int64, the column after the fed one's.
        prompt_bias: [S, P] or [1, P], -inf where a prompt's key is hidden; None: none is.
        own_bias: [width], likewise.
        shared: None where every place is computed.
    """

    members: int
    width: int
    step: Tensor
    prompt_bias: Tensor | None
    own_bias: Tensor | None
    shared: SharedStates | None


class LayerCache:
    """Keys and values of one layer.

    Args:
        keys, values: of the prompts [S, key heads, P, D].
        members: M.
        length: of the longest completion.
    """

    def __init__(self, keys: Tensor, values: Tensor, members: int, length: int) -> None:
        studies, key_heads, _, size = keys.shape
        self.key_heads, self.by_kernel = key_heads, kernels.ready(keys)
        # [S * key heads, D, P] and [S * key heads, P, D]: the layouts that the two products read
        self.prompt_keys, self.prompt_values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
        of_keys: tuple[int, ...] = (length, size)
        of_values = of_keys
        if self.by_kernel:
            self.prompt_keys, self.prompt_values = kernels.pack(self.prompt_keys), kernels.pack(self.prompt_values)
            of_keys, of_values = kernels.packed_shape(size, length), kernels.packed_shape(length, size)
        self.prompt_keys, self.prompt_values = self.prompt_keys.contiguous(), self.prompt_values.contiguous()
        # a graph reads keys and values that nothing was written to yet, with a weight of 0: they must be finite
        empty = torch.zeros if keys.is_cuda else torch.empty
        rows = (studies, key_heads, members)
        self.own_keys = empty(*rows, *of_keys, dtype=keys.dtype, device=keys.device)
        self.own_values = empty(*rows, *of_values, dtype=keys.dtype, device=keys.device)

    def take(self, blocks: Tensor | None, places: Tensor) -> None:
        """Keep some places.

        Args:
            blocks: [S', key heads] int64, what stays of the S * key heads prompts; None: all.
            places: [S', key heads, M'] int64, what stays of the S * key heads * M rows.
        """
        if blocks is not None:
            self.prompt_keys = self.prompt_keys[blocks.flatten()]
            self.prompt_values = self.prompt_values[blocks.flatten()]
        self.own_keys, self.own_values = _taken(self.own_keys, places), _taken(self.own_values, places)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """Write the fed tokens' keys and values, and let the tokens see their prompt and all of their own.

        Args:
            q: [U, heads, D]; k, v: [U, key heads, D], of the places that are computed.

        Returns:
            [U, heads, D].
        """
        if self.by_kernel:
            shared = None if sight.shared is None else (sight.shared.places, sight.shared.of_place)
            return decode_attention(
                q, k, v, prompt_keys=self.prompt_keys, prompt_values=self.prompt_values, prompt_bias=sight.prompt_bias,
                own_keys=self.own_keys, own_values=self.own_values, own_bias=sight.own_bias, width=sight.width,
                shared=shared,
            )  # fmt: skip
        if sight.shared is not None:
            q, k, v = (part.index_select(0, sight.shared.of_place) for part in (q, k, v))
        attended = self._attend(q, k, v, sight)
        return attended if sight.shared is None else attended.index_select(0, sight.shared.places)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """`attend` of every place [S * M], by torch's kernels."""
        width, key_heads, (_, heads, size) = sight.width, self.key_heads, q.shape
        for cache, fresh in ((self.own_keys, k), (self.own_values, v)):
            if cache.is_cuda:  # a graph finds its column in a tensor
                cache.index_copy_(3, sight.step - 1, self._by_study(fresh, sight.members))
            else:
                cache[:, :, :, width - 1 : width].copy_(self._by_study(fresh, sight.members))

        # query heads that share a key head are so many queries of it: [S, K, M, heads / K, D]
        q = self._by_study(q, sight.members).contiguous().mul_(size**-0.5)
        studies = len(q)
        # the prompt is read once a study
        to_prompt = torch.bmm(q.view(studies * key_heads, -1, size), self.prompt_keys)
        if sight.prompt_bias is not None:
            to_prompt.view(studies, key_heads, -1, to_prompt.shape[2]).add_(sight.prompt_bias[:, None, None])
        # [S, K, M, heads / K, width]
        to_own = torch.matmul(q, self.own_keys[:, :, :, :width].transpose(3, 4))
        if sight.own_bias is not None:
            to_own.add_(sight.own_bias)
        scores = torch.cat([to_prompt, to_own.view(*to_prompt.shape[:2], width)], dim=2)
        weights = scores.softmax(dim=2)  # float32 inside, whatever comes in and goes out
        seen = to_prompt.shape[2]
        attended = torch.matmul(weights[:, :, seen:].view(*q.shape[:4], width), self.own_values[:, :, :, :width])
        attended.view(studies * key_heads, -1, size).baddbmm_(weights[:, :, :seen], self.prompt_values)
        return attended.transpose(1, 2).reshape(-1, heads, size)

    def _by_study(self, heads: Tensor, members: int) -> Tensor:
        """[S * M, n * K, D] -> [S, K, M, n, D], a view: members of a study side by side under each key head."""
        shape = (-1, members, self.key_heads, heads.shape[1] // self.key_heads, heads.shape[2])
        return heads.view(shape).transpose(1, 2)


def _taken(cache: Tensor, places: Tensor) -> Tensor:
    """[S, K, M, ...] -> [S', K, M', ...]: whole blocks are copied, once."""
    return cache.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, *cache.shape[3:])
