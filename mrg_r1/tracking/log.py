"""The run as it happens: one JSON object a step, a line on the terminal, numbers to wandb.

Only rank 0 writes. wandb gets numbers (`tracking.wandb_run`); it is offline unless the recipe says otherwise, and a run
goes on without it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrg_r1.files import write_text_atomically
from mrg_r1.tracking.terminal import StepLine, phase_table
from mrg_r1.tracking.wandb_run import Sample, WandbMode, WandbRun

_OUTSIDE_TRAINING = ("start", "validation", "checkpoint", "evaluation")


class RunLog:
    """Writes RUN/metrics.jsonl, the terminal and wandb; silent on every rank but the first.

    Args:
        directory: RUN.
        active: True on rank 0.
        steps: outer steps of the run, for the time left.
        wandb_mode: off, offline or online.
        start_step: steps already done; later lines of an interrupted run are cut off, since they will be written again.
        clock: of the run, for the closing table of phases.
    """

    def __init__(
        self,
        directory: Path,
        *,
        active: bool,
        steps: int,
        wandb_mode: WandbMode,
        wandb_project: str,
        config: dict[str, Any],
        start_step: int = 0,
        clock: Clock | None = None,
        share_text: bool = False,
        share_images: bool = False,
    ) -> None:
        self.directory, self.active, self._clock = directory, active, clock
        self._terminal = StepLine(active=active, steps=steps)
        self.console = self._terminal.console
        self._wandb: WandbRun | None = None
        self._rates: list[float] = []
        if not active:
            return
        if clock is not None:
            clock.entering = self._terminal.entering
        path, logged = directory / "metrics.jsonl", -1
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_whole(line)]
            logged = max((json.loads(line)["step"] for line in whole), default=-1)
        if wandb_mode != "off":  # before the cut: what wandb has of the steps that are cut off is known from them alone
            self._wandb = WandbRun(
                directory,
                mode=wandb_mode,
                project=wandb_project,
                config=config,
                start_step=start_step,
                logged=logged,
                share_text=share_text,
                share_images=share_images,
                say=self.say,
            )
        if path.exists():
            kept = [line for line in whole if json.loads(line)["step"] < start_step]
            # killed here, a run loses none of its steps
            write_text_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float | int | None], samples: Sequence[Sample] = ()) -> None:
        """Write one step's metrics; the step is the one just taken, counted from 0.

        Args:
            samples: of the step's validation; they leave only where the recipe shares them.
        """
        if not self.active:
            return
        written = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **written}) + "\n")  # NaN is no JSON
        self._file.flush()
        if self._wandb is not None:
            if "validation/mean_reward" in metrics:  # a validation before training belongs to no step
                self._wandb.share(step, samples)
            self._wandb.log(step, metrics)
        rate = metrics.get("time/tokens_per_second")
        if rate is not None:
            self._rates.append(rate)
        self._terminal.step(step, metrics)

    def sync(self) -> None:
        """Bring the steps logged so far to the disk: a checkpoint that survives a crash of the machine must not survive
        its metrics.
        """
        if self.active:
            os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self._terminal.say(text)

    def close(self) -> None:
        """Where the time went, and the end of wandb's run."""
        if not self.active:
            return
        self._file.close()
        if self._clock is not None and self._clock.totals:
            self._terminal.clear()
            self.console.print(phase_table(self._clock.totals, statistics.median(self._rates) if self._rates else None))
        if self._wandb is not None:
            self._wandb.close()


class Clock:
    """Seconds by phase: of the step at hand, and of the whole run.

    Args:
        beat: is told the name of each phase as it begins.
    """

    def __init__(self, beat: Callable[[str], None] = lambda phase: None) -> None:
        self.beat = beat
        self.entering: Callable[[str], None] = lambda phase: None  # told as well, by the log that shows the run
        self.totals: dict[str, float] = {}
        self.training_cpu_seconds = 0.0  # this process's own, all its threads: what a busy machine does not stretch
        self._step: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.beat(name)
        self.entering(name)
        began, began_cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            if name not in _OUTSIDE_TRAINING:
                self.training_cpu_seconds += time.process_time() - began_cpu
            self.totals[name] = self.totals.get(name, 0.0) + seconds
            self._step[name] = self._step.get(name, 0.0) + seconds

    def add(self, totals: dict[str, float], cpu_seconds: float = 0.0) -> None:
        """Seconds that an interrupted run had spent before, and its `training_cpu_seconds`."""
        self.training_cpu_seconds += cpu_seconds
        for name, seconds in totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds

    @property
    def training_seconds(self) -> float:
        """Seconds inside training steps: everything but start, validation, checkpoints and evaluation."""
        return _training(self.totals)

    def share(self, name: str) -> tuple[Tensor, Tensor]:
        """(seconds of a phase, seconds of training phases) of the step so far: a metric whose mean over ranks is the
        phase's share.
        """
        return torch.tensor(self._step.get(name, 0.0)), torch.tensor(_training(self._step))

    def costs(self, tokens: int, *, world_size: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What the step so far has cost, to be reduced over ranks.

        `time/tokens_per_second`: all ranks' tokens over the ranks' mean seconds. `time/memory_gib_max`: the process's
        peak since it began, of CUDA's allocator, or of the resident set where there is no GPU.
        """
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "time/tokens_per_second": (torch.tensor(float(tokens)), torch.tensor(_training(self._step) / world_size)),
            "time/memory_gib_max": (torch.tensor(peak / 2**30), torch.tensor(1.0)),
        }

    def end_step(self) -> dict[str, float]:
        """`time/PHASE` of the step that ends here."""
        times = {f"time/{name}": round(seconds, 4) for name, seconds in self._step.items()}
        self._step = {}
        return times


def _training(seconds: dict[str, float]) -> float:
    return sum(value for name, value in seconds.items() if name not in _OUTSIDE_TRAINING)


def write_environment(directory: Path, *, world_size: int, device: str, seed: int) -> None:
    """RUN/environment.json: what a reader needs to repeat the run."""
    packages = ("torch", "transformers", "peft", "deepspeed", "numpy", "tokenizers", "pillow", "safetensors")
    environment = {
        "mrg-r1": metadata.version("mrg-r1"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "command": sys.argv,
        "world_size": world_size,
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "seed": seed,
    }
    (directory / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """The project's commit, where it runs from a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _is_whole(line: str) -> bool:
    """A line that a crash cut in the middle is not JSON; it will be written again."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
