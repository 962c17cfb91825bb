"""What a run has learned, for use without this project: a merged checkpoint that plain transformers loads, or an
adapter for plain PEFT.

A run's policy is its checkpoint, plus the cold-start adapter of its recipe where there is one, plus RUN/adapter.
Everything is read from safetensors and JSON, tensor by tensor; no model is built, and no weights of 7B size are ever
held.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mrg_r1 import __version__
from mrg_r1.files import naming, save_tensors, sha256_of
from mrg_r1.policy.export.checkpoint_files import (
    StoredTensor,
    checkpoint_bytes,
    read_layout,
    write_checkpoint,
)
from mrg_r1.policy.family import family_of

_WEIGHTS, _CONFIG, _RECORD = "adapter_model.safetensors", "adapter_config.json", "mrg_r1_export.json"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_MERGEABLE = ("F32", "BF16", "F16")  # anything else is a quantised weight
# Settings of PEFT under which an adapter is more, or other, than W + scale * B A. Empty or false everywhere else.
_OTHER_THAN_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# others (pissa, olora, corda, …) change the base weights as well
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Low:
    """One module's LoRA: it adds scale * b a to the weight."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter directory in PEFT's layout: its configuration, and its matrices by the name of the module in
    transformers.
    """

    directory: Path
    config: dict[str, Any]
    modules: dict[str, Low]

    def describe(self) -> dict[str, Any]:
        """What the record of an export says of it."""
        return {
            "path": str(self.directory),
            "sha256": sha256_of(self.directory / _WEIGHTS),
            "rank": self.config["r"],
            "alpha": self.config["lora_alpha"],
            "modules": len(self.modules),
        }


def export(
    run: Path,
    *,
    policy: Path,
    cold_start: Path | None,
    merged: Path | None,
    adapter: Path | None,
) -> None:
    """Write what `run` has learned as a whole checkpoint, as an adapter, or as both. Each output is there whole or not
    at all.

    Args:
        run: output_dir of a GRPO run, or of an SFT run of LoRA.
        policy: the checkpoint that the run started from.
        cold_start: the adapter that it merged before training, if any.
        merged: folder to make: the checkpoint with every adapter added to its weights, rounded once to its own dtype.
        adapter: folder to make: one adapter for the checkpoint as it was published.

    Raises:
        FileExistsError: an output, or its temporary folder, is there already.
        ValueError: no adapter in the run, files that do not fit one another, or a disk that is too small; before
            anything is written.
    """
    outputs = [path for path in (merged, adapter) if path is not None]
    for path in outputs:
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path}: exists already and is not overwritten; name another folder or remove it")
    if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
        raise ValueError(f"{outputs[0]}: the merged checkpoint and the adapter cannot be the same folder")
    _require_adapter(run)
    adapters = ([] if cold_start is None else [read_adapter(cold_start)]) + [read_adapter(run / "adapter")]
    layout = read_layout(policy)
    module_name = family_of(policy).module_name
    stored = {module_name(tensor.name): tensor for tensors in layout.values() for tensor in tensors}
    for one in adapters:
        _require_fit(one, stored, policy)
    _require_space(
        ([(merged, checkpoint_bytes(policy, layout))] if merged else [])
        + ([(adapter, _adapter_bytes(adapters))] if adapter else [])
    )
    record = _record(run, policy, cold_start, adapters)
    if adapter is not None:
        with _new_folder(adapter) as folder:
            _write_adapter(folder, adapters, policy)
            _write_json(folder / _RECORD, {"kind": "adapter", **record})
    if merged is not None:
        with _new_folder(merged) as folder:
            write_checkpoint(policy, layout, folder, change=_merging(adapters, module_name))
            _write_json(folder / _RECORD, {"kind": "merged", **record})


def read_adapter(directory: Path) -> Adapter:
    """Read a LoRA adapter in PEFT's layout.

    Raises:
        ValueError: not there, not safetensors, or more than LoRA on linear layers; names the file and what it is.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory}: no {name} there; give an adapter folder as a run leaves it (a pickle is not loaded)"
            )
    try:
        config: dict[str, Any] = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / _CONFIG}: not JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA is exported")
    absent = [name for name in ("r", "lora_alpha") if name not in config]
    if absent:
        raise ValueError(f"{directory / _CONFIG}: no {' and no '.join(absent)} in it; PEFT writes both")
    unknown = [name for name in _OTHER_THAN_LORA if config.get(name)]
    unknown += ["bias"] if config.get("bias", "none") != "none" else []
    unknown += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_STARTS else []
    if unknown:
        named = ", ".join(f"{name} {config[name]!r}" for name in unknown)
        raise ValueError(
            f"{directory / _CONFIG}: {named}: more than a product added to linear layers, which is all that is exported"
        )
    try:
        tensors = load_file(directory / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / _WEIGHTS}: not a whole safetensors file ({error})") from error
    return Adapter(directory, config, dict(sorted(_pair(tensors, config, directory / _WEIGHTS))))


def _pair(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Low]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise ValueError(f"{file}: {name} {list(tensor.shape)} is not a LoRA matrix of a linear layer")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    for module, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: {module} has only lora_{'A' if 'A' in pair else 'B'}; its other half is missing")
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank:
            raise ValueError(
                f"{file}: {module} has lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}; their "
                "ranks differ"
            )
        alpha = _alpha(module, config)
        yield module, Low(pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    """A module's alpha: that of the first pattern which its name ends in, as PEFT looks it up, or the adapter's."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    return next(
        (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"]
    )


def _require_adapter(run: Path) -> None:
    if (run / "adapter" / _CONFIG).is_file():
        return
    if (run / "policy" / "config.json").is_file():
        raise ValueError(
            f"{run}: this run trained all parameters; {run / 'policy'} already is the checkpoint, there is nothing "
            "to merge"
        )
    raise ValueError(f"{run}: no adapter/ in it; a run leaves one when it validates for the first time, or at its end")


def _require_fit(adapter: Adapter, stored: Mapping[str, StoredTensor], policy: Path) -> None:
    """Every matrix of the adapter has a weight of its shape in the checkpoint, under the name by which the trainer's
    PEFT finds it.
    """
    for module, low in adapter.modules.items():
        weight = stored.get(f"{module}.weight")
        if weight is None:
            raise ValueError(
                f"{adapter.directory / _WEIGHTS}: LoRA of {module}, which {policy} does not have; was the run "
                "trained on another one?"
            )
        shape = (low.b.shape[0], low.a.shape[1])
        if weight.shape != shape:
            raise ValueError(
                f"{adapter.directory / _WEIGHTS}: LoRA of {module} is for a weight {list(shape)}, in {policy} it "
                f"is {list(weight.shape)}; was the run trained on another one?"
            )
        if weight.dtype not in _MERGEABLE:
            raise ValueError(
                f"{weight.file}: {weight.name} is stored as {weight.dtype}; LoRA is added to "
                f"{', '.join(_MERGEABLE)} only"
            )


def _merging(adapters: Sequence[Adapter], module_name: Callable[[str], str]) -> Callable[[StoredTensor], Tensor | None]:
    def change(tensor: StoredTensor) -> Tensor | None:
        name = module_name(tensor.name).removesuffix(".weight")
        lows = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        if not lows:
            return None
        weight = tensor.read()
        merged = weight.float()
        for low in lows:
            merged = torch.addmm(merged, low.b.float(), low.a.float(), alpha=low.scale)
        merged = merged.to(weight.dtype)  # the only rounding
        if not merged.isfinite().all():
            raise ValueError(
                f"{tensor.file}: {tensor.name} is not finite with the adapters added; one of them is damaged"
            )
        return merged

    return change


def _write_adapter(folder: Path, adapters: Sequence[Adapter], policy: Path) -> None:
    config = {**adapters[-1].config, "base_model_name_or_path": str(policy)}
    if len(adapters) == 1:
        shutil.copyfile(adapters[0].directory / _WEIGHTS, folder / _WEIGHTS)
        _write_json(folder / _CONFIG, config)
        return
    modules = _combined(adapters)
    ranks = {name: low.a.shape[0] for name, low in modules.items()}
    rank = max(ranks.values())
    others = {name: other for name, other in ranks.items() if other != rank}
    config |= {
        "r": rank,
        "lora_alpha": rank,  # scaling 1 everywhere: it is in B
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        # by full names: the two adapters may stand on different modules, and no shorter pattern is then right for sure
        "target_modules": list(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tensors = {}
    for name, low in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = low.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = low.b
    save_tensors(folder / _WEIGHTS, tensors, {"format": "pt"})
    _write_json(folder / _CONFIG, config)


def _combined(adapters: Sequence[Adapter]) -> dict[str, Low]:
    """One adapter that adds what all of them add: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]; float32, for the
    products with s.
    """
    combined = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        lows = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        a = torch.cat([low.a.float() for low in lows])  # [sum of ranks, in]
        b = torch.cat([low.b.float() * low.scale for low in lows], dim=1)  # [out, sum of ranks]
        combined[name] = Low(a, b, 1.0)
    return combined


def _adapter_bytes(adapters: Sequence[Adapter]) -> int:
    if len(adapters) == 1:
        return (adapters[0].directory / _WEIGHTS).stat().st_size
    return sum(4 * (low.a.numel() + low.b.numel()) for adapter in adapters for low in adapter.modules.values())


def _require_space(needed: Sequence[tuple[Path, int]]) -> None:
    """Refuse outputs that do not fit on their disks, together where they share one."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in needed:
        there = next(parent for parent in path.resolve().parents if parent.exists())
        device = there.stat().st_dev
        disks[device] = (there, disks.get(device, (there, 0))[1] + size)
    for there, size in disks.values():
        free, margin = shutil.disk_usage(there).free, 16 * 1024**2  # headers, records, the file system's own
        if free < size + margin:
            raise ValueError(
                f"{there}: {free / 1e9:.2f} GB free on that disk, {(size + margin) / 1e9:.2f} GB needed; free some "
                "or write elsewhere"
            )


def _record(run: Path, policy: Path, cold_start: Path | None, adapters: Sequence[Adapter]) -> dict[str, Any]:
    summary = run / "summary.json"
    best = json.loads(summary.read_text(encoding="utf-8")).get("best") if summary.is_file() else None
    return {
        "run": str(run),
        "step": None if best is None else best["step"],  # None: the run has not ended, its adapter is the best so far
        "policy": str(policy),
        "cold_start": None if cold_start is None else adapters[0].describe(),
        "adapter": adapters[-1].describe(),
        "versions": {"mrg-r1": __version__}
        | {name: metadata.version(name) for name in ("torch", "safetensors", "transformers", "peft")},
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes it when all went well and is removed when not."""
    folder = output.with_name(f".{output.name}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{folder}: left by an export that was killed, or another one is writing it; remove it and try again"
        ) from None
    try:
        with naming(output, folder):
            yield folder
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
