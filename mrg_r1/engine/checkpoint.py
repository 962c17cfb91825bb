"""Checkpoints: the trainable state as safetensors and JSON, whole or not at all.

RUN/checkpoints/step_N/ holds `state.safetensors` (fp32 masters, Adam's moments, the live parameters) and `state.json`
(step, counters, seeds, digest of the tensors); `latest` names the newest. The state is gathered, so it does not depend on the
number of ranks or the ZeRO stage, and no pickle is ever written or read. All randomness of a run is keyed by step and study,
so the step is the whole state of the samplers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mrg_r1.engine.zero import Engine

_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and the remedy."""


def save_checkpoint(engine: Engine, directory: Path, *, step: int, extra: dict[str, Any], keep: int) -> None:
    """Write `directory/step_N` and point `latest` at it. Every rank calls this; rank 0 writes.

    Args:
        directory: RUN/checkpoints.
        step: outer steps that are done.
        extra: plain JSON values to find again on loading.
        keep: older checkpoints beyond this many are removed, after `latest` has moved.
    """
    state = _gather(engine)
    if engine.ranks.is_main:
        target, temporary = directory / f"step_{step}", directory / f".step_{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(state, temporary / "state.safetensors")
        record = {"step": step, "optimizer_steps": _optimizer_steps(engine), "sha256": _digest(temporary / "state.safetensors"), **extra}
        (temporary / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for name in ("state.safetensors", "state.json"):
            _sync(temporary / name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        write_text_atomically(directory / "latest", target.name)
        old = sorted(directory.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))[:-keep]
        for path in old:
            shutil.rmtree(path)
    engine.ranks.barrier()


def load_checkpoint(engine: Engine, directory: Path) -> dict[str, Any] | None:
    """Load what `latest` names into the engine.

    Returns:
        The saved record (`step` and the `extra` values), or None where there is no checkpoint.

    Raises:
        CheckpointError: damaged, or of another set of parameters.
    """
    latest = directory / "latest"
    if not latest.is_file():
        return None
    path = directory / latest.read_text(encoding="utf-8").strip()
    if not (path / "state.json").is_file() or not (path / "state.safetensors").is_file():
        raise CheckpointError(
            f"{latest}: names {path.name}, which is not there or not whole; point `latest` at an older step_N, or remove it"
        )
    record: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if record["sha256"] != _digest(path / "state.safetensors"):
        raise CheckpointError(
            f"{path}: state.safetensors is damaged (its digest is not the recorded one); point `latest` at an older step_N"
        )
    state = load_file(path / "state.safetensors")
    expected = {f"{kind}/{name}" for name in engine.trainable for kind in ("live", "master", *_MOMENTS)}
    if set(state) != expected:
        different = sorted(set(state) ^ expected)[:3]
        raise CheckpointError(f"{path}: its parameters are not this run's (first differences: {different}); use another output_dir")
    _scatter(engine, state, record["optimizer_steps"])
    return record


def _gather(engine: Engine) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, parameter in engine.trainable.items():
        state[f"live/{name}"] = parameter.detach().cpu().clone()
        state[f"master/{name}"] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for moment in _MOMENTS:
            state[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()
    return state


def _scatter(engine: Engine, state: dict[str, Tensor], optimizer_steps: int) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _create_optimizer_state(engine)
    with torch.no_grad():
        for name, parameter in engine.trainable.items():
            parameter.copy_(state[f"live/{name}"])  # the masters reach it only at the next update
            safe_set_full_fp32_param(parameter, state[f"master/{name}"].to(parameter.device))
            for moment in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{moment}/{name}"].to(parameter.device), moment)
    for entry in engine.optimizer.optimizer.state.values():
        entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), optimizer_steps)


def _create_optimizer_state(engine: Engine) -> None:
    """AdamW has no moments before its first step: take one of size zero, so that there is something to set."""
    groups = engine.optimizer.param_groups
    kept = [(group["lr"], group["weight_decay"]) for group in groups]
    for group in groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    nothing = sum((parameter.float().sum() * 0.0 for parameter in engine.trainable.values()), torch.zeros((), device=engine.ranks.device))
    engine.backward(nothing, last=True)
    for group, (rate, decay) in zip(groups, kept, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def _optimizer_steps(engine: Engine) -> int:
    return max((int(entry["step"]) for entry in engine.optimizer.optimizer.state.values()), default=0)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, also through a crash or a full disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # lone surrogates in reports, as JSON escapes them
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
