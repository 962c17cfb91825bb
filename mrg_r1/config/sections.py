"""The sections of a recipe: every field typed, bounded, and described with where its value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mrg_r1.metrics.clinical import DEFINITIONS
from mrg_r1.metrics.radeval import RadEvalSettings
from mrg_r1.metrics.radeval_names import require_metrics

THINK_INSTRUCTION = (
    "Write the findings of this chest X-ray. First reason inside <think></think>, then give the report inside "
    "<report></report>."
)
PLAIN_INSTRUCTION = "Write the findings of this chest X-ray."


DEVICE = r"^(cpu|cuda:\d+|(GPU|MIG)-[0-9A-Za-z/-]+)$"  # physical, whatever the ranks see


def _off_is_a_word(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataSection(Section):
    manifest: Path = Field(description="Manifest of studies (JSONL), made by `mrg-r1 prepare`. yours")
    train_split: str = Field("train", description="Split to learn from. ours")
    val_split: str = Field("val", description="Split for validation and for choosing the best adapter. ours")
    test_split: str = Field("test", description="Split that the closing evaluation uses. ours")
    min_pixels: int = Field(56 * 56, ge=28 * 28, description="Smaller images are enlarged to this area. ours")
    max_pixels: int = Field(
        262_144,
        ge=28 * 28,
        description="Larger images are reduced to this area (published peers: 262,144 to 401,408). ours",
    )
    context: list[Literal["indication", "comparison", "prior_report"]] = Field(
        [],
        description="Study context written into the prompt, in this order; prior_report: of the study that `prior` "
        "names. ours",
    )
    sampling: Literal["uniform", "rare_findings"] = Field(
        "uniform",
        description="Each study once an epoch, or oftener where the labeler reads a rare finding in its report. ours",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes a rank that read images ahead; 0: a thread; None: 2 on a GPU, 0 on a CPU. ours",
    )
    check_images: bool = Field(
        True, description="Open every image once before training, so that a truncated one is named now. ours"
    )


class PromptSection(Section):
    mode: Literal["think", "plain"] = Field(
        "think", description="think: <think> then <report>; plain: the completion is the report. paper (think)"
    )
    instruction: str | None = Field(None, description="The words after the images; None takes the mode's own. ours")
    show_view: bool = Field(
        True, description="Write the view (frontal, lateral) before its image where it is known. ours"
    )
    max_tokens: int = Field(
        4096, ge=8, description="Longer prompts are refused with the study's id, never cut (a cut image is worse). ours"
    )

    @property
    def words(self) -> str:
        """The instruction that is used."""
        return self.instruction or (THINK_INSTRUCTION if self.mode == "think" else PLAIN_INSTRUCTION)


class LoraSection(Section):
    rank: int = Field(32, ge=1, description="LoRA rank (published peers: 16 to 64). ours")
    alpha: int = Field(64, ge=1, description="LoRA alpha; the update is scaled by alpha / rank. ours")
    targets: Literal["language", "language+merger", "all"] = Field(
        "language",
        description="The linear layers that LoRA is on: the language model's, those of the merger between tower and "
        "language model too, or the tower's as well (docs/method.md). ours",
    )


class PolicySection(Section):
    path: Path = Field(description="Directory of a checkpoint (config.json, safetensors, tokenizer). yours")
    adapter: Path | None = Field(
        None, description="Cold-start LoRA adapter, merged before training: it is part of the reference. ours"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the weights in the forward pass. ours"
    )
    attention: Literal["auto", "torch", "flash_attn"] = Field(
        "auto",
        description="Kernels of attention on a GPU: torch's own, which auto takes, or the package flash-attn's. ours",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory. ours"
    )
    lora: LoraSection = Field(
        default_factory=LoraSection, description="LoRA on all linear layers that its targets name. paper (LoRA)"
    )

    @model_validator(mode="after")
    def _kernels_of_its_dtype(self) -> PolicySection:
        if self.attention == "flash_attn" and self.dtype == "float32":
            raise ValueError(
                "attention flash_attn with dtype float32: it has kernels for bfloat16 alone; set policy.dtype=bfloat16 "
                "or policy.attention=torch"
            )
        return self


class RolloutSection(Section):
    max_new_tokens: int = Field(1024, ge=1, description="Longest completion. ours")
    cache_tokens: int = Field(
        262_144,
        ge=1,
        description="Tokens whose keys and values a rank holds while sampling (15 GB of a 7B model); more are "
        "sampled in parts. ours",
    )
    reuse_prefill: bool = Field(
        False,
        description="Keep the prefill's graph as the policy's prompt pass of the update (one update a rollout only): a "
        "pass over all prompts saved, for the memory of its activations while sampling. ours",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the scoring passes divide by it too. ours")
    top_p: float = Field(
        1.0, description="Only 1 is allowed in training: the sampled and the scored distribution must be one. ours"
    )
    top_k: int = Field(0, description="Only 0 is allowed in training, for the same reason. ours")

    @model_validator(mode="after")
    def _one_distribution(self) -> RolloutSection:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p {self.top_p} and top_k {self.top_k}: GRPO scores the full distribution, so only top_p 1 "
                "and top_k 0 are sampled; use temperature to sharpen"
            )
        return self


class GrpoSection(Section):
    group_size: int = Field(8, description="G, reports sampled a study; at least 2. ours")
    studies_per_step: int = Field(
        8, ge=1, description="Studies a step over all ranks; divisible by the number of ranks. ours"
    )
    minibatches: int = Field(1, ge=1, description="Optimizer steps that one rollout is cut into. ours")
    inner_iterations: int = Field(1, ge=1, description="mu: passes over each rollout. ours")
    clip_low: float = Field(0.2, gt=0, lt=1, description="eps_low of the clipped ratio. ours")
    clip_high: float = Field(0.28, gt=0, description="eps_high of the clipped ratio (DAPO). ours")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="token: GRPO; sequence: GSPO, wants clip_low and clip_high near 3e-4. ours"
    )
    beta: float = Field(
        0.02, ge=0, description="Weight of the KL to the reference; 0 leaves the reference pass out. ours"
    )
    kl: Literal["k3", "k3_unbiased"] = Field(
        "k3",
        description="The penalty's estimate; k3_unbiased multiplies k3 by the ratio, so that its gradient is that of "
        "KL(policy || reference). ours",
    )
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo",
        description="Mean of token means (grpo), over all tokens (dapo), or of sums over max_new_tokens (dr_grpo). "
        "ours",
    )
    advantage_scale: Literal["group", "batch", "none"] = Field(
        "group", description="What the centred reward is divided by. paper (group)"
    )
    mask_truncated: bool = Field(False, description="Leave completions without EOS out of the loss. ours")
    correction: Literal["none", "tis"] = Field(
        "none", description="Weight tokens by scored / sampled probability, capped. ours"
    )
    correction_cap: float = Field(2.0, gt=0, description="Cap of the correction's weight. ours")
    max_resample: int = Field(0, ge=0, description="Times that a zero-signal group is sampled again. ours")

    @model_validator(mode="after")
    def _consistent(self) -> GrpoSection:
        if self.group_size < 2:
            raise ValueError(
                f"group_size {self.group_size}: a group of one has no baseline, its advantage is always 0; take at "
                "least 2"
            )
        if self.ratio == "sequence" and self.clip_high > 0.05:
            raise ValueError(
                f"clip_high {self.clip_high} with ratio sequence: a whole sequence's geometric mean hardly moves; "
                "GSPO clips near 3e-4 (set grpo.clip_low and grpo.clip_high)"
            )
        return self


class OptimizerSection(Section):
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate (published peers with LoRA: 1e-5). ours")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay. ours")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas. ours")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up. ours")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="After warm-up, to a tenth of the peak at the last step, or at the end of the time that "
        "sft.max_seconds or sft.max_cpu_seconds gives. ours",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this. ours")


class SftSection(Section):
    trainable: Literal["lora", "all"] = Field(
        "lora", description="Train LoRA, or every parameter (a random tiny policy needs all). ours"
    )
    batch_size: int = Field(32, ge=1, description="Studies a step over all ranks. ours")
    stop_at: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Stop once validation disease_micro13 F1 reaches this (early-stopped cold start). ours",
    )
    max_seconds: float | None = Field(
        None, gt=0, description="Stop after this many seconds of training steps (equal-time controls). ours"
    )
    max_cpu_seconds: float | None = Field(
        None,
        gt=0,
        description="The same in processor seconds of rank 0 and its share of the labeler, which other work on the "
        "machine does not stretch (tables, the demo's control). ours",
    )
    skip_studies: int = Field(0, ge=0, description="Start this far into the seeded stream of studies. ours")


class EngineSection(Section):
    deepspeed: Path = Field(
        Path("ds_configs/zero2.json"),
        description="DeepSpeed configuration; `auto` values are filled in from the recipe. ours",
    )
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        description="Tokens of one forward and backward pass on a rank: prompts, once a study, and completions. ours",
    )
    max_skipped: int = Field(
        5,
        ge=1,
        description="Steps in a row that may be skipped because a loss, gradient or reward is not finite; then the run "
        "stops. ours",
    )
    hang_timeout: float = Field(
        1800,
        gt=0,
        description="Seconds in which a rank must have come somewhere; then it is named and the run stops. ours",
    )


class EvaluationSection(Section):
    every: int = Field(
        0, ge=0, description="Validate every this many steps and keep the best adapter; 0: only at the end. ours"
    )
    max_studies: int | None = Field(
        None, ge=1, description="At most this many studies of the validation split; None: all. ours"
    )
    max_test_studies: int | None = Field(
        None, ge=1, description="At most this many studies of the test split; None: all. ours"
    )
    batch_size: int = Field(16, ge=1, description="Studies decoded together on each rank. ours")
    before: bool = Field(
        True,
        description="Evaluate the test split before training too, for summary.json's `before`, and in GRPO "
        "validate: the start is then a candidate for the best adapter. ours",
    )
    test: bool = Field(True, description="Evaluate the test split at the end. ours")
    held_out_labeler: Path | None = Field(
        None,
        description="A second labeler (a directory, or a CheXbert file), never rewarded: it scores every evaluation "
        "beside reward.labeler, so that a policy that learns what one labeler misreads is seen; another seed, "
        "size or training set. None: no held-out labeler. ours",
    )
    held_out_tokenizer: str | None = Field(
        None, description="Tokenizer directory for a held-out labeler that is a CheXbert checkpoint file. yours"
    )
    held_out_device: str = Field(
        "cpu",
        pattern=DEVICE,
        description="Physical device of the held-out labeler on the first node, as reward.device: cpu, cuda:7 or a "
        "UUID. ours",
    )
    lexical: Literal["raw", "r2gen-iu", "r2gen-mimic", "off"] = Field(
        "raw",
        description="Cleaning of texts before closing evaluations score BLEU, ROUGE-L, CIDEr and, where Java runs, "
        "METEOR (docs/scores.md); off: none of them. ours",
    )
    radeval: list[str] = Field(
        [],
        description="Metrics of RadEval that closing evaluations score too, in a process of radeval.python "
        "(docs/scores.md), as [radgraph, ratescore, bertscore, radcliq]. ours",
    )
    bootstrap_samples: int = Field(1000, ge=100, description="Bootstrap samples of the 95 % intervals. ours")
    select: str = Field(
        "disease_micro13",
        description="Validation score that chooses the best adapter: a definition of clinical efficacy "
        "(docs/ce-definitions.md), or mean_reward. ours",
    )

    _bare_off = field_validator("lexical", mode="before")(_off_is_a_word)

    @field_validator("radeval")
    @classmethod
    def _kept_here(cls, radeval: list[str]) -> list[str]:
        require_metrics(radeval, how=" in a recipe; score the run's predictions with `mrg-r1 score --send-text-to`")
        return list(dict.fromkeys(radeval))

    @field_validator("select")
    @classmethod
    def _one_that_is_scored(cls, select: str) -> str:
        if select not in (*DEFINITIONS, "mean_reward"):
            raise ValueError(f"{select!r} is no score of a validation; there are {', '.join(DEFINITIONS)}, mean_reward")
        return select


class RadEvalSection(Section):
    python: str | None = Field(
        None, description="Interpreter of an environment that has RadEval (`make radeval` makes one). yours"
    )
    device: str = Field(
        "cpu",
        pattern=DEVICE,
        description="Physical device of its models, as reward.device: cpu, cuda:7 or a UUID. ours",
    )
    workers: int = Field(
        1, ge=1, description="Processes of it that share the reports to be rewarded, each with models of its own. ours"
    )
    download: bool = Field(False, description="Let it fetch weights that are not in the hub's cache yet. ours")

    def settings(self, metrics: tuple[str, ...], *, threads: int) -> RadEvalSettings:
        """How a child for these metrics is started."""
        assert self.python is not None  # the recipe has been checked
        return RadEvalSettings(self.python, metrics, self.device, max(1, threads), self.download)


class TrackingSection(Section):
    wandb: Literal["off", "offline", "online"] = Field(
        "offline", description="wandb gets numbers; offline keeps them here. ours"
    )
    wandb_project: str = Field("mrg-r1", description="Project name in wandb. ours")
    tensorboard: Literal["off"] | Path = Field(
        "off",
        description="A directory where TensorBoard's event files of this run go, in a folder of the run's name: the "
        "numbers that wandb gets. It needs the package tensorboard. ours",
    )
    share_text: bool = Field(False, description="Also give wandb a few reports of each validation: patient data. ours")
    share_images: bool = Field(
        False, description="Also give wandb a few radiographs of each validation: patient data. ours"
    )
    completions_every: int = Field(
        1, ge=0, description="Write the sampled reports every this many steps; 0: never. ours"
    )

    _bare_off = field_validator("wandb", "tensorboard", mode="before")(_off_is_a_word)


class CheckpointSection(Section):
    every: int = Field(50, ge=1, description="Write a checkpoint every this many steps; the last step always. ours")
    keep: int = Field(2, ge=1, description="Checkpoints kept, newest first. ours")


class ResumeSection(Section):
    allow_changes: bool = Field(
        False,
        description="Go on from RUN's checkpoint, or learn from saved experience, under a recipe that differs from its "
        "own. ours",
    )
