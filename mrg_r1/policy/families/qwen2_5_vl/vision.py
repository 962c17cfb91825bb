"""The vision tower, once an image a step.

Each kind of window is one batch here; transformers' own forward loops over the windows (36 for a 672x672 image, in most
layers). That both give the same features, and the same gradients where the tower is trained, is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import PackedAttention, SeqLens
from mrg_r1.policy.family import Gathered
from mrg_r1.policy.layers import Norm, Projection, swiglu
from mrg_r1.policy.qwen_vl.positions import GRIDS, PIXELS, places_of_patches
from mrg_r1.policy.rotation import rotated_heads
from mrg_r1.types import ImageInputs, to_device

_ROTARY_BASE = 10_000.0  # of the published towers; transformers keeps it as a constant too


def modules(model: Any) -> list[nn.Module]:
    return [model.model.visual]


def mergers(model: Any) -> list[nn.Module]:
    return [model.model.visual.merger]


def see(model: Any, images: ImageInputs, gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[patches, hidden] of each image, in the order of its windows."""
    return run_tower(
        model.model.visual, images.tensors[PIXELS], images.tensors[GRIDS], gathered=gathered, recompute=recompute
    )


def merge(model: Any, images: ImageInputs, seen: Sequence[Tensor], gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[merged patches, H] of each image, in the order of its image tokens."""
    visual, grids = model.model.visual, images.tensors[GRIDS].tolist()
    windows = _windows_of(visual.config, grids)
    order = _order(windows, seen[0].device)

    def run(x: Tensor) -> Tensor:
        with gathered(visual.merger):
            merged: Tensor = visual.merger.mlp(_norm(visual.merger.ln_q, x).view(len(order), -1))
            return merged

    x = torch.cat(list(seen))
    merged = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
    return list(merged[order.argsort()].split([len(image.order) for image in windows]))


def run_tower(
    visual: Any, pixels: Tensor, grids: Tensor, *, gathered: Gathered, recompute: bool = False
) -> list[Tensor]:
    """The tower's forward up to its merger (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1) over all images at once,
    packed.

    Args:
        visual: the checkpoint's vision module; its weights are used, its attention is not.
        pixels: [patches, channels * 2 * 14 * 14].
        grids: [I, 3] int64, patches in time, height and width.
        gathered: given a module of the tower, a block inside which its weights can be read.
        recompute: gradient checkpointing: keep each block's input only.

    Returns:
        A tensor [patches, hidden] for each image, in the order of its windows.
    """
    config, device = visual.config, pixels.device
    merge, heads = config.spatial_merge_size, config.num_heads
    images = _windows_of(config, grids.tolist())
    frames = SeqLens(tuple(length for image in images for length in image.frames), device)
    windows = SeqLens(tuple(length for image in images for length in image.windows), device)

    with gathered(visual.patch_embed):
        weight = visual.patch_embed.proj.weight  # a convolution whose stride is its kernel is a matrix product
        x = F.linear(pixels.to(weight.dtype), weight.flatten(1))
    order = _order(images, device)
    x = x.view(len(order), merge**2, -1)[order].flatten(0, 1)
    size = x.shape[1] // heads
    frequencies = _ROTARY_BASE ** (-torch.arange(0, size // 2, 2, device=device).float() / (size // 2))  # [size / 4]
    places = (
        to_device(torch.cat([image.places for image in images]), device)
        .view(len(order), merge**2, 2)[order]
        .flatten(0, 1)
    )
    angles = (places.float().unsqueeze(-1) * frequencies).flatten(1)  # [patches, size / 2]: rows first, then columns
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def run_block(number: int, x: Tensor) -> Tensor:
        block = visual.blocks[number]
        with gathered(block):
            qkv = Projection.read([block.attn.qkv])(_norm(block.norm1, x)).view(len(x), 3 * heads, size)
            q, k, v = rotated_heads(qkv, heads, heads, cos, sin)
            seq_lens = frames if number in config.fullatt_block_indexes else windows
            attended = PackedAttention.apply(q, k, v, seq_lens, seq_lens, False)
            x = Projection.read([block.attn.proj])(attended.flatten(1)).add_(x)
            gate_up = Projection.read([block.mlp.gate_proj, block.mlp.up_proj])
            return Projection.read([block.mlp.down_proj])(swiglu(gate_up(_norm(block.norm2, x)))).add_(x)

    for number in range(len(visual.blocks)):
        x = checkpoint(run_block, number, x, use_reentrant=False) if recompute else run_block(number, x)
    return list(x.split([len(image.places) for image in images]))


def _windows_of(config: Any, grids: Sequence[list[int]]) -> list[_Windows]:
    merge = config.spatial_merge_size
    cells = config.window_size // merge // config.patch_size  # merged patches on a window's side
    return [_Windows.of(grid, merge=merge, cells=cells) for grid in grids]


def _order(images: Sequence[_Windows], device: torch.device) -> Tensor:
    """[merged patches of all images] int64: where each, in the order of the windows, comes from."""
    starts = [0]
    for image in images:
        starts.append(starts[-1] + len(image.order))
    return to_device(torch.cat([image.order + start for image, start in zip(images, starts[:-1], strict=True)]), device)


def _norm(module: Any, x: Tensor) -> Tensor:
    return Norm(module.weight, module.variance_epsilon)(x)


@dataclass(frozen=True)
class _Windows:
    """One image's merged patches in the order of its windows; equal windows lie side by side, so that they are one
    batch.
    """

    order: Tensor  # [merged patches] int64: where each comes from
    places: Tensor  # [patches, 2] int64: row and column, in the processor's order
    frames: list[int]  # patches of each frame
    windows: list[int]  # patches of each window

    @classmethod
    def of(cls, grid: list[int], *, merge: int, cells: int) -> _Windows:
        time, height, width = grid
        rows, columns = height // merge, width // merge
        index = torch.arange(time * rows * columns).view(time, rows, columns)
        padded = F.pad(index, (0, -columns % cells, 0, -rows % cells), value=-1)
        # [windows, cells * cells]
        windows = padded.unfold(1, cells, cells).unfold(2, cells, cells).flatten(0, 2).flatten(1)
        windows = windows[(windows >= 0).sum(dim=1).argsort(stable=True)]
        return cls(
            order=windows[windows >= 0],
            places=places_of_patches(grid, merge),
            frames=[height * width] * time,
            windows=[count * merge**2 for count in (windows >= 0).sum(dim=1).tolist()],
        )
