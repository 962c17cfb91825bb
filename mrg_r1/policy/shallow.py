"""A checkpoint of few layers and random weights, otherwise as wide as a published one, of which it needs config,
tokenizer and processor and no weights: what a rehearsal runs (`mrg-r1 rehearse`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrg_r1.console import progress
from mrg_r1.files import save_tensors
from mrg_r1.policy.checkpoint_files import files_beside
from mrg_r1.policy.completeness import empty_model
from mrg_r1.policy.family import read_config

_LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
_STD = 0.02  # of the matrices, as models of this kind are begun with


@dataclass(frozen=True)
class Depth:
    """Layers of the decoder, and of the vision tower."""

    decoder: int
    tower: int


def whole_depth(config: Mapping[str, Any]) -> Depth:
    """What a config.json says.

    Raises:
        ValueError: it does not.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    depth = vision.get("depth", vision.get("num_hidden_layers"))
    if depth is None or "num_hidden_layers" not in text:
        raise ValueError("config.json names no number of layers of the decoder or of the vision tower")
    return Depth(text["num_hidden_layers"], depth)


def two_depths(config: Mapping[str, Any]) -> tuple[Depth, Depth]:
    """The least depth whose layers are mixed as in the whole model, and the next such one, each at most the whole.

    Layers are of kinds: a tower's of whole and of windowed attention (Qwen2.5-VL), those after which features are added
    (DeepStack), and then at least one more, a decoder's of a window and without (Gemma 3).
    """
    text, vision, whole = config.get("text_config") or config, config["vision_config"], whole_depth(config)
    stacked = len(vision.get("deepstack_visual_indexes") or [])
    kinds = text.get("layer_types") or []
    other = next((place + 1 for place, kind in enumerate(kinds) if kind != kinds[0]), 1)
    mixed = max(other, text.get("sliding_window_pattern") or 1)
    first = max(mixed, stacked + 1)
    tower = max(whole.tower // len(vision.get("fullatt_block_indexes") or range(whole.tower)), stacked)
    return (
        Depth(min(first, whole.decoder), min(tower, whole.tower)),
        Depth(min(first + mixed, whole.decoder), min(2 * tower, whole.tower)),
    )


def shallow_config(config: Mapping[str, Any], depth: Depth) -> dict[str, Any]:
    """A config.json of so many layers; what names layers by number keeps those that are left, and as many features of
    DeepStack as there were.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    for text in (changed, changed.get("text_config") or {}):
        if "num_hidden_layers" in text:
            text["num_hidden_layers"] = depth.decoder
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][: depth.decoder]
    vision = changed["vision_config"]
    vision["depth" if "depth" in vision else "num_hidden_layers"] = depth.tower
    if vision.get("fullatt_block_indexes"):
        vision["fullatt_block_indexes"] = [place for place in vision["fullatt_block_indexes"] if place < depth.tower]
    stacked = len(vision.get("deepstack_visual_indexes") or [])
    if stacked:
        vision["deepstack_visual_indexes"] = [(n + 1) * depth.tower // stacked - 1 for n in range(stacked)]
    return changed


def write_shallow(source: Path, folders: Mapping[Depth, Path], *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a random checkpoint of each depth into a folder that is not there yet. Layers that they share lie on the
    disk once, in the deepest one's folder.

    Args:
        source: a checkpoint directory; its weights are not looked at, and need not be there.

    Raises:
        ValueError: no config.json, or one without a family.
    """
    config = read_config(source)
    deepest = max(folders, key=lambda depth: (depth.decoder, depth.tower))
    for depth in sorted(folders, key=lambda depth: depth != deepest):  # the deepest one first
        folder = folders[depth]
        folder.mkdir(parents=True)
        for path in files_beside(source):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / path, folder / path)
        (folder / "config.json").write_text(json.dumps(shallow_config(config, depth), indent=2), encoding="utf-8")
        model = empty_model(folder, dtype)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        files = _files(shapes)
        if depth == deepest:
            generator = torch.Generator().manual_seed(seed)
            for file, names in progress(list(files.items()), "random weights"):
                tensors = {name: _random(name, shapes[name], dtype, generator) for name in names}
                save_tensors(folder / file, tensors, metadata={"format": "pt"})
        else:
            for file in files:
                (folder / file).symlink_to((folders[deepest] / file).resolve())
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _files(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which tensors lie in which file: a layer's together, all others in one."""
    files: dict[str, list[str]] = {}
    for name, file in _placed(names):
        files.setdefault(file, []).append(name)
    return files


def _placed(names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in names:
        found = _LAYER.search(name)
        part = "decoder" if "language_model" in name else "tower"
        yield name, f"model-{part}-{found[1]}.safetensors" if found else "model-rest.safetensors"


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=_STD, generator=generator)
