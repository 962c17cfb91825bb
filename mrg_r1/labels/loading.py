"""A labeler's files: the checkpoint that CheXbert's authors published, a safetensors copy of it, and a directory of
ours.

Paths enter; configurations and tensors by name leave, `module.` and what CheXbert never uses taken out. Nothing is
unpickled but tensors, and nothing here knows a model: `load_strictly` compares with whichever it is given.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig

from mrg_r1.files import atomically, parse_json, save_tensors, write_text_atomically
from mrg_r1.labels.observations import OBSERVATIONS

# of every BERT published by its authors; a checkpoint's tensors do not tell the number of attention heads
HEAD_DIM = 64
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# in the published file but in no part of CheXbert's forward pass: BERT's pooler, and a buffer that older versions
# stored
_UNUSED_KEYS = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


def read_directory(directory: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Configuration and tensors of a directory of ours.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        ValueError: config.json describes another model, or model.safetensors is no safetensors file.
    """
    return _read_config(directory / CONFIG), read_safetensors(directory / WEIGHTS)


def read_checkpoint(path: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Configuration and tensors of a published checkpoint, or of a `.safetensors` copy of it with or without `module.`
    in its keys.

    Raises:
        ValueError: a pickled object, a file of another kind, a name that stands twice, or tensors whose sizes are no
            BERT's.
    """
    state = _stripped(read_safetensors(path) if path.suffix == ".safetensors" else _read_published(path), path)
    return _config_of_tensors(state, path), state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or one cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the directory is incomplete, train or copy the labeler again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a safetensors file ({error}); train, convert or copy the weights again"
        ) from error


def read_pickled(path: Path) -> Any:
    """What torch.save wrote, read as tensors in plain containers and nothing else.

    Raises:
        ValueError: a pickled object of another kind, or no such file format.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        # torch's own message recommends loading such a file without the safeguard, so it is not passed on
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it holds the pickled object {found.group(1)}"
            if found
            else f"it cannot be read as tensors ({type(error).__name__})"
        )
        raise ValueError(
            f"{path}: refused: {what}; a checkpoint may hold tensors only, because unpickling runs code"
        ) from None


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, in the parameters' dtype.

    Raises:
        ValueError: a missing, unexpected or wrongly shaped tensor; names the file and up to 8 of them.
    """
    require_fit(model.state_dict(), state, path)
    model.load_state_dict(state, strict=True)


def require_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not the expected ones by name and shape.

    Raises:
        ValueError: names the file and up to 8 tensors.
    """
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is {tensor.dtype}, not floating point"
        for name, tensor in state.items()
        if not tensor.is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: not the weights of this CheXbert: {'; '.join(problems[:8])}{more}")


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file in float32."""
    weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    with atomically(path) as temporary:
        save_tensors(temporary, weights, {"format": "pt"})


def write_directory(
    directory: Path, config: BertConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor], *, max_tokens: int
) -> None:
    """Write config.json, tokenizer files and model.safetensors (float32, last: a directory cut short does not load)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).unlink(missing_ok=True)
    described = {**config.to_dict(), "architectures": ["CheXbert"], "observations": list(OBSERVATIONS)}
    write_text_atomically(directory / CONFIG, json.dumps(described, indent=2) + "\n")
    write_text_atomically(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, **special}
    write_text_atomically(directory / "tokenizer_config.json", json.dumps(words, indent=2) + "\n")
    write_weights(directory / WEIGHTS, state)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all tensors in float32, by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def _read_config(path: Path) -> BertConfig:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a labeler directory has {CONFIG}, {WEIGHTS} and tokenizer files"
        )
    stored = read_settings(path)
    if stored.get("architectures") != ["CheXbert"]:
        raise ValueError(
            f"{path}: architectures is {stored.get('architectures')}, not ['CheXbert']; this directory holds "
            "another model"
        )
    if stored.get("observations") != list(OBSERVATIONS):
        raise ValueError(
            f"{path}: observations are {stored.get('observations')}; expected, in this order, {list(OBSERVATIONS)}"
        )
    return bert_config(stored, path)


def read_settings(path: Path) -> dict[str, Any]:
    """What stands in a config.json.

    Raises:
        ValueError: not JSON, or no object.
    """
    try:
        stored: Any = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); train or copy the model again") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: {json.dumps(stored)[:40]} is no object of settings; train or copy the model again")
    return stored


def bert_config(stored: Mapping[str, Any], path: Path) -> BertConfig:
    """
    Raises:
        ValueError: a value of the wrong kind, named.
    """
    try:
        return BertConfig.from_dict(dict(stored))
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}; train or copy the model again") from error


def _read_published(path: Path) -> Mapping[Any, Any]:
    """What stands under `model_state_dict`."""
    stored = read_pickled(path)
    state = stored.get("model_state_dict") if isinstance(stored, dict) else None
    if not isinstance(state, Mapping):
        found_keys = sorted(map(str, stored))[:8] if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(
            f"{path}: no `model_state_dict` (found {found_keys}); a published CheXbert checkpoint is a dict that "
            "has one"
        )
    return state


def _stripped(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key} is {type(tensor).__name__}, not a tensor")
        name = str(key).removeprefix("module.")
        if name in stripped:
            raise ValueError(f"{path}: {name} stands twice, with and without `module.`")
        stripped[name] = tensor
    return {name: tensor for name, tensor in stripped.items() if name not in _UNUSED_KEYS}


def _config_of_tensors(state: Mapping[str, Tensor], path: Path) -> BertConfig:
    """BERT's sizes as the tensors have them (bert-base-uncased's in the published file)."""

    def rows_and_columns(name: str) -> tuple[int, int]:
        if name not in state:
            raise ValueError(f"{path}: missing {name}; not a CheXbert checkpoint")
        if state[name].ndim != 2:
            raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, expected two dimensions")
        return state[name].shape[0], state[name].shape[1]

    vocabulary, hidden = rows_and_columns("bert.embeddings.word_embeddings.weight")
    layers = {int(found.group(1)) for name in state if (found := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    if hidden % HEAD_DIM:
        raise ValueError(
            f"{path}: hidden size {hidden} is not a multiple of {HEAD_DIM}, so the attention heads cannot be told"
        )
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=max(layers, default=0) + 1,
        num_attention_heads=hidden // HEAD_DIM,
        intermediate_size=rows_and_columns("bert.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=rows_and_columns("bert.embeddings.position_embeddings.weight")[0],
        type_vocab_size=rows_and_columns("bert.embeddings.token_type_embeddings.weight")[0],
    )
