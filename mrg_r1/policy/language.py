"""The decoder as raw tensors: what rollout and scoring run instead of the checkpoint's modules.

The weights stay where they are; this is a reading of them. Layers (`families/`) take packed tokens, so that a prompt is
computed once for its group; what stands here is the order of the layers and the attention between their two halves.
That it equals transformers' modules is tested, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import SeqLens
from mrg_r1.policy.family import Family, Rotation
from mrg_r1.policy.group_attention import GroupLens
from mrg_r1.policy.layers import DecoderLayer, Norm
from mrg_r1.policy.masks import PromptSight, attend_group
from mrg_r1.policy.prefixes import PrefixTree


@dataclass(frozen=True)
class LanguageModel:
    """The decoder's weights as they are now: read it anew after an update of adapters or a change between policy and
    reference.
    """

    layers: tuple[DecoderLayer, ...]
    norm: Norm
    rotation: Rotation

    @classmethod
    def read(cls, family: Family, model: Any) -> LanguageModel:
        """The decoder of a family's `model`; its adapters as they stand, on or off."""
        decoder, config = model.model.language_model, model.config
        layers = tuple(family.read_layer(layer, config) for layer in decoder.layers)
        return cls(layers, family.read_norm(decoder.norm, config), family.rotation(model))

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer(self, number: int) -> AbstractContextManager[DecoderLayer]:
        """A layer, to be used inside the block only."""
        return nullcontext(self.layers[number])

    def merged(self) -> LanguageModel:
        """The same with LoRA folded into new matrices, for the rollout."""
        return replace(self, layers=tuple(layer.merged() for layer in self.layers))

    def for_few_tokens(self) -> LanguageModel:
        """The same with weights laid out for decoding."""
        return replace(self, layers=tuple(layer.for_few_tokens() for layer in self.layers))

    def prompt_pass(self, prompts: Packed, *, recompute: bool = False) -> PromptCache:
        """Run prompts: what everything after them needs to know of them.

        Args:
            recompute: gradient checkpointing: keep each layer's input only.
        """
        x, layers = prompts.embeddings, []
        for number in range(self.depth):
            x, k, v = self._run(recompute, self._prompt_layer, number, x, prompts)
            layers.append((k, v))
        return PromptCache(tuple(layers), self.norm(x), prompts.seq_lens)

    def completion_pass(
        self,
        completions: Packed,
        groups: SeqLens,
        states: PromptCache,
        *,
        tree: PrefixTree | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Run completions after their prompts.

        Args:
            groups: how many of the tokens belong to each study of `states`.
            tree: where the tokens are its nodes.

        Returns:
            [T, H] normalised hidden states.
        """
        x, lens = completions.embeddings, GroupLens(groups, states.seq_lens, completions.seq_lens, tree)
        for number in range(self.depth):
            x = self._run(recompute, self._completion_layer, number, x, completions, lens, *states.layers[number])
        return self.norm(x)

    def _run(self, recompute: bool, layer: Callable[..., Any], *arguments: Any) -> Any:
        if recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def _prompt_layer(self, number: int, x: Tensor, prompts: Packed) -> tuple[Tensor, Tensor, Tensor]:
        with self.layer(number) as layer:
            q, k, v = layer.heads(x, prompts.cos, prompts.sin)
            k, v = k.contiguous(), v.contiguous()  # the cache outlives the pass: a view would keep the queries too
            if number == self.depth - 1:  # past the last keys and values only the last tokens predict something
                last = prompts.seq_lens.last_tokens
                attended, x = prompts.sight.attend_last(q[last], k, v, layer.window), x[last]
            else:
                attended = prompts.sight.attend(q, k, v, layer.window)
            x = layer.finish(x, attended)
            return x + prompts.added[number] if number < len(prompts.added) else x, k, v

    def _completion_layer(
        self,
        number: int,
        x: Tensor,
        completions: Packed,
        lens: GroupLens,
        prompt_k: Tensor,
        prompt_v: Tensor,
    ) -> Tensor:
        with self.layer(number) as layer:
            q, k, v = layer.heads(x, completions.cos, completions.sin)
            if layer.window is None or lens.longest <= layer.window:
                return layer.finish(x, lens.attend(q, k, v, prompt_k, prompt_v))
            q, k, v = lens.spread(q, k, v)
            attended = attend_group(
                q, k, v, prompt_k, prompt_v, members=lens.members, prompts=lens.prompts, window=layer.window
            )
            return layer.finish(x, lens.own(attended))


@dataclass(frozen=True)
class Packed:
    """Sequences behind one another on one axis, as a layer takes them."""

    embeddings: Tensor  # [T, H]
    cos: Tensor  # [T, 1, D / 2] float32, the rotation of each token, or what else the family's layers take
    sin: Tensor  # like cos
    seq_lens: SeqLens
    added: tuple[Tensor, ...] = ()  # each [T, H], added after each of the first layers
    images: Tensor | None = None  # [T] int64, as `masks.PromptSight` has it: of prompts whose images see themselves

    @cached_property
    def sight(self) -> PromptSight:
        return PromptSight(self.seq_lens, self.images)


@dataclass(frozen=True)
class PromptCache:
    """What completions need to know of their prompts: computed once, shared by a group, and by a rollout and the update
    after it.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, each [T, key heads, D]
    last: Tensor  # [B, H] normalised hidden states of the last tokens, which predict the first of each completion
    seq_lens: SeqLens  # a sequence a study

    def select(self, studies: Sequence[int]) -> PromptCache:
        """Those of some studies, in the order given."""
        lengths = self.seq_lens.lengths
        if list(studies) == list(range(len(lengths))):
            return self

        def chosen(tokens: Tensor) -> Tensor:
            pieces = tokens.split(list(lengths))
            return torch.cat([pieces[study] for study in studies])

        seq_lens = SeqLens(tuple(lengths[study] for study in studies), self.seq_lens.device)
        last = torch.stack([self.last[study] for study in studies])  # a list as an index would wait for the device
        return PromptCache(tuple((chosen(k), chosen(v)) for k, v in self.layers), last, seq_lens)

    def leaves(self) -> PromptCache:
        """The same values cut off from their graph, collecting gradients: several backward passes can start
        from them.
        """

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_()

        return PromptCache(tuple((leaf(k), leaf(v)) for k, v in self.layers), leaf(self.last), self.seq_lens)

    def continuation(self, leaves: PromptCache) -> Tensor:
        """A scalar whose gradient is what reached `leaves`: its backward pass goes on through the prompts' graph."""
        pairs = zip(self._tensors(), leaves._tensors(), strict=True)
        parts = [(mine * leaf.grad).sum() for mine, leaf in pairs if leaf.grad is not None]
        return torch.stack(parts).sum() if parts else self.last.sum() * 0.0

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self.layers for tensor in pair] + [self.last]
