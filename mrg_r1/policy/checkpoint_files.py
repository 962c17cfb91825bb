"""The weights of a checkpoint directory as files: what lies where, and the same layout written anew with some tensors
changed.

Tensors pass one at a time, so that a checkpoint of any size is copied in the memory of its largest tensor. No model is
built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mrg_r1.console import progress
from mrg_r1.files import parse_json

SHARD_BYTES = 5 * 10**9  # a single file larger than this is written in parts; a checkpoint in parts keeps its own
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_COPY_BYTES = 64 * 1024**2
# What stands beside the weights: configs, tokenizer, processor, chat templates, licences. Python files and pickles stay
# behind, and so does the README, which describes other weights.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "LICEN[CS]E*", "NOTICE*", "additional_chat_templates/*.jinja")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str  # in the file
    file: Path
    dtype: str  # safetensors' word: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # byte of the file
    size: int  # bytes

    def read(self) -> Tensor:
        """The tensor; the file is opened for it alone, so that no more of it than this stays mapped."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


Placed = tuple[str, StoredTensor]  # the file that a tensor is written to


def read_layout(directory: Path) -> dict[str, list[StoredTensor]]:
    """The tensors of each weight file, in the order in which they lie there: model.safetensors, the files that the
    index names, or without an index the parts that number themselves (model-00001-of-00004.safetensors).

    Raises:
        ValueError: no safetensors weights (a pickle is not loaded); a whole file and an index of others; a part that is
            missing, damaged or short of a tensor.
    """
    index = directory / _INDEX
    weight_map = _read_index(index) if index.is_file() else {}
    names = sorted(set(weight_map.values()))
    if (directory / _WEIGHTS).is_file():
        if names not in ([], [_WEIGHTS]):
            raise ValueError(
                f"{directory}: {_WEIGHTS} is there, and {_INDEX}, which names {names[0]}: two sets of weights; remove "
                "the one that is not meant"
            )
        names = [_WEIGHTS]
    elif not index.is_file():
        names = _numbered_parts(directory)
    layout = {name: _read_header(directory / name) for name in names}
    held = {(tensor.name, name) for name, tensors in layout.items() for tensor in tensors}
    lost = sorted(set(weight_map.items()) - held)
    if lost:
        raise ValueError(
            f"{directory / lost[0][1]}: {lost[0][0]} is not in it, though {_INDEX} says so; fetch the checkpoint again"
        )
    return layout


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        index: Any = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch the checkpoint again") from error
    weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
    names = weight_map.values() if isinstance(weight_map, dict) and weight_map else [None]
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(
            f"{file}: weight_map is {json.dumps(weight_map)[:60]}, no map of tensors to files of this folder; fetch "
            "the checkpoint again"
        )
    return dict(weight_map)


def _numbered_parts(directory: Path) -> list[str]:
    """The parts of a checkpoint whose index was left behind."""
    found = {path.name: match for path in directory.iterdir() if (match := _PART.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"{directory}: neither {_WEIGHTS} nor {_INDEX} there; weights in another format (*.bin is a pickle) "
            "are not loaded"
        )
    count = next(iter(found.values()))["count"]
    wanted = {f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)}
    if set(found) != wanted:
        odd = min(wanted ^ set(found))
        what = "is missing" if odd in wanted else f"is not one of {int(count)} parts"
        raise ValueError(f"{directory}: no {_INDEX}, and {odd} {what}; fetch the checkpoint again")
    return sorted(found)


def _read_header(path: Path) -> list[StoredTensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, the checkpoint is incomplete; fetch it again")
    try:
        with safe_open(path, framework="pt"):
            pass  # sizes and offsets are checked here, also against the file's length
    except SafetensorError as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ValueError(f"{path}: only Git LFS's pointer to the file; git lfs pull fetches it") from error
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors.append(StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin))
    return sorted(tensors, key=lambda tensor: tensor.start)


def files_beside(directory: Path) -> list[Path]:
    """The files of a checkpoint that are not weights and belong to it, relative to `directory`."""
    found = {path.relative_to(directory) for pattern in _BESIDE for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def checkpoint_bytes(directory: Path, layout: Mapping[str, Sequence[StoredTensor]]) -> int:
    """What `write_checkpoint` will need on the disk, short of the headers."""
    weights = sum(tensor.size for tensors in layout.values() for tensor in tensors)
    return weights + sum((directory / path).stat().st_size for path in files_beside(directory))


def write_checkpoint(
    source: Path,
    layout: Mapping[str, Sequence[StoredTensor]],
    output: Path,
    *,
    change: Callable[[StoredTensor], Tensor | None],
    rename: Callable[[str], str],
) -> None:
    """Write the checkpoint of `source` into the empty folder `output`.

    Args:
        layout: `read_layout(source)`.
        change: the tensor to write in place of a stored one, of its dtype and shape, or None: its bytes are copied.
        rename: the name to write a tensor under, given its stored one.
    """
    for path in files_beside(source):
        (output / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, output / path)
    plan = _in_parts(layout)
    placed = [(name, tensor) for name, tensors in plan.items() for tensor in tensors]
    for name, group in groupby(progress(placed, "writing the weights"), key=itemgetter(0)):
        with open(output / name, "wb") as file:
            file.write(_header(plan[name], rename))
            for _, tensor in group:
                changed = change(tensor)
                if changed is None:
                    _copy_bytes(tensor, file)
                else:
                    file.write(changed.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for _, tensor in placed)},
            "weight_map": dict(sorted((rename(tensor.name), name) for name, tensor in placed)),
        }
        (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_parts(layout: Mapping[str, Sequence[StoredTensor]]) -> Mapping[str, Sequence[StoredTensor]]:
    """The source's own files, or parts of at most SHARD_BYTES where it is a single larger one."""
    if len(layout) > 1:
        return layout
    parts: list[list[StoredTensor]] = [[]]
    for tensor in next(iter(layout.values())):
        if parts[-1] and sum(other.size for other in parts[-1]) + tensor.size > SHARD_BYTES:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {_WEIGHTS: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}


def _header(tensors: Sequence[StoredTensor], rename: Callable[[str], str]) -> bytes:
    """What a safetensors file begins with: the header's length, then the header, padded so that the data starts at a
    multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        entries[rename(tensor.name)] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, begin + tensor.size],
        }
        begin += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy_bytes(tensor: StoredTensor, file: BinaryIO) -> None:
    with open(tensor.file, "rb") as source:
        source.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = source.read(min(left, _COPY_BYTES))
            if not chunk:
                raise ValueError(f"{tensor.file}: became shorter while it was read")
            file.write(chunk)
            left -= len(chunk)
