"""A checkpoint as its class, the names in its files, its image processor and the ids that stand for pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mrg_r1.policy.endings import read_generation
from mrg_r1.policy.family import reading

# A bare list of names would also hit the vision tower, whose layers share some of them.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# Ids that stand for pixels. A sampled one would make the next forward look for an image that is not there
# (docs/traps.md #11).
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")


def lora_targets(*, merger: str, tower: str) -> dict[str, str]:
    """What `policy.lora.targets` may name. The tower's first layer, a convolution, and its learned positions are left
    out: they are read as raw weights, which no LoRA would reach.
    """
    with_merger = rf"{LORA_TARGETS}|.*visual\.{merger}"
    return {
        "language": LORA_TARGETS,
        "language+merger": with_merger,
        "all": rf"{with_merger}|.*visual\.blocks\.\d+\.{tower}",
    }


def empty_model(
    kind: type[PreTrainedModel], path: Path, config: Any, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The module without weights; its rotary frequencies, computed and never stored, on `device`."""
    with reading(path / "config.json"):  # numbers that contradict one another
        with torch.device("meta"):
            model: Any = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.tie_weights()
        for parent in (model.model.visual, model.model.language_model):
            for name, child in list(parent.named_children()):
                if any(buffer.is_meta for buffer in child.buffers()) and not list(child.parameters()):
                    fresh = (
                        type(child)(child.config) if hasattr(child, "config") else type(child)(2 * len(child.inv_freq))
                    )
                    setattr(parent, name, fresh.to(device))
    model.generation_config = read_generation(path) or model.generation_config
    module: nn.Module = model
    return module


# How files name the parts: transformers 5's tree; before 4.52; as LLaVA's and Gemma's do; the base model saved alone.
_LAYOUTS = {
    "model.visual.": "model.visual.",
    "model.language_model.": "model.language_model.",
    "visual.": "model.visual.",
    "model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
}


def module_name(key: str) -> str:
    """The name of a stored tensor in the module tree: published checkpoints keep the names of other trees."""
    for prefix, place in _LAYOUTS.items():
        if key.startswith(prefix):
            return place + key.removeprefix(prefix)
    return key


def banned_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of image, video and vision tokens, as the config and as the tokenizer name them."""
    named = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    vocabulary = tokenizer.get_vocab()
    return {token for token in named if token is not None} | {
        vocabulary[token] for token in _VISION_TOKENS if token in vocabulary
    }


def image_processor(path: Path, min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """The PIL one, which needs no torchvision and gives the same pixels on every machine."""
    with reading(path / "preprocessor_config.json"):
        return Qwen2VLImageProcessorPil.from_pretrained(
            path, min_pixels=min_pixels, max_pixels=max_pixels, local_files_only=True
        )
