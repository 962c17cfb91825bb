"""A checkpoint of few layers with random weights, at the widths, vocabulary and prompts of a real one: what a rehearsal
loads.

The real directory gives config.json, tokenizer and processor; its weights are not read and need not be there.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrg_r1.policy.checkpoint_files import files_beside
from mrg_r1.policy.family import Family, family_of, read_config, shape_of

_SHARD = 2 * 10**9  # bytes that are held and written together
# Random numbers are dear where there are billions: each weight is these over and over. Their number divides no width,
# so that no two rows near each other are alike.
_DRAWN = 1_000_003
_STD = 0.02
_VISION_DEPTHS = ("depth", "num_hidden_layers")


@dataclass(frozen=True)
class Depth:
    """Layers of the decoder and of the vision tower."""

    language: int
    vision: int


def depth_of(path: Path) -> Depth:
    """The layers that a checkpoint directory's config.json states.

    Raises:
        ValueError: as `shape_of`.
    """
    shape = shape_of(path)
    return Depth(shape.layers, shape.vision.depth)


def write_shallow(
    source: Path,
    output: Path,
    depth: Depth,
    *,
    narrowest: int,
    dtype: torch.dtype,
    seed: int,
    room: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a checkpoint of `source`'s model with so many layers into the empty folder `output`.

    Args:
        narrowest: decoder layers of the shallowest checkpoint that this one is compared with: it says how many feature
            maps of the tower are added after the decoder's first layers, which must be fewer than those.
        dtype: of the weights.
        room: is told how many bytes they take before any is written, and raises where that is too much.

    Raises:
        ValueError: a config.json whose layers cannot be made fewer, or as `family_of`.
    """
    family = family_of(source)
    for path in files_beside(source):
        (output / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, output / path)
    config = cut_config(read_config(source), depth, narrowest=narrowest)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if depth_of(output) != depth:
        raise ValueError(f"{source}: its config.json does not state its layers where a rehearsal can make them fewer")
    room(shape_of(output).parameters * dtype.itemsize)
    _write_weights(family, output, dtype=dtype, seed=seed)


def cut_config(config: Mapping[str, Any], depth: Depth, *, narrowest: int) -> dict[str, Any]:
    """A config.json of the same model with fewer layers. Lists that name each layer's kind, or layers by their number,
    are cut so that every kind that is there stays there.

    Args:
        narrowest: as `write_shallow`.
    """
    cut = copy.deepcopy(dict(config))
    text, vision = cut.get("text_config") or cut, cut["vision_config"]
    text["num_hidden_layers"] = depth.language
    kinds = text.get("layer_types")
    if kinds:
        text["layer_types"] = _some_of_each(kinds, depth.language)
    before = 1
    for name in _VISION_DEPTHS:
        if name in vision:
            before, vision[name] = vision[name], depth.vision
    if "fullatt_block_indexes" in vision:  # the other blocks see a window
        share = len(vision["fullatt_block_indexes"]) / before
        vision["fullatt_block_indexes"] = _spread(max(1, round(share * depth.vision)), depth.vision)
    if "deepstack_visual_indexes" in vision:  # one map is added after each of the decoder's first layers
        maps = min(len(vision["deepstack_visual_indexes"]), narrowest - 1, depth.vision)
        vision["deepstack_visual_indexes"] = _spread(maps, depth.vision)
    return cut


def _some_of_each(kinds: Sequence[str], count: int) -> list[str]:
    """The first `count`, the last of them of the kind that would be missing."""
    kept = list(kinds[:count])
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in kept]
    return kept[: count - 1] + missing[:1] if missing and count > 1 else kept


def _spread(count: int, depth: int) -> list[int]:
    """`count` numbers of `depth` blocks, the last one among them."""
    return [(number + 1) * depth // count - 1 for number in range(count)]


def _write_weights(family: Family, output: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Random matrices, norms of 1, biases of 0, under the names of the module tree."""
    model = family.empty_model(output, dtype, torch.device("cpu"))
    drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(seed)) * _STD).to(dtype)
    parts: list[list[tuple[str, nn.Parameter]]] = [[]]
    held = 0
    for name, parameter in model.named_parameters():  # a tied one once
        size = parameter.numel() * drawn.element_size()
        if parts[-1] and held + size > _SHARD:
            parts.append([])
            held = 0
        parts[-1].append((name, parameter))
        held += size
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {key: _value(key, parameter, drawn) for key, parameter in part}
        save_file(tensors, output / name, metadata={"format": "pt"})


def _value(name: str, parameter: nn.Parameter, drawn: Tensor) -> Tensor:
    if parameter.ndim == 1:
        return torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=drawn.dtype)
    repeats = -(-parameter.numel() // len(drawn))
    return drawn.repeat(repeats)[: parameter.numel()].view(parameter.shape).clone()
