"""A decoder layer and its rotation (Qwen3-VL, arXiv 2511.21631): each head's queries and keys have a norm before they
are rotated, and the size of a head is independent of the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mrg_r1.policy.layers import DecoderLayer, Norm, Projection, swiglu
from mrg_r1.policy.qwen_vl import decoder as qwen_vl
from mrg_r1.policy.qwen_vl.decoder import MultimodalRotation, read_norm
from mrg_r1.policy.rotation import rotated_heads


@dataclass(frozen=True)
class Layer(DecoderLayer):
    """One decoder layer."""

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
    """A decoder layer of the checkpoint's modules; its adapters as they stand, on or off."""
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


def rotation(model: Any) -> MultimodalRotation:
    """Time, height and width by turns, so that each has high and low frequencies; time has what is left over."""
    rotary = model.model.language_model.rotary_emb
    axes = torch.zeros(len(rotary.inv_freq), dtype=torch.long)
    for axis in (1, 2):
        axes[axis : 3 * rotary.mrope_section[axis] : 3] = axis
    return MultimodalRotation.read(model, axes)


def run_modules(
    model: Any,
    embeddings: Tensor,
    attention_mask: Tensor,
    prompt_positions: Tensor,
    text_positions: Tensor,
    added: Sequence[Tensor],
) -> Tensor:
    """[R, L, H] normalised hidden states by transformers' modules (`Family.run_modules`)."""
    rows, length, _ = embeddings.shape
    at_prompts = torch.arange(length, device=embeddings.device).expand(rows, -1) < prompt_positions.shape[1]
    return qwen_vl.run_modules(
        model,
        embeddings,
        attention_mask,
        prompt_positions,
        text_positions,
        visual_pos_masks=at_prompts,
        deepstack_visual_embeds=[part.flatten(0, 1) for part in added],
    )
