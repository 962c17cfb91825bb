"""A second family, in tests alone: Qwen3-VL, which differs from the first in all that the seam is for.

Norms of queries and keys in each head, heads whose width is not that of the model divided by their number, rotary
axes interleaved, features added to the prompts after the first layers (DeepStack, arXiv 2406.04334), no biases, another
tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mrg_r1.policy.attention import rotated_heads
from mrg_r1.policy.families import qwen2_5_vl
from mrg_r1.policy.families.qwen2_5_vl.positions import GRIDS, PIXELS
from mrg_r1.policy.family import Family, Gathered
from mrg_r1.policy.layers import DecoderLayer, Norm, Projection, frozen_values, swiglu
from mrg_r1.types import ImageInputs


@dataclass(frozen=True)
class Layer(DecoderLayer):
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm_attention: Norm
    norm_mlp: Norm
    norm_q: Norm
    norm_k: Norm
    query_heads: int
    key_heads: int

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.query_heads, self.key_heads, self.key_heads]
        q, k, v = self.qkv(self.norm_attention(x)).view(len(x), sum(sizes), -1).split(sizes, dim=1)
        qkv = torch.cat([self.norm_q(q), self.norm_k(k), v], dim=1)
        return rotated_heads(qkv, self.query_heads, self.key_heads, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.out(attended.flatten(1)).add_(x)
        return self.down(swiglu(self.gate_up(self.norm_mlp(x)))).add_(x)


def read_layer(module: Any, config: Any) -> Layer:
    attention, mlp, text = module.self_attn, module.mlp, config.text_config
    return Layer(
        qkv=Projection.read([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=Projection.read([attention.o_proj]),
        gate_up=Projection.read([mlp.gate_proj, mlp.up_proj]),
        down=Projection.read([mlp.down_proj]),
        norm_attention=read_norm(module.input_layernorm, config),
        norm_mlp=read_norm(module.post_attention_layernorm, config),
        norm_q=read_norm(attention.q_norm, config),
        norm_k=read_norm(attention.k_norm, config),
        query_heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
    )


def read_norm(module: Any, config: Any) -> Norm:
    return Norm(frozen_values(module.weight), config.text_config.rms_norm_eps)


@dataclass(frozen=True)
class InterleavedRotation:
    inverse_frequencies: Tensor  # [D / 2]
    axis_of_frequency: Tensor  # [D / 2]

    @classmethod
    def read(cls, model: Any) -> InterleavedRotation:
        rotary = model.model.language_model.rotary_emb
        axes = torch.zeros(len(rotary.inv_freq), dtype=torch.long)
        for axis in (1, 2):
            axes[axis : 3 * rotary.mrope_section[axis] : 3] = axis
        return cls(rotary.inv_freq.float(), axes)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.unsqueeze(1).expand(-1, 3) if positions.dim() == 1 else positions
        angles = positions[:, self.axis_of_frequency].float() * self.inverse_frequencies
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def encode_images(model: Any, images: ImageInputs, gathered: Gathered) -> list[Tensor]:
    """[image tokens, (1 + n) * H]: what the tower ends with, then what its inner layers gave."""
    with gathered(model.model.visual), torch.no_grad():
        seen = model.get_image_features(images.tensors[PIXELS], images.tensors[GRIDS], return_dict=True)
    return [torch.cat(parts, dim=1) for parts in zip(seen.pooler_output, *seen.deepstack_features, strict=True)]


def run_modules(
    model: Any,
    embeddings: Tensor,
    attention_mask: Tensor,
    prompt_positions: Tensor,
    text_positions: Tensor,
    added: Sequence[Tensor],
) -> Tensor:
    rows, length, _ = embeddings.shape
    positions = torch.cat([prompt_positions.movedim(2, 0), text_positions.expand(3, -1, -1)], dim=2)
    at_prompts = torch.arange(length).expand(rows, -1) < prompt_positions.shape[1]
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        visual_pos_masks=at_prompts,
        deepstack_visual_embeds=[part.flatten(0, 1) for part in added],
    ).last_hidden_state
    return hidden


ANOTHER: Family = replace(
    qwen2_5_vl.FAMILY,  # tokens, prompts and names of modules are the first family's
    encode_images=encode_images,
    read_layer=read_layer,
    read_norm=read_norm,
    rotation=InterleavedRotation.read,
    run_modules=run_modules,
)


def random_model(first: Any) -> Qwen3VLForConditionalGeneration:
    """Of the vocabulary and the ids of `first`, a config of the first family; norms and biases far from 1 and 0."""
    text = first.text_config
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "eos_token_id": text.eos_token_id,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 14,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=first.image_token_id,
        video_token_id=first.video_token_id,
        vision_start_token_id=first.vision_start_token_id,
        vision_end_token_id=first.vision_end_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
            else:
                parameter.data.mul_(4)
    return model.requires_grad_(False)
