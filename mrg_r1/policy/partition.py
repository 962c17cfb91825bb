"""A policy of whose weights each rank holds a part: loading it, and running its decoder a layer at a time.

Who cuts the weights and brings them together is the engine's business; here stands what a policy asks of it
(`Partition`), and where in a pass it asks. All passes of the ranks must be alike: bringing weights together is
something that they do together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from mrg_r1.policy.language import LanguageModel, Layer, read_layer


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
    time, and what autograd has saved of them is gone with the layer.
    """

    policy: Any = None

    @classmethod
    def read(cls, policy: Any) -> PartitionedLanguageModel:
        model = policy.language_model
        with policy.gathered(model.norm):
            norm = model.norm.weight.data.clone()
        return cls(**cls.dimensions(policy), layers=(), norm=norm, policy=policy)

    @property
    def depth(self) -> int:
        return len(self.policy.language_model.layers)

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        module = self.policy.language_model.layers[number]
        with self.policy.gathered(module):
            yield read_layer(module)

    def merged(self) -> LanguageModel:
        """The whole decoder with LoRA folded in, in memory of its own; no more than one layer is held twice."""
        layers = []
        for number in range(self.depth):
            with self.layer(number) as layer:
                layers.append(layer.merged())
        return LanguageModel(**self.dimensions(self.policy), layers=tuple(layers), norm=self.norm)

    def _run(self, recompute: bool, layer: Any, *arguments: Any) -> Any:
        return super()._run(True, layer, *arguments)


def load_parts(path: Path, *, dtype: torch.dtype, partition: Partition) -> Qwen2_5_VLForConditionalGeneration:
    """A checkpoint directory as a module of which this rank holds a part: read tensor by tensor, cut module by module.

    No more than one module (a decoder layer, the embeddings) is whole in memory at any time. Every rank calls this.

    Raises:
        ValueError: the checkpoint lacks a parameter, or has one of another shape.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    _compute_buffers(model, partition.device)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    # a tied parameter once, by its first name
    names = {parameter: name for name, parameter in model.named_parameters()}
    files = _files(path)
    read: dict[nn.Parameter, nn.Parameter] = {}
    visual, language = model.model.visual, model.model.language_model
    parts = [
        visual.patch_embed,
        *visual.blocks,
        visual.merger,
        language.embed_tokens,
        *language.layers,
        language.norm,
        model.lm_head,
    ]
    for part in parts:
        for module in part.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in read:
                    tensor = _read(path, files, names[parameter], parameter).to(device=partition.device, dtype=dtype)
                    read[parameter] = nn.Parameter(tensor, requires_grad=False)
                setattr(module, key, read[parameter])
        partition.place(part)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{path}: parameters that belong to no known part of a Qwen2.5-VL: {missing[:3]}")
    return model.eval()


def _files(path: Path) -> dict[str, tuple[Path, str]]:
    """Parameter name, as the modules have it -> the file that holds it, and its name there."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        stored = {key: path / file for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    else:
        stored = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                stored |= dict.fromkeys(content.keys(), file)
    return {_module_name(key): (file, key) for key, file in stored.items()}


def _module_name(key: str) -> str:
    """The name of a stored tensor in the module tree: published checkpoints keep the names of an older tree."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def _read(path: Path, files: dict[str, tuple[Path, str]], name: str, like: Tensor) -> Tensor:
    if name not in files:
        raise ValueError(
            f"{path}: no tensor {name} in its safetensors; the download is incomplete, or it is another model"
        )
    file, key = files[name]
    with safe_open(file, framework="pt") as content:
        tensor: Tensor = content.get_tensor(key)
    if tensor.shape != like.shape:
        raise ValueError(f"{file}: {key} is {list(tensor.shape)}, config.json makes it {list(like.shape)}")
    return tensor


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Rotary frequencies: computed, never stored."""
    for parent in (model.model.visual, model.model.language_model):
        for name, child in list(parent.named_children()):
            if any(buffer.is_meta for buffer in child.buffers()) and not list(child.parameters()):
                fresh = type(child)(child.config) if hasattr(child, "config") else type(child)(2 * len(child.inv_freq))
                setattr(parent, name, fresh.to(device))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without values: {left}"
