"""The worker of this project: its GRPO step, its rollout, its scoring pass, and the plain alternatives under the same
policy.

`python -m benchmarks.ours FOLDER TASK` serves one unit of TASK (JSON of `benchmarks.task.Task`) a line; see
`benchmarks.workers`. Everything that the bench knows of mrg_r1's inside stands in this file.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import task as same
from benchmarks.task import Task
from benchmarks.workers import Channel, Phases, serve
from mrg_r1.config.recipe import Recipe
from mrg_r1.data.loader import PromptBuilder, PromptWords, StudyLoader
from mrg_r1.engine.ranks import finish_ranks, start_ranks
from mrg_r1.kernels.library import state
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.logprobs import completion_logprobs, micro_batches
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.compute import RewardContext
from mrg_r1.reward.service.interface import Health, Ticket
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training.grpo import grpo_step
from mrg_r1.training.rewards import RunRewards
from mrg_r1.training.run import Run, build_engine
from mrg_r1.types import Completions, Prompts, Rewards, Study, StudyImage, VisionFeatures

MICRO_BATCH_TOKENS = 2800  # of our passes: a group of 32 at 672 pixels fits one; size hardly matters (README.md)
MICRO_BATCH_ROWS = 8  # completions in a pass of the naive scoring
OPTIMIZER_STEPS = 1_000_000  # a horizon that no bench reaches: the learning rate is constant


class WordOverlapRewards:
    """A `RewardService` that gives the reward of `benchmarks.task`, as the other side has it: no labeler is part of the
    bench.
    """

    def __init__(self) -> None:
        self._results: dict[str, Rewards] = {}

    def submit(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        study_ids: Sequence[str],
        references: Sequence[str | None],
        context: RewardContext = RewardContext(),  # noqa: B008 (frozen)
    ) -> Ticket:
        total = torch.tensor(
            [
                [same.word_overlap(text, reference or "") for text in group]
                for group, reference in zip(texts, references, strict=True)
            ]
        )
        ticket = Ticket(study_ids=tuple(study_ids))
        labels = torch.full((*total.shape, 14), -1)
        self._results[ticket.id] = Rewards(
            total, {"words": total}, {"words": 1.0}, labels, [list(group) for group in texts]
        )
        return ticket

    def result(self, ticket: Ticket) -> Rewards:
        return self._results.pop(ticket.id)

    def hint(self, texts: Sequence[str]) -> None:
        pass

    def label(self, texts: Sequence[str]) -> NDArray[np.int64]:
        raise RuntimeError("the bench has no labeler: rewards come from word overlap")

    def health(self) -> Health:
        return Health()

    def close(self) -> None:
        pass


def word_overlap(recipe: Recipe) -> RunRewards:
    """What a run keeps for its rewards, where no labels are read: every reference is blank."""
    blank: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(OBSERVATIONS))
    return RunRewards(
        recipe, WordOverlapRewards(), {}, {}, blank, constant=None, ccs_weights=None, thresholds=None, supervisor=None
    )


def make_recipe(folder: Path, task: Task) -> Recipe:
    """The recipe of a whole step: one rank, ZeRO-2, float32, one inner iteration."""
    return Recipe.model_validate(
        {
            "output_dir": folder / "run",
            "steps": OPTIMIZER_STEPS,
            "seed": same.SEED,
            "data": {"manifest": folder / "none.jsonl", "min_pixels": same.SMALLEST_AREA, "max_pixels": task.side**2},
            "prompt": {"mode": "plain", "instruction": same.INSTRUCTION, "show_view": False},
            "policy": {
                "path": folder / "policy",
                "dtype": "float32",
                "lora": {"rank": same.LORA_RANK, "alpha": same.LORA_ALPHA},
            },
            "rollout": {"max_new_tokens": task.new_tokens, "temperature": 1.0, "reuse_prefill": True},
            "grpo": {
                "group_size": task.group,
                "studies_per_step": task.studies,
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
            "engine": {
                "deepspeed": Path("ds_configs/zero2.json"),
                "micro_batch_tokens": task.micro_batch or MICRO_BATCH_TOKENS,
            },
            "tracking": {"wandb": "off", "completions_every": 0},
        }
    )


def make_run(recipe: Recipe, folder: Path, task: Task) -> Run:
    """What `mrg_r1.training.run.open_run` would make of the recipe, without manifest and labeler; the policy has LoRA
    and cannot end a report.
    """
    ranks = start_ranks(recipe.seed)
    policy = load_policy(recipe.policy.path, dtype=torch.float32)
    policy.banned[policy.eos_ids] = True  # every completion is as long as was asked for, on both sides
    add_lora(policy, **recipe.policy.lora.model_dump(), seed=recipe.seed)
    policy.train()
    processor = load_image_processor(
        recipe.policy.path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels
    )
    words = PromptWords(instruction=recipe.prompt.words, show_view=recipe.prompt.show_view)
    images = same.images_of(folder, task.side)
    studies = [Study(path.stem, path.stem, (StudyImage(path),), same.REFERENCE, "train") for path in images]
    return Run(
        recipe=recipe,
        ranks=ranks,
        directory=recipe.output_dir,
        studies={"train": studies, "val": [], "test": []},
        policy=policy,
        build=PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=words),
        rewards_if_any=word_overlap(recipe),
        dtype=torch.float32,
    )


def step_unit(run: Run, task: Task) -> Callable[[], Phases]:
    """Whole GRPO steps of `mrg_r1.training.grpo`, under DeepSpeed."""
    engine = build_engine(run)
    loader = StudyLoader(
        run.studies["train"], run.build, seed=run.recipe.seed, batch_size=task.studies, rank=0, world_size=1
    )
    rewards, clock, taken = run.rewards.service, Clock(), 0

    def unit() -> Phases:
        nonlocal taken
        parts = grpo_step(taken, run=run, engine=engine, loader=loader, reward_service=rewards, clock=clock)
        total, count = parts["groups/length"]
        if float(total / count) != task.new_tokens:
            raise RuntimeError(
                f"completions of {float(total / count)} tokens on average, {task.new_tokens} were asked for"
            )
        taken += 1
        return {name.removeprefix("time/"): seconds for name, seconds in clock.end_step().items()}

    return unit


def rollout_unit(run: Run, task: Task, prompts: Prompts) -> Callable[[], Phases]:
    """Vision tower, prefill and decoding, from pixels to token ids."""
    taken = 0

    def unit() -> Phases:
        nonlocal taken
        began = time.perf_counter()
        vision = run.policy.encode_images(prompts)
        seen = time.perf_counter()
        done = sample(run.policy, task, prompts, vision, step=taken)
        taken += 1
        check_length(done.token_ids, task)
        return {"vision": seen - began, "decode": time.perf_counter() - seen}

    return unit


def generate_unit(run: Run, task: Task, prompts: Prompts) -> Callable[[], Phases]:
    """transformers' `generate` on the same module, LoRA attached, asked for the same distribution in every setting it
    knows.
    """
    policy = run.policy
    inputs: dict[str, Tensor] = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "mm_token_type_ids": (
            prompts.input_ids == policy.image_token_id
        ).int(),  # left out, positions are silently wrong
        "pixel_values": prompts.images.tensors["pixel_values"],
        "image_grid_thw": prompts.images.tensors["image_grid_thw"],
    }
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,  # the checkpoint's own generation config says otherwise
        "num_return_sequences": task.group,
        "max_new_tokens": task.new_tokens,
        "suppress_tokens": policy.banned.nonzero().squeeze(1).tolist(),
        "use_cache": True,
    }

    @torch.no_grad()
    def unit() -> Phases:
        policy.eval()
        rows = cast(Any, policy.model).generate(**inputs, **settings)
        check_length(rows[:, prompts.input_ids.shape[1] :], task)
        return {}

    return unit


def scoring_unit(run: Run, task: Task, prompts: Prompts, *, naive: bool) -> Callable[[], Phases]:
    """Forward and backward over one fixed rollout, vision features given.

    Args:
        naive: one padded row [prompt | completion] for each completion through the transformers and PEFT modules; else
            this project's scoring pass, with the prompt once a study.
    """
    policy = run.policy
    vision = policy.encode_images(prompts)
    done = sample(policy, task, prompts, vision, step=0)
    ids, mask = (tensor.view(-1, task.new_tokens) for tensor in (done.token_ids, done.mask))
    study_of_row = torch.arange(task.studies).repeat_interleave(task.group)
    advantages = torch.linspace(-1, 1, len(ids)).unsqueeze(1)  # a gradient that does not vanish
    if naive:
        score, parts = (
            completion_logprobs_plain,
            list(torch.arange(len(ids)).split(task.micro_batch or MICRO_BATCH_ROWS)),
        )
    else:
        score = completion_logprobs
        parts = micro_batches(prompts, mask, study_of_row, token_budget=task.micro_batch or MICRO_BATCH_TOKENS)

    def unit() -> Phases:
        phases = {"forward": 0.0, "backward": 0.0}
        for part in parts:
            began = time.perf_counter()
            logp, _ = score(policy, prompts, vision, ids[part], mask[part], study_of_row[part])
            loss = -(logp * advantages[part]).sum() / len(ids)
            middle = time.perf_counter()
            loss.backward()
            phases["forward"] += middle - began
            phases["backward"] += time.perf_counter() - middle
        policy.zero_grad(set_to_none=True)
        return phases

    return unit


def sample(policy: Policy, task: Task, prompts: Prompts, vision: VisionFeatures, *, step: int) -> Completions:
    """This project's rollout of the task's size."""
    return rollout(policy, prompts, vision, Sampling(task.group, task.new_tokens, seed=same.SEED, step=step))


def check_length(token_ids: Tensor, task: Task) -> None:
    """Refuse a unit that did less work than was asked for.

    Raises:
        RuntimeError: the completions are not `task.new_tokens` long.
    """
    if token_ids.shape[-1] != task.new_tokens:
        raise RuntimeError(f"completions of {token_ids.shape[-1]} tokens, {task.new_tokens} were asked for")


def make_unit(run: Run, task: Task, prompts: Prompts) -> Callable[[], Phases]:
    """The unit that the task names.

    Raises:
        ValueError: no such unit.
    """
    if task.unit == "step":
        return step_unit(run, task)
    if task.unit == "rollout":
        return rollout_unit(run, task, prompts)
    if task.unit == "hf_generate":
        return generate_unit(run, task, prompts)
    if task.unit == "scoring":
        return scoring_unit(run, task, prompts, naive=False)
    if task.unit == "scoring_naive":
        return scoring_unit(run, task, prompts, naive=True)
    raise ValueError(f"unit {task.unit!r}; known are step, rollout, hf_generate, scoring and scoring_naive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where benchmarks.model wrote the policy and the images")
    parser.add_argument("task", type=Task.from_json, help="JSON of a Task")
    arguments = parser.parse_args()
    channel, task = Channel(), arguments.task
    torch.set_num_threads(1)
    run = make_run(make_recipe(arguments.folder, task), arguments.folder, task)
    prompts = run.build(run.studies["train"][: task.studies])
    naive = task.unit == "scoring_naive"
    settings = {
        "micro_batch": task.micro_batch or (MICRO_BATCH_ROWS if naive else MICRO_BATCH_TOKENS),
        "micro_batch_of": "completions" if naive else "tokens",
        "prompt_tokens": prompts.input_ids.shape[1],
        "trained_parameters": sum(
            parameter.numel() for parameter in run.policy.parameters() if parameter.requires_grad
        ),
        "parameters": sum(parameter.numel() for parameter in run.policy.parameters()),
        "threads": torch.get_num_threads(),
        "kernels": state().text,
        "versions": {name: metadata.version(name) for name in ("mrg-r1", "torch", "transformers", "peft", "deepspeed")},
    }
    serve(channel, make_unit(run, task, prompts), settings)
    finish_ranks()


if __name__ == "__main__":
    main()
    os._exit(0)  # the loader's thread may still be reading the studies of a step that will not come
