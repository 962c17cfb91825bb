"""Whether a checkpoint's files and its model are of one piece: each tensor of either in the other, in its shape.

transformers fills what it misses with random numbers and passes over what it cannot place, with a warning; names that
it knows for one model type it leaves out for the next. So nothing is loaded by it: tensors are read by the names that
are compared here (`load.load_policy`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mrg_r1.policy.checkpoint_files import StoredTensor, read_layout
from mrg_r1.policy.family import family_of, load_config, read_config, shape_of

_COMPUTED = (".inv_freq",)  # buffers that old files carry and the model computes
_PLAIN = ("F64", "F32", "BF16", "F16")  # anything else is a quantised weight, whose numbers are not the weight's
_PREFIXES = {
    "base_model.model.": "a PEFT state; export or merge it into a checkpoint first",
    "_orig_mod.": "a state of torch.compile",
    "module.": "a state of a wrapped module (DistributedDataParallel, DeepSpeed)",
}


def empty_model(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> nn.Module:
    """The model of a checkpoint directory without weights: what names, shapes and ties are read from, and what loading
    fills. Whatever builds a model builds it here.

    Args:
        device: of the few buffers that are computed and never stored; None: the CPU.

    Raises:
        ValueError: as `load_config` and `shape_of`; numbers of the config.json that contradict one another.
    """
    config = load_config(path)  # first: a value of the wrong kind is named there
    shape_of(path)
    with no_init_weights():  # nobody reads them
        return family_of(path).empty_model(path, config, dtype, device or torch.device("cpu"))


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding."""
    return model.lm_head.weight is model.model.language_model.embed_tokens.weight


def stored_tensors(path: Path, model: nn.Module) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint directory by their names in the module tree: exactly those of its model.

    Only headers are read, and of a tied head that is stored as well the values.

    Args:
        model: of the directory, without weights.

    Raises:
        ValueError: a tensor of the model is missing in the files, one of the files has no place in the model, stands
            twice or is quantised, a shape differs, or an adapter lies beside them; names the first few.
    """
    family = family_of(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: an adapter_config.json beside the weights; whether they hold the adapter cannot be told: remove "
            "it where they do, else move it to a folder of its own and name that as policy.adapter"
        )
    tensors = [tensor for file in read_layout(path).values() for tensor in file]
    stored = {family.module_name(tensor.name): tensor for tensor in tensors}
    twice = [tensor for tensor in tensors if stored[family.module_name(tensor.name)] is not tensor]
    if twice:
        other = stored[family.module_name(twice[0].name)]
        more = f" (and {len(twice) - 1} more so)" if len(twice) > 1 else ""
        raise ValueError(
            f"{path}: {twice[0].name} of {twice[0].file.name} and {other.name} of {other.file.name} are the same "
            f"tensor{more}; one of them is of another checkpoint: fetch it again"
        )
    wanted = dict(model.named_parameters())  # a tied one once, by its first name
    aliases = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if name not in wanted}
    buffers = dict(model.named_buffers())
    missing = [name for name in wanted if name not in stored]
    unexpected = [
        tensor.name
        for name, tensor in stored.items()
        if name not in wanted and name not in aliases and name not in buffers and not name.endswith(_COMPUTED)
    ]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"no tensor {_some(missing)} in its safetensors, which the model of its config.json has")
        if unexpected:
            parts.append(f"no place in that model for {_some(unexpected)}")
        raise ValueError(f"{path}: {'; '.join(parts)}; {_hint(path, [tensor.name for tensor in tensors], missing)}")
    for name, weight in {**wanted, **aliases}.items():
        if name in stored:
            _require_alike(stored[name], weight)
    first = {weight: name for name, weight in wanted.items()}
    for name, weight in aliases.items():
        if name in stored and not torch.equal(stored[name].read(), stored[first[weight]].read()):
            raise ValueError(
                f"{stored[name].file}: {stored[name].name} differs from {stored[first[weight]].name}, with which "
                "config.json ties it (tie_word_embeddings); one of the two files is of another checkpoint, or "
                "config.json is to say tie_word_embeddings: false, at its top and in text_config"
            )
    return stored


def _require_alike(tensor: StoredTensor, weight: nn.Parameter) -> None:
    if tensor.shape != tuple(weight.shape):
        raise ValueError(
            f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, config.json makes it {list(weight.shape)}; the "
            "two are of different checkpoints: fetch both again"
        )
    if tensor.dtype not in _PLAIN:
        raise ValueError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, a quantised weight; fetch the checkpoint that "
            "was quantised (BF16, F16 or F32)"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _hint(path: Path, names: list[str], missing: list[str]) -> str:
    for prefix, what in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return f"all names start with {prefix}: this is {what}"
    quantised = read_config(path).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        return f"config.json says it is quantised ({method}); fetch the checkpoint that was"
    if missing == ["lm_head.weight"]:
        return (
            "the download is incomplete, or the head is the embedding, which config.json then says at its top level "
            "(tie_word_embeddings: true)"
        )
    return "the download is incomplete, or of two checkpoints: fetch it again"
