"""The policy and the images that every contender of the bench is given, written once.

The policy is a random Qwen2.5-VL wide enough that matrix products and not Python decide what a step costs, with
grouped-query attention as published checkpoints have it; its vision tower is small. Images are seeded noise: what they
show costs nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from benchmarks.task import INSTRUCTION, REFERENCE, SEED
from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy

IMAGES = 8  # of each size; the largest case takes 8 studies a step

_TEXTS = [
    REFERENCE,
    "No pleural effusion.",
    "There is a left pleural effusion.",
    "The lungs are clear.",
    "No pneumothorax is seen.",
    "system user assistant",
    INSTRUCTION,
]
_WIDTH, _LAYERS, _VOCABULARY = 256, 4, 512
_VISION = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": [1]}


def write_model(folder: Path, sides: list[int]) -> Path:
    """Write `folder`/policy and `folder`/images-SIDE, unless they are there; a half-written one is never left.

    Args:
        folder: usually runs/bench.
        sides: of the square images, in pixels; the processor lets the largest pass unreduced.

    Returns:
        The checkpoint directory.
    """
    transformers_logging.disable_progress_bar()  # for writing a file of 20 MB
    policy = folder / "policy"
    if not (policy / "config.json").is_file():
        fresh = folder / "policy.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        # its tokenizer, image processor and language model are what is wanted here; its vision tower is as wide as the
        # language model
        create_tiny_policy(
            fresh, _TEXTS * 20, vocabulary=_VOCABULARY, image_side=max(sides), hidden=_WIDTH, layers=_LAYERS, seed=SEED
        )
        _replace_model(fresh)
        fresh.rename(policy)
    for side in sides:
        _write_images(folder / f"images-{side}", side)
    return policy


def _replace_model(directory: Path) -> None:
    """Put a model with the bench's small vision tower into the checkpoint, everything else as it was."""
    config = Qwen2_5_VLConfig.from_pretrained(directory)
    for name, value in _VISION.items():
        setattr(config.vision_config, name, value)
    generation = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).generation_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = generation
    model.save_pretrained(directory, safe_serialization=True)


def _write_images(folder: Path, side: int) -> None:
    if folder.is_dir():
        return
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for number in range(IMAGES):
        pixels = np.random.default_rng([SEED, side, number]).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(fresh / f"{number}.png")
    fresh.rename(folder)
