"""One whole step of a recipe before there are weights or a card for it (`mrg-r1 rehearse`): at the checkpoint's widths,
vocabulary and prompts, with random weights and few layers, by the code that trains.

The step is taken at two depths, each in a process of its own. What a layer takes is their difference, and so all layers
are foretold without a supposition about how dear a layer is beside the head.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from json import loads
from pathlib import Path
from typing import Any, Literal

import torch

from mrg_r1.config.paths import check_deepspeed, check_manifest
from mrg_r1.config.recipe import Recipe, RecipeError, check_numbers, dump_recipe
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.doctor.inputs import most_images
from mrg_r1.doctor.labeler import check_labeler, labeler_bytes, shared_device
from mrg_r1.doctor.memory import Prediction, Workload, predict, workload_of
from mrg_r1.policy.family import family_of, lora_pattern, shape_of
from mrg_r1.policy.load import load_image_processor, load_tokenizer
from mrg_r1.policy.shallow import Depth, depth_of, write_shallow
from mrg_r1.policy.shape import PolicyShape
from mrg_r1.training.preflight import DTYPES
from mrg_r1.training.rehearsed_step import DOING, RESULT
from mrg_r1.types import Study

CPU_TOKENS = 64  # new tokens of a rehearsal on a CPU, unless asked for others
PHASES = (
    "start", "load", "vision", "rollout", "reward_exposed", "reference", "old", "advantages", "update", "checkpoint",
    "export",
)  # fmt: skip
_IN_STEP = PHASES[1:-2]
_BY_PARAMETERS = ("start", "checkpoint", "export")  # what is read and written
_BY_LAYERS = ("rollout", "reference", "old", "update")
_COMPLETIONS = ("reference", "old", "update")  # they read whole sequences
_COPIES = 2  # of a shallow checkpoint on the disk: it, and its export


@dataclass(frozen=True)
class Sizes:
    """What one rehearsal is: `None` takes the rehearsal's own choice.

    Attributes:
        layers, vision_layers: of the first of the two steps; the second has twice as many.
        studies: of a step; None: as few as the recipe's minibatches let be, which is one as a rule.
        new_tokens: of a completion; None: the recipe's, on a CPU at most `CPU_TOKENS`.
        world_size: ranks of the run that is foretold.
    """

    layers: int = 2
    vision_layers: int = 2
    studies: int | None = None
    new_tokens: int | None = None
    world_size: int = 1


def rehearse(
    recipe: Recipe, sizes: Sizes, *, command: Sequence[str], say: Callable[[str], None] = lambda doing: None
) -> dict[str, Any]:
    """Take one step of the recipe at two depths.

    Args:
        command: a program that runs `rehearsed_step` on the recipe whose path it is given.
        say: is told what is being done, again and again.

    Returns:
        `depths`, `phases` (seconds at each depth, with all layers, and of the recipe's whole step), `memory` (bytes by
        phase: measured at the second depth, by the formula there, and by the formula for all of the recipe), and what
        was `changed` of the recipe.

    Raises:
        RecipeError, ManifestError, ValueError, OSError: bad input, or a step that failed, named.
    """
    say("checking the recipe")
    _check(recipe, sizes)
    whole = depth_of(recipe.policy.path)
    first = Depth(min(sizes.layers, whole.language), min(sizes.vision_layers, whole.vision))
    second = Depth(min(2 * first.language, whole.language), min(2 * first.vision, whole.vision))
    with tempfile.TemporaryDirectory(prefix="mrg-r1-rehearse-") as name:
        folder = Path(name)
        prepared, changed = _prepared(recipe, sizes, folder)
        steps = [
            _step(prepared, depth, narrowest=first.language, folder=folder / f"{depth.language}_layers",
                  command=command, say=say)
            for depth in dict.fromkeys((first, second))
        ]  # fmt: skip
    studies = read_manifest(recipe.data.manifest, split=recipe.data.train_split)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape_of(recipe.policy.path)
    meant = _workload(recipe, shape, world_size=sizes.world_size, images=most_images(studies), device=_foretold(recipe))
    done = steps[-1]
    taken = _workload(prepared, done.shape, world_size=1, images=done.images, device=device)
    return {
        "policy": str(recipe.policy.path),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": recipe.policy.dtype,
        "whole": {**asdict(whole), "parameters": shape.parameters},
        "depths": [{**asdict(step.depth), "parameters": step.shape.parameters} for step in steps],
        "studies": prepared.grpo.studies_per_step,
        "group_size": recipe.grpo.group_size,
        "new_tokens": [step.result["new_tokens"] for step in steps],
        "prompt_tokens": taken.prompt_tokens,
        "loss": [step.result["loss"] for step in steps],
        "grad_norm": [step.result["grad_norm"] for step in steps],
        "recipe": {
            "studies": meant.studies,
            "new_tokens": meant.new_tokens,
            "world_size": sizes.world_size,
            "device": meant.device,
        },
        "phases": _phases(steps, shape, taken=taken, meant=meant),
        "memory": _memory(steps[-1], predict(done.shape, taken), predict(shape, meant)),
        "changed": changed,
    }


@dataclass(frozen=True)
class _Step:
    """A step that was taken."""

    depth: Depth
    shape: PolicyShape
    images: int  # of the study that has most
    result: dict[str, Any]  # `rehearsed_step`'s


def _check(recipe: Recipe, sizes: Sizes) -> None:
    """Everything that can be said before a weight is written.

    Raises:
        RecipeError, ValueError: named.
    """
    if recipe.control == "sft":
        raise RecipeError("control sft: a rehearsal is of a GRPO step; set control=null")
    check_numbers(recipe, world_size=sizes.world_size, task="grpo")
    check_manifest(recipe.data.manifest)
    check_deepspeed(recipe.engine.deepspeed)
    path = recipe.policy.path
    try:
        lora_pattern(family_of(path), recipe.policy.lora.targets)
        load_tokenizer(path)
        load_image_processor(path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels)
    except ValueError as error:
        raise RecipeError(
            f"policy.path: {error} (a rehearsal needs config.json, tokenizer and processor, no weights)"
        ) from error
    try:
        check_labeler(recipe.reward.labeler, recipe.reward.tokenizer)
    except ValueError as error:
        raise RecipeError(f"{error} (a rehearsal scores reports by the recipe's own labeler)") from error


def _prepared(recipe: Recipe, sizes: Sizes, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe of one step of few studies without what surrounds it, and what was changed, in words."""
    count = sizes.studies or recipe.grpo.minibatches
    on_gpu = torch.cuda.is_available()
    tokens = recipe.rollout.max_new_tokens
    tokens = sizes.new_tokens or (tokens if on_gpu else min(tokens, CPU_TOKENS))
    chosen = _studies(recipe, count)
    write_manifest(folder / "manifest.jsonl", chosen)
    labeler = recipe.reward.device
    if labeler.startswith("cuda") and not on_gpu:
        labeler = "cpu"
    elif labeler.startswith("cuda:") and int(labeler.removeprefix("cuda:")) >= torch.cuda.device_count():
        labeler = "cuda:0"
    values = recipe.model_dump(mode="json")
    values |= {"steps": 1, "phases": "all", "control": None, "experience": None, "control_of": None}
    values["data"] |= {"manifest": str(folder / "manifest.jsonl"), "check_images": True}
    values["policy"] |= {"adapter": None}
    values["rollout"] |= {"max_new_tokens": tokens}
    values["grpo"] |= {"studies_per_step": count}
    values["reward"] |= {"device": labeler}
    values["evaluation"] |= {
        "test": False, "every": 0, "before": False, "held_out_labeler": None, "held_out_tokenizer": None,
        "radeval": [],
    }  # fmt: skip
    values["tracking"] |= {"wandb": "off", "tensorboard": "off"}
    changed = [f"{count} of the recipe's {recipe.grpo.studies_per_step} studies a step, those with the most images"]
    if tokens != recipe.rollout.max_new_tokens:
        changed.append(f"{tokens} of {recipe.rollout.max_new_tokens} new tokens")
    if recipe.policy.adapter is not None:
        changed.append(f"without policy.adapter {recipe.policy.adapter}, which is of all layers")
    if labeler != recipe.reward.device:
        changed.append(f"the labeler on {labeler}, not on {recipe.reward.device}")
    return Recipe.model_validate(values), changed


def _studies(recipe: Recipe, count: int) -> list[Study]:
    """The training studies with the most images, and behind them what they name as their prior.

    Raises:
        RecipeError: there are fewer.
    """
    everything = {study.id: study for study in read_manifest(recipe.data.manifest)}
    train = [study for study in everything.values() if study.split == recipe.data.train_split]
    if len(train) < count:
        raise RecipeError(
            f"data.train_split {recipe.data.train_split!r}: {recipe.data.manifest} has {len(train)} studies of that "
            f"split, and the step is to have {count}"
        )
    chosen = sorted(train, key=lambda study: -len(study.images))[:count]
    priors = {study.prior for study in chosen} - {study.id for study in chosen} - {None}
    aside = [
        replace(everything[prior], split=f"not {recipe.data.train_split}", prior=None) for prior in priors if prior
    ]
    return [*chosen, *aside]


def _step(
    recipe: Recipe, depth: Depth, *, narrowest: int, folder: Path, command: Sequence[str], say: Callable[[str], None]
) -> _Step:
    """Write a checkpoint of so many layers, and take the step in a process of its own."""
    what = f"{depth.language} layers, {depth.vision} of the tower"
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    say(f"{what}: writing random weights")
    dtype = DTYPES[recipe.policy.dtype]
    write_shallow(
        recipe.policy.path, checkpoint, depth, narrowest=narrowest, dtype=dtype, seed=recipe.seed,
        room=lambda size: _require_room(folder, size),
    )  # fmt: skip
    changed = recipe.model_copy(
        update={
            "output_dir": folder / "run",
            "policy": recipe.policy.model_copy(update={"path": checkpoint}),
        }
    )
    (folder / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    with open(folder / "output", "w+", encoding="utf-8") as output:
        process = subprocess.Popen([*command, str(folder / "recipe.yaml")], stdout=output, stderr=output)
        try:
            while process.poll() is None:
                say(f"{what}: {_doing(folder)}")
                time.sleep(0.2)
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        said = output.read()
    if process.returncode or not (folder / RESULT).is_file():
        raise ValueError(_why(process.returncode, said, what=what, doing=_doing(folder)))
    shape, studies = shape_of(checkpoint), read_manifest(recipe.data.manifest, split=recipe.data.train_split)
    result = loads((folder / RESULT).read_text(encoding="utf-8"))
    shutil.rmtree(folder)  # the next one needs its room
    return _Step(depth, shape, most_images(studies), result)


def _doing(folder: Path) -> str:
    """The phase that the process is in."""
    file = folder / DOING
    return (file.read_text(encoding="utf-8") if file.is_file() else "") or "start"


def _why(code: int, said: str, *, what: str, doing: str) -> str:
    """What a failed step says: its own message, or that it was killed."""
    if code < 0:
        return (
            f"the step at {what} was killed (signal {-code}) in the phase {doing}: too little memory, as a rule; less "
            "is needed with --layers 1, --studies 1, fewer --new-tokens or a smaller grpo.group_size"
        )
    lines = said.strip().splitlines()
    place = next((number for number, line in enumerate(lines) if line.startswith("error")), max(0, len(lines) - 30))
    return f"the step at {what} failed in the phase {doing} (exit code {code}):\n" + "\n".join(lines[place:])


def _require_room(folder: Path, size: int) -> None:
    """
    Raises:
        ValueError: the disk cannot hold a checkpoint of so many bytes and its export.
    """
    free = shutil.disk_usage(folder).free
    if free < _COPIES * size:
        raise ValueError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, and the rehearsal's checkpoint and its export take "
            f"{_COPIES * size / 1e9:.1f} GB; fewer --layers, or set TMPDIR to a folder on a larger disk "
            f"(now {os.environ.get('TMPDIR', 'not set')})"
        )


def _foretold(recipe: Recipe) -> Literal["cuda", "cpu"]:
    """What the recipe is meant for: where its labeler is on a card, its policy is too."""
    return "cuda" if torch.cuda.is_available() or recipe.reward.device.startswith("cuda") else "cpu"


def _workload(
    recipe: Recipe, shape: PolicyShape, *, world_size: int, images: int, device: Literal["cuda", "cpu"]
) -> Workload:
    beside = labeler_bytes(recipe) if device == "cuda" and shared_device(recipe) == 0 else 0
    return workload_of(
        recipe, shape, task="grpo", world_size=world_size, device=device, images=images, labeler_bytes=beside
    )


def _phases(
    steps: Sequence[_Step], shape: PolicyShape, *, taken: Workload, meant: Workload
) -> dict[str, dict[str, Any]]:
    """Seconds of each phase: at the depths, with all layers, and of the whole step of the recipe."""
    found = {}
    for name in PHASES:
        seconds = [step.result["seconds"].get(name, 0.0) for step in steps]
        if not any(seconds):
            continue
        sizes = [_size(name, step.shape) for step in steps]
        whole = at_size(sizes, seconds, _size(name, shape))
        found[name] = {
            "seconds": seconds,
            "all_layers": whole,
            "recipe": whole * _more(name, taken, meant, tokens=steps[-1].result["new_tokens"]),
            "in_step": name in _IN_STEP,
        }
    return found


def _size(name: str, shape: PolicyShape) -> int:
    """What a phase's time grows with, beside what it takes anyway."""
    if name == "vision":
        return shape.vision.depth
    if name in _BY_PARAMETERS:
        return shape.parameters
    return shape.layers if name in _BY_LAYERS else 1


def at_size(sizes: Sequence[float], seconds: Sequence[float], size: float) -> float:
    """The line through one or two points, at `size`; a slope that is none but noise is 0."""
    if len(sizes) < 2 or sizes[0] == sizes[-1]:
        return max(seconds)
    slope = max(0.0, (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0]))
    return seconds[-1] + slope * (size - sizes[-1])


def _more(name: str, taken: Workload, meant: Workload, *, tokens: float) -> float:
    """How many times as much a phase of the recipe's step has to do."""
    if name in _BY_PARAMETERS:
        return 1.0
    studies = meant.studies / taken.studies
    if name == "rollout":
        return studies * meant.new_tokens / tokens
    if name in _COMPLETIONS:
        before = taken.prompt_tokens + taken.group_size * tokens
        return studies * (meant.prompt_tokens + meant.group_size * meant.new_tokens) / before
    return studies


def _memory(step: _Step, here: Prediction, whole: Prediction) -> dict[str, dict[str, int | None]]:
    """Bytes of a phase."""
    measured: Mapping[str, int] = step.result["peak_bytes"]
    return {
        name: {
            "measured": measured.get(name),
            "formula": sum(here.phases[name].values()),
            "recipe": sum(whole.phases[name].values()),
        }
        for name in here.phases
        if name in whole.phases and name != "evaluation"
    }
