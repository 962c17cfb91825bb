"""The memory of a run, by formula: sizes of a policy and numbers of a recipe enter, bytes of a device by phase and part
leave.

Nothing is loaded. docs/memory.md has each term with the place in the code that it comes from, and what was measured
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mrg_r1.config.recipe import Recipe
from mrg_r1.engine.config import read_config
from mrg_r1.policy.logprobs import CHUNK_ELEMENTS
from mrg_r1.policy.packing import plan_micro_batches
from mrg_r1.policy.shape import PolicyShape

Parts = dict[str, int]  # name -> bytes
Task = Literal["grpo", "sft", "evaluate"]

# Allowances, not measured: what no tensor of ours accounts for on a GPU.
CONTEXT_BYTES = 1_000_000_000  # CUDA context, kernels, cuBLAS workspaces, NCCL's buffers
ALLOCATOR_SHARE = 0.05  # of everything else: blocks that torch's allocator holds and cannot give to another size
PROCESSES = "processes (allowance)"
# of own keys and values: `Decoder.compact` copies the keys, at most three quarters of them, before the old ones go
_COMPACTING = 0.375
_PROMPT_WORDS = 48  # tokens of the chat template around the words, and
_IMAGE_WORDS = 8  # of a view's name and the marks around an image: generous for published tokenizers
_CONTEXT_WORDS = 96  # of an indication or a comparison
# of the labeler's batches, and what a BERT-base's layer has of a token at once
_LABELER_TOKENS, _LABELER_VALUES = (2048, 12_000)


@dataclass(frozen=True)
class Workload:
    """What one rank does in a step."""

    task: Task
    bytes: int  # of a weight or an activation: 2 in bfloat16, 4 in float32
    stage: int  # ZeRO
    world_size: int
    lora_rank: int | None  # None: every parameter is trained
    studies: int  # of a step, on this rank
    group_size: int
    prompt_tokens: int  # of a study, its images included
    image_tokens: int  # of a study, over its images
    new_tokens: int
    cache_tokens: int
    micro_batch_tokens: int
    recompute: bool
    reuse_prefill: bool
    evaluated: int  # studies decoded together in evaluation; 0: nothing is evaluated
    device: Literal["cuda", "cpu"]
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 50_000_000  # elements of ZeRO's reduction bucket
    labeler_bytes: int = 0  # the labeler's weights, where they lie on this device
    part: Literal["all", "rollout", "update"] = "all"  # the recipe's `phases`
    lora_targets: str = "language"  # `policy.lora.targets`

    @property
    def cut(self) -> int:
        """Over how many ranks frozen weights are cut."""
        return self.world_size if self.stage == 3 else 1


@dataclass(frozen=True)
class Prediction:
    """Bytes of a device, by phase and part."""

    phases: dict[str, Parts]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())


def predict(shape: PolicyShape, work: Workload) -> Prediction:
    """The memory of a rank's device in each phase of a step."""
    resident = resting_parts(shape, work)
    images = _image_parts(shape, work, _encoded(work))
    phases = {"vision": {**resident, **images, "vision tower's activations": _tower(shape, work, _encoded(work))}}
    if work.task == "evaluate":
        pass  # below
    elif work.task == "grpo":
        graph = (
            {"prompts' graph (reuse_prefill)": _prompt_graph(shape, work, work.studies)} if work.reuse_prefill else {}
        )
        phases["rollout"] = {**resident, **images, **graph, **_rollout_parts(shape, work)}
        phases["update"] = {**resident, **images, **graph, **_update_parts(shape, work)}
    else:
        phases["update"] = {**resident, **images, **_update_parts(shape, work)}
    if work.evaluated:
        alone = replace(work, studies=work.evaluated, group_size=1, cache_tokens=10**12, reuse_prefill=False)
        shown = _image_parts(shape, alone, alone.studies)
        phases["evaluation"] = {**resident, **shown, **_rollout_parts(shape, alone)}
    left_out = {"all": None, "rollout": "update", "update": "rollout"}[work.part]
    return Prediction({name: _with_allowance(parts, work) for name, parts in phases.items() if name != left_out})


def resting_parts(shape: PolicyShape, work: Workload) -> Parts:
    """What a device holds from the first update to the end: weights, and the state of what is trained."""
    b, ranks = work.bytes, work.world_size
    away = work.offload_parameters and work.stage == 3
    parts = {
        "language model": 0 if away else shape.language_parameters * b // work.cut,
        "vision tower": 0 if away else shape.vision.parameters * b // work.cut,
    }
    if work.labeler_bytes:
        parts["labeler"] = work.labeler_bytes + _LABELER_TOKENS * _LABELER_VALUES * 4
    trained = _trained(shape, work)
    if work.lora_rank is not None:
        parts["LoRA"] = trained * b
    if work.task == "evaluate":
        return parts
    share = trained if work.stage == 1 else trained // ranks
    # memory that is never touched is no memory on a CPU
    bucket = work.bucket if work.device == "cuda" else min(work.bucket, trained)
    parts["gradients"] = (share + bucket) * b
    if not work.offload_optimizer:
        parts["fp32 masters, gradients"] = 8 * trained // ranks
        parts["Adam's moments"] = 8 * trained // ranks
    return parts


def _trained(shape: PolicyShape, work: Workload) -> int:
    """Elements that are trained."""
    return shape.parameters if work.lora_rank is None else shape.lora_parameters(work.lora_rank, work.lora_targets)


def _image_parts(shape: PolicyShape, work: Workload, studies: int) -> Parts:
    """Pixels, float32, and features: both stay through a step."""
    tokens, vision = studies * work.image_tokens, shape.vision
    kept = {}
    if work.lora_rank is not None and work.lora_targets == "language+merger":
        kept = {"what the merger starts from": tokens * vision.before_merger * work.bytes}
    return {
        "pixels": tokens * vision.patches * vision.patch_values * 4,
        "vision features": tokens * vision.out * work.bytes,
        **kept,
    }


def _encoded(work: Workload) -> int:
    """Studies whose images are in the tower at once."""
    if work.task != "sft":
        return work.studies
    return max(1, min(work.studies, work.micro_batch_tokens // (work.prompt_tokens + work.new_tokens)))


def _tower(shape: PolicyShape, work: Workload, studies: int) -> int:
    vision = shape.vision
    patches = studies * work.image_tokens * vision.patches
    return patches * work.bytes * (2 * vision.hidden + max(8 * vision.hidden, 3 * vision.intermediate))


def _rollout_parts(shape: PolicyShape, work: Workload) -> Parts:
    """Beside what rests: the merged decoder, keys and values of the largest part, and a decode step."""
    b = work.bytes
    copies = 2 if work.device == "cpu" and b == 4 else 1  # float32 on a CPU: oneDNN's layout beside the merged matrices
    parts = {"merged decoder": copies * shape.layers * shape.layer_matrices * b}
    if work.stage == 3:
        parts["embeddings and head"] = shape.vocabulary * shape.hidden * b * (1 if shape.tied else 2)
    at_once = max(1, min(work.studies, work.cache_tokens // (work.prompt_tokens + work.group_size * work.new_tokens)))
    prompt_tokens, rows = at_once * work.prompt_tokens, at_once * work.group_size
    one_layout = prompt_tokens * shape.cache_values * b
    own = rows * work.new_tokens * shape.cache_values * b
    parts["prompts' keys and values"], parts["completions' keys and values"] = one_layout, own
    prefill = prompt_tokens * (3 * shape.intermediate + (4 + shape.added) * shape.hidden) * b - own
    building = 2 * one_layout  # packed, padded, and as the decoder reads them
    scores = rows * shape.heads * (work.prompt_tokens + work.new_tokens) * (2 * b + 4)
    # log-probs, and doubles that a token is drawn from
    step = rows * shape.vocabulary * (20 if work.group_size > 1 else 16) + scores
    captured = 2 if work.device == "cuda" else 1  # a graph's memory is its own
    parts["prefill or decode step"] = max(prefill, building, int(_COMPACTING * own), captured * step)
    return parts


def _prompt_graph(shape: PolicyShape, work: Workload, studies: int) -> int:
    """What the backward pass needs of so many prompts: all of a layer, but of the last one only what keys and values
    need.
    """
    b, tokens, rank = work.bytes, studies * work.prompt_tokens, work.lora_rank or 0
    if work.recompute or work.stage == 3:
        return tokens * ((shape.layers + shape.added) * shape.hidden + shape.cache_values) * b
    last = (2 + shape.added) * shape.hidden + shape.cache_values // shape.layers
    return tokens * ((shape.layers - 1) * (shape.kept_values(rank) * b + 8) + last * b)


def _update_parts(shape: PolicyShape, work: Workload) -> Parts:
    """Beside what rests: the largest pass of an update."""
    if work.lora_rank is None:
        return _whole_update_parts(shape, work)
    b, rank = work.bytes, work.lora_rank
    studies, own = _largest_pass(work)
    prompts = studies * work.prompt_tokens
    recompute = work.recompute or work.stage == 3
    kept = shape.hidden * b if recompute else shape.kept_values(rank) * b + 8  # and the norms' scales
    parts = {
        "completions' activations": own * shape.layers * kept,
        # with reuse_prefill the prompts' graph is held already, and what a pass takes of it is a copy
        "prompts' activations": prompts * shape.cache_values * b
        if work.reuse_prefill
        else _prompt_graph(shape, work, studies),
        "hidden states at the head": 4 * own * shape.hidden * b,
        **_vision_graph(shape, work, studies),
    }
    tokens = max(own, prompts)
    layer = tokens * (3 * shape.intermediate + 2 * shape.hidden) * b  # gradients of one layer's insides
    if recompute:
        layer += tokens * shape.kept_values(rank) * b
    if work.stage == 3:
        layer += shape.layer_matrices * b
    held = work.studies * work.prompt_tokens if work.reuse_prefill else prompts
    # log-probs, probabilities and their product
    chunk = min(own, max(1, CHUNK_ELEMENTS // shape.vocabulary)) * shape.vocabulary * 12
    if work.stage == 3:
        chunk += shape.vocabulary * shape.hidden * b
    parts["logits, or a layer's backward"] = max(chunk, layer + held * shape.cache_values * b)
    return parts


def _vision_graph(shape: PolicyShape, work: Workload, studies: int) -> Parts:
    """What the backward pass needs of merger and tower where LoRA is on them, of the studies of a pass."""
    if work.lora_targets == "language":
        return {}
    b, vision, tokens = work.bytes, shape.vision, studies * work.image_tokens
    recompute = work.recompute or work.stage == 3
    # a merger's input normalised, its MLP before and after the activation; the features, cut and joined
    merger = 3 * vision.before_merger + 2 * vision.out
    parts = {"merger's graph": tokens * merger * b}
    if work.lora_targets == "all":
        one = tokens * vision.patches * b * (10 * vision.hidden + 4 * vision.intermediate)
        rest = tokens * vision.patches * b * vision.hidden * vision.depth
        parts["vision tower's graph"] = rest + one if recompute else vision.depth * one
    return parts


def _whole_update_parts(shape: PolicyShape, work: Workload) -> Parts:
    """SFT of every parameter, each study one sequence (`policy/logprobs_trained.py`). An estimate: not measured."""
    b = work.bytes
    studies, own = _largest_pass(work)
    tokens = own + studies * work.prompt_tokens
    kept = (
        shape.hidden * b
        if work.recompute
        else (shape.kept_values(0) + 2 * shape.qkv_rows + 4 * shape.hidden + shape.intermediate) * b
    )
    return {
        "activations": tokens * shape.layers * kept,
        "vision tower's graph": work.image_tokens
        * studies
        * shape.vision.patches
        * shape.vision.depth
        * 16
        * shape.vision.hidden
        * b,
        # log-probs, probabilities and their product of a chunk; the head's gradient as it is summed
        "logits": min(own, max(1, CHUNK_ELEMENTS // shape.vocabulary)) * shape.vocabulary * 12
        + shape.vocabulary * shape.hidden * 4,
    }


def _largest_pass(work: Workload) -> tuple[int, int]:
    """Studies and completion tokens of the largest pass, where every completion has its full length
    (`plan_micro_batches`).
    """
    group = work.group_size if work.task == "grpo" else 1
    study_of_row = [study for study in range(work.studies) for _ in range(group)]
    plan = plan_micro_batches(
        [work.prompt_tokens] * work.studies,
        [work.new_tokens] * len(study_of_row),
        study_of_row,
        token_budget=work.micro_batch_tokens,
    )
    return max(
        ((len({study_of_row[row] for row in rows}), len(rows) * work.new_tokens) for rows in plan),
        key=lambda found: found[0] * work.prompt_tokens + found[1],
    )


def _with_allowance(parts: Parts, work: Workload) -> Parts:
    if work.device == "cpu":
        return parts
    contexts = CONTEXT_BYTES * (2 if work.labeler_bytes else 1)  # the labeler is a process of its own
    return {**parts, "CUDA and allocator (allowance)": contexts + int(ALLOCATOR_SHARE * sum(parts.values()))}


def workload_of(
    recipe: Recipe,
    shape: PolicyShape,
    *,
    task: Task,
    world_size: int,
    device: Literal["cuda", "cpu"],
    images: int,
    labeler_bytes: int = 0,
) -> Workload:
    """The workload that a recipe means, at its largest: images of `data.max_pixels`, completions of full length.

    Args:
        images: of the study that has most.
        labeler_bytes: the labeler's weights, where they lie on a rank's device.
    """
    zero = read_config(recipe.engine.deepspeed)["zero_optimization"]
    image_tokens = images * (shape.vision.image_tokens or recipe.data.max_pixels // shape.vision.pixels)
    words = _PROMPT_WORDS + len(recipe.prompt.words) // 3 + images * _IMAGE_WORDS
    words += sum(
        recipe.rollout.max_new_tokens if part == "prior_report" else _CONTEXT_WORDS for part in recipe.data.context
    )
    rank_studies = recipe.evaluation.batch_size
    if task != "evaluate":
        batch = recipe.grpo.studies_per_step if task == "grpo" else recipe.sft.batch_size
        rank_studies = max(1, batch // world_size)
    trained_whole = task == "sft" and recipe.sft.trainable == "all"
    evaluation = recipe.evaluation
    evaluates = task == "evaluate" or recipe.phases == "all" and (evaluation.test or evaluation.every > 0)
    return Workload(
        task=task,
        bytes=2 if recipe.policy.dtype == "bfloat16" else 4,
        stage=2 if task == "evaluate" else zero["stage"],  # evaluation loads the policy whole
        world_size=world_size,
        lora_rank=None if trained_whole else recipe.policy.lora.rank,
        lora_targets=recipe.policy.lora.targets,
        studies=rank_studies,
        group_size=recipe.grpo.group_size if task == "grpo" else 1,
        prompt_tokens=min(recipe.prompt.max_tokens, image_tokens + words),
        image_tokens=min(recipe.prompt.max_tokens, image_tokens),
        new_tokens=recipe.rollout.max_new_tokens,
        cache_tokens=recipe.rollout.cache_tokens,
        micro_batch_tokens=recipe.engine.micro_batch_tokens,
        recompute=recipe.policy.gradient_checkpointing,
        reuse_prefill=recipe.rollout.reuse_prefill and task == "grpo",
        evaluated=evaluation.batch_size if evaluates else 0,
        device=device,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device") == "cpu",
        offload_parameters=zero.get("offload_param", {}).get("device") == "cpu",
        bucket=int(zero.get("reduce_bucket_size", 50_000_000)),
        labeler_bytes=labeler_bytes,
        part=recipe.phases,
    )


def host_bytes(shape: PolicyShape, work: Workload, *, ranks_here: int) -> Parts:
    """A node's own memory: what each rank holds there while it loads its policy, what is offloaded to it, and the
    processes themselves.
    """
    b = work.bytes
    trained = _trained(shape, work)
    largest = max(shape.layer_matrices, shape.vocabulary * shape.hidden)
    parts = {
        PROCESSES: (2_000_000_000 if work.device == "cuda" else 1_000_000_000) * ranks_here,
        "policies while they load": (largest if work.stage == 3 else shape.parameters) * b * ranks_here,
    }
    if work.offload_optimizer:
        parts["offloaded masters, gradients, moments"] = 16 * trained // work.world_size * ranks_here
    if work.offload_parameters:
        parts["offloaded weights"] = shape.parameters * b // work.world_size * ranks_here
    return parts
