"""Measure this project's step beside TRL's, its rollout beside transformers' generate, its scoring and its labeler
beside plain ones.

What is compared, on one thread each, in turns:
  step_*      whole GRPO steps on the same weights, images, prompt words, reward and hyperparameters: vision, rollout,
              reference, update. The reward is word overlap on both sides; no labeler is part of it.
  rollout_*   from pixels to token ids, the same policy in both, LoRA attached.
  scoring_*   log-probs of a fixed rollout with their gradient.
  growth_*    our own step as group, prompt, completion or batch grow.
  rollouts    GRPO steps of the demo's policy on two ranks, tiny labeler included: rollouts a second.
  sft_all     SFT of all its parameters: ours, and the checkpoint's own modules, one padded row a study.
  labeler_*   reports labelled by CheXbert, random weights of BERT-base's size: ours, and the plain ways of it.

Results stand in OUT/bench.json and OUT/bench.md after each case, so that an interrupted bench keeps what it has. A
contender that fails has its reason in its row and a null ratio; the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.cases import CASES, RATIOS, SIDES, Case
from benchmarks.figures import compute_figures, figure_table, roofline, roofline_table
from benchmarks.kept import KEPT, keep, read_kept, worse_than_kept
from benchmarks.results import HOW, CaseResult, Measurement, Table, case_table, phase_table, ratio_table, write_results
from benchmarks.workers import WORKER_ENVIRONMENT, Worker, WorkerError

READY_SECONDS = 180.0  # imports and loading take about 10
UNIT_SECONDS = 300.0  # no unit of a working contender takes a minute

# Both sides get the same allocator: glibc told to keep freed memory. By itself it hands large blocks back to the kernel
# and faults them in again at the next allocation; TRL was a tenth slower then, and ours a little (README.md).
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}


class Budget:
    """The time that the whole bench may take, and how its estimates have done so far."""

    def __init__(self, minutes: float, cases: Sequence[Case]) -> None:
        self.began = time.monotonic()
        self.seconds = minutes * 60
        self.waiting = list(cases)
        self._estimated = 0.0

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def begin(self, case: Case) -> str:
        """Take the case off the list and say how long this and all others will take, by the pace so far."""
        spent = time.monotonic() - self.began
        pace = spent / self._estimated if self._estimated else 1.0
        coming = pace * sum(waiting.estimate for waiting in self.waiting)
        self.waiting.remove(case)
        self._estimated += case.estimate
        return f"about {max(1, round(min(coming, self.left) / 60))} min left"


def run_case(case: Case, *, commands: dict[str, list[str]], folder: Path, budget: Budget, say: Console) -> CaseResult:
    """Start the contenders, let each warm up once, then let them take turns.

    A case that time does not allow is left out or cut short, and its measurements say so.
    """
    measurements = {contender.name: Measurement(contender.name) for contender in case.contenders}
    result = CaseResult(case.name, case.title, list(measurements.values()))
    if budget.left < case.estimate / 2:
        for one in result.measurements:
            one.error = f"not run: {budget.left:.0f} s of --minutes left, about {case.estimate:.0f} s needed"
        return result
    workers: dict[str, Worker] = {}
    try:
        for contender in case.contenders:  # all at once: what they do until they are ready is not measured
            with _keeping_reason(measurements[contender.name]):
                log = folder / "logs" / f"{case.name}-{contender.name.replace(' ', '_')}.log"
                command = [*commands[contender.side], str(folder), contender.task.to_json()]
                environment = WORKER_ENVIRONMENT | (
                    ALLOCATOR if contender.allocator is None else dict(contender.allocator)
                )
                workers[contender.name] = Worker(command, log=log, environment=environment)
        for name, worker in workers.items():
            with _keeping_reason(measurements[name]):
                answer = worker.wait_ready(READY_SECONDS)
                measurements[name].settings, measurements[name].resident_mb = answer["settings"], answer["resident_mb"]
        for turn in range(case.repetitions + 1):
            began = time.monotonic()
            for name, worker in workers.items():
                one = measurements[name]
                if one.error is not None:
                    continue
                with _keeping_reason(one):
                    answer = worker.run(UNIT_SECONDS)
                    if turn == 0:
                        one.warm_up = answer
                    else:
                        one.repetitions.append(answer)
            _show_turn(case, turn, result, say)
            if 0 < turn < case.repetitions and budget.left < 1.2 * (time.monotonic() - began):
                for one in result.measurements:
                    one.note = f"{turn} of {case.repetitions} repetitions: --minutes ran out"
                break
    finally:
        for worker in workers.values():
            worker.close()
    return result


@contextmanager
def _keeping_reason(one: Measurement) -> Iterator[None]:
    """A contender that fails inside the block keeps its reason, and the others go on."""
    try:
        yield
    except WorkerError as error:
        one.error = str(error)


def _show_turn(case: Case, turn: int, result: CaseResult, say: Console) -> None:
    units = [
        (one.name, one.repetitions[-1] if one.repetitions else one.warm_up)
        for one in result.measurements
        if one.error is None
    ]
    shown = "  ".join(f"{name} {unit['seconds']:.2f} s" for name, unit in units if unit is not None)
    say.print(f"  {f'{turn} of {case.repetitions}' if turn else 'warm-up'}: {shown}", highlight=False, soft_wrap=True)


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_before": list(os.getloadavg()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": done.stdout.strip() or None,
        "worker_environment": WORKER_ENVIRONMENT | ALLOCATOR,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listing = "cases:\n" + "\n".join(f"  {case.name:<18}{case.title}" for case in CASES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        epilog=f"{listing}\n\n{HOW}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="where policy, images, logs and results go (runs/bench)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="time for everything; repetitions, then cases, are left out beyond it (20)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", choices=[case.name for case in CASES], help="run these cases and no others"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help=f"keep the figures of a whole bench in {KEPT}, to be committed: later benches are compared with them",
    )
    parser.add_argument(
        "--trl-python",
        type=Path,
        default=Path(".venv-trl/bin/python"),
        help="interpreter of TRL's environment, made by `make bench`",
    )
    return parser.parse_args(arguments)


def _was_run(ratio: str, results: Sequence[CaseResult]) -> bool:
    """Whether the ratio's case is among the results; of one that was not asked for nothing is said."""
    case = next(one.case for one in RATIOS if one.name == ratio)
    return any(result.name == case for result in results)


def to_rich(table: Table, title: str) -> RichTable:
    header, rows = table
    shown = RichTable(title=escape(title) or None, title_justify="left")
    for number, name in enumerate(header):
        shown.add_column(name, justify="left" if number in (0, len(header) - 1) else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; returns the exit status."""
    from benchmarks.demo_shaped import write_demo_shaped  # torch and transformers: not for --help
    from benchmarks.model import write_model

    options = parse(arguments)
    say = Console(width=None if sys.stdout.isatty() else 140)
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.ours"],
        "trl": [str(options.trl_python), "-m", "benchmarks.trl_worker"],
        "labeler": [sys.executable, "-m", "benchmarks.labeler"],
        "laboratory": [sys.executable, "-m", "benchmarks.laboratory"],
    }
    environment = describe_machine()
    budget = Budget(options.minutes, cases)
    write_model(options.out, SIDES)
    if any(contender.side == "laboratory" for case in cases for contender in case.contenders):
        write_demo_shaped(options.out)
    results: list[CaseResult] = []
    for case in cases:
        say.print(f"\n[bold]{escape(case.title)}[/bold] ({budget.begin(case)})", highlight=False)
        results.append(run_case(case, commands=commands, folder=options.out, budget=budget, say=say))
        environment["seconds"] = round(time.monotonic() - budget.began, 1)
        figures, roof = compute_figures(results), roofline(results)
        tables = [
            ("Units a second", figure_table(figures)),
            ("Roofline: what is counted, and what was reached", roofline_table(roof)),
        ]
        content = write_results(
            options.out,
            results=results,
            ratios=RATIOS,
            environment=environment,
            complete=len(results) == len(CASES),
            more={"figures": figures, "roofline": roof},
            tables=tables if roof else (),
        )
        say.print(to_rich(case_table(results[-1]), ""))
        if phase_table(results[-1])[1]:
            say.print(to_rich(phase_table(results[-1]), ""))
    say.print(to_rich(ratio_table(content["ratios"], content["reasons"]), "Ratios of minima"))
    for title, table in tables if roof else ():
        say.print(to_rich(table, title))
    measured = {name: value for name, value in content["ratios"].items() if _was_run(name, results)}
    for line in worse_than_kept(measured, read_kept()):
        say.print(f"WORSE {line}", highlight=False, soft_wrap=True)
    if options.keep and content["complete"]:
        keep(content)
        say.print(f"kept in {KEPT}")
    elif options.keep:
        say.print("not kept: only a whole bench is")
    say.print(f"{options.out / 'bench.json'} and {options.out / 'bench.md'}, {environment['seconds'] / 60:.1f} minutes")
    return 1 if any(result.errors for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
