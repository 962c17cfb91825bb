"""One whole step of a recipe before its checkpoint is there: at the checkpoint's widths, vocabulary and prompts, with
random weights and few layers (`mrg-r1 rehearse`).

The step is a run of its own, started as `launch/train.py` starts it, so that nothing here is a second trainer. It is
taken at two depths; what all layers take follows from both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.doctor.inputs import read_splits
from mrg_r1.doctor.labeler import check_labeler
from mrg_r1.doctor.memory import Prediction, predict, workload_of
from mrg_r1.policy.family import family_of, load_config, lora_pattern, read_config, shape_of
from mrg_r1.policy.load import load_image_processor, load_tokenizer
from mrg_r1.policy.shallow import Depth, two_depths, whole_depth, write_shallow
from mrg_r1.training.phase_peaks import PEAKS
from mrg_r1.training.preflight import DTYPES

CPU_NEW_TOKENS = 32  # of a report, where no GPU writes it
_TRAIN = (
    "import sys; sys.argv[0] = 'rehearsal'; from mrg_r1.cli.launch import run_on_ranks; "
    "from mrg_r1.training.phase_peaks import train_with_peaks; "
    "run_on_ranks(train_with_peaks, None, labeler_beside=True)"
)
_EXPORT = "import sys; from mrg_r1.cli import main; sys.exit(main(sys.argv[1:]))"
_BY_DECODER = ("rollout", "reference", "old", "update")
_PHASES = ("load", "vision", *_BY_DECODER, "advantages")  # the wait for rewards is no matter of layers
_SHARE_OF_DISK = 0.9  # of what is free
_STUDIES = 64  # of the training split: its labeler reads all references before the first step


def rehearse(
    recipe: Recipe, asked: Sequence[str], *, studies: int, new_tokens: int | None, world_size: int, folder: Path
) -> dict[str, Any]:
    """Take one step of the recipe at two depths, with checkpoint and export, on one rank of this machine.

    Args:
        recipe: what `asked` says.
        asked: the recipe's file and overrides, as on a command line.
        studies: of the step.
        new_tokens: of a report at most; None: the recipe's on a GPU, `CPU_NEW_TOKENS` on a CPU. Random weights end a
            report as good as never, so that all have this length.
        world_size: ranks that the whole step is to be reckoned for.
        folder: an empty folder; what is written there is the caller's to remove.

    Returns:
        `depths` with seconds by phase, `whole` with what all layers and studies of a rank should take, `memory` by
        formula and measured, and what was rehearsed.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named; a step or an export that failed.
    """
    on_gpu = torch.cuda.is_available()
    source = recipe.policy.path
    _require_readable(recipe)
    try:
        first, second = two_depths(load_config(source).to_dict())  # kinds of layers are stated or are a default
        whole = whole_depth(read_config(source))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"policy.path {source}: {error}") from error
    splits, _ = read_splits(recipe)
    if not splits["val"]:
        raise RecipeError(
            f"data.val_split {recipe.data.val_split!r}: {recipe.data.manifest} has no study of that split, and a step "
            "ends with the validation of one; name another as data.val_split=NAME"
        )
    check_labeler(recipe.reward.labeler, recipe.reward.tokenizer)
    manifest = folder / "manifest.jsonl"
    _write_manifest(recipe, manifest, train=max(_STUDIES, studies))
    tokens = min(recipe.rollout.max_new_tokens, new_tokens or (10**9 if on_gpu else CPU_NEW_TOKENS))
    # bfloat16 has no instructions of its own on most CPUs, and is many times slower than float32 there
    dtype = recipe.policy.dtype if on_gpu else "float32"
    depths = list(dict.fromkeys((first, second)))
    checkpoints = {depth: folder / f"policy-{depth.decoder}-{depth.tower}" for depth in depths}
    _require_space(recipe, depths[-1], whole, dtype, folder)
    write_shallow(source, checkpoints, dtype=DTYPES[dtype])
    taken = []
    for depth in depths:
        run = folder / f"run-{depth.decoder}-{depth.tower}"
        changed = _overrides(recipe, checkpoints[depth], run, studies=studies, tokens=tokens, dtype=dtype)
        changed.append(f"data.manifest={manifest}")
        print(f"one step with {depth.decoder} layers of the decoder and {depth.tower} of the tower:", file=sys.stderr)
        _require_done(_child(_TRAIN, [*asked, *changed]), "the step", depth)
        taken.append({"decoder": depth.decoder, "tower": depth.tower, **_taken(run)})
        if depth == depths[-1]:
            began = time.perf_counter()
            _require_done(_child(_EXPORT, ["export", str(run), "--merged", str(folder / "merged")]), "export", depth)
            taken[-1]["export_seconds"] = time.perf_counter() - began
        shutil.rmtree(run / "checkpoints")
    images = max(len(study.images) for study in splits["train"])
    small = recipe.model_copy(
        update={
            "grpo": recipe.grpo.model_copy(update={"studies_per_step": studies}),
            "rollout": recipe.rollout.model_copy(update={"max_new_tokens": tokens}),
            "policy": recipe.policy.model_copy(update={"dtype": dtype}),
            "evaluation": recipe.evaluation.model_copy(update={"every": 0, "test": False}),
        }
    )
    whole_shape, small_shape = shape_of(source), shape_of(checkpoints[depths[-1]])
    planned = workload_of(recipe, whole_shape, task="grpo", world_size=world_size, device="cuda", images=images)
    rehearsed = workload_of(
        small, small_shape, task="grpo", world_size=1, device="cuda" if on_gpu else "cpu", images=images
    )
    prediction, of_rehearsed = predict(whole_shape, planned), predict(small_shape, rehearsed)
    return {
        "policy": str(source),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": dtype,
        "recipe_dtype": recipe.policy.dtype,
        "studies": studies,
        "group_size": recipe.grpo.group_size,
        "new_tokens": tokens,
        "recipe_new_tokens": recipe.rollout.max_new_tokens,
        "prompt_tokens": planned.prompt_tokens,
        "world_size": world_size,
        "rank_studies": planned.studies,
        "steps": recipe.steps,
        "depths": taken,
        "whole": {
            "decoder": whole.decoder,
            "tower": whole.tower,
            "start_seconds": _at(whole, taken, "start", by="decoder"),
            "checkpoint_seconds": _at(whole, taken, "checkpoint", by="decoder"),
            "seconds": _whole_step(
                whole,
                taken,
                studies=planned.studies / studies,
                length=recipe.rollout.max_new_tokens / tokens,
                tokens=_tokens(planned.prompt_tokens, recipe, recipe.rollout.max_new_tokens)
                / _tokens(planned.prompt_tokens, recipe, tokens),
            ),
        },
        "memory": {
            "measured_gib": taken[-1]["memory_gib"],
            "formula_gib": of_rehearsed.peak / 2**30,
            "formula_gib_by_phase": _gib(of_rehearsed),
            "whole_gpu_gib": prediction.peak / 2**30,
            "whole_gpu_gib_by_phase": _gib(prediction),
            "whole_gpu_phase": prediction.peak_phase,
        },
    }


def _require_readable(recipe: Recipe) -> None:
    """Everything of policy.path that is not weights.

    Raises:
        ValueError: what a rehearsal needs and cannot read.
    """
    source = recipe.policy.path
    try:
        lora_pattern(family_of(source), recipe.policy.lora.targets)
        load_tokenizer(source)
        shape_of(source)
        load_image_processor(source, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels)
    except ValueError as error:
        raise ValueError(f"policy.path {error} (no weights are needed, but tokenizer and processor)") from error


def _write_manifest(recipe: Recipe, file: Path, *, train: int) -> None:
    """The training studies with the longest prompts, as far as images and priors make them long, and one to validate:
    a real labeler on a CPU takes minutes for the references of thousands.
    """
    everything = {study.id: study for study in read_manifest(recipe.data.manifest)}
    with_prior = "prior_report" in recipe.data.context
    longest = sorted(
        (study for study in everything.values() if study.split == recipe.data.train_split),
        key=lambda study: (with_prior and study.prior is not None, len(study.images)),
        reverse=True,
    )[:train]
    validated = next(study for study in everything.values() if study.split == recipe.data.val_split)
    chosen = {study.id: study for study in (*longest, validated)}
    for study in [*chosen.values()]:
        prior = study.prior
        while prior is not None and prior not in chosen:
            # of no split that is learned from: it is there to be quoted
            chosen[prior] = replace(everything[prior], split="prior of a rehearsed study")
            prior = everything[prior].prior
    write_manifest(file, chosen.values())


def _gib(prediction: Prediction) -> dict[str, float]:
    return {name: sum(parts.values()) / 2**30 for name, parts in prediction.phases.items()}


def _tokens(prompt: int, recipe: Recipe, new_tokens: int) -> int:
    """Of a study in a scoring pass: the prompt once, and its group."""
    return prompt + recipe.grpo.group_size * new_tokens


def _require_space(recipe: Recipe, deepest: Depth, whole: Depth, dtype: str, folder: Path) -> None:
    """The checkpoint and its export, and a checkpoint of LoRA, of which each is small beside them.

    Raises:
        ValueError: `folder` lies on a disk that is too full.
    """
    shape = shape_of(recipe.policy.path)
    left_out = (whole.decoder - deepest.decoder) * (shape.layer_matrices + shape.layer_vectors)
    left_out += int(shape.vision.parameters * (1 - deepest.tower / whole.tower))
    needed = 2 * (shape.parameters - left_out) * DTYPES[dtype].itemsize
    free = shutil.disk_usage(folder).free
    if needed > _SHARE_OF_DISK * free:
        raise ValueError(
            f"{folder}: a rehearsal writes {needed / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free; "
            "name another place as --folder"
        )


def _overrides(recipe: Recipe, policy: Path, run: Path, *, studies: int, tokens: int, dtype: str) -> list[str]:
    """What makes the recipe one step of few layers."""
    changed = {
        "output_dir": run,
        "steps": _steps(),
        "control": "null",
        "control_of": "null",
        "phases": "all",
        "experience": "null",
        "policy.path": policy,
        "policy.adapter": "null",  # of a policy of more layers
        "policy.dtype": dtype,
        "rollout.max_new_tokens": tokens,
        "grpo.studies_per_step": studies,
        "optimizer.warmup_steps": 0,
        "evaluation.every": 0,
        "evaluation.before": "false",
        "evaluation.test": "false",
        "evaluation.max_studies": 1,
        "evaluation.batch_size": 1,
        "evaluation.held_out_labeler": "null",
        "tracking.wandb": '"off"',
        "tracking.tensorboard": '"off"',
        "checkpoint.every": 1,
    }
    if not torch.cuda.is_available():
        changed |= {"reward.device": "cpu", "policy.attention": "torch"}
    return [f"{key}={value}" for key, value in changed.items()]


def _steps() -> int:
    """On a GPU the first step loads kernels and captures graphs, and the second is the one that is timed."""
    return 2 if torch.cuda.is_available() else 1


def _child(code: str, arguments: Sequence[str]) -> int:
    """Run it in a process of its own, whose words go to this terminal; returns its exit code."""
    numbered = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in numbered}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    said_to = 2  # stderr: what is asked for is the table
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, stdout=said_to, check=False).returncode


def _require_done(code: int, what: str, depth: Depth) -> None:
    if code:
        raise ValueError(
            f"rehearsal with {depth.decoder} layers of the decoder: {what} ended with exit code {code}; what it said "
            "stands above"
        )


def _taken(run: Path) -> dict[str, Any]:
    """Of a run's last step: seconds by phase, the wait for rewards, and the process's peak."""
    row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    totals = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds"]
    peaks = json.loads((run / PEAKS).read_text(encoding="utf-8"))
    return {
        "seconds": {name: row[f"time/{name}"] for name in _PHASES if f"time/{name}" in row},
        "start": totals["start"],
        "checkpoint": totals["checkpoint"] / _steps(),
        "reward_exposed": row["time/reward_exposed"],
        "update_tflops": row["time/update_tflops"],
        "update_mfu": row["time/update_mfu"],
        # where phases are counted, the metric is of the last one alone
        "memory_gib": max(peaks.values()) / 2**30 if peaks else row["time/memory_gib_max"],
        "memory_gib_by_phase": {name: peak / 2**30 for name, peak in peaks.items()},
    }


def _at(whole: Depth, taken: Sequence[dict[str, Any]], name: str, *, by: str) -> float:
    """Seconds of all layers: a straight line through both depths, of which none is below what was measured."""
    values = [float(one["seconds"].get(name, 0.0) if name in _PHASES else one[name]) for one in taken]
    layers = [one[by] for one in taken]
    if len(taken) == 1 or layers[0] == layers[1]:
        return values[-1]
    a_layer = (values[1] - values[0]) / (layers[1] - layers[0])
    return values[1] + max(0.0, a_layer) * (getattr(whole, by) - layers[1])


def _whole_step(
    whole: Depth, taken: Sequence[dict[str, Any]], *, studies: float, length: float, tokens: float
) -> dict[str, float]:
    """Seconds by phase of a rank's step with all layers, studies and tokens.

    Args:
        studies, length, tokens: the whole step's over the rehearsed one's: studies of a rank, tokens of a report, and
            of a study in a scoring pass.
    """
    seconds = {}
    for name in taken[-1]["seconds"]:
        by = {"vision": "tower", **dict.fromkeys(_BY_DECODER, "decoder")}.get(name)
        found = taken[-1]["seconds"][name] if by is None else _at(whole, taken, name, by=by)
        longer = length if name == "rollout" else tokens if name in _BY_DECODER else 1.0
        seconds[name] = found * studies * longer
    return seconds
