"""What a run has learned, for use without this project: a merged checkpoint that plain transformers loads, or an
adapter for plain PEFT.

A run's policy is its checkpoint, plus the cold-start adapter of its recipe where there is one, plus RUN/adapter.
Everything is read from safetensors and JSON, tensor by tensor; no model is built, and no weights of 7B size are ever
held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrg_r1 import __version__
from mrg_r1.files import naming, save_tensors
from mrg_r1.policy.adapter_files import Adapter, Low, read_adapter, require_fit
from mrg_r1.policy.checkpoint_files import (
    StoredTensor,
    checkpoint_bytes,
    read_layout,
    write_checkpoint,
)
from mrg_r1.policy.completeness import empty_model, is_tied, stored_tensors
from mrg_r1.policy.endings import eos_ids, read_generation, write_generation
from mrg_r1.policy.family import Family, family_of
from mrg_r1.policy.load import load_tokenizer

_WEIGHTS, _CONFIG, _RECORD = "adapter_model.safetensors", "adapter_config.json", "mrg_r1_export.json"
_CARD = "README.md"  # ours: the source's own is not copied (checkpoint_files), it tells of other weights


def export(
    run: Path,
    *,
    policy: Path,
    cold_start: Path | None,
    merged: Path | None,
    adapter: Path | None,
    card: Callable[[Mapping[str, Any]], str],
) -> None:
    """Write what `run` has learned as a whole checkpoint, as an adapter, or as both. Each output is there whole or not
    at all.

    Args:
        run: output_dir of a GRPO run, or of an SFT run of LoRA.
        policy: the checkpoint that the run started from.
        cold_start: the adapter that it merged before training, if any.
        merged: folder to make: the checkpoint with every adapter added to its weights, rounded once to its own dtype.
        adapter: folder to make: one adapter for the checkpoint as it was published.
        card: the content of mrg_r1_export.json, whose `kind` is `merged` or `adapter`, to the README.md beside it.

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
    family, model = family_of(policy), empty_model(policy)
    tied = is_tied(model)
    adapters = [read_adapter(path, tied=tied) for path in (cold_start, run / "adapter") if path is not None]
    layout, module_name, stored = read_layout(policy), family.module_name, stored_tensors(policy, model)
    for one in adapters:
        require_fit(one, stored, policy, empty_model(policy))
    _require_space(
        ([(merged, checkpoint_bytes(policy, layout))] if merged else [])
        + ([(adapter, _adapter_bytes(adapters))] if adapter else [])
    )
    ends, pad = _endings(policy, model) if merged else ([], 0)
    record = _record(run, policy, cold_start, adapters, family.lora_targets)
    if adapter is not None:
        with _new_folder(adapter) as folder:
            _write_adapter(folder, adapters, policy)
            _describe(folder, {"kind": "adapter", **record}, card)
    if merged is not None:
        with _new_folder(merged) as folder:
            write_checkpoint(policy, layout, folder, change=_merging(adapters, module_name), rename=_published(family))
            write_generation(policy, folder, ends, pad=pad)
            _describe(folder, {"kind": "merged", **record}, card)


def _require_adapter(run: Path) -> None:
    if (run / "adapter" / _CONFIG).is_file():
        return
    if (run / "policy" / "config.json").is_file():
        raise ValueError(
            f"{run}: this run trained all parameters; {run / 'policy'} already is the checkpoint, there is nothing "
            "to merge"
        )
    raise ValueError(f"{run}: no adapter/ in it; a run leaves one when it validates for the first time, or at its end")


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


def _endings(policy: Path, model: Any) -> tuple[list[int], int]:
    """The ids at which the run's reports ended, and the pad id."""
    tokenizer, rows = load_tokenizer(policy), model.lm_head.out_features
    ends = eos_ids(read_generation(policy), model.config, tokenizer, rows=rows)
    return ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _published(family: Family) -> Callable[[str], str]:
    """Names that other programs load: as they are stored, or where they are read here alone as transformers has
    them.
    """

    def rename(name: str) -> str:
        return name if name.startswith(family.published) else family.module_name(name)

    return rename


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


def _record(
    run: Path, policy: Path, cold_start: Path | None, adapters: Sequence[Adapter], names: Mapping[str, str]
) -> dict[str, Any]:
    summary = run / "summary.json"
    best = json.loads(summary.read_text(encoding="utf-8")).get("best") if summary.is_file() else None
    return {
        "run": str(run),
        "step": None if best is None else best["step"],  # None: the run has not ended, its adapter is the best so far
        "policy": str(policy),
        "cold_start": None if cold_start is None else adapters[0].describe(names),
        "adapter": adapters[-1].describe(names),
        "versions": {"mrg-r1": __version__}
        | {name: metadata.version(name) for name in ("torch", "safetensors", "transformers", "peft")},
    }


def _describe(folder: Path, record: Mapping[str, Any], card: Callable[[Mapping[str, Any]], str]) -> None:
    _write_json(folder / _RECORD, record)
    (folder / _CARD).write_text(card(record), encoding="utf-8", errors="backslashreplace")


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
