"""The model of the GPU bench: the published 7B shapes with random weights, made on the device and never written to a
disk.

What stands in a folder is only what all contenders read: tokenizer, image processor, config and images. What a step
costs depends on the number and shapes of weights, not on their values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.gpu_cases import Size
from benchmarks.task import INSTRUCTION, REFERENCE, SEED
from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy

DTYPE = torch.bfloat16
_TEXTS = [REFERENCE, "There is a left pleural effusion.", "The lungs are clear.", "system user assistant", INSTRUCTION]

# text and vision of Qwen2.5-VL-7B-Instruct's config.json; tiny is of the same kind: grouped-query attention, an untied
# head
_TEXT: dict[Size, dict[str, Any]] = {
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
}
_VISION: dict[Size, dict[str, Any]] = {
    "7b": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "patch_size": 14,
    },
    "tiny": {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "patch_size": 14,
    },
}


def write_folder(folder: Path, size: Size, *, sides: Sequence[int], images: int) -> None:
    """Write `folder`/policy (without weights) and `images` pictures of noise a side into `folder`/images-SIDE, anew
    each time.
    """
    fresh = folder / "policy"
    shutil.rmtree(fresh, ignore_errors=True)
    # for its tokenizer
    create_tiny_policy(fresh, _TEXTS * 20, vocabulary=512, image_side=max(sides), hidden=32, layers=1, seed=SEED)
    (fresh / "model.safetensors").unlink()
    text = _TEXT[size]
    _fill_vocabulary(fresh / "tokenizer.json", text["vocab_size"])
    tiny = Qwen2_5_VLConfig.from_pretrained(fresh)  # has the ids of the tokenizer
    ids = {name: getattr(tiny.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    Qwen2_5_VLConfig(
        text_config={**text, **ids},
        vision_config=_VISION[size],
        image_token_id=tiny.image_token_id,
        video_token_id=tiny.video_token_id,
        vision_start_token_id=tiny.vision_start_token_id,
        vision_end_token_id=tiny.vision_end_token_id,
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    ).save_pretrained(fresh)
    for side in sides:
        _write_images(folder / f"images-{side}", side, images)


def _fill_vocabulary(tokenizer: Path, entries: int) -> None:
    """Give every row of the head a word, so that both sides sample from all of them and every completion has a text."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    for number in range(len(vocabulary), entries):
        vocabulary[f"Ġword{number}"] = number  # the byte-level sign for a space comes first
    tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_images(folder: Path, side: int, count: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng([SEED, side, number]).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png", compress_level=0)


def random_model(policy: Path, device: torch.device, *, attention: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    """The model that `policy`/config.json describes, drawn on the device in bfloat16, every parameter frozen."""
    config = Qwen2_5_VLConfig.from_pretrained(policy, local_files_only=True)
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE, attn_implementation=attention)
    model.generation_config = GenerationConfig.from_pretrained(policy, local_files_only=True)
    model.name_or_path = str(policy)
    return model.requires_grad_(False).eval()
