"""The vision tower, once an image a step.

Each kind of window is one batch here; transformers' own forward loops over the windows (36 for a 672x672 image, in most
layers). That both give the same features, and the same gradients where the tower is trained, is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import PackedAttention, SeqLens, rotated_heads
from mrg_r1.policy.family import Gathered
from mrg_r1.policy.layers import Norm, Projection, swiglu
from mrg_r1.policy.qwen_vl.positions import GRIDS, PIXELS, places_of_patches
from mrg_r1.types import ImageInputs

_ROTARY_BASE = 10_000.0  # of the published towers; transformers keeps it as a constant too


def modules(model: Any) -> list[nn.Module]:
    return [model.model.visual]


def encode_images(model: Any, images: ImageInputs, gathered: Gathered) -> list[Tensor]:
    """[merged patches, H] of each image; with a graph where gradients are enabled and the tower's parameters want
    them.
    """
    visual, pixels, grids = model.model.visual, images.tensors[PIXELS], images.tensors[GRIDS]
    trained = any(parameter.requires_grad for parameter in visual.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        recompute = torch.is_grad_enabled() and model.is_gradient_checkpointing
        return run_tower(visual, pixels, grids, gathered=gathered, recompute=recompute)


def run_tower(
    visual: Any, pixels: Tensor, grids: Tensor, *, gathered: Gathered, recompute: bool = False
) -> list[Tensor]:
    """The tower's forward (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1) over all images at once, packed.

    Args:
        visual: the checkpoint's vision module; its weights are used, its attention is not.
        pixels: [patches, channels * 2 * 14 * 14].
        grids: [I, 3] int64, patches in time, height and width.
        gathered: given a module of the tower, a block inside which its weights can be read.
        recompute: gradient checkpointing: keep each block's input only.

    Returns:
        A tensor [merged patches, H] for each image.
    """
    config, device = visual.config, pixels.device
    merge, heads = config.spatial_merge_size, config.num_heads
    cells = config.window_size // merge // config.patch_size  # merged patches on a window's side
    images = [_Windows.of(grid, merge=merge, cells=cells) for grid in grids.tolist()]
    frames = SeqLens(tuple(length for image in images for length in image.frames), device)
    windows = SeqLens(tuple(length for image in images for length in image.windows), device)

    with gathered(visual.patch_embed):
        weight = visual.patch_embed.proj.weight  # a convolution whose stride is its kernel is a matrix product
        x = F.linear(pixels.to(weight.dtype), weight.flatten(1))
    starts = [0]
    for image in images:
        starts.append(starts[-1] + len(image.order))
    # of merged patches
    order = torch.cat([image.order + start for image, start in zip(images, starts[:-1], strict=True)]).to(device)
    x = x.view(len(order), merge**2, -1)[order].flatten(0, 1)
    size = x.shape[1] // heads
    frequencies = _ROTARY_BASE ** (-torch.arange(0, size // 2, 2, device=device).float() / (size // 2))  # [size / 4]
    places = torch.cat([image.places for image in images]).to(device).view(len(order), merge**2, 2)[order].flatten(0, 1)
    angles = (places.float().unsqueeze(-1) * frequencies).flatten(1)  # [patches, size / 2]: rows first, then columns
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def run_block(number: int, x: Tensor) -> Tensor:
        block = visual.blocks[number]
        with gathered(block):
            qkv = block.attn.qkv(_norm(block.norm1, x)).view(len(x), 3 * heads, size)
            q, k, v = rotated_heads(qkv, heads, heads, cos, sin)
            seq_lens = frames if number in config.fullatt_block_indexes else windows
            attended = PackedAttention.apply(q, k, v, seq_lens, seq_lens, False)
            x = block.attn.proj(attended.flatten(1)).add_(x)
            gate_up = Projection.read([block.mlp.gate_proj, block.mlp.up_proj])
            return block.mlp.down_proj(swiglu(gate_up(_norm(block.norm2, x)))).add_(x)

    for number in range(len(visual.blocks)):
        x = checkpoint(run_block, number, x, use_reentrant=False) if recompute else run_block(number, x)
    with gathered(visual.merger):
        merger = visual.merger
        merged = merger.mlp(_norm(merger.ln_q, x).view(len(order), -1))
    features = merged[order.argsort()]
    return list(features.split([len(image.order) for image in images]))


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
