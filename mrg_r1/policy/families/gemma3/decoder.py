"""A decoder layer, its norms and its two rotations (Gemma 3, arXiv 2503.19786, section 2): of six layers five see a
window only and rotate by a small base, the sixth sees everything and rotates by a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from mrg_r1.policy.families.gemma3.images import image_numbers, in_order
from mrg_r1.policy.layers import DecoderLayer, Norm, Projection, frozen_values
from mrg_r1.policy.rotation import rotated_heads

_SLIDING = "sliding_attention"
_KINDS = (_SLIDING, "full_attention")  # as the rotation's second axis has them


@dataclass(frozen=True)
class WideNorm(Norm):
    """RMSNorm whose weight, 1 + what is stored, is multiplied in float32, before the result is rounded."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 and (x.is_cuda or not torch.is_grad_enabled()):
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.epsilon).to(x.dtype)
        return super().__call__(x)


@dataclass(frozen=True)
class Layer(DecoderLayer):
    """One decoder layer."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm_attention: Norm
    norm_attended: Norm
    norm_mlp: Norm
    norm_mlp_out: Norm
    norm_q: Norm
    norm_k: Norm
    query_heads: int
    key_heads: int
    rotation: int  # which of the two
    window: int | None

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.query_heads, self.key_heads, self.key_heads]
        q, k, v = self.qkv(self.norm_attention(x)).view(len(x), sum(sizes), -1).split(sizes, dim=1)
        qkv = torch.cat([self.norm_q(q), self.norm_k(k), v], dim=1)
        own = slice(self.rotation, self.rotation + 1)
        return rotated_heads(qkv, self.query_heads, self.key_heads, cos[:, own], sin[:, own])

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm_attended(self.out(attended.flatten(1))).add_(x)
        return self.norm_mlp_out(self.down(geglu(self.gate_up(self.norm_mlp(x))))).add_(x)


def read_norm(module: Any, config: Any) -> WideNorm:
    return _norm(module, config.text_config.rms_norm_eps)


def _norm(module: Any, epsilon: float, factor: float = 1.0) -> WideNorm:
    return WideNorm((1.0 + frozen_values(module.weight).float()) * factor, epsilon)


def read_layer(module: Any, config: Any) -> Layer:
    """A decoder layer of the checkpoint's modules; its adapters as they stand, on or off."""
    attention, mlp, text = module.self_attn, module.mlp, config.text_config
    kind, epsilon = attention.layer_type, text.rms_norm_eps
    return Layer(
        qkv=Projection.read([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=Projection.read([attention.o_proj]),
        gate_up=Projection.read([mlp.gate_proj, mlp.up_proj]),
        down=Projection.read([mlp.down_proj]),
        norm_attention=_norm(module.input_layernorm, epsilon),
        norm_attended=_norm(module.post_attention_layernorm, epsilon),
        norm_mlp=_norm(module.pre_feedforward_layernorm, epsilon),
        norm_mlp_out=_norm(module.post_feedforward_layernorm, epsilon),
        # scores are scaled by D ** -0.5 later; what the checkpoint scales by is made up for here
        norm_q=_norm(attention.q_norm, epsilon, (text.head_dim / text.query_pre_attn_scalar) ** 0.5),
        norm_k=_norm(attention.k_norm, epsilon),
        query_heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        rotation=_KINDS.index(kind),
        window=text.sliding_window if kind == _SLIDING else None,
    )


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of both kinds of layers."""

    inverse_frequencies: Tensor  # [2, D / 2] float32

    @classmethod
    def read(cls, model: Any) -> Rotation:
        rotary = model.model.language_model.rotary_emb
        # a decoder of few layers may have none of one kind, whose frequencies nobody reads then
        known = [getattr(rotary, f"{kind}_inv_freq", None) for kind in _KINDS]
        some = next(one for one in known if one is not None)
        return cls(torch.stack([some if one is None else one for one in known]).float())

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T, 2] as `ImageTokens.positions` makes them, or [T] of text -> cos and sin [T, 2, D / 2]
        float32.
        """
        places = positions if positions.dim() == 1 else in_order(positions)
        angles = places.float()[:, None, None] * self.inverse_frequencies
        return angles.cos(), angles.sin()


def run_modules(
    model: Any,
    embeddings: Tensor,
    attention_mask: Tensor,
    prompt_positions: Tensor,
    text_positions: Tensor,
    added: Sequence[Tensor],
) -> Tensor:
    """[R, L, H] normalised hidden states by transformers' modules (`Family.run_modules`)."""
    positions = torch.cat([in_order(prompt_positions), text_positions], dim=1)
    numbers = image_numbers(prompt_positions)
    blocks = F.pad(numbers, (0, text_positions.shape[1])) - 1  # -1: of no image
    masks = create_masks_for_vision_model(
        config=model.config.text_config,
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions,
        block_sequence_ids=blocks,
    )
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=masks, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu by its tanh: [T, 2 * intermediate] -> [T, intermediate] (arXiv 2002.05202)."""
    if torch.is_grad_enabled():
        result: Tensor = _Geglu.apply(gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=1)
    return F.gelu(gate, approximate="tanh").mul_(up)


class _Geglu(torch.autograd.Function):
    """gelu(gate) * up of [T, 2 * intermediate]; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return torch.cat([d_gate, F.gelu(gate, approximate="tanh").mul_(grad)], dim=1)
