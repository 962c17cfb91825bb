"""The worker for what an experiment on the demo's policy costs: whole GRPO steps and SFT steps as `launch/` runs them.

`python -m benchmarks.laboratory FOLDER TASK` serves one unit of TASK (JSON of `benchmarks.task.Task`) a line; see
`benchmarks.workers`. A step has everything in it: images, vision tower, rollout, the labeler in a process of its own,
reference, update, over as many ranks as the task says, one thread each.

`gemm` is the peak that everything is compared with: a float32 product, on one core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.roofline import Shapes, count_grpo, count_sft
from benchmarks.task import SEED, Task
from benchmarks.workers import Channel, Phases, serve
from mrg_r1.config.recipe import Recipe, load_recipe
from mrg_r1.data.loader import StudyLoader
from mrg_r1.engine.ranks import Ranks, finish_ranks, start_ranks
from mrg_r1.kernels.library import state
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.products import product
from mrg_r1.tracking.log import Clock
from mrg_r1.training.grpo import grpo_step
from mrg_r1.training.run import Run, build_engine, open_run
from mrg_r1.training.sft import sft_step
from mrg_r1.types import Prompts

GEMM = (2200, 256, 512)  # rows, inputs, outputs: of the bench's long step
GEMM_PRODUCTS = 100
OPTIMIZER_STEPS = 1_000_000  # a horizon that no bench reaches
SFT_STEPS = 4  # in a unit


def make_recipe(folder: Path, task: Task) -> Recipe:
    """The demo's own recipe: of GRPO, from a policy that has learned to write, or of its cold start."""
    data = folder / "demo-shaped"
    keys = [
        f"output_dir={folder / f'run-{task.unit}-{task.studies}'}",
        f"steps={OPTIMIZER_STEPS}",
        f"seed={SEED}",
        f"data.manifest={data / 'manifest.jsonl'}",
        f"policy.path={data / ('taught' if task.unit == 'lab_grpo' else 'policy')}",
        f"reward.labeler={data / 'labeler'}",
        "evaluation.every=0",
        "tracking.completions_every=0",
    ]
    if task.unit == "lab_grpo":
        keys += [
            f"grpo.studies_per_step={task.studies}",
            f"grpo.group_size={task.group}",
            f"rollout.max_new_tokens={task.new_tokens}",
        ]
        return load_recipe(Path("launch/recipes/demo.yaml"), keys)
    keys += [
        f"sft.batch_size={task.studies}",
        "data.train_split=train",
        "optimizer.schedule=constant",
        "sft.stop_at=null",
    ]
    return load_recipe(Path("launch/recipes/demo_sft.yaml"), keys)


def grpo_unit(run: Run, task: Task, lengths: list[float]) -> Callable[[], Phases]:
    """One GRPO step, which adds the mean tokens of its reports to `lengths`."""
    recipe, clock, taken = run.recipe, Clock(), 0
    add_lora(run.policy, rank=recipe.policy.lora.rank, alpha=recipe.policy.lora.alpha, seed=recipe.seed)
    run.policy.train()
    engine, loader = build_engine(run), _loader(run, task)
    clock.count_labelers(run.labeler_cpu_seconds, sharing=run.ranks.node.size)

    def unit() -> Phases:
        nonlocal taken
        parts = grpo_step(taken, run=run, engine=engine, loader=loader, reward_service=run.rewards.service, clock=clock)
        total, count = run.ranks.sum(torch.stack([part.cpu() for part in parts["groups/length"]])).tolist()
        lengths.append(total / count)
        taken += 1
        return _seconds(clock) | {"labeler_cpu": float(parts["time/labeler_cpu"][0])}

    return unit


def sft_unit(run: Run, task: Task) -> Callable[[], Phases]:
    """`SFT_STEPS` steps of SFT of every parameter: ours, or over the checkpoint's own modules."""
    clock, taken = Clock(), 0
    run.policy.requires_grad_(True)
    if task.unit == "lab_sft_modules":
        use_the_checkpoints_modules(run.policy)
    run.policy.train()
    engine, loader = build_engine(run), _loader(run, task)

    def unit() -> Phases:
        nonlocal taken
        for _ in range(SFT_STEPS):
            sft_step(taken, run=run, engine=engine, loader=loader, clock=clock)
            taken += 1
        return _seconds(clock)

    return unit


def use_the_checkpoints_modules(policy: Policy) -> None:
    """Let SFT's pass of this policy run transformers' model from pixels to logits: one row [prompt | target] a study,
    padded, as its users fine-tune it. The only place that knows how `training.sft` calls the policy.
    """

    def forward(
        prompts: Prompts, vision: None, token_ids: Tensor, mask: Tensor, study_of_row: Tensor
    ) -> tuple[Tensor, None]:
        rows = prompts.select(study_of_row.tolist())
        length = int(mask.sum(dim=1).max())
        ids, kept = token_ids[:, :length], mask[:, :length]
        input_ids = torch.cat([rows.input_ids, ids], dim=1)
        logits = policy.base(
            input_ids=input_ids,
            attention_mask=torch.cat([rows.attention_mask, kept.long()], dim=1),
            mm_token_type_ids=(input_ids == policy.image_token_id).int(),
            pixel_values=rows.images.tensors["pixel_values"],
            image_grid_thw=rows.images.tensors["image_grid_thw"],
            logits_to_keep=length + 1,
            use_cache=False,
        ).logits[:, :-1]  # [R, length, V]; the last prompt token predicts the first of the target
        logits = logits.float().masked_fill(policy.banned, -torch.inf)
        logp = -cross_entropy(logits[kept], ids[kept], reduction="none")
        return torch.zeros(token_ids.shape).masked_scatter(mask, logp), None

    policy.forward = forward  # type: ignore[method-assign, assignment]
    policy.encode_images = lambda prompts, again=None: None  # type: ignore[method-assign, assignment, misc]


def gemm_unit() -> Phases:
    """`GEMM_PRODUCTS` products of the shape `GEMM`, by what the policy's large ones are made by."""
    rows, inputs, outputs = GEMM
    left, right = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    for _ in range(GEMM_PRODUCTS):
        product(left, right)
    return {}


def _loader(run: Run, task: Task) -> StudyLoader:
    ranks = run.ranks
    return StudyLoader(
        run.studies["train"],
        run.build,
        seed=run.recipe.seed,
        batch_size=task.studies,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _seconds(clock: Clock) -> Phases:
    return {name.removeprefix("time/"): seconds for name, seconds in clock.end_step().items()}


def arithmetic(run: Run, task: Task, *, length: float | None) -> dict[str, Any]:
    """What the unit's shapes ask for, over all ranks: `rollouts` or `studies`, and `counted` by phase.

    Args:
        length: mean tokens of a report that GRPO samples.
    """
    config = run.policy.base.config.to_dict()
    prompts = run.build(run.studies["train"][:1])
    grid = prompts.images.tensors["image_grid_thw"]
    shapes = Shapes.of(config, prompt=prompts.input_ids.shape[1], patches=int(grid.prod(dim=1).sum()))
    if length is not None:
        rank = run.recipe.policy.lora.rank
        counted = count_grpo(shapes, studies=task.studies, group=task.group, tokens=length, lora=rank)
        return {"rollouts": task.studies * task.group, "counted": {name: asdict(one) for name, one in counted.items()}}
    words = [len(run.policy.tokenizer(study.report)["input_ids"]) + 1 for study in run.studies["train"]]
    studies = task.studies * SFT_STEPS
    counted = count_sft(shapes, studies=studies, tokens=sum(words) / len(words))
    return {"studies": studies, "counted": {name: asdict(one) for name, one in counted.items()}}


def start_second_ranks(folder: Path, task: Task) -> list[subprocess.Popen[bytes]]:
    """Describe the ranks to this process, the first of them, and start the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": task.ranks, "LOCAL_SIZE": task.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (shared | {"RANK": 0, "LOCAL_RANK": 0}).items()})
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.laboratory", str(folder), task.to_json()],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        for rank in range(1, task.ranks)
    ]


def open_laboratory(folder: Path, task: Task) -> Run:
    """The run, opened as a launch opens it, in a fresh folder."""
    recipe = make_recipe(folder, task)
    ranks = start_ranks(recipe.seed)
    if ranks.is_main:
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    ranks.barrier()
    return open_run(recipe, ranks, task="grpo" if task.unit == "lab_grpo" else "sft")


def follow(ranks: Ranks, unit: Callable[[], Phases]) -> None:
    """The life of a rank that is not the first: a unit whenever that begins one."""
    while ranks.agree(None):
        unit()
        ranks.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where benchmarks.demo_shaped wrote policy, studies and labeler")
    parser.add_argument("task", type=Task.from_json, help="JSON of a Task")
    arguments = parser.parse_args()
    folder, task = arguments.folder, arguments.task
    torch.set_num_threads(1)
    if task.unit == "gemm":
        rows, inputs, outputs = GEMM
        serve(Channel(), gemm_unit, {"gflop": 2e-9 * rows * inputs * outputs * GEMM_PRODUCTS, "shape": list(GEMM)})
        return
    first = os.environ.get("RANK", "0") == "0"
    channel = Channel() if first else None
    others = start_second_ranks(folder, task) if first else []
    run = open_laboratory(folder, task)
    lengths: list[float] = []
    unit = grpo_unit(run, task, lengths) if task.unit == "lab_grpo" else sft_unit(run, task)
    if channel is None:
        follow(run.ranks, unit)
    else:

        def together() -> Phases:
            run.ranks.agree(True)
            phases = unit()
            run.ranks.barrier()  # the step ends with its last rank
            return phases

        if task.unit == "lab_grpo":
            together()  # what is resident is taken after it
        length = lengths[0] if lengths else None  # a step's arithmetic is counted from the first one's reports
        settings = {"ranks": task.ranks, "threads": torch.get_num_threads(), "length": length, "kernels": state().text}
        serve(channel, together, settings | arithmetic(run, task, length=length))
        run.ranks.agree(False)
    finish_ranks()
    run.close()
    for other in others:
        other.wait()


if __name__ == "__main__":
    main()
    os._exit(0)  # the loader's thread may still be reading the studies of a step that will not come
