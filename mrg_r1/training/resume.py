"""A run that goes on: with the recipe that it began with, unless somebody means it; and what is no longer the same to
the last bit.
"""

from __future__ import annotations

from typing import Any

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.engine.checkpoint import recorded_recipe
from mrg_r1.engine.ranks import Ranks

# what a run may be continued with without being another one
_FREE = (
    "output_dir",
    "evaluation.",
    "tracking.",
    "checkpoint.",
    "resume.",
    "reward.device",
    "reward.timeout",
    "reward.http.",
    "reward.send_text_to",
    "radeval.",
    "data.check_images",
    "data.workers",
)
# what changes the order of sums and nothing else
_ROUNDING = (
    "engine.",
    "rollout.cache_tokens",
    "rollout.reuse_prefill",
    "policy.gradient_checkpointing",
    "policy.attention",
)


def check_changes(recipe: Recipe, ranks: Ranks) -> None:
    """Compare the recipe with the one that RUN's checkpoint was written under. Every rank calls this, before anything
    is written.

    Raises:
        RecipeError: it differs in what decides the result, and `resume.allow_changes` is false; every change with both
            values.
    """
    ranks.from_main(lambda: _refuse_changes(recipe), RecipeError)


def _refuse_changes(recipe: Recipe) -> None:
    before = recorded_recipe(recipe.output_dir / "checkpoints")
    if before is None or recipe.resume.allow_changes:
        return
    changed = [line for line in differences(before, recipe) if not _starts(line, _ROUNDING)]
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise RecipeError(
            f"{recipe.output_dir}: holds a checkpoint of a run with another recipe:\n{listed}\ntake the old values "
            "back, set another output_dir, or go on as another run with resume.allow_changes=true"
        )


def differences(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """`key: old -> new` of every field that differs and is not free to; a field that is younger than the checkpoint had
    its default.
    """
    old, new = flat(before), flat(recipe.model_dump(mode="json"))
    defaults = flat(_defaults(recipe))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, defaults.get(key)), new.get(key)
        free = _starts(key, _FREE) or (key == "steps" and recipe.optimizer.schedule == "constant")
        if was != now and not free:
            lines.append(f"{key}: {was} -> {now}")
    return lines


def what_rounds_otherwise(record: dict[str, Any], recipe: Recipe, *, world_size: int, stage: int) -> list[str]:
    """Why the run that goes on from `record` will not be the uninterrupted one to the last bit; empty where it will."""
    reasons = [line for line in differences(record["recipe"], recipe)] if record.get("recipe") else []
    if record["world_size"] != world_size:
        reasons.insert(0, f"{record['world_size']} -> {world_size} ranks")
    if record["zero_stage"] != stage:
        reasons.insert(0, f"ZeRO stage {record['zero_stage']} -> {stage}")
    return reasons


def _starts(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; `reward.weights` and other values that are mappings stay whole."""
    keys: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and name != "weights":
            keys |= flat(value, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = value
    return keys


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """Every field at its default, where it has one."""
    plain = Recipe.model_validate(
        {
            "output_dir": recipe.output_dir,
            "steps": recipe.steps,
            "data": {"manifest": recipe.data.manifest},
            "policy": {"path": recipe.policy.path},
            "reward": {"labeler": recipe.reward.labeler},
        }
    )
    return plain.model_dump(mode="json")
