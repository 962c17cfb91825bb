"""The checkpoint's class, and its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from mrg_r1.policy.qwen_vl import checkpoint


def empty_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return checkpoint.empty_model(Qwen3VLForConditionalGeneration, path, config, dtype, device)


def parts(model: Any) -> list[nn.Module]:
    visual, language = model.model.visual, model.model.language_model
    return [
        visual.patch_embed,
        visual.pos_embed,
        *visual.blocks,
        visual.merger,
        *visual.deepstack_merger_list,
        language.embed_tokens,
        *language.layers,
        language.norm,
        model.lm_head,
    ]
