"""Measure this project's GRPO step and TRL's on one CUDA card, at the shapes of Qwen2.5-VL-7B.

The contenders, one after another, each a process of its own, since no two of them fit a card together:
  ours      the trainer's own step under DeepSpeed: one rank, ZeRO-2, bfloat16, LoRA
  trl       TRL's GRPOTrainer, generating by transformers
  trl-vllm  the same, generating by vLLM in its process, where vllm is installed

All get the same shapes, images, words, reward and hyperparameters, and sample exactly 256 tokens a completion.
OUT/bench.json and OUT/bench.md are written after each case. A contender that fails has its reason in its row, the
others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks.bench import describe_machine, to_rich
from benchmarks.gpu_cases import CASES, GpuCase, find_cases
from benchmarks.gpu_results import HOW, Contender, Outcome, phase_table, step_table, write_results
from benchmarks.workers import Worker, WorkerError

# contender -> packages without which it is left out, and its part of the time: a side that computes a prompt for each
# completion needs more
NEEDS: dict[str, tuple[str, ...]] = {"ours": (), "trl": ("trl",), "trl-vllm": ("trl", "vllm")}
PARTS = {"ours": 3, "trl": 5, "trl-vllm": 4}
GRACE = 5.0  # seconds after its time in which a contender may still say that it is done

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# one card: TRL would spread over all
ON_CUDA = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# passes of many sizes leave holes otherwise; vLLM has its own
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class CaseReader(Worker):
    """The parent's end of a worker that says a line whenever it has one."""

    def line(self, seconds: float) -> dict[str, Any]:
        """The next line.

        Raises:
            WorkerError: it ended, or said nothing within `seconds`.
        """
        return self._receive(seconds)


def run_contender(
    contender: Contender,
    command: Sequence[str],
    cases: Sequence[GpuCase],
    *,
    log: Path,
    environment: Mapping[str, str],
    until: float,
    keep: Callable[[], None],
) -> None:
    """Let one contender run its cases and put what came of each into `contender.outcomes`.

    Args:
        until: when it must be done, in seconds since the epoch; it is ended a little later.
        keep: called after each case.
    """
    waiting = [case.name for case in cases]
    worker: CaseReader | None = None
    try:
        worker = CaseReader([*command, "--until", str(until)], log=log, environment=environment)
        contender.settings = worker.line(_time_to(until))["settings"]
        while waiting:
            line = worker.line(_time_to(until))
            outcome = contender.outcomes[line["case"]]
            outcome.note, outcome.error, outcome.line = line.pop("note", None), line.pop("error", None), line
            waiting.remove(line["case"])
            keep()
        worker.line(_time_to(until))  # a contender that breaks after its last case is not sound
    except WorkerError as error:
        broken = waiting[0] if waiting else cases[-1].name
        contender.outcomes[broken].error, contender.outcomes[broken].note = str(error), None
        for name in waiting[1:]:
            contender.outcomes[name].note = f"not run: it failed in {broken}"
        keep()
    finally:
        if worker is not None:
            worker.close()


def _time_to(until: float) -> float:
    return max(0.0, until - time.time()) + GRACE


def commands(options: argparse.Namespace, cases: Sequence[GpuCase]) -> dict[str, list[str]]:
    """What starts each contender."""
    common = [
        str(options.out),
        "--size",
        options.size,
        "--device",
        options.device,
        "--cases",
        *(case.name for case in cases),
    ]
    ours = [
        sys.executable,
        "-m",
        "benchmarks.gpu_ours",
        *common,
        "--micro-batch-tokens",
        str(options.micro_batch_tokens),
    ]
    ours += [f"--{name.replace('_', '-')}" for name in ("reuse_prefill", "recompute") if getattr(options, name)]
    trl = [str(options.trl_python), "-m", "benchmarks.gpu_trl", *common, "--micro-batch", str(options.trl_micro_batch)]
    return {"ours": ours, "trl": trl, "trl-vllm": [*trl, "--vllm", "--vllm-memory", str(options.vllm_memory)]}


def missing(python: str, packages: Sequence[str]) -> list[str]:
    """Which of the packages an interpreter does not have."""
    program = (
        "import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
    )
    done = subprocess.run([python, "-c", program, *packages], capture_output=True, text=True, check=True)
    return done.stdout.split()


def describe_card() -> list[str] | None:
    """Name, driver and memory of the cards as their driver tells them; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):  # no driver, or one without a card
        return None
    return done.stdout.strip().splitlines()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listing = "cases (studies x prompt tokens, about; 8 completions a study):\n  " + ", ".join(
        case.name for case in CASES["7b"]
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"{listing}\n\n{HOW}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench-gpu"), help="where images, logs and results go (runs/bench-gpu)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="time for everything; steps, then cases, are left out beyond it (10)",
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=list(NEEDS), default=list(NEEDS), help="run these only"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="run these only")
    parser.add_argument("--size", choices=list(CASES), default="7b", help="tiny: to try the bench itself")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the bench itself")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=7300, help="ours: tokens of a forward and backward pass (7300)"
    )
    parser.add_argument("--reuse-prefill", action="store_true", help="ours: keep the prefill's graph for the update")
    parser.add_argument("--recompute", action="store_true", help="ours: gradient checkpointing")
    parser.add_argument(
        "--trl-micro-batch", type=int, default=8, help="TRL: completions of a forward and backward pass (8)"
    )
    parser.add_argument(
        "--trl-python", type=Path, default=Path(sys.executable), help="interpreter that has TRL (this one)"
    )
    parser.add_argument(
        "--vllm-memory", type=float, default=0.45, help="TRL with vLLM: vLLM's share of the card's memory (0.45)"
    )
    options = parser.parse_args(arguments)
    try:
        find_cases(options.size, options.cases)
    except ValueError as error:
        parser.error(str(error))
    if shutil.which(options.trl_python) is None:
        parser.error(f"--trl-python {options.trl_python}: no such interpreter")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contenders; returns the exit status."""
    from benchmarks.gpu_model import write_folder  # torch and transformers: not for --help

    began, options = time.time(), parse(arguments)
    say = Console(width=None if sys.stdout.isatty() else 160)
    cases = find_cases(options.size, options.cases)
    contenders = [
        Contender(name, outcomes={case.name: Outcome() for case in cases})
        for name in NEEDS
        if name in options.contenders
    ]
    environment = describe_machine() | {"cards": describe_card(), "worker_environment": ENVIRONMENT | ALLOCATOR}
    environment["options"] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(complete: bool = False) -> None:
        environment["seconds"] = round(time.time() - began, 1)
        write_results(options.out, contenders=contenders, cases=cases, environment=environment, complete=complete)

    write_folder(
        options.out,
        options.size,
        sides=sorted({case.side for case in cases}),
        images=max(case.studies for case in cases),
    )
    to_run = []
    for one in contenders:
        lacking = missing(str(options.trl_python if one.name != "ours" else sys.executable), NEEDS[one.name])
        if not lacking:
            to_run.append(one)
        for outcome in one.outcomes.values():
            outcome.note = f"not installed: {', '.join(lacking)}" if lacking else "not run yet"

    for number, one in enumerate(to_run):
        left = options.minutes * 60 - (time.time() - began) - GRACE * (len(to_run) - number)
        until = time.time() + left * PARTS[one.name] / sum(PARTS[other.name] for other in to_run[number:])
        say.print(f"\n[bold]{escape(one.name)}[/bold], at most {until - time.time():.0f} s", highlight=False)
        run_contender(
            one,
            commands(options, cases)[one.name],
            cases,
            log=options.out / "logs" / f"{one.name}.log",
            environment=ENVIRONMENT
            | (ON_CUDA if options.device == "cuda" else ON_CPU)
            | (ALLOCATOR if one.name != "trl-vllm" else {}),
            until=until,
            keep=keep,
        )
        say.print(to_rich(step_table([one], cases), ""))
    keep(complete=True)
    say.print(to_rich(step_table(contenders, cases), "Steps"))
    say.print(to_rich(phase_table(contenders, cases), "Phases of the fastest step"))
    say.print(f"{options.out / 'bench.json'} and {options.out / 'bench.md'}, {environment['seconds'] / 60:.1f} minutes")
    return 1 if any(outcome.error for one in contenders for outcome in one.outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
