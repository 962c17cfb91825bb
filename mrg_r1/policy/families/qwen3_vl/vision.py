"""The vision tower, once an image a step (Qwen3-VL, arXiv 2511.21631, section 2; DeepStack, arXiv 2406.04334).

What its inner layers see goes to the decoder beside what it ends with: the features of an image token are as wide as
all of that together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import PackedAttention, SeqLens
from mrg_r1.policy.family import Gathered
from mrg_r1.policy.layers import Projection
from mrg_r1.policy.qwen_vl.positions import GRIDS, PIXELS, places_of_patches
from mrg_r1.policy.rotation import rotated_heads
from mrg_r1.types import ImageInputs, to_device


def modules(model: Any) -> list[nn.Module]:
    return [model.model.visual]


def mergers(model: Any) -> list[nn.Module]:
    """The one at the tower's end, then DeepStack's within it."""
    return [model.model.visual.merger, *model.model.visual.deepstack_merger_list]


def see(model: Any, images: ImageInputs, gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[1 + n, patches, hidden] of each image: the tower's end, then its n DeepStack layers."""
    return run_tower(
        model.model.visual, images.tensors[PIXELS], images.tensors[GRIDS], gathered=gathered, recompute=recompute
    )


def merge(model: Any, images: ImageInputs, seen: Sequence[Tensor], gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[merged patches, (1 + n) * H] of each image: each of its layers through the merger of that layer."""

    def run(merger: nn.Module, x: Tensor) -> Tensor:
        with gathered(merger):
            merged: Tensor = merger(x)
            return merged

    layers = torch.cat(list(seen), dim=1)
    parts = [
        checkpoint(run, merger, x, use_reentrant=False) if recompute else run(merger, x)
        for merger, x in zip(mergers(model), layers, strict=True)
    ]
    size = model.model.visual.config.spatial_merge_size**2
    return list(torch.cat(parts, dim=1).split([image.shape[1] // size for image in seen]))


def run_tower(
    visual: Any, pixels: Tensor, grids: Tensor, *, gathered: Gathered, recompute: bool = False
) -> list[Tensor]:
    """The tower's forward up to its mergers over all images at once, packed; a patch sees those of its own image and
    frame.

    Args:
        visual: the checkpoint's vision module; its weights are used, its attention is not.
        pixels: [patches, channels * 2 * 16 * 16].
        grids: [I, 3] int64, patches in time, height and width.
        gathered: given a module of the tower, a block inside which its weights can be read.
        recompute: gradient checkpointing: keep each block's input only.

    Returns:
        A tensor [1 + n, patches, hidden] for each image: the tower's end, then its n DeepStack layers.
    """
    config, device, sizes = visual.config, pixels.device, grids.tolist()
    merge, heads = config.spatial_merge_size, config.num_heads
    frames = SeqLens(tuple(height * width for time, height, width in sizes for _ in range(time)), device)
    places = [places_of_patches(size, merge) for size in sizes]

    with gathered(visual.patch_embed):
        projection = visual.patch_embed.proj  # a convolution whose stride is its kernel is a matrix product
        x = F.linear(pixels.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
    with gathered(visual.pos_embed):
        table = visual.pos_embed.weight
        x = x + torch.cat([learned_positions(table, to_device(place, device)) for place in places])
    size = x.shape[1] // heads
    frequencies = to_device(visual.rotary_pos_emb.inv_freq.float(), device)  # [size / 4]
    own = to_device(torch.cat(places), device).float()
    angles = (own.unsqueeze(-1) * frequencies).flatten(1)  # rows first, then columns
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def run_block(number: int, x: Tensor) -> Tensor:
        block = visual.blocks[number]
        with gathered(block):
            qkv = Projection.read([block.attn.qkv])(block.norm1(x)).view(len(x), 3 * heads, size)
            q, k, v = rotated_heads(qkv, heads, heads, cos, sin)
            attended = PackedAttention.apply(q, k, v, frames, frames, False)
            x = x + Projection.read([block.attn.proj])(attended.flatten(1))
            inner = block.mlp.act_fn(Projection.read([block.mlp.linear_fc1])(block.norm2(x)))
            return x + Projection.read([block.mlp.linear_fc2])(inner)

    deeper: dict[int, Tensor] = {}  # by the number of its merger
    for number in range(len(visual.blocks)):
        x = checkpoint(run_block, number, x, use_reentrant=False) if recompute else run_block(number, x)
        if number in config.deepstack_visual_indexes:
            deeper[list(config.deepstack_visual_indexes).index(number)] = x
    layers = torch.stack([x, *(deeper[which] for which in range(len(deeper)))])
    return list(layers.split([len(place) for place in places], dim=1))


def learned_positions(table: Tensor, places: Tensor) -> Tensor:
    """The square of learned positions, stretched over an image with its corners on the image's corners.

    Args:
        table: [side * side, hidden].
        places: [patches, 2] int64, row and column of each.

    Returns:
        [patches, hidden]: of the four learned positions around each patch, by nearness; summed in float32.
    """
    side = round(len(table) ** 0.5)
    extent = places.amax(dim=0).clamp(min=1)  # the last row and column
    exact = places * (side - 1) / extent
    low = exact.floor().long()
    high, share = (low + 1).clamp(max=side - 1), exact - low
    result = torch.zeros(len(places), table.shape[1], device=table.device)
    for rows, row_shares in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for columns, column_shares in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            result += table[rows * side + columns] * (row_shares * column_shares).unsqueeze(1)
    return result.to(table.dtype)
