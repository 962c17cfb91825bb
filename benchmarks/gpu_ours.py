"""The worker of this project on a GPU: `mrg_r1.training.grpo.grpo_step` under DeepSpeed, one rank, ZeRO-2, bfloat16.

It runs the cases one after another on one policy and says a line of JSON after each; `benchmarks.gpu` starts it.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import task as same
from benchmarks.gpu_cases import (
    LORA_ALPHA,
    LORA_RANK,
    Allowance,
    CaseChannel,
    GpuCase,
    Unit,
    find_cases,
    units_of,
    worker_arguments,
)
from benchmarks.gpu_model import DTYPE, random_model
from benchmarks.gpu_results import Shape
from benchmarks.ours import OPTIMIZER_STEPS, word_overlap
from mrg_r1.config.recipe import Recipe
from mrg_r1.data.loader import PromptBuilder, PromptWords, StudyLoader
from mrg_r1.engine.ranks import finish_ranks, start_ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.policy.load import load_image_processor, load_tokenizer
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.service.interface import RewardService
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training.grpo import grpo_step
from mrg_r1.training.run import Run, build_engine
from mrg_r1.types import Study, StudyImage


class SynchronisedClock(Clock):
    """Waits for the device at both ends of a phase: otherwise its work would be counted where something else waits for
    it.
    """

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        synchronise()
        with super().phase(name):
            yield
            synchronise()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_recipe(
    folder: Path, case: GpuCase, *, largest_side: int, micro_batch_tokens: int, reuse_prefill: bool, recompute: bool
) -> Recipe:
    """The recipe of a case: the hyperparameters of `benchmarks.task`, one inner iteration, a wider LoRA."""
    return Recipe.model_validate(
        {
            "output_dir": folder / "run",
            "steps": OPTIMIZER_STEPS,
            "seed": same.SEED,
            "data": {
                "manifest": folder / "none.jsonl",
                "min_pixels": same.SMALLEST_AREA,
                "max_pixels": largest_side**2,
            },
            "prompt": {"mode": "plain", "instruction": same.INSTRUCTION, "show_view": False},
            "policy": {
                "path": folder / "policy",
                "dtype": "bfloat16",
                "gradient_checkpointing": recompute,
                "lora": {"rank": LORA_RANK, "alpha": LORA_ALPHA},
            },
            "rollout": {"max_new_tokens": case.new_tokens, "temperature": 1.0, "reuse_prefill": reuse_prefill},
            "grpo": {
                "group_size": case.group,
                "studies_per_step": case.studies,
                "beta": same.BETA,
                "clip_low": same.CLIP,
                "clip_high": same.CLIP,
            },
            "reward": {"labeler": folder / "none"},
            "optimizer": {
                "learning_rate": same.LEARNING_RATE,
                "betas": same.BETAS,
                "max_grad_norm": same.MAX_GRAD_NORM,
            },
            "engine": {"deepspeed": Path("ds_configs/zero2.json"), "micro_batch_tokens": micro_batch_tokens},
            "tracking": {"wandb": "off", "completions_every": 0},
        }
    )


def make_run(recipe: Recipe) -> Run:
    """What `mrg_r1.training.run.open_run` would make of the recipe, without checkpoint, manifest and labeler; LoRA is
    on the policy already.
    """
    ranks = start_ranks(recipe.seed)
    path = recipe.policy.path
    policy = Policy(random_model(path, ranks.device, attention="sdpa"), tokenizer=load_tokenizer(path)).to(ranks.device)
    policy.banned[policy.eos_ids] = True  # every completion is as long as was asked for, on all sides
    if recipe.policy.gradient_checkpointing:
        policy.checkpoint_gradients()
    add_lora(policy, rank=recipe.policy.lora.rank, alpha=recipe.policy.lora.alpha, seed=recipe.seed)
    policy.train()
    processor = load_image_processor(path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels)
    words = PromptWords(instruction=recipe.prompt.words, show_view=recipe.prompt.show_view)
    return Run(
        recipe=recipe,
        ranks=ranks,
        directory=recipe.output_dir,
        studies={"train": [], "val": [], "test": []},
        policy=policy,
        build=PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=words),
        rewards_if_any=word_overlap(recipe),
        dtype=DTYPE,
    )


def studies_of(folder: Path, case: GpuCase) -> list[Study]:
    """As many studies as a step takes, one picture each."""
    images = same.images_of(folder, case.side)[: case.studies]
    return [Study(path.stem, path.stem, (StudyImage(path),), same.REFERENCE, "train") for path in images]


def measure_case(run: Run, engine: Engine, case: GpuCase, allowance: Allowance) -> dict[str, Any]:
    """Steps of one case, as many as wanted and time allows, and the rollout again for a single token."""
    loader = StudyLoader(
        run.studies["train"], run.build, seed=run.recipe.seed, batch_size=case.studies, rank=0, world_size=1
    )
    rewards, clock = run.rewards.service, SynchronisedClock()
    units: list[Unit] = []
    try:
        while allowance.another(case, units) or not units:
            units.append(_measure_step(len(units), run=run, engine=engine, loader=loader, rewards=rewards, clock=clock))
    finally:
        loader.close()
    seconds, prompt_tokens = measure_prefill(run, case)
    return {**units_of(units), "prefill_seconds": seconds, "prompt_tokens": prompt_tokens}


def _measure_step(
    step: int, *, run: Run, engine: Engine, loader: StudyLoader, rewards: RewardService, clock: SynchronisedClock
) -> Unit:
    reset_peak()
    synchronise()
    began = time.perf_counter()
    parts = grpo_step(step, run=run, engine=engine, loader=loader, reward_service=rewards, clock=clock)
    synchronise()
    seconds = time.perf_counter() - began
    total, count = parts["groups/length"]
    if float(total / count) != run.recipe.rollout.max_new_tokens:
        raise RuntimeError(
            f"completions of {float(total / count)} tokens on average, {run.recipe.rollout.max_new_tokens} were "
            "asked for"
        )
    phases = {name.removeprefix("time/"): spent for name, spent in clock.end_step().items()}
    gap, gaps = parts["sampling/logp_gap"]
    return {"seconds": seconds, "phases": phases, "peak_bytes": peak_bytes(), "logp_gap": float(gap / gaps)}


def measure_prefill(run: Run, case: GpuCase) -> tuple[float, int]:
    """Seconds of a rollout of one token, merging LoRA and the prefill, at its second time; and the tokens of a
    prompt.
    """
    prompts = run.build(run.studies["train"]).to(run.ranks.device)
    vision = run.policy.encode_images(prompts)
    seconds = 0.0
    for step in range(2):
        synchronise()
        began = time.perf_counter()
        rollout(run.policy, prompts, vision, Sampling(case.group, 1, seed=same.SEED, step=step))
        synchronise()
        seconds = time.perf_counter() - began
    return seconds, int(prompts.attention_mask.sum(dim=1).max())


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def shape_of(policy: Policy) -> Shape:
    """Counted on the model itself, so that it is the one that ran."""
    text = policy.base.config.text_config
    layers = list(policy.language_model.layers.named_parameters())
    head_size = text.hidden_size // text.num_attention_heads
    return Shape(
        layer_weights=sum(
            parameter.numel() for name, parameter in layers if parameter.ndim == 2 and "lora_" not in name
        ),
        lora_weights=sum(parameter.numel() for name, parameter in layers if "lora_" in name),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        cache_values=2 * text.num_hidden_layers * text.num_key_value_heads * head_size,
        item_bytes=policy.base.lm_head.weight.element_size(),
    )


def run_cases(
    run: Run,
    folder: Path,
    cases: Sequence[GpuCase],
    recipes: Sequence[Recipe],
    channel: CaseChannel,
    allowance: Allowance,
) -> None:
    """One case after the other on the same policy, optimizer and weights. What does not fit into memory is a result of
    its case only.
    """
    engine = build_engine(run)
    for case, recipe in zip(cases, recipes, strict=True):
        refusal = allowance.refusal(case)
        if refusal is not None:
            channel.case(case, {"note": refusal})
            continue
        try:
            line = measure_case(
                replace(run, recipe=recipe, studies={"train": studies_of(folder, case)}), engine, case, allowance
            )
        except torch.OutOfMemoryError as error:
            line = {"error": f"out of memory: {str(error).splitlines()[0]}"}
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        channel.case(case, line)
    channel.done()


def main() -> None:
    parser = worker_arguments(__doc__)
    parser.add_argument("--micro-batch-tokens", type=int, required=True, help="engine.micro_batch_tokens")
    parser.add_argument("--reuse-prefill", action="store_true", help="rollout.reuse_prefill")
    parser.add_argument("--recompute", action="store_true", help="policy.gradient_checkpointing")
    options = parser.parse_args()
    channel, allowance = CaseChannel(), Allowance(options.until)
    if (options.device == "cuda") != torch.cuda.is_available():
        raise RuntimeError(
            f"--device {options.device}, and torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    cases = find_cases(options.size, options.cases)
    recipes = [
        make_recipe(
            options.folder,
            case,
            largest_side=max(one.side for one in cases),
            micro_batch_tokens=options.micro_batch_tokens,
            reuse_prefill=options.reuse_prefill,
            recompute=options.recompute,
        )
        for case in cases
    ]
    run = make_run(recipes[0])
    channel.ready(
        {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "micro_batch_tokens": options.micro_batch_tokens,
            "reuse_prefill": options.reuse_prefill,
            "gradient_checkpointing": options.recompute,
            "parameters": sum(parameter.numel() for parameter in run.policy.parameters()),
            "shape": asdict(shape_of(run.policy)),
            "cuda": torch.version.cuda,
            "versions": {
                name: metadata.version(name) for name in ("mrg-r1", "torch", "transformers", "peft", "deepspeed")
            },
        }
    )
    run_cases(run, options.folder, cases, recipes, channel, allowance)
    finish_ranks()


if __name__ == "__main__":
    main()
    os._exit(0)  # a loader's thread may still be reading the studies of a step that will not come
