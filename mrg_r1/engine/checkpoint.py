"""Checkpoints: the trainable state as safetensors and JSON, whole or not at all.

RUN/checkpoints/step_N/ holds `state.safetensors` (fp32 masters, Adam's moments, the live parameters) and `state.json`
(step, counters, seeds, digest of the tensors); `latest` names the newest. The state is gathered, so it does not depend
on the number of ranks or the ZeRO stage, and no pickle is ever written or read. All randomness of a run is keyed by
step and study, so the step is the whole state of the samplers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mrg_r1.engine.state import MOMENTS, gather_state, optimizer_steps, scatter_state
from mrg_r1.engine.zero import Engine
from mrg_r1.files import naming, save_tensors, sha256_of, sync, write_text_atomically

_ALWAYS = ("step", "optimizer_steps", "world_size", "zero_stage")  # of every record, beside `extra`


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and the remedy."""


def save_checkpoint(
    engine: Engine, directory: Path, *, step: int, extra: dict[str, Any], keep: int, best: int | None = None
) -> None:
    """Write `directory/step_N` and point `latest` at it. Every rank calls this; rank 0 writes.

    Args:
        directory: RUN/checkpoints.
        step: outer steps that are done.
        extra: plain JSON values to find again on loading.
        keep: older checkpoints beyond this many are removed, after `latest` has moved.
        best: the step whose checkpoint is kept however old it is.

    Raises:
        CheckpointError: it cannot be written (a full disk), on every rank; what was there before is untouched.
    """
    state = gather_state(engine)

    def write() -> None:
        record = {
            "step": step,
            "optimizer_steps": optimizer_steps(engine),
            "world_size": engine.ranks.world_size,
            "zero_stage": engine.stage,
            **extra,
        }
        try:
            _write(directory, step, state, record)
            _prune(directory, keep=keep, best=best)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(directory / f".step_{step}.tmp", ignore_errors=True)
            last = latest_step(directory)
            there = "there is no earlier one" if last is None else f"step_{last} is whole and is what a resume takes"
            raise CheckpointError(
                f"{directory}/step_{step}: the checkpoint could not be written ({error}); {there}; free some disk "
                "and start again"
            ) from error

    engine.ranks.from_main(write, CheckpointError)


def latest_step(directory: Path) -> int | None:
    """The step that `latest` names, or None."""
    path = directory / "latest"
    return int(path.read_text(encoding="utf-8").strip().removeprefix("step_")) if path.is_file() else None


def recorded_recipe(directory: Path) -> dict[str, Any] | None:
    """The recipe that the newest readable checkpoint was written under (`extra["recipe"]`), or None."""
    steps = sorted((int(path.name.removeprefix("step_")) for path in directory.glob("step_*")), reverse=True)
    for step in steps:
        try:
            record: dict[str, Any] = json.loads((directory / f"step_{step}" / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # damaged: `load_checkpoint` says so
        return record.get("recipe")
    return None


def load_checkpoint(
    engine: Engine, directory: Path, *, needed: Sequence[str] = (), say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into the engine. Every rank calls this.

    Args:
        directory: RUN/checkpoints.
        needed: names of `extra` values that the caller cannot go on without.
        say: is told, on rank 0, which damaged ones were passed over.

    Returns:
        The saved record (`step`, `world_size`, `zero_stage` and the `extra` values), or None where there is no
        checkpoint.

    Raises:
        CheckpointError: none of them is whole, or it was written by another version, or it is of another set of
            parameters; on every rank.
    """
    # one verdict: ranks that read a shared disk a moment apart could see two
    name = engine.ranks.from_main(lambda: _newest_whole(directory, say), CheckpointError)
    if name is None:
        return None
    path = directory / name
    record: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    missing = [name for name in (*_ALWAYS, *needed) if name not in record]
    if missing:
        raise CheckpointError(
            f"{path}: its state.json has no {missing[0]!r}, so another version of mrg-r1 has written it; go on with "
            "that version, or begin again in another output_dir"
        )
    state = load_file(path / "state.safetensors")
    expected = {f"{kind}/{parameter}" for parameter in engine.trainable for kind in ("live", "master", *MOMENTS)}
    if set(state) != expected:
        different = sorted(set(state) ^ expected)[:3]
        raise CheckpointError(
            f"{path}: its parameters are not this run's (first differences: {different}); use another output_dir"
        )
    scatter_state(engine, state, record["optimizer_steps"])
    return record


def _write(directory: Path, step: int, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """The folder under another name, then its own, then `latest`: a kill at any moment leaves a whole one."""
    target, temporary = directory / f"step_{step}", directory / f".step_{step}.tmp"
    for left in directory.glob(".step_*.tmp"):  # of a run that was killed while writing
        shutil.rmtree(left)
    with naming(target, temporary):
        temporary.mkdir(parents=True)
        save_tensors(temporary / "state.safetensors", state)
        described = {**record, "sha256": sha256_of(temporary / "state.safetensors")}
        (temporary / "state.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        for name in ("state.safetensors", "state.json"):
            sync(temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    sync(directory)
    write_text_atomically(directory / "latest", target.name)


def _prune(directory: Path, *, keep: int, best: int | None) -> None:
    steps = sorted(int(path.name.removeprefix("step_")) for path in directory.glob("step_*"))
    for step in steps[:-keep]:
        if step != best:
            shutil.rmtree(directory / f"step_{step}")


def _newest_whole(directory: Path, say: Callable[[str], None]) -> str | None:
    """The name of the newest checkpoint that is whole, beginning with the one that `latest` names; None where there is
    no `latest`.

    Raises:
        CheckpointError: none of them is whole; says what is wrong with each.
    """
    first = latest_step(directory)
    if first is None:
        return None
    steps = {int(path.name.removeprefix("step_")) for path in directory.glob("step_*")} | {first}
    faults: list[str] = []
    for step in sorted(steps, key=lambda step: (step != first, -step)):
        fault = _fault_of(directory / f"step_{step}")
        if fault is None:
            for passed in faults:
                say(f"{passed}; step_{step} is used instead")
            return f"step_{step}"
        faults.append(f"{directory / f'step_{step}'}: {fault}")
    raise CheckpointError("\n".join([*faults, "no whole checkpoint is left: remove the folder to begin again"]))


def _fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    for name in ("state.json", "state.safetensors"):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"state.json is damaged ({error})"
    if record.get("sha256") != sha256_of(path / "state.safetensors"):
        return "state.safetensors is damaged (its digest is not the recorded one)"
    return None
