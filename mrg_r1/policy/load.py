"""A checkpoint directory as a policy, its tokenizer and its image processor.

No network, no remote code, no pickle: safetensors from a local directory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mrg_r1.files import folder_filled
from mrg_r1.policy.family import family_of
from mrg_r1.policy.partition import Partition, load_parts
from mrg_r1.policy.policy import Policy
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import PromptLayout


def load_policy(
    path: Path, *, dtype: torch.dtype, temperature: float = 1.0, partition: Partition | None = None
) -> Policy:
    """Load a checkpoint directory in evaluation mode, every parameter frozen.

    Args:
        partition: load this rank's part of the weights only; all ranks call this then.

    Raises:
        ValueError: a model type without a family, no chat template, or no EOS is known.
    """
    family, tokenizer = family_of(path), load_tokenizer(path)
    if partition is not None:
        parts = load_parts(path, family, dtype=dtype, partition=partition)
        return Policy(parts, tokenizer=tokenizer, temperature=temperature, partition=partition).eval()
    model = family.load_model(path, dtype)
    model.requires_grad_(False)
    return Policy(model, tokenizer=tokenizer, temperature=temperature).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with its chat template wherever the checkpoint keeps it.

    Raises:
        ValueError: no chat template in the directory.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.chat_template is None:  # older checkpoints keep it with the processor
        file = path / "chat_template.json"
        if not file.is_file():
            raise ValueError(
                f"{path}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
            )
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def load_prompt_layout(path: Path, tokenizer: PreTrainedTokenizerBase) -> PromptLayout:
    """How images stand in a prompt of this checkpoint.

    Raises:
        ValueError: the tokenizer's image token is not the config's.
    """
    return family_of(path).prompt_layout(AutoConfig.from_pretrained(path, local_files_only=True), tokenizer)


def load_image_processor(path: Path, *, min_pixels: int, max_pixels: int) -> Any:
    """The checkpoint's image processor with the recipe's limits on the image area in pixels."""
    return family_of(path).image_processor(path, min_pixels, max_pixels)


def save_policy(policy: PolicyWeights, directory: Path, *, source: Path) -> None:
    """Write the policy as a checkpoint directory of the layout that `load_policy` reads; tokenizer and processor come
    from `source`.
    """
    with folder_filled(directory) as fresh:
        policy.base.save_pretrained(fresh, safe_serialization=True)
        policy.tokenizer.save_pretrained(fresh)
        shutil.copy(source / "preprocessor_config.json", fresh)
