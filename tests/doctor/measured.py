"""Peaks of real steps on a CPU beside the formula's: `python -m tests.doctor.measured CASE FOLDER` prints both, by
phase, as JSON.

The step is the project's own, under DeepSpeed, as `benchmarks.ours` makes it; the kernel's high-water mark is set back
at each phase.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.memory import peak_mb, reset_peak, resident_mb
from benchmarks.model import _write_images
from benchmarks.ours import make_recipe, make_run, step_unit
from benchmarks.task import INSTRUCTION, LORA_RANK, REFERENCE, Task
from mrg_r1.doctor.memory import Workload, predict
from mrg_r1.engine.ranks import finish_ranks, start_ranks
from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy
from mrg_r1.policy.family import shape_of
from mrg_r1.tracking.log import Clock

# Long rollouts with little kept for the update, and the other way round.
CASES = {
    "rollout": (
        Task(side=112, studies=4, group=16, new_tokens=256, micro_batch=2048),
        {"hidden": 512, "recompute": True, "reuse": False},
    ),
    "update": (
        Task(side=448, studies=4, group=8, new_tokens=256, micro_batch=10_000),
        {"hidden": 256, "recompute": False, "reuse": True},
    ),
    "merger": (
        Task(side=448, studies=4, group=4, new_tokens=32, micro_batch=10_000),
        {"hidden": 256, "recompute": False, "reuse": False, "targets": "language+merger"},
    ),
    "tower": (
        Task(side=448, studies=4, group=4, new_tokens=32, micro_batch=10_000),
        {"hidden": 256, "recompute": False, "reuse": False, "targets": "all"},
    ),
    "tower recomputed": (
        Task(side=448, studies=4, group=4, new_tokens=32, micro_batch=10_000),
        {"hidden": 256, "recompute": True, "reuse": False, "targets": "all"},
    ),
}
MB = 1024 * 1024


class PeakClock(Clock):
    """Keeps each phase's peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        reset_peak()
        with super().phase(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak_mb())


def _warm_up(folder: Path) -> None:
    """A step of next to nothing, for everything that is loaded once: DeepSpeed, kernels, the image processor."""
    task = Task(side=56, studies=1, group=2, new_tokens=4)
    create_tiny_policy(
        folder / "policy", [REFERENCE, INSTRUCTION] * 20, vocabulary=400, image_side=task.side, hidden=32, layers=1
    )
    _write_images(folder / f"images-{task.side}", task.side)
    step_unit(make_run(make_recipe(folder, task), folder, task), task)()
    gc.collect()


def compare(case: str, folder: Path) -> dict[str, dict[str, float]]:
    """MB above what the process held before its policy was loaded: measured and predicted, for rollout and update."""
    import benchmarks.ours as ours

    task, options = CASES[case]
    create_tiny_policy(
        folder / "policy", [REFERENCE, INSTRUCTION] * 20, vocabulary=512, image_side=task.side, hidden=options["hidden"]
    )
    _write_images(folder / f"images-{task.side}", task.side)
    start_ranks(0)
    recipe = make_recipe(folder, task)
    recipe.rollout.reuse_prefill = options["reuse"]
    recipe.policy.gradient_checkpointing = options["recompute"]
    recipe.policy.lora.targets = options.get("targets", "language")
    _warm_up(folder / "warm")
    before = resident_mb()
    run = make_run(recipe, folder, task)
    if options["recompute"]:
        run.policy.checkpoint_gradients()
    prompts = run.build(run.studies["train"][:1])
    clock = PeakClock()
    ours.Clock = lambda: clock  # type: ignore[assignment,misc]
    step_unit(run, task)()
    shape = shape_of(folder / "policy")
    work = Workload(
        task="grpo",
        bytes=4,
        stage=2,
        world_size=1,
        lora_rank=LORA_RANK,
        studies=task.studies,
        group_size=task.group,
        prompt_tokens=prompts.input_ids.shape[1],
        image_tokens=(task.side // 28) ** 2,
        new_tokens=task.new_tokens,
        cache_tokens=recipe.rollout.cache_tokens,
        micro_batch_tokens=recipe.engine.micro_batch_tokens,
        recompute=options["recompute"],
        reuse_prefill=options["reuse"],
        evaluated=0,
        device="cpu",
        lora_targets=recipe.policy.lora.targets,
    )
    predicted = predict(shape, work)
    return {
        phase: {"measured": clock.peaks[phase] - before, "predicted": sum(predicted.phases[phase].values()) / MB}
        | {name: value / MB for name, value in predicted.phases[phase].items()}
        for phase in ("rollout", "update")
    }


if __name__ == "__main__":
    # freed memory goes back to the system, so that a phase's peak is not that of an earlier one
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.doctor.measured", *sys.argv[1:]], os.environ | settings)
    print("RESULT " + json.dumps(compare(sys.argv[1], Path(sys.argv[2]))))
    finish_ranks()
