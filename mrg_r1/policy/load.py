"""A checkpoint directory as a policy, its tokenizer and its image processor.

No network, no remote code, no pickle: safetensors from a local directory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mrg_r1.files import folder_filled, parse_json
from mrg_r1.policy.completeness import empty_model, stored_tensors
from mrg_r1.policy.endings import write_generation
from mrg_r1.policy.family import Family, family_of, load_config, reading, shape_of
from mrg_r1.policy.partition import Partition
from mrg_r1.policy.policy import Policy
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import PromptLayout

_LEAST_TOKENS = 0.9  # of the head's rows; published checkpoints pad their vocabulary by 0.3 % at most
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")  # of a checkpoint, one of the two


def load_policy(
    path: Path, *, dtype: torch.dtype, temperature: float = 1.0, partition: Partition | None = None
) -> Policy:
    """Load a checkpoint directory in evaluation mode, every parameter frozen.

    Args:
        partition: load this rank's part of the weights only; all ranks call this then.

    Raises:
        ValueError: a model type without a family, a model that the family's passes do not compute, tensors that are not
            the model's, a tokenizer of another one, no chat template, or no EOS is known.
    """
    family, tokenizer = family_of(path), load_tokenizer(path)
    model = _load_model(path, family, dtype=dtype, partition=partition)
    return Policy(model, tokenizer=tokenizer, temperature=temperature, partition=partition).eval()


def _load_model(path: Path, family: Family, *, dtype: torch.dtype, partition: Partition | None) -> nn.Module:
    """A checkpoint directory as a module, read tensor by tensor; under a partition each part is cut once it is read, so
    that no more than one (a decoder layer, the embeddings) is whole in memory at any time.

    Raises:
        ValueError: the checkpoint's tensors are not those of its model.
    """
    device = torch.device("cpu") if partition is None else partition.device
    model = empty_model(path, dtype, device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without values: {left}"
    stored = stored_tensors(path, model)
    # a tied parameter once, by its first name
    names = {parameter: name for name, parameter in model.named_parameters()}
    read: dict[nn.Parameter, nn.Parameter] = {}
    for part in family.parts(model):
        for module in part.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in read:
                    tensor = stored[names[parameter]].read().to(device=device, dtype=dtype)
                    read[parameter] = nn.Parameter(tensor, requires_grad=False)
                setattr(module, key, read[parameter])
        if partition is not None:
            partition.place(part)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{path}: parameters that belong to no part of the family's: {missing[:3]}")
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with its chat template wherever the checkpoint keeps it.

    Raises:
        ValueError: no tokenizer, one of another model, or no chat template in the directory.
    """
    config = load_config(path)  # transformers looks the class up in it, and would lay what is wrong there to the words
    with reading(f"{path}: tokenizer.json and tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, local_files_only=True)
    _require_own(path, len(tokenizer), shape_of(path).vocabulary)
    file = path / "chat_template.json"
    # The processor's; the one in tokenizer_config.json, beside it, may be of a model that reads no images.
    if file.is_file() and not (path / "chat_template.jinja").is_file():
        tokenizer.chat_template = _read_template(file)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{path}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
        )
    return tokenizer


def _require_own(path: Path, tokens: int, rows: int) -> None:
    """Refuse a tokenizer whose tokens cannot be the rows of the head: more of them, or far fewer. A few rows that no
    token owns are a padded vocabulary.
    """
    found = f"{path}: the tokenizer has {tokens} tokens and the model's head {rows} rows"
    if tokens > rows:
        raise ValueError(
            f"{found}: it is another model's, or tokens were added without resizing the model; fetch the checkpoint's "
            "own tokenizer"
        )
    if tokens < _LEAST_TOKENS * rows:
        raise ValueError(
            f"{found}, of which it should own nine tenths or more: it is another model's, or cut short; fetch the "
            "checkpoint's own tokenizer"
        )


def _read_template(file: Path) -> str | dict[str, str]:
    """The template of a chat_template.json, or its templates by name."""
    with reading(file):
        template = parse_json(file.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}
        if not isinstance(template, (str, dict)):
            raise ValueError(f"chat_template is {template!r}, no template")
    return template


def load_prompt_layout(path: Path, tokenizer: PreTrainedTokenizerBase) -> PromptLayout:
    """How images stand in a prompt of this checkpoint.

    Raises:
        ValueError: the tokenizer's image token is not the config's.
    """
    return family_of(path).prompt_layout(load_config(path), tokenizer)


def load_image_processor(path: Path, *, min_pixels: int, max_pixels: int) -> Any:
    """The checkpoint's image processor with the recipe's limits on the image area in pixels."""
    return family_of(path).image_processor(path, min_pixels, max_pixels)


def save_policy(policy: PolicyWeights, directory: Path, *, source: Path) -> None:
    """Write the policy as a checkpoint directory of the layout that `load_policy` reads; tokenizer and processor come
    from `source`.
    """
    model = policy.base
    with folder_filled(directory) as fresh:
        # its own is written below: transformers refuses to write some that it has read
        stated, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.save_pretrained(fresh, safe_serialization=True)
        finally:
            model.generation_config = stated
        write_generation(source, fresh, policy.eos_ids, pad=policy.pad_id)
        policy.tokenizer.save_pretrained(fresh)
        for name in _PROCESSOR:
            if (source / name).is_file():
                shutil.copy(source / name, fresh)
