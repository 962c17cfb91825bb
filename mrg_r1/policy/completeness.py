"""Whether a checkpoint's files and its model are of one piece: each tensor of either in the other, in its shape.

transformers fills what it misses with random numbers and passes over what it cannot place, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mrg_r1.policy.checkpoint_files import StoredTensor, read_layout
from mrg_r1.policy.family import family_of

_COMPUTED = (".inv_freq",)  # buffers that old files carry and the model computes
_PREFIXES = {
    "base_model.model.": "a PEFT state; export or merge it into a checkpoint first",
    "_orig_mod.": "a state of torch.compile",
    "module.": "a state of a wrapped module (DistributedDataParallel, DeepSpeed)",
}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint directory by their names in the module tree: exactly those of its model.

    Only headers are read, and of a tied head that is stored as well the values.

    Raises:
        ValueError: a tensor of the model is missing in the files, one of the files has no place in the model, or a
            shape differs; names the first few.
    """
    family = family_of(path)
    tensors = [tensor for file in read_layout(path).values() for tensor in file]
    stored = {family.module_name(tensor.name): tensor for tensor in tensors}
    twice = [tensor.name for tensor in tensors if stored[family.module_name(tensor.name)] is not tensor]
    if twice:
        raise ValueError(f"{path}: {_some(twice)} stored twice under different names; fetch the checkpoint again")
    model = family.empty_model(path, torch.float32, torch.device("cpu"))
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
        raise ValueError(f"{path}: {'; '.join(parts)}; {_hint([tensor.name for tensor in tensors])}")
    for name, weight in {**wanted, **aliases}.items():
        if name in stored and stored[name].shape != tuple(weight.shape):
            raise ValueError(
                f"{stored[name].file}: {stored[name].name} is {list(stored[name].shape)}, config.json makes it "
                f"{list(weight.shape)}"
            )
    first = {weight: name for name, weight in wanted.items()}
    for name, weight in aliases.items():
        if name in stored and not torch.equal(stored[name].read(), stored[first[weight]].read()):
            raise ValueError(
                f"{stored[name].file}: {stored[name].name} differs from {stored[first[weight]].name}, with which "
                "config.json ties it (tie_word_embeddings); one of the two files is of another checkpoint"
            )
    return stored


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _hint(names: list[str]) -> str:
    for prefix, what in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return f"all names start with {prefix}: this is {what}"
    return "the download is incomplete, or of two checkpoints: fetch it again"
