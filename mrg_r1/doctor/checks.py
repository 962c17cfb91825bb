"""What a recipe needs of this machine: each check one finding, none stops the others, no policy is loaded."""

from __future__ import annotations

import os
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import torch

from mrg_r1.config import Recipe, RecipeError, check_checkpoint_directory, check_numbers
from mrg_r1.data.images import image_problem
from mrg_r1.doctor.finding import Finding, examined
from mrg_r1.doctor.inputs import check_disk, check_output, check_stage, most_images, read_splits
from mrg_r1.doctor.machine import Device, host_memory
from mrg_r1.doctor.memory import Parts, Prediction, Task, Workload, host_bytes, predict, workload_of
from mrg_r1.doctor.shape import PolicyShape
from mrg_r1.engine.config import read_config
from mrg_r1.labels import loading
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.tokenizer import PUBLISHED_VOCABULARY, read_tokenizer, require_uncased
from mrg_r1.policy.checkpoint_files import read_layout
from mrg_r1.types import Study

_IMAGES = 8  # of each split that `mrg-r1 doctor` opens; a launch opens all (data.check_images)
_TIGHT = 0.9  # of the free memory: more than this is said
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def task_of(recipe: Recipe) -> Task:
    """What a recipe is for, where nobody says: SFT where it has a section `sft` and none `grpo`."""
    return "sft" if "sft" in recipe.model_fields_set and "grpo" not in recipe.model_fields_set else "grpo"


def recipe_findings(recipe: Recipe, *, task: Task, world_size: int, devices: list[Device]) -> list[Finding]:
    """Everything that `mrg-r1 doctor RECIPE` looks at besides the machine."""
    splits: dict[str, list[Study]] = {}

    def numbers() -> str:
        check_numbers(recipe, world_size=world_size, task=task)
        batch = recipe.grpo.studies_per_step if task == "grpo" else recipe.sft.batch_size
        return f"{task}, {recipe.steps} steps of {batch} studies over {world_size} rank(s)"

    def data() -> str:
        found, _ = read_splits(recipe)
        splits.update(found)
        names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
        return f"{recipe.data.manifest}: " + ", ".join(f"{len(part)} studies in {names[name]!r}" for name, part in found.items())

    findings = [examined("recipe", numbers), examined("deepspeed", lambda: _deepspeed(recipe, task)), examined("data", data)]
    if splits:
        findings.append(examined("images", lambda: _first_images(splits)))
    findings += static_findings(recipe, task=task, world_size=world_size, devices=devices, images=most_images(splits.get("train", [])))
    findings += [examined("output_dir", lambda: f"{recipe.output_dir} can be written ({check_output(recipe)} is there)")]
    if findings[-1].state == "ok":
        findings.append(examined("disk", lambda: check_disk(recipe, check_output(recipe))))
    return [*findings, _wandb(recipe)]


def static_findings(recipe: Recipe, *, task: Task, world_size: int, devices: list[Device], images: int) -> list[Finding]:
    """Policy, labeler and memory: also what a launch looks at before it loads the policy.

    Args:
        images: of the study that has most.
    """
    findings = [examined("policy", lambda: _policy(recipe)), examined("tokenizer", lambda: _tokenizer(recipe))]
    if recipe.phases != "update":
        findings += [examined("labeler", lambda: _labeler(recipe)), _labeler_device(recipe, devices)]
    if findings[0].state == "ok" and recipe.engine.deepspeed.is_file():
        findings += memory_findings(recipe, task=task, world_size=world_size, devices=devices, images=images)
    return findings


def memory_findings(recipe: Recipe, *, task: Task, world_size: int, devices: list[Device], images: int) -> list[Finding]:
    """What a rank needs by the formula (docs/memory.md) beside what is free: of each kind of device, and of this machine itself."""
    shape = PolicyShape.of_directory(recipe.policy.path)
    ranks_here = min(world_size, len(devices)) if devices else world_size

    def workload(labeler_bytes: int) -> Workload:
        kind: Literal["cuda", "cpu"] = "cuda" if devices else "cpu"
        return workload_of(recipe, task=task, world_size=world_size, device=kind, images=images, labeler_bytes=labeler_bytes)

    alone = workload(0)
    labeler = _labeler_bytes(recipe)
    host = host_bytes(shape, alone, ranks_here=ranks_here)
    if recipe.reward.device == "cpu":
        host["labeler"] = 2 * labeler
    findings = []
    if devices:
        shared = _shared_device(recipe)
        for device in devices[:ranks_here]:
            prediction = predict(shape, workload(labeler if device.index == shared else 0))
            findings.append(_memory(f"memory cuda:{device.index}", prediction, device.free, recipe))
    else:
        prediction = predict(shape, alone)
        host[f"{ranks_here} rank(s) in {prediction.peak_phase}"] = max(0, prediction.peak * ranks_here - host["policies while they load"])
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


def _deepspeed(recipe: Recipe, task: Task) -> str:
    path = recipe.engine.deepspeed
    if not path.is_file():
        raise RecipeError(f"engine.deepspeed {path}: no such file; ds_configs/ has zero1.json to zero3.json")
    stage = read_config(path)["zero_optimization"]["stage"]
    check_stage(recipe, stage=stage, task=task)
    return f"{path}: ZeRO stage {stage}"


def _first_images(splits: dict[str, list[Study]]) -> str:
    count, problems = 0, []
    for studies in splits.values():
        for path, name in [(image.path, study.id) for study in studies[:_IMAGES] for image in study.images][:_IMAGES]:
            count += 1
            problem = image_problem(path, name)
            if problem is not None:
                problems.append(problem)
    if problems:
        raise RecipeError("\n".join(problems))
    return f"the first {count} open"


def _policy(recipe: Recipe) -> str:
    path = recipe.policy.path
    check_checkpoint_directory(path)
    shape, tensors = PolicyShape.of_directory(path), [tensor for file in read_layout(path).values() for tensor in file]
    elements = sum(_elements(tensor.shape) for tensor in tensors)
    if recipe.policy.adapter is not None and not (recipe.policy.adapter / "adapter_config.json").is_file():
        raise RecipeError(f"policy.adapter {recipe.policy.adapter}: no adapter_config.json there; give the adapter/ folder of a run")
    spare = shape.vocabulary * shape.hidden if shape.tied else 0  # a tied head may be stored twice
    if not shape.parameters <= elements <= shape.parameters + spare:
        raise RecipeError(
            f"policy.path {path}: its safetensors hold {elements:,} numbers, config.json describes {shape.parameters:,}; "
            "the download is incomplete or of two checkpoints, fetch it again"
        )
    return f"{path}: {elements / 1e9:.3f} billion parameters in {len({tensor.file for tensor in tensors})} file(s), whole"


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _tokenizer(recipe: Recipe) -> str:
    from mrg_r1.policy.load import load_image_processor, load_tokenizer

    path = recipe.policy.path
    try:
        words = load_tokenizer(path)
        load_image_processor(path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"policy.path {path}: no tokenizer and image processor that can be loaded ({first}); fetch it again") from error
    return f"{len(words)} entries, chat template and image processor there"


def _labeler(recipe: Recipe) -> str:
    reward = recipe.reward
    path = reward.labeler
    if path.is_dir():
        config, state = loading.read_directory(path)
        words = read_tokenizer(reward.tokenizer if reward.tokenizer is not None else str(path))
    elif path.is_file():
        config, state = loading.read_checkpoint(path)
        words = read_tokenizer(reward.tokenizer or PUBLISHED_VOCABULARY)
        require_uncased(words, config.vocab_size, reward.tokenizer or PUBLISHED_VOCABULARY)
    else:
        raise RecipeError(f"reward.labeler {path}: no such file or directory; `mrg-r1 labeler train` makes one (docs/labelers.md)")
    with torch.device("meta"):
        expected = CheXbert(config).state_dict()
    loading.require_fit(expected, state, path)
    return f"{path}: {sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} million parameters, {words.get_vocab_size()} words"


def _labeler_bytes(recipe: Recipe) -> int:
    """Of the labeler's weights in its dtype; files hold float32."""
    path = recipe.reward.labeler
    file = path / loading.WEIGHTS if path.is_dir() else path
    return file.stat().st_size // 4 * _BYTES[recipe.reward.dtype] if file.is_file() and recipe.phases != "update" else 0


def _shared_device(recipe: Recipe) -> int | None:
    """The index at which this process sees the labeler's GPU; None: on none of them, or its number is not to be told."""
    name = recipe.reward.device
    if not name.startswith("cuda:"):
        return None
    physical, visible = name.removeprefix("cuda:"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return int(physical)
    seen = [part.strip() for part in visible.split(",")]
    return seen.index(physical) if physical in seen else None


def _labeler_device(recipe: Recipe, devices: list[Device]) -> Finding:
    device = recipe.reward.device
    if device == "cpu":
        slow = bool(devices)
        text = "cpu: with a BERT-base and a policy on GPUs, steps may wait for rewards (time/reward_exposed)" if slow else "cpu"
        return Finding("labeler's device", "ok", text)
    if not devices:
        return Finding("labeler's device", "failure", f"reward.device {device}: this machine shows no GPU", "set reward.device=cpu")
    index = _shared_device(recipe)
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and index is not None and index >= len(devices):
        text = f"reward.device {device}: this machine has {len(devices)} GPU(s), numbered from 0"
        return Finding("labeler's device", "failure", text, "name one of them, or cpu")
    return Finding("labeler's device", "ok", f"{device}, a physical number" if device.startswith("cuda:") else device)


def _wandb(recipe: Recipe) -> Finding:
    mode = recipe.tracking.wandb
    if mode == "off":
        return Finding("wandb", "ok", "off")
    if util.find_spec("wandb") is None:
        return Finding("wandb", "failure", f"tracking.wandb {mode}: wandb is not installed", "pip install wandb, or tracking.wandb=off")
    text = f"{mode}, version {metadata.version('wandb')}"
    if mode == "online" and not _has_key():
        return Finding("wandb", "failure", f"{text}: no key for the service", "wandb login, WANDB_API_KEY, or tracking.wandb=offline")
    return Finding("wandb", "ok", text)


def _has_key() -> bool:
    """Whether wandb would find a key: in the environment, or an entry of its host in netrc. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").removeprefix("https://").split("/")[0]
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return file.is_file() and f"machine {host}" in file.read_text(encoding="utf-8", errors="replace")
