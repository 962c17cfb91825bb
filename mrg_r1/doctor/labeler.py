"""A recipe's labeler: whether its files fit its network, what they weigh, and where it will run."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mrg_r1.config.paths import check_labeler_path
from mrg_r1.config.recipe import Recipe, held_out_is_rewarded
from mrg_r1.doctor.finding import Finding, examined
from mrg_r1.labels import loading
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.tokenizer import PUBLISHED_VOCABULARY, read_tokenizer, require_uncased

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_labeler(path: Path, tokenizer: str | None, *, field: str = "reward.labeler") -> str:
    """Refuse a labeler whose tensors are not, by name and shape, those of its network, or whose tokenizer cannot be
    had.

    Args:
        field: of the recipe, which names it.

    Raises:
        ValueError, OSError: names the file, what is wrong and the remedy.
    """
    check_labeler_path(field, path)
    if path.is_dir():
        config, state = loading.read_directory(path)
        words = read_tokenizer(tokenizer if tokenizer is not None else str(path))
    else:
        config, state = loading.read_checkpoint(path)
        words = read_tokenizer(tokenizer or PUBLISHED_VOCABULARY)
        require_uncased(words, config.vocab_size, tokenizer or PUBLISHED_VOCABULARY)
    with torch.device("meta"):
        expected = CheXbert(config).state_dict()
    loading.require_fit(expected, state, path)
    return (
        f"{path}: {sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} million parameters, "
        f"{words.get_vocab_size()} words"
    )


def held_out_finding(recipe: Recipe) -> list[Finding]:
    """Whether the held-out labeler is one, and another than the rewarded, where a recipe has one and evaluates."""
    path, tokenizer = recipe.evaluation.held_out_labeler, recipe.evaluation.held_out_tokenizer
    if path is None or recipe.phases != "all":
        return []

    def look() -> str:
        said = check_labeler(path, tokenizer, field="evaluation.held_out_labeler")
        if path.resolve() == recipe.reward.labeler.resolve():
            raise ValueError(held_out_is_rewarded(recipe))
        return said

    return [examined("held-out labeler", look)]


def labeler_bytes(recipe: Recipe) -> int:
    """Of the labeler's weights in its dtype; files hold float32."""
    path = recipe.reward.labeler
    file = path / loading.WEIGHTS if path.is_dir() else path
    return file.stat().st_size // 4 * _BYTES[recipe.reward.dtype] if file.is_file() and recipe.phases != "update" else 0


def shared_device(name: str) -> int | None:
    """The index at which this process sees the GPU of a `reward.device`; None: on none of them, or its number is not to
    be told.
    """
    if not name.startswith("cuda:"):
        return None
    physical, visible = name.removeprefix("cuda:"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return int(physical)
    seen = [part.strip() for part in visible.split(",")]
    return seen.index(physical) if physical in seen else None


def device_findings(recipe: Recipe, gpus: int) -> list[Finding]:
    """Whether the labelers' devices are there; RadEval's is when its process starts."""
    evaluation = recipe.evaluation
    found = [_device("labeler's device", "reward.device", recipe.reward.device, gpus, slow=gpus > 0)]
    if evaluation.held_out_labeler is not None and recipe.phases == "all":
        device = evaluation.held_out_device
        found.append(_device("held-out labeler's device", "evaluation.held_out_device", device, gpus))
    return found


def _device(subject: str, field: str, device: str, gpus: int, *, slow: bool = False) -> Finding:
    """
    Args:
        slow: steps may wait for what is on the CPU.
    """
    if device == "cpu":
        waits = ": with a BERT-base and a policy on GPUs, steps may wait for rewards (time/reward_exposed)"
        return Finding(subject, "ok", f"cpu{waits if slow else ''}")
    if not gpus:
        return Finding(subject, "failure", f"{field} {device}: this machine shows no GPU", f"set {field}=cpu")
    index = shared_device(device)
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and index is not None and index >= gpus:
        text = f"{field} {device}: this machine has {gpus} GPU(s), numbered from 0"
        return Finding(subject, "failure", text, "name one of them, or cpu")
    return Finding(subject, "ok", f"{device}, a physical number" if device.startswith("cuda:") else device)
