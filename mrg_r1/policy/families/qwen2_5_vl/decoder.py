"""A decoder layer and its rotation (Qwen2.5-VL, arXiv 2502.13923; grouped-query attention, SwiGLU, RMSNorm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mrg_r1.policy.attention import rotated_heads
from mrg_r1.policy.layers import DecoderLayer, Norm, Projection, frozen_values, swiglu


@dataclass(frozen=True)
class Layer(DecoderLayer):
    """One decoder layer."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm_attention: Norm
    norm_mlp: Norm
    query_heads: int
    key_heads: int

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.query_heads + 2 * self.key_heads
        qkv = self.qkv(self.norm_attention(x)).view(len(x), heads, -1)
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
        query_heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
    )


def read_norm(module: Any, config: Any) -> Norm:
    return Norm(frozen_values(module.weight), config.text_config.rms_norm_eps)


@dataclass(frozen=True)
class MultimodalRotation:
    """Rotary angles of which each frequency follows one axis of a position (Qwen2-VL, arXiv 2409.12191, section
    2.1).
    """

    inverse_frequencies: Tensor  # [D / 2] float32
    axis_of_frequency: Tensor  # [D / 2] int64: time, height or width

    @classmethod
    def read(cls, model: Any) -> MultimodalRotation:
        frequencies = model.model.language_model.rotary_emb.inv_freq.float()
        sections = model.config.text_config.rope_parameters["mrope_section"]
        axes = torch.arange(3).repeat_interleave(torch.tensor(sections))
        return cls(frequencies, axes.to(frequencies.device))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T, 3], or [T] of text -> cos and sin [T, 1, D / 2] float32."""
        axes = positions.expand(3, -1) if positions.dim() == 1 else positions.t()
        angles = axes[self.axis_of_frequency].t().float() * self.inverse_frequencies
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def run_modules(
    model: Any,
    embeddings: Tensor,
    attention_mask: Tensor,
    prompt_positions: Tensor,
    text_positions: Tensor,
    added: Sequence[Tensor],
) -> Tensor:
    """[R, L, H] normalised hidden states by transformers' modules (`Family.run_modules`); nothing is ever `added`."""
    positions = torch.cat([prompt_positions.movedim(2, 0), text_positions.expand(3, -1, -1)], dim=2)
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden
