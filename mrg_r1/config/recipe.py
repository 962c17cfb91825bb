"""The recipe: one YAML file is one experiment. Typed, validated, and every field says where its value comes from.

Each description ends in one word: `paper` (arXiv 2512.16145 states it), `ours` (the paper is silent; we chose), or
`yours` (a path or a name that only you can know). `load_recipe` reads the file, applies `key=value` overrides, refuses
unknown keys with the nearest known one, and checks what can be checked before any model is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mrg_r1.config.paths import (
    RecipeError,
    check_adapter,
    check_checkpoint_directory,
    check_deepspeed,
    check_labeler_path,
    check_manifest,
)
from mrg_r1.config.reward import RewardSection
from mrg_r1.config.sections import (
    CheckpointSection,
    DataSection,
    EngineSection,
    EvaluationSection,
    GrpoSection,
    OptimizerSection,
    PolicySection,
    PromptSection,
    ResumeSection,
    RolloutSection,
    Section,
    SftSection,
    TrackingSection,
)

# keys of version 0.1.0, and what they are called today
RENAMED = {
    "evaluation.judge": "evaluation.held_out_labeler",
    "evaluation.judge_tokenizer": "evaluation.held_out_tokenizer",
    "evaluation.judge_device": "evaluation.held_out_device",
}


class Recipe(Section):
    """One experiment. `python launch/train.py --help` lists every field with its default."""

    output_dir: Path = Field(
        description="RUN: where everything of this run is written; a run resumes when it holds a checkpoint. yours"
    )
    seed: int = Field(0, ge=0, description="Seeds data order, sampling, initialisation and bootstraps. ours")
    steps: int = Field(ge=1, description="Outer steps: rollouts (GRPO) or optimizer steps (SFT). yours")
    phases: Literal["all", "rollout", "update"] = Field(
        "all",
        description="rollout: sample, score and save; update: learn from `experience`, sample nothing "
        "(docs/debugging.md). ours",
    )
    experience: Path | None = Field(
        None, description="What phases=update learns from: RUN/experience, or a file of one step. ours"
    )
    control: Literal["sft", "rft", "random"] | None = Field(
        None,
        description="What GRPO is compared with (docs/recipes.md), in place of it: further SFT for the time of "
        "`control_of`; rft, the likelihood of each group's best report; random, each group's rewards dealt to its "
        "reports at random. ours",
    )
    control_of: Path | None = Field(
        None, description="The finished run whose processor seconds `control: sft` gets. yours"
    )
    data: DataSection
    prompt: PromptSection = Field(default_factory=PromptSection)
    policy: PolicySection
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    grpo: GrpoSection = Field(default_factory=GrpoSection)
    reward: RewardSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    sft: SftSection = Field(default_factory=SftSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    resume: ResumeSection = Field(default_factory=ResumeSection)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.data.min_pixels > self.data.max_pixels:
            raise ValueError(
                f"data.min_pixels {self.data.min_pixels} is larger than data.max_pixels {self.data.max_pixels}"
            )
        if not self.reward.weights or all(weight == 0 for weight in self.reward.weights.values()):
            raise ValueError("reward.weights: no term has a weight, so every advantage would be 0")
        if self.rollout.reuse_prefill and self.grpo.inner_iterations * self.grpo.minibatches > 1:
            raise ValueError(
                f"rollout.reuse_prefill with grpo.inner_iterations {self.grpo.inner_iterations} and "
                f"grpo.minibatches {self.grpo.minibatches}: after the first update the prompts' states are those "
                "of older weights; set it to false"
            )
        if self.rollout.reuse_prefill and self.policy.lora.targets != "language":
            raise ValueError(
                f"rollout.reuse_prefill with policy.lora.targets {self.policy.lora.targets}: the prompts' states, kept "
                "from the rollout, would have no gradient for merger and tower; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _control(self) -> Recipe:
        if self.control != "sft" and self.control_of is not None:
            raise ValueError(f"control_of {self.control_of} with control {self.control}: only control sft has a time")
        if self.control == "sft":
            if self.control_of is None and self.sft.max_cpu_seconds is None and self.sft.max_seconds is None:
                raise ValueError(
                    "control sft without a time: give the finished run that it is compared with as control_of=RUN, or "
                    "sft.max_cpu_seconds"
                )
            if self.sft.stop_at is not None:
                raise ValueError(
                    f"control sft with sft.stop_at {self.sft.stop_at}: time ends it, without validations; set null"
                )
        if self.control == "rft" and self.grpo.correction != "none":
            raise ValueError(
                f"control rft with grpo.correction {self.grpo.correction}: the likelihood of the best report has no "
                "ratio to correct; set it to none"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises:
        RecipeError: unreadable file, unknown key (with the nearest known one), a key that has another name today, a
            value of the wrong type or range, fields that contradict.
    """
    content = _read(path)
    for override in overrides:
        _apply(content, override)
    return _validated(content, path)


def load_run(run: Path) -> Recipe:
    """The recipe that RUN was started with. Its config.yaml was written by this program, so keys of version 0.1.0 are
    read under today's names.

    Raises:
        RecipeError: no config.yaml there, or one that cannot be read.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise RecipeError(f"{run}: no config.yaml in it; give the output_dir of a run")
    content = _read(path)
    for old, new in RENAMED.items():
        (section, was), name = old.split("."), new.rpartition(".")[2]
        if isinstance(content.get(section), dict) and was in content[section]:
            content[section][name] = content[section].pop(was)
    return _validated(content, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; the ones that come along are in launch/recipes/") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (data:, policy:, …), this is a {type(content).__name__}"
        )
    return content


def _validated(content: dict[str, Any], path: Path) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise RecipeError(f"{path}: {error.error_count()} problem(s)\n{problems}") from None


def check_recipe(recipe: Recipe, *, world_size: int, task: Literal["grpo", "sft", "evaluate"]) -> None:
    """Checks across fields, ranks and the disk, made before any model is loaded.

    Raises:
        RecipeError: a batch that does not divide over the ranks, phases that contradict, or a path that is not what it
            should be.
    """
    check_numbers(recipe, world_size=world_size, task=task)
    _check_paths(recipe)


def check_numbers(recipe: Recipe, *, world_size: int, task: Literal["grpo", "sft", "evaluate"]) -> None:
    """The part of `check_recipe` that looks at no file.

    Raises:
        RecipeError: a batch that does not divide over the ranks, or phases that contradict.
    """
    _check_phases(recipe, task)
    if task != "evaluate":
        _check_batches(recipe, world_size, task)


def _check_phases(recipe: Recipe, task: str) -> None:
    if recipe.phases != "all" and task != "grpo":
        script = {"sft": "launch/sft.py", "evaluate": "launch/evaluate.py"}[task]
        raise RecipeError(
            f"phases {recipe.phases}: only launch/train.py has phases; {script} wants phases=all experience=null"
        )
    if recipe.control == "sft" and recipe.phases != "all":
        raise RecipeError(f"control sft with phases {recipe.phases}: SFT has no phases; set phases=all")
    if recipe.control in ("rft", "random") and task == "sft":
        raise RecipeError(f"control {recipe.control}: it samples reports, which launch/train.py does")
    if recipe.phases == "update" and recipe.experience is None:
        raise RecipeError(
            "phases update without experience: give RUN/experience of a phases=rollout run as experience=RUN/experience"
        )
    if recipe.phases != "update" and recipe.experience is not None:
        raise RecipeError(
            f"experience {recipe.experience} with phases {recipe.phases}: only phases=update reads it; set that, "
            "or experience=null"
        )


def _check_batches(recipe: Recipe, world_size: int, task: str) -> None:
    batch, name = (
        (recipe.grpo.studies_per_step, "grpo.studies_per_step")
        if task == "grpo"
        else (recipe.sft.batch_size, "sft.batch_size")
    )
    if batch % world_size:
        lower, upper = batch // world_size * world_size, (batch // world_size + 1) * world_size
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise RecipeError(
            f"{name} {batch} does not divide over {world_size} ranks; take {nearest}, or another number of ranks"
        )
    if task == "grpo":
        learned = 1 if recipe.control == "rft" else recipe.grpo.group_size  # of each group
        rows = batch // world_size * learned
        if rows % recipe.grpo.minibatches:
            each = "the best report" if recipe.control == "rft" else f"G {learned}"
            raise RecipeError(
                f"grpo.minibatches {recipe.grpo.minibatches} does not divide the {rows} completions of a rank "
                f"({batch} studies / {world_size} ranks x {each})"
            )


def _check_paths(recipe: Recipe) -> None:
    check_manifest(recipe.data.manifest)
    check_checkpoint_directory(recipe.policy.path)
    if recipe.policy.adapter is not None:
        check_adapter(recipe.policy.adapter)
    check_deepspeed(recipe.engine.deepspeed)
    if recipe.phases != "update":
        check_labeler_path("reward.labeler", recipe.reward.labeler)
    held_out = recipe.evaluation.held_out_labeler
    if held_out is not None:
        check_labeler_path("evaluation.held_out_labeler", held_out)
        if held_out.resolve() == recipe.reward.labeler.resolve():
            raise RecipeError(held_out_is_rewarded(recipe))


def held_out_is_rewarded(recipe: Recipe) -> str:
    """What to say where the held-out labeler is the rewarded labeler."""
    return (
        f"evaluation.held_out_labeler {recipe.evaluation.held_out_labeler} is reward.labeler {recipe.reward.labeler} "
        "(equal weights): it would agree with itself, and never see a policy that fools it; give a labeler of another "
        "seed, size or training set (`mrg-r1 labeler train --seed 1`), or none"
    )


def with_trained_policy(recipe: Recipe, run: Path) -> Recipe:
    """The recipe of a finished `run` with the policy that it left: RUN/policy, where SFT has trained every parameter,
    its cold start included. RUN/adapter, of every other run, goes on top of the recipe's own policy.
    """
    trained = run / "policy"
    if recipe.sft.trainable != "all" or not (trained / "config.json").is_file():
        return recipe
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"path": trained, "adapter": None})})


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_fields() -> str:
    """Every field with its type, default, meaning and where the value comes from; the text behind `--help`."""
    lines = []
    for key, field in _leaves(Recipe, ""):
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        text, _, source = (field.description or "").rpartition(". ")
        lines.append(f"  {key}  ({default}; {source})\n      {text}.")
    return "\n".join(lines)


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value, as in steps=100 or grpo.group_size=16")
    if key.strip() in RENAMED:
        raise RecipeError(f"override {override!r}: {_renamed(key.strip())}")
    node = content
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error


def _renamed(key: str) -> str:
    return f"{key} of version 0.1.0 is called {RENAMED[key]} now; rename it"


def _explain(problem: Any) -> str:
    """One pydantic problem as a sentence: the field, the value, and for an unknown key the nearest known one."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "recipe"
    if key in RENAMED:
        return _renamed(key)
    if problem["type"] == "extra_forbidden":
        known = [name for name, _ in _leaves(Recipe, "")]
        sections = [name for name in Recipe.model_fields]
        near = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.5)
        if not near:  # a right name in the wrong section
            near = [name for name in known if name.rpartition(".")[2] == location[-1]][:1]
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; `--help` lists every key")
    if problem["type"] == "missing":
        return f"{key}: required, and not set"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return (
        message
        if message.startswith(key)
        else f"{key}: {message}" + ("" if problem["type"] == "value_error" else f" (got {problem['input']!r})")
    )
