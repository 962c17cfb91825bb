"""The recipe: one YAML file is one experiment. Typed, validated, and every field says where its value comes from.

Each description ends in one word: `paper` (arXiv 2512.16145 states it), `ours` (the paper is silent; we chose), or `yours`
(a path or a name that only you can know). `load_recipe` reads the file, applies `key=value` overrides, refuses unknown keys
with the nearest known one, and checks what can be checked before any model is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

THINK_INSTRUCTION = (
    "Write the findings of this chest X-ray. First reason inside <think></think>, then give the report inside <report></report>."
)
PLAIN_INSTRUCTION = "Write the findings of this chest X-ray."


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the field, the value and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataSection(_Section):
    manifest: Path = Field(description="Manifest of studies (JSONL), made by `mrg-r1 prepare`. yours")
    train_split: str = Field("train", description="Split to learn from. ours")
    val_split: str = Field("val", description="Split for validation and for choosing the best adapter. ours")
    test_split: str = Field("test", description="Split that the closing evaluation uses. ours")
    min_pixels: int = Field(56 * 56, ge=28 * 28, description="Smaller images are enlarged to this area. ours")
    max_pixels: int = Field(
        262_144, ge=28 * 28, description="Larger images are reduced to this area (published peers: 262,144 to 401,408). ours"
    )
    context: list[Literal["indication", "comparison", "prior_report"]] = Field(
        [], description="Study context written into the prompt, in this order; prior_report: of the study that `prior` names. ours"
    )
    sampling: Literal["uniform", "rare_findings"] = Field(
        "uniform", description="Each study once an epoch, or oftener where the labeler reads a rare finding in its report. ours"
    )
    workers: int | None = Field(
        None, ge=0, description="Processes a rank that read images ahead; 0: a thread; None: 2 on a GPU, 0 on a CPU. ours"
    )
    check_images: bool = Field(True, description="Open every image once before training, so that a truncated one is named now. ours")


class PromptSection(_Section):
    mode: Literal["think", "plain"] = Field(
        "think", description="think: <think> then <report>; plain: the completion is the report. paper (think)"
    )
    instruction: str | None = Field(None, description="The words after the images; None takes the mode's own. ours")
    show_view: bool = Field(True, description="Write the view (frontal, lateral) before its image where it is known. ours")
    max_tokens: int = Field(
        4096, ge=8, description="Longer prompts are refused with the study's id, never cut (a cut image is worse). ours"
    )

    @property
    def words(self) -> str:
        """The instruction that is used."""
        return self.instruction or (THINK_INSTRUCTION if self.mode == "think" else PLAIN_INSTRUCTION)


class LoraSection(_Section):
    rank: int = Field(32, ge=1, description="LoRA rank (published peers: 16 to 64). ours")
    alpha: int = Field(64, ge=1, description="LoRA alpha; the update is scaled by alpha / rank. ours")


class PolicySection(_Section):
    path: Path = Field(description="Directory of a Qwen2.5-VL checkpoint (config.json, safetensors, tokenizer). yours")
    adapter: Path | None = Field(None, description="Cold-start LoRA adapter, merged before training: it is part of the reference. ours")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Precision of the weights in the forward pass. ours")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory. ours")
    lora: LoraSection = Field(default_factory=LoraSection, description="LoRA on all linear layers of the language model. paper (LoRA)")


class RolloutSection(_Section):
    max_new_tokens: int = Field(1024, ge=1, description="Longest completion. ours")
    cache_tokens: int = Field(
        262_144,
        ge=1,
        description="Tokens whose keys and values a rank holds while sampling (15 GB of a 7B model); more are sampled in parts. ours",
    )
    reuse_prefill: bool = Field(
        False,
        description="Keep the prefill's graph as the policy's prompt pass of the update (one update a rollout only): a pass over all "
        "prompts saved, for the memory of its activations while sampling. ours",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the scoring passes divide by it too. ours")
    top_p: float = Field(1.0, description="Only 1 is allowed in training: the sampled and the scored distribution must be one. ours")
    top_k: int = Field(0, description="Only 0 is allowed in training, for the same reason. ours")

    @model_validator(mode="after")
    def _one_distribution(self) -> RolloutSection:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p {self.top_p} and top_k {self.top_k}: GRPO scores the full distribution, so only top_p 1 and top_k 0 are sampled; "
                "use temperature to sharpen"
            )
        return self


class GrpoSection(_Section):
    group_size: int = Field(8, description="G, reports sampled a study; at least 2. ours")
    studies_per_step: int = Field(8, ge=1, description="Studies a step over all ranks; divisible by the number of ranks. ours")
    minibatches: int = Field(1, ge=1, description="Optimizer steps that one rollout is cut into. ours")
    inner_iterations: int = Field(1, ge=1, description="mu: passes over each rollout. ours")
    clip_low: float = Field(0.2, gt=0, lt=1, description="eps_low of the clipped ratio. ours")
    clip_high: float = Field(0.28, gt=0, description="eps_high of the clipped ratio (DAPO). ours")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="token: GRPO; sequence: GSPO, wants clip_low and clip_high near 3e-4. ours"
    )
    beta: float = Field(0.02, ge=0, description="Weight of the KL to the reference; 0 leaves the reference pass out. ours")
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo", description="Mean of token means (grpo), over all tokens (dapo), or of sums over max_new_tokens (dr_grpo). ours"
    )
    advantage_scale: Literal["group", "batch", "none"] = Field("group", description="What the centred reward is divided by. paper (group)")
    mask_truncated: bool = Field(False, description="Leave completions without EOS out of the loss. ours")
    correction: Literal["none", "tis"] = Field("none", description="Weight tokens by scored / sampled probability, capped. ours")
    correction_cap: float = Field(2.0, gt=0, description="Cap of the correction's weight. ours")
    max_resample: int = Field(0, ge=0, description="Times that a zero-signal group is sampled again. ours")

    @model_validator(mode="after")
    def _consistent(self) -> GrpoSection:
        if self.group_size < 2:
            raise ValueError(f"group_size {self.group_size}: a group of one has no baseline, its advantage is always 0; take at least 2")
        if self.ratio == "sequence" and self.clip_high > 0.05:
            raise ValueError(
                f"clip_high {self.clip_high} with ratio sequence: a whole sequence's geometric mean hardly moves; GSPO clips near 3e-4 "
                "(set grpo.clip_low and grpo.clip_high)"
            )
        return self


class RewardSection(_Section):
    labeler: Path = Field(description="Labeler: a directory of `mrg-r1 labeler train`, or a CheXbert file. yours")
    tokenizer: str | None = Field(None, description="Tokenizer directory for a CheXbert checkpoint file (bert-base-uncased). yours")
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda:\d+|(GPU|MIG)-[0-9A-Za-z/-]+)$",
        description="Physical device of the labeler, whatever the ranks see: cpu, cuda:7 (nvidia-smi's number) or a UUID. ours",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of the labeler's weights. ours")
    timeout: float = Field(
        600, gt=0, description="Seconds after which a reward service that is at work on one batch is taken for stuck and restarted. ours"
    )
    weights: dict[str, float] = Field(
        {"mccs": 0.75, "format": 0.25},
        description="Terms and weights: mccs, ccs, ce_f1, bleu4, rouge_l, length, format, module:function. paper",
    )
    margin: float = Field(0.5, ge=0, lt=1, description="m of MCCS; the paper's value is not known, `mrg-r1 reward-card` suggests one. ours")
    margin_end: float | None = Field(None, ge=0, lt=1, description="The margin moves to this one in a straight line; None: it stays. ours")
    margin_steps: int | None = Field(None, ge=1, description="Steps after which margin_end is reached. ours")
    ccs_weights: Literal["equal", "inverse_prevalence"] = Field(
        "equal",
        description="Weights inside the cosine of ccs and mccs: equal, or rare findings of the training reports count more. paper (equal)",
    )
    format: Literal["binary", "graded"] = Field("binary", description="Format reward: all rules, or the share of them kept. ours")
    normalise: Literal["total", "per_term"] = Field(
        "total", description="Normalise the weighted sum, or each term in its group before summing. ours"
    )

    @model_validator(mode="after")
    def _annealed(self) -> RewardSection:
        if (self.margin_end is None) != (self.margin_steps is None):
            raise ValueError(
                f"margin_end {self.margin_end} and margin_steps {self.margin_steps}: an annealed margin needs both, a constant one neither"
            )
        return self

    def margin_at(self, step: int) -> float:
        """m of the outer step `step`, counted from 0."""
        if self.margin_end is None or self.margin_steps is None:
            return self.margin
        return self.margin + (self.margin_end - self.margin) * min(step / self.margin_steps, 1.0)


class OptimizerSection(_Section):
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate (published peers with LoRA: 1e-5). ours")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay. ours")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas. ours")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up. ours")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up, to a tenth of the peak at the last step. ours"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this. ours")


class SftSection(_Section):
    trainable: Literal["lora", "all"] = Field("lora", description="Train LoRA, or every parameter (a random tiny policy needs all). ours")
    batch_size: int = Field(32, ge=1, description="Studies a step over all ranks. ours")
    stop_at: float | None = Field(
        None, gt=0, le=1, description="Stop once validation disease_micro13 F1 reaches this (early-stopped cold start). ours"
    )
    max_seconds: float | None = Field(None, gt=0, description="Stop after this many seconds of training steps (equal-time controls). ours")
    skip_studies: int = Field(0, ge=0, description="Start this far into the seeded stream of studies. ours")


class EngineSection(_Section):
    deepspeed: Path = Field(
        Path("ds_configs/zero2.json"), description="DeepSpeed configuration; `auto` values are filled in from the recipe. ours"
    )
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        description="Tokens of one forward and backward pass on a rank: prompts, once a study, and completions. ours",
    )
    max_skipped: int = Field(
        5, ge=1, description="Steps in a row that may be skipped because a loss, gradient or reward is not finite; then the run stops. ours"
    )
    hang_timeout: float = Field(
        1800, gt=0, description="Seconds in which a rank must have come somewhere; then it is named and the run stops. ours"
    )


class EvaluationSection(_Section):
    every: int = Field(0, ge=0, description="Validate every this many steps and keep the best adapter; 0: only at the end. ours")
    max_studies: int | None = Field(None, ge=1, description="At most this many studies of the validation split; None: all. ours")
    max_test_studies: int | None = Field(None, ge=1, description="At most this many studies of the test split; None: all. ours")
    batch_size: int = Field(16, ge=1, description="Studies decoded together on each rank. ours")
    before: bool = Field(True, description="Evaluate the test split before training too, for summary.json's `before`. ours")
    test: bool = Field(True, description="Evaluate the test split at the end. ours")
    bootstrap_samples: int = Field(1000, ge=100, description="Bootstrap samples of the 95 % intervals. ours")
    select: Literal["disease_micro13", "disease_macro13", "example14", "r2gen_micro14", "mean_reward"] = Field(
        "disease_micro13", description="Validation score that chooses the best adapter. ours"
    )


class TrackingSection(_Section):
    wandb: Literal["off", "offline", "online"] = Field("offline", description="wandb gets numbers only, never texts or images. ours")
    wandb_project: str = Field("mrg-r1", description="Project name in wandb. ours")
    completions_every: int = Field(1, ge=0, description="Write the sampled reports every this many steps; 0: never. ours")


class CheckpointSection(_Section):
    every: int = Field(50, ge=1, description="Write a checkpoint every this many steps; the last step always. ours")
    keep: int = Field(2, ge=1, description="Checkpoints kept, newest first. ours")


class ResumeSection(_Section):
    allow_changes: bool = Field(
        False, description="Go on from RUN's checkpoint, or learn from saved experience, under a recipe that differs from its own. ours"
    )


class Recipe(_Section):
    """One experiment. `python launch/train.py --help` lists every field with its default."""

    output_dir: Path = Field(description="RUN: where everything of this run is written; a run resumes when it holds a checkpoint. yours")
    seed: int = Field(0, ge=0, description="Seeds data order, sampling, initialisation and bootstraps. ours")
    steps: int = Field(ge=1, description="Outer steps: rollouts (GRPO) or optimizer steps (SFT). yours")
    phases: Literal["all", "rollout", "update"] = Field(
        "all",
        description="rollout: sample, score and save; update: learn from `experience`, sample nothing (docs/debugging.md). ours",
    )
    experience: Path | None = Field(None, description="What phases=update learns from: RUN/experience, or a file of one step. ours")
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
            raise ValueError(f"data.min_pixels {self.data.min_pixels} is larger than data.max_pixels {self.data.max_pixels}")
        if not self.reward.weights or all(weight == 0 for weight in self.reward.weights.values()):
            raise ValueError("reward.weights: no term has a weight, so every advantage would be 0")
        if self.rollout.reuse_prefill and self.grpo.inner_iterations * self.grpo.minibatches > 1:
            raise ValueError(
                f"rollout.reuse_prefill with grpo.inner_iterations {self.grpo.inner_iterations} and grpo.minibatches "
                f"{self.grpo.minibatches}: after the first update the prompts' states are those of older weights; set it to false"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises:
        RecipeError: unreadable file, unknown key (with the nearest known one), a value of the wrong type or range, fields that contradict.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; the ones that come along are in launch/recipes/") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (data:, policy:, …), this is a {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise RecipeError(f"{path}: {error.error_count()} problem(s)\n{problems}") from None


def check_recipe(recipe: Recipe, *, world_size: int, task: Literal["grpo", "sft", "evaluate"]) -> None:
    """Checks across fields, ranks and the disk, made before any model is loaded.

    Raises:
        RecipeError: a batch that does not divide over the ranks, phases that contradict, or a path that is not what it should be.
    """
    _check_phases(recipe, task)
    if task != "evaluate":
        _check_batches(recipe, world_size, task)
    _check_paths(recipe)


def _check_phases(recipe: Recipe, task: str) -> None:
    if recipe.phases != "all" and task != "grpo":
        script = {"sft": "launch/sft.py", "evaluate": "launch/evaluate.py"}[task]
        raise RecipeError(f"phases {recipe.phases}: only launch/train.py has phases; {script} wants phases=all experience=null")
    if recipe.phases == "update" and recipe.experience is None:
        raise RecipeError("phases update without experience: give RUN/experience of a phases=rollout run as experience=RUN/experience")
    if recipe.phases != "update" and recipe.experience is not None:
        raise RecipeError(
            f"experience {recipe.experience} with phases {recipe.phases}: only phases=update reads it; set that, or experience=null"
        )


def _check_batches(recipe: Recipe, world_size: int, task: str) -> None:
    batch, name = (recipe.grpo.studies_per_step, "grpo.studies_per_step") if task == "grpo" else (recipe.sft.batch_size, "sft.batch_size")
    if batch % world_size:
        lower, upper = batch // world_size * world_size, (batch // world_size + 1) * world_size
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise RecipeError(f"{name} {batch} does not divide over {world_size} ranks; take {nearest}, or another number of ranks")
    if task == "grpo":
        rows = batch // world_size * recipe.grpo.group_size
        if rows % recipe.grpo.minibatches:
            raise RecipeError(
                f"grpo.minibatches {recipe.grpo.minibatches} does not divide the {rows} completions of a rank "
                f"({batch} studies / {world_size} ranks x G {recipe.grpo.group_size})"
            )


def _check_paths(recipe: Recipe) -> None:
    if not recipe.data.manifest.is_file():
        raise RecipeError(f"data.manifest {recipe.data.manifest}: no such file; `mrg-r1 prepare` makes one")
    check_checkpoint_directory(recipe.policy.path)
    if recipe.phases != "update" and not recipe.reward.labeler.exists():
        raise RecipeError(f"reward.labeler {recipe.reward.labeler}: no such file or directory; `mrg-r1 labeler train` makes one")
    if recipe.policy.adapter is not None and not (recipe.policy.adapter / "adapter_config.json").is_file():
        raise RecipeError(f"policy.adapter {recipe.policy.adapter}: no adapter_config.json there; give the adapter/ folder of a run")
    if not recipe.engine.deepspeed.is_file():
        raise RecipeError(f"engine.deepspeed {recipe.engine.deepspeed}: no such file; ds_configs/ has zero1.json to zero3.json")


def check_checkpoint_directory(path: Path) -> None:
    """Refuse a directory that is not a Qwen2.5-VL checkpoint.

    Raises:
        RecipeError: names policy.path, what was found there and the remedy.
    """
    config = path / "config.json"
    if not config.is_file():
        raise RecipeError(f"policy.path {path}: no config.json there; give the directory of a Qwen2.5-VL checkpoint")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise RecipeError(f"policy.path {path}: config.json is not JSON ({error}); fetch the checkpoint again") from error
    if model_type != "qwen2_5_vl":
        raise RecipeError(f"policy.path {path}: config.json says model_type {model_type!r}; a Qwen2.5-VL checkpoint says 'qwen2_5_vl'")
    if not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"policy.path {path}: no *.safetensors there; the download is incomplete, or the weights are a pickle (not loaded)"
        )


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


def _explain(problem: Any) -> str:
    """One pydantic problem as a sentence: the field, the value, and for an unknown key the nearest known one."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "recipe"
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
