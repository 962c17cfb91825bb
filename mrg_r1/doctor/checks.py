"""What a recipe needs of this machine: each check one finding, none stops the others, no policy is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from mrg_r1.config.paths import RecipeError, check_adapter, check_checkpoint_directory, check_deepspeed
from mrg_r1.config.recipe import Recipe, check_numbers
from mrg_r1.data.images import image_problem
from mrg_r1.doctor.finding import Finding, examined
from mrg_r1.doctor.fitting import Place, memory_findings
from mrg_r1.doctor.inputs import check_disk, check_output, check_stage, most_images, read_splits, studies_to_learn
from mrg_r1.doctor.labeler import check_labeler, device_findings, held_out_finding
from mrg_r1.doctor.machine import Device, chosen_attention, cuda_devices, package_findings
from mrg_r1.doctor.memory import Task
from mrg_r1.doctor.reward import judge_findings, own_term_findings, radeval_finding, reward_findings
from mrg_r1.doctor.texts import check_texts
from mrg_r1.doctor.tokenizer import tokenizer_finding
from mrg_r1.engine.config import read_config
from mrg_r1.engine.ranks import Ranks
from mrg_r1.policy.adapter_files import read_adapter, require_fit
from mrg_r1.policy.completeness import empty_model, is_tied, stored_tensors
from mrg_r1.policy.family import family_of, lora_pattern, shape_of
from mrg_r1.tracking.tensorboard_run import check_tensorboard
from mrg_r1.types import Study

_IMAGES = 8  # of each split that `mrg-r1 doctor` opens; a launch opens all (data.check_images)


def task_of(recipe: Recipe) -> Task:
    """What a recipe is for, where nobody says: SFT where it has a section `sft` and none `grpo`, or is its control."""
    if recipe.control == "sft":
        return "sft"
    return "sft" if "sft" in recipe.model_fields_set and "grpo" not in recipe.model_fields_set else "grpo"


def recipe_findings(recipe: Recipe, *, task: Task, world_size: int, devices: list[Device]) -> list[Finding]:
    """Everything that `mrg-r1 doctor RECIPE` looks at besides the machine."""
    splits: dict[str, list[Study]] = {}

    def numbers() -> str:
        check_numbers(recipe, world_size=world_size, task=task)
        batch = recipe.grpo.studies_per_step if task == "grpo" else recipe.sft.batch_size
        return f"{task}, {recipe.steps} steps of {batch} studies over {world_size} rank(s)"

    def data() -> str:
        found, _ = read_splits(recipe, task=task)
        splits.update(found)
        names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
        counts = [f"{len(part)} studies in {names[name]!r}{_of_labels(part)}" for name, part in found.items()]
        left_out = len(found["train"]) - len(studies_to_learn(found["train"], task=task))
        counts += [f"SFT leaves out {left_out} without a report"] if left_out else []
        return f"{recipe.data.manifest}: {', '.join(counts)}"

    findings = [
        examined("recipe", numbers),
        examined("deepspeed", lambda: _deepspeed(recipe, task)),
        examined("data", data),
    ]
    if splits:
        findings.append(examined("images", lambda: _first_images(splits)))
    place = Place(world_size, min(world_size, len(devices)) if devices else world_size, devices, len(devices))
    findings += static_findings(recipe, task=task, place=place, studies=splits)
    if recipe.phases != "update":
        findings += own_term_findings(recipe)  # a launch's reward service imports them first of all
    findings += [
        examined(
            "output_dir", lambda: f"{recipe.output_dir} can be written ({check_output(recipe.output_dir)} is there)"
        )
    ]
    if findings[-1].state == "ok":
        findings.append(examined("disk", lambda: _disk(recipe)))
    return [*findings, wandb_finding(recipe), *tensorboard_finding(recipe)]


def launch_findings(recipe: Recipe, *, task: Task, ranks: Ranks, studies: dict[str, list[Study]]) -> list[Finding]:
    """What a launch looks at besides its own checks, on its first rank: packages, the policy's and the labeler's files,
    memory.
    """
    # its own device only: a look at another one would take memory there
    devices = cuda_devices([ranks.device.index]) if ranks.device.type == "cuda" else []
    place = Place(
        world_size=ranks.world_size, here=ranks.node.size, devices=devices, gpus=torch.cuda.device_count(), started=True
    )
    static = static_findings(recipe, task=task, place=place, studies=studies)
    return [*package_findings(), *static, wandb_finding(recipe)]


def static_findings(
    recipe: Recipe, *, task: Task, place: Place, studies: Mapping[str, Sequence[Study]]
) -> list[Finding]:
    """Policy, texts, reward, labeler and memory: also what a launch looks at before it loads the policy.

    Args:
        studies: by split; empty where the manifest cannot be read.
    """
    images = most_images([study for part in studies.values() for study in part])
    findings = [examined("policy", lambda: _policy(recipe)), tokenizer_finding(recipe)]
    if studies and findings[-1].state != "failure":
        findings.append(examined("texts", lambda: check_texts(recipe, studies, task=task)))
    asked = recipe.policy
    if asked.attention == "flash_attn":
        findings.append(examined("flash-attn", lambda: chosen_attention(asked.attention, asked.dtype, place.devices)))
    if task == "grpo":
        findings += reward_findings(recipe)
    if recipe.phases != "update":
        reward = recipe.reward
        findings += [
            examined("labeler", lambda: check_labeler(reward.labeler, reward.tokenizer)),
            *held_out_finding(recipe),
            *device_findings(recipe, place.gpus),
            *radeval_finding(recipe),
            *judge_findings(recipe),
        ]
    if findings[0].state == "ok" and _can_be_run(recipe.engine.deepspeed):
        findings += memory_findings(recipe, task=task, place=place, images=images)
    return findings


def _of_labels(studies: Sequence[Study]) -> str:
    """How many of them have labels alone."""
    bare = sum(study.report is None for study in studies)
    return f" ({bare} with labels alone)" if bare else ""


def _disk(recipe: Recipe) -> str:
    trains_all, keep = recipe.sft.trainable == "all", recipe.checkpoint.keep
    return check_disk(recipe.output_dir, policy=recipe.policy.path, trains_all=trains_all, keep=keep)


def _deepspeed(recipe: Recipe, task: Task) -> str:
    path = recipe.engine.deepspeed
    check_deepspeed(path)
    stage = read_config(path)["zero_optimization"]["stage"]
    check_stage(recipe, stage=stage, task=task)
    return f"{path}: ZeRO stage {stage}"


def _can_be_run(deepspeed: Path) -> bool:
    """Whether memory can be told by this configuration; what is wrong with it is a finding of its own."""
    try:
        read_config(deepspeed)
    except (ValueError, OSError):
        return False
    return True


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
    lora_pattern(family_of(path), recipe.policy.lora.targets)
    try:
        model = empty_model(path)
        stored = stored_tensors(path, model)
        shape_of(path)
    except ValueError as error:
        raise RecipeError(f"policy.path {error}") from error
    if recipe.policy.adapter is not None:
        check_adapter(recipe.policy.adapter)
        try:
            require_fit(read_adapter(recipe.policy.adapter, tied=is_tied(model)), stored, path, model)
        except ValueError as error:
            raise RecipeError(f"policy.adapter {error}") from error
    elements = sum(math.prod(tensor.shape) for tensor in stored.values())
    files = {tensor.file for tensor in stored.values()}
    return f"{path}: {elements / 1e9:.3f} billion parameters in {len(files)} file(s), whole"


def wandb_finding(recipe: Recipe) -> Finding:
    """Whether wandb can do what it is asked."""
    mode = recipe.tracking.wandb
    if mode == "off":
        return Finding("wandb", "ok", "off")
    version = wandb_version()
    if version is None:
        text = f"tracking.wandb {mode}: wandb is not installed"
        return Finding("wandb", "failure", text, "pip install wandb, or tracking.wandb=off")
    text = f"{mode}, version {version}"
    if mode == "online" and not _has_key():
        return Finding(
            "wandb",
            "failure",
            f"{text}: no key for the service",
            "wandb login, WANDB_API_KEY, or tracking.wandb=offline",
        )
    return Finding("wandb", "ok", text)


def tensorboard_finding(recipe: Recipe) -> list[Finding]:
    """Whether TensorBoard's files can be written, where a recipe asks for them; a launch checks it first of all."""
    wanted = recipe.tracking.tensorboard
    if wanted == "off":
        return []
    try:
        check_tensorboard(wanted)
    except ValueError as error:
        text, _, remedy = str(error).partition("; ")
        return [Finding("tensorboard", "failure", text, remedy)]
    return [Finding("tensorboard", "ok", f"event files go to {wanted}")]


def wandb_version() -> str | None:
    """None where it is not installed. It is not imported: that takes a second, and is tracking's alone."""
    try:
        return metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return None


def _has_key() -> bool:
    """Whether wandb would find a key: in the environment, or an entry of its host in netrc. The key itself is
    not read.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").removeprefix("https://").split("/")[0]
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return file.is_file() and f"machine {host}" in file.read_text(encoding="utf-8", errors="replace")
