"""The vision tower, once an image a step: SigLIP (arXiv 2303.15343), its patches pooled and projected to the width of
the decoder (Gemma 3, arXiv 2503.19786, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import PackedAttention, SeqLens
from mrg_r1.policy.families.gemma3.images import PIXELS
from mrg_r1.policy.family import Gathered
from mrg_r1.policy.layers import Projection
from mrg_r1.types import ImageInputs


def modules(model: Any) -> list[nn.Module]:
    return [model.model.vision_tower, model.model.multi_modal_projector]


def mergers(model: Any) -> list[nn.Module]:
    return [model.model.multi_modal_projector]


def see(model: Any, images: ImageInputs, gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[patches, hidden] of each image, normalised: what the projector takes."""
    tower, pixels = model.model.vision_tower, images.tensors[PIXELS]
    heads = tower.config.num_attention_heads
    with gathered(tower.embeddings):
        x = tower.embeddings(pixels)  # [I, patches, hidden]
    lens = SeqLens((x.shape[1],) * len(x), pixels.device)

    def run_block(number: int, x: Tensor) -> Tensor:
        block = tower.encoder.layers[number]
        attention = block.self_attn
        with gathered(block):
            normed = block.layer_norm1(x)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (Projection.read([one])(normed).view(len(x), heads, -1) for one in projections)
            attended = PackedAttention.apply(q, k, v, lens, lens, False)
            x = x + Projection.read([attention.out_proj])(attended.flatten(1))
            inner = block.mlp.activation_fn(Projection.read([block.mlp.fc1])(block.layer_norm2(x)))
            return x + Projection.read([block.mlp.fc2])(inner)

    x = x.flatten(0, 1)
    for number in range(len(tower.encoder.layers)):
        x = checkpoint(run_block, number, x, use_reentrant=False) if recompute else run_block(number, x)
    with gathered(tower.post_layernorm):
        return list(tower.post_layernorm(x).split(list(lens.lengths)))


def merge(model: Any, images: ImageInputs, seen: Sequence[Tensor], gathered: Gathered, recompute: bool) -> list[Tensor]:
    """[image tokens, H] of each image."""
    projector = model.model.multi_modal_projector

    def run(x: Tensor) -> Tensor:
        with gathered(projector):
            projected: Tensor = projector(x)
            return projected

    stacked = torch.stack(list(seen))
    return list(checkpoint(run, stacked, use_reentrant=False) if recompute else run(stacked))
