"""The run as it happens: one JSON object a step, a line on the terminal, numbers to wandb.

Only rank 0 writes. wandb gets numbers and never texts or images; it is offline unless the recipe says otherwise, and a run
goes on without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from mrg_r1.files import write_text_atomically

WandbMode = Literal["off", "offline", "online"]

logger = logging.getLogger(__name__)

_OUTSIDE_TRAINING = ("start", "validation", "checkpoint", "evaluation")

_LINE = {  # what the terminal shows of a step: title -> metric
    "reward": "reward/total",
    "constant": "reward/constant",
    "mccs": "reward/mccs",
    "format": "reward/format",
    "loss": "loss",
    "kl": "policy/kl",
    "entropy": "policy/entropy",
    "length": "groups/length",
    "zero-signal": "groups/zero_signal",
    "| val F1": "validation/disease_micro13",
    "val reward": "validation/mean_reward",
}


class RunLog:
    """Writes RUN/metrics.jsonl, the terminal and wandb; silent on every rank but the first.

    Args:
        directory: RUN.
        active: True on rank 0.
        steps: outer steps of the run, for the time left.
        wandb_mode: off, offline or online.
        start_step: steps already done; later lines of an interrupted run are cut off, since they will be written again.
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
    ) -> None:
        self.directory, self.active, self.steps = directory, active, steps
        # a pipe or a log file has no width: wide enough for the closing table
        self.console = Console(stderr=True, quiet=not active, width=None if sys.stderr.isatty() else 120)
        self._wandb: Any = None
        self._began = time.monotonic()
        self._first: int | None = None
        if not active:
            return
        path = directory / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] < start_step]
            write_text_atomically(path, "".join(f"{line}\n" for line in kept))  # killed here, a run loses none of its steps
        self._file = open(path, "a", encoding="utf-8")
        if wandb_mode != "off":
            self._wandb = _start_wandb(directory, wandb_mode, wandb_project, config)

    def log(self, step: int, metrics: dict[str, float | int | None]) -> None:
        """Write one step's metrics; the step is the one just taken, counted from 0."""
        if not self.active:
            return
        written = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **written}) + "\n")  # NaN is no JSON
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in metrics.items() if value is not None}, step=step)
        self._first = step if self._first is None else self._first
        pace = (time.monotonic() - self._began) / (step - self._first + 1)
        parts = [f"{title} {_short(metrics[name])}" for title, name in _LINE.items() if metrics.get(name) is not None]
        left = int(pace * (self.steps - step - 1))
        self.console.print(
            f"step {step + 1}/{self.steps}  {'  '.join(parts)}  {left // 60}:{left % 60:02d} left", highlight=False, soft_wrap=True
        )

    def sync(self) -> None:
        """Bring the steps logged so far to the disk: a checkpoint that survives a crash of the machine must not survive its metrics."""
        if self.active:
            os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.active:
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()


class Clock:
    """Seconds by phase: of the step at hand, and of the whole run.

    Args:
        beat: is told the name of each phase as it begins.
    """

    def __init__(self, beat: Callable[[str], None] = lambda phase: None) -> None:
        self.beat = beat
        self.totals: dict[str, float] = {}
        self.training_cpu_seconds = 0.0  # this process's own, all its threads: what a busy machine does not stretch
        self._step: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.beat(name)
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
        """(seconds of a phase, seconds of training phases) of the step so far: a metric whose mean over ranks is the phase's share."""
        return torch.tensor(self._step.get(name, 0.0)), torch.tensor(_training(self._step))

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
    done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _start_wandb(directory: Path, mode: WandbMode, project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed (pip install 'mrg-r1[wandb]'): metrics go to metrics.jsonl only")
        return None
    # numbers and the recipe only: no code, no console capture (a completion could be printed), no system probes of the machine
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    assert mode != "off"
    return wandb.init(project=project, name=directory.name, dir=directory, mode=mode, config=config, settings=settings)


def _is_whole(line: str) -> bool:
    """A line that a crash cut in the middle is not JSON; it will be written again."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
