"""Memory that a recipe needs beside memory that is free: of a rank's device, and of the machine itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrg_r1.config.recipe import Recipe
from mrg_r1.doctor.finding import Finding
from mrg_r1.doctor.labeler import labeler_bytes, shared_device
from mrg_r1.doctor.machine import Device, host_memory
from mrg_r1.doctor.memory import PROCESSES, Parts, Prediction, Task, Workload, host_bytes, predict, workload_of
from mrg_r1.policy.family import shape_of

_TIGHT = 0.9  # of the free memory: more than this is said


@dataclass(frozen=True)
class Place:
    """Where a run's ranks are."""

    world_size: int
    here: int  # ranks on this machine
    devices: list[Device]  # that are looked at, each with one rank on it; none: the ranks run on the CPU
    gpus: int  # of this machine
    started: bool = False  # the ranks are there already, so what is free is free beside them


def memory_findings(recipe: Recipe, *, task: Task, place: Place, images: int) -> list[Finding]:
    """What a rank needs by the formula (docs/memory.md) beside what is free: of each kind of device, and of this
    machine itself.
    """
    shape = shape_of(recipe.policy.path)
    devices, ranks_here = place.devices, place.here

    def workload(beside: int) -> Workload:
        kind: Literal["cuda", "cpu"] = "cuda" if devices else "cpu"
        return workload_of(
            recipe, shape, task=task, world_size=place.world_size, device=kind, images=images, labeler_bytes=beside
        )

    alone = workload(0)
    labeler = labeler_bytes(recipe)
    host = host_bytes(shape, alone, ranks_here=ranks_here)
    if place.started:
        del host[PROCESSES]
    if recipe.reward.device == "cpu":
        host["labeler"] = 2 * labeler
    findings = []
    if devices:
        shared = shared_device(recipe.reward.device)
        for device in devices[:ranks_here]:
            prediction = predict(shape, workload(labeler if device.index == shared else 0))
            findings.append(_memory(f"memory cuda:{device.index}", prediction, device.free, recipe))
    else:
        prediction = predict(shape, alone)
        host[f"{ranks_here} rank(s) in {prediction.peak_phase}"] = max(
            0, prediction.peak * ranks_here - host["policies while they load"]
        )
    return [*findings, _host(host, host_memory())]


def _memory(name: str, prediction: Prediction, free: int, recipe: Recipe) -> Finding:
    peak, phase = prediction.peak, prediction.peak_phase
    text = f"{peak / 1e9:.2f} GB at most (in {phase}: {_largest(prediction.phases[phase])}) of {free / 1e9:.2f} GB free"
    return _compared(name, text, peak, free, _lower(phase, recipe))


def _host(parts: Parts, free: int) -> Finding:
    needed = sum(parts.values())
    text = f"{needed / 1e9:.2f} GB at most ({_largest(parts)}) of {free / 1e9:.2f} GB free"
    remedy = "fewer ranks, a smaller checkpoint, or ZeRO-3, which loads it module by module"
    return _compared("memory of the host", text, needed, free, remedy)


def _compared(name: str, text: str, needed: int, free: int, remedy: str) -> Finding:
    if needed > free:
        return Finding(name, "failure", text, remedy)
    return Finding(name, "warning", text, remedy) if needed > _TIGHT * free else Finding(name, "ok", text)


def _largest(parts: Parts) -> str:
    first = sorted(parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {value / 1e9:.2f}" for name, value in first)


def _lower(phase: str, recipe: Recipe) -> str:
    if phase == "evaluation":
        return "lower evaluation.batch_size or rollout.max_new_tokens"
    if phase == "vision":
        return "lower data.max_pixels or the studies of a rank"
    reuse = "set rollout.reuse_prefill=false, " if recipe.rollout.reuse_prefill else ""
    if phase == "rollout":
        return f"{reuse}lower rollout.cache_tokens or rollout.max_new_tokens"
    checkpointing = "" if recipe.policy.gradient_checkpointing else " or set policy.gradient_checkpointing=true"
    return f"{reuse}lower engine.micro_batch_tokens{checkpointing}"
