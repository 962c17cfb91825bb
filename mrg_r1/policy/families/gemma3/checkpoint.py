"""The checkpoint's class, its modules and the names in its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Gemma3ForConditionalGeneration

from mrg_r1.policy.endings import read_generation
from mrg_r1.policy.family import reading

# The tower's layers share some of these names.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# transformers 4 and 5 write `language_model.model.`, and read it and their own tree, `model.language_model.`
PUBLISHED = (
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.",
    "multi_modal_projector.",
    "model.language_model.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "lm_head.",
)
_LAYOUTS = {
    r"language_model\.lm_head\.": "lm_head.",
    r"(model\.)?language_model\.(model\.)?": "model.language_model.",
    r"(model\.)?vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"(model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
}


def module_name(key: str) -> str:
    """The name of a stored tensor in the module tree."""
    for prefix, place in _LAYOUTS.items():
        found = re.match(prefix, key)
        if found is not None:
            return place + key[found.end() :]
    return key


def empty_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module without weights; what is computed and never stored (rotary frequencies, the embeddings' scale, numbers
    of patches) on `device`.
    """
    with reading(path / "config.json"):  # numbers that contradict one another
        with torch.device("meta"):
            model: Any = Gemma3ForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.tie_weights()
        decoder, seen = model.model.language_model, model.model.vision_tower.embeddings
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
        embed = decoder.embed_tokens
        scale = torch.tensor(embed.scalar_embed_scale, device=device)
        embed.register_buffer("embed_scale", scale, persistent=False)
        numbers = torch.arange(seen.num_positions, device=device).unsqueeze(0)
        seen.register_buffer("position_ids", numbers, persistent=False)
    model.generation_config = read_generation(path) or model.generation_config
    module: nn.Module = model
    return module


def parts(model: Any) -> list[nn.Module]:
    tower, language = model.model.vision_tower, model.model.language_model
    return [
        tower.embeddings,
        *tower.encoder.layers,
        tower.post_layernorm,
        model.model.multi_modal_projector,
        language.embed_tokens,
        *language.layers,
        language.norm,
        model.lm_head,
    ]
