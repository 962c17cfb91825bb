"""The control `sft` of a GRPO recipe: the recipe that SFT then runs, and for how long (docs/recipes.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mrg_r1.config.paths import RecipeError
from mrg_r1.config.recipe import Recipe, load_run

_STEPS = 1_000_000  # more than any time allows: the time ends the run
_CHECKPOINT_EVERY = 1000


def as_sft(recipe: Recipe) -> Recipe:
    """A GRPO recipe as SFT runs it, but for the time. `steps`, `evaluation.every` and `checkpoint.every` count steps of
    GRPO, of which each takes as long as many of SFT: time ends the run, nothing is validated (the last policy is kept),
    and there are at least 1,000 steps between two checkpoints. A recipe without `control: sft` is left as it is.
    """
    if recipe.control != "sft":
        return recipe
    checkpoint = recipe.checkpoint.model_copy(update={"every": max(recipe.checkpoint.every, _CHECKPOINT_EVERY)})
    evaluation = recipe.evaluation.model_copy(update={"every": 0})
    return recipe.model_copy(update={"steps": _STEPS, "checkpoint": checkpoint, "evaluation": evaluation})


def at_equal_time(recipe: Recipe, *, world_size: int) -> Recipe:
    """`as_sft` with the processor seconds of the run that `control_of` names.

    Args:
        world_size: ranks that are to run it. Seconds are counted on rank 0, so they must be as many as there.

    Raises:
        RecipeError: `control_of` is no finished run, ran on another number of ranks, or from another start or manifest.
    """
    if recipe.control != "sft" or recipe.control_of is None:
        return as_sft(recipe)
    run = recipe.control_of
    summary = _summary(run)
    if summary["world_size"] != world_size:
        raise RecipeError(
            f"control_of {run}: ran on {summary['world_size']} rank(s), this is started on {world_size}; processor "
            "seconds are rank 0's and its share of the labeler's: start as many ranks"
        )
    theirs = load_run(run)
    for name, ours, other in (
        ("policy.path", recipe.policy.path, theirs.policy.path),
        ("policy.adapter", recipe.policy.adapter, theirs.policy.adapter),
        ("data.manifest", recipe.data.manifest, theirs.data.manifest),
    ):
        if (ours and ours.resolve()) != (other and other.resolve()):
            raise RecipeError(
                f"control_of {run}: its {name} is {other}, the recipe's {ours}; a control begins where the run did "
                "that it is compared with"
            )
    seconds, given = float(summary["training_cpu_seconds"]), recipe.sft.max_cpu_seconds
    if given is not None and given != seconds:
        raise RecipeError(
            f"control_of {run}: took {seconds} processor seconds, sft.max_cpu_seconds is {given}; leave one of them out"
        )
    sft = recipe.sft.model_copy(update={"max_cpu_seconds": seconds})
    return as_sft(recipe.model_copy(update={"sft": sft}))


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if summary.get("status") != "complete":
        raise RecipeError(f"control_of {run}: no finished run is there; give the output_dir of one that has ended")
    if not summary.get("training_cpu_seconds"):
        raise RecipeError(f"control_of {run}: its summary has no training_cpu_seconds; run it again with this version")
    return summary
