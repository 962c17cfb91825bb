"""The run as it happens: its steps to the backends and the terminal, and where its time went.

Only rank 0 writes. The backends are listed in `tracking.backends`; wandb, one of them, is offline unless the recipe
says otherwise, and a run goes on without it.
"""

from __future__ import annotations

import json
import platform
import resource
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
from mrg_r1.kernels import library as kernels
from mrg_r1.tracking.backend import Backend, Tracked, TrackingOptions
from mrg_r1.tracking.backends import open_backends
from mrg_r1.tracking.sharing import Sample, shared_of, without_paths
from mrg_r1.tracking.terminal import Budget, StepLine, where_time_went

_OUTSIDE_TRAINING = ("start", "validation", "checkpoint", "evaluation")


class RunLog:
    """Tells the terminal and the backends of each step; silent on every rank but the first.

    Args:
        directory: RUN.
        active: True on rank 0.
        steps: outer steps of the run, for the time left.
        options: the recipe's section `tracking`.
        config: the recipe, as plain values; backends are given it without its paths.
        start_step: steps already done; later ones that an interrupted run has logged come again.
        clock: of the run, for the closing table of phases.
    """

    def __init__(
        self,
        directory: Path,
        *,
        active: bool,
        steps: int,
        options: TrackingOptions,
        config: dict[str, Any],
        start_step: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.active, self._options, self._clock = active, options, clock
        self._terminal = StepLine(active=active, steps=steps)
        self.console = self._terminal.console
        self._backends: list[Backend] = []
        if active:
            if clock is not None:
                clock.entering = self._terminal.entering
            self._backends = open_backends(Tracked(directory, options, without_paths(config), start_step, self.say))

    def log(
        self,
        step: int,
        metrics: dict[str, float | int | None],
        samples: Sequence[Sample] = (),
        budget: Budget | None = None,
    ) -> None:
        """Tell one step's metrics; the step is the one just taken, counted from 0.

        Args:
            samples: of the step's validation; they leave only where the recipe shares them.
            budget: of a run which a time ends.
        """
        if not self.active:
            return
        # a validation before training belongs to no step
        seen = samples if "validation/mean_reward" in metrics else ()
        shared = shared_of(seen, text=self._options.share_text, images=self._options.share_images)
        for backend in self._backends:
            backend.log(step, metrics, shared)
        self._terminal.step(step, metrics, budget)

    def sync(self) -> None:
        """Bring the steps logged so far to the disk."""
        for backend in self._backends:
            backend.sync()

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self._terminal.say(text)

    def close(self) -> None:
        """The end of the backends, and where the time went."""
        for backend in self._backends:
            backend.close()
        if self.active and self._clock is not None and self._clock.totals:
            self._terminal.clear()
            closing = where_time_went(
                self._clock.totals, self._terminal.tokens_per_second, sum(self._clock.labeler_totals.values())
            )
            self.console.print(closing, highlight=False)


class Clock:
    """Seconds by phase: of the step at hand, and of the whole run.

    Args:
        beat: is told the name of each phase as it begins.

    Attributes:
        totals: seconds of the wall clock by phase.
        labeler_totals: processor seconds of the labelers' processes that this rank keeps, by the phase meanwhile.
        training_cpu_seconds: processor seconds inside training steps, which a busy machine does not stretch: this
            process's own, all its threads, and its share of the labelers'.
    """

    def __init__(self, beat: Callable[[str], None] = lambda phase: None) -> None:
        self.beat = beat
        self.entering: Callable[[str], None] = lambda phase: None  # told as well, by the log that shows the run
        self.totals: dict[str, float] = {}
        self.labeler_totals: dict[str, float] = {}
        self.training_cpu_seconds = 0.0
        self._step: dict[str, float] = {}
        self._labelers: Callable[[], float] = lambda: 0.0
        self._sharing, self._labelers_seen, self._labelers_in_step = 1, 0.0, 0.0

    def count_labelers(self, cpu_seconds: Callable[[], float], *, sharing: int) -> None:
        """Count what labelers take beside this process.

        Args:
            cpu_seconds: processor seconds of the labelers' processes that this rank keeps, since they were started.
            sharing: ranks that they serve, this one among them.
        """
        self._labelers, self._sharing, self._labelers_seen = cpu_seconds, sharing, 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.beat(name)
        self.entering(name)
        began, began_cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            # since the end of the last phase: a labeler also works while no phase is open
            so_far = self._labelers()
            labelers, self._labelers_seen = so_far - self._labelers_seen, so_far
            if name not in _OUTSIDE_TRAINING:
                self.training_cpu_seconds += time.process_time() - began_cpu + labelers / self._sharing
                self._labelers_in_step += labelers
            self.labeler_totals[name] = self.labeler_totals.get(name, 0.0) + labelers
            self.totals[name] = self.totals.get(name, 0.0) + seconds
            self._step[name] = self._step.get(name, 0.0) + seconds

    def add(
        self, totals: dict[str, float], cpu_seconds: float = 0.0, labeler_totals: dict[str, float] | None = None
    ) -> None:
        """Seconds that an interrupted run had spent before, its `training_cpu_seconds` and its `labeler_totals`."""
        self.training_cpu_seconds += cpu_seconds
        for mine, before in ((self.totals, totals), (self.labeler_totals, labeler_totals or {})):
            for name, seconds in before.items():
                mine[name] = mine.get(name, 0.0) + seconds

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

        `time/tokens_per_second`: all ranks' tokens over the ranks' mean seconds. `time/labeler_cpu`: processor seconds
        of all labelers' processes. `time/memory_gib_max`: the process's peak since it began, of CUDA's allocator, or of
        the resident set where there is no GPU.
        """
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "time/tokens_per_second": (torch.tensor(float(tokens)), torch.tensor(_training(self._step) / world_size)),
            # a sum over ranks: those that keep no labeler have seen none
            "time/labeler_cpu": (torch.tensor(self._labelers_in_step), torch.tensor(1.0 / world_size)),
            "time/memory_gib_max": (torch.tensor(peak / 2**30), torch.tensor(1.0)),
        }

    def end_step(self) -> dict[str, float]:
        """`time/PHASE` of the step that ends here."""
        times = {f"time/{name}": round(seconds, 4) for name, seconds in self._step.items()}
        self._step, self._labelers_in_step = {}, 0.0
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
        "threads": torch.get_num_threads(),
        "kernels": kernels.state().text if device == "cpu" else None,
        "seed": seed,
    }
    write_text_atomically(directory / "environment.json", json.dumps(environment, indent=1) + "\n")


def _commit() -> str | None:
    """The project's commit, where it runs from a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
