"""A policy of whose weights each rank holds a part: running its decoder a layer at a time.

Who cuts the weights and brings them together is the engine's business; here stands what a policy asks of it
(`Partition`), and where in a pass it asks. All passes of the ranks must be alike: bringing weights together is
something that they do together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from mrg_r1.policy.family import Family, Gathered
from mrg_r1.policy.language import LanguageModel
from mrg_r1.policy.layers import DecoderLayer


class Partition(Protocol):
    """Parts of weights, one a rank."""

    device: torch.device

    def place(self, module: nn.Module) -> None:
        """Keep only this rank's part of each of the module's parameters."""

    def gathered(self, parameters: Sequence[nn.Parameter], *, written: bool = False) -> AbstractContextManager[None]:
        """Inside, these parameters are whole; every rank enters the same blocks in the same order."""

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""


@dataclass(frozen=True)
class PartitionedLanguageModel(LanguageModel):
    """The decoder of a policy under a `Partition`: a layer's weights are whole while it runs, and again while its
    gradient is taken.

    Layers are always computed again in the backward pass: it is then that their weights are brought together the second
    time, and what autograd has saved of them is gone with the layer. `layers`, the whole ones, is empty.
    """

    modules: Sequence[nn.Module]  # of the decoder's layers
    read_layer: Callable[[nn.Module], DecoderLayer]
    gathered: Gathered

    @classmethod
    def read_parts(cls, family: Family, model: Any, gathered: Gathered) -> PartitionedLanguageModel:
        """
        Args:
            gathered: given a module, a block inside which its weights can be read; all ranks enter it together.
        """
        decoder, config = model.model.language_model, model.config
        with gathered(decoder.norm):
            norm = family.read_norm(decoder.norm, config)
            norm = replace(norm, weight=norm.weight.clone())

        def read_layer(module: nn.Module) -> DecoderLayer:
            return family.read_layer(module, config)

        return cls((), norm, family.rotation(model), decoder.layers, read_layer, gathered)

    @property
    def depth(self) -> int:
        return len(self.modules)

    @contextmanager
    def layer(self, number: int) -> Iterator[DecoderLayer]:
        module = self.modules[number]
        with self.gathered(module):
            yield self.read_layer(module)

    def merged(self) -> LanguageModel:
        """The whole decoder with LoRA folded in, in memory of its own; no more than one layer is held twice."""
        layers = []
        for number in range(self.depth):
            with self.layer(number) as layer:
                layers.append(layer.merged())
        return LanguageModel(tuple(layers), self.norm, self.rotation)

    def _run(self, recompute: bool, layer: Any, *arguments: Any) -> Any:
        return super()._run(True, layer, *arguments)
