"""The rotation of queries and keys by three axes, the norm, and the decoder as transformers' modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mrg_r1.policy.layers import Norm, frozen_values
from mrg_r1.types import to_device


@dataclass(frozen=True)
class MultimodalRotation:
    """Rotary angles of which each frequency follows one axis of a position (Qwen2-VL, arXiv 2409.12191, section
    2.1).
    """

    inverse_frequencies: Tensor  # [D / 2] float32
    axis_of_frequency: Tensor  # [D / 2] int64: time, height or width

    @classmethod
    def read(cls, model: Any, axes: Tensor) -> MultimodalRotation:
        """The frequencies of a model; `axes` is `axis_of_frequency`, on any device."""
        frequencies = model.model.language_model.rotary_emb.inv_freq.float()
        return cls(frequencies, to_device(axes, frequencies.device))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T, 3], or [T] of text -> cos and sin [T, 1, D / 2] float32."""
        axes = positions.expand(3, -1) if positions.dim() == 1 else positions.t()
        angles = axes[self.axis_of_frequency].t().contiguous().float() * self.inverse_frequencies
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def run_modules(
    model: Any,
    embeddings: Tensor,
    attention_mask: Tensor,
    prompt_positions: Tensor,
    text_positions: Tensor,
    **further: Any,
) -> Tensor:
    """[R, L, H] normalised hidden states by transformers' modules (`Family.run_modules`), which take `further` too."""
    positions = torch.cat([prompt_positions.movedim(2, 0), text_positions.expand(3, -1, -1)], dim=2)
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=positions, use_cache=False, **further
    ).last_hidden_state
    return hidden


def read_norm(module: Any, config: Any) -> Norm:
    return Norm(frozen_values(module.weight), config.text_config.rms_norm_eps)
