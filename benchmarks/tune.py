"""Which settings each side is fastest with: sizes of a pass and allocators, in turns like the bench itself.

The winners are the defaults of `trl_worker.py`, `ours.py` and `bench.py`; README.md has the table they were chosen
from. An allocator that is preloaded (jemalloc, tcmalloc) is tried where its library is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks.bench import ALLOCATOR, Budget, describe_machine, run_case, to_rich
from benchmarks.cases import LONG, SIDES, Case, Contender
from benchmarks.model import write_model
from benchmarks.results import case_table, write_results
from benchmarks.task import Task

Side = Literal["trl", "ours"]

SIZES: dict[Side, tuple[int, ...]] = {"trl": (8, 16, 32), "ours": (1200, 2800, 9000)}  # completions; tokens


def candidates(side: Side, pixels: int, preloads: Iterable[Path]) -> tuple[Contender, ...]:
    """Every size under glibc as it is, and where it keeps memory, the smallest under each preloaded allocator.

    No more than that: all of them are resident at once, some with several gigabytes.
    """
    sizes = SIZES[side]
    found = [_contender(side, pixels, size, "glibc", {}) for size in sizes]
    for size in sizes:
        found.append(_contender(side, pixels, size, "glibc, kept", ALLOCATOR))
    for library in preloads:
        found.append(_contender(side, pixels, sizes[0], library.name.split(".")[0], {"LD_PRELOAD": str(library)}))
    return tuple(found)


def _contender(side: Side, pixels: int, size: int, allocator: str, environment: dict[str, str]) -> Contender:
    return Contender(f"{size}, {allocator}", side, Task(side=pixels, micro_batch=size), tuple(environment.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["trl", "ours"], help="whose settings to try")
    parser.add_argument("--pixels", type=int, choices=SIDES, default=LONG, help=f"side of the images ({LONG})")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench-tune"), help="where results and logs go (runs/bench-tune)"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="repetitions beyond this are left out (20)")
    parser.add_argument(
        "--repetitions", type=int, default=3, help="measured steps of each candidate after its warm-up (3)"
    )
    parser.add_argument(
        "--preload", type=Path, nargs="*", default=[], help="allocator libraries to try, as in .../libjemalloc.so.2"
    )
    parser.add_argument(
        "--trl-python", type=Path, default=Path(".venv-trl/bin/python"), help="interpreter of TRL's environment"
    )
    options = parser.parse_args()
    write_model(options.out, SIDES)
    title = f"{options.side}: settings at {options.pixels} px"
    contenders = candidates(options.side, options.pixels, options.preload)
    case = Case(f"tune_{options.side}", title, contenders, options.repetitions, 1.0)
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.ours"],
        "trl": [str(options.trl_python), "-m", "benchmarks.trl_worker"],
    }
    say = Console(width=None if sys.stdout.isatty() else 140)
    result = run_case(case, commands=commands, folder=options.out, budget=Budget(options.minutes, [case]), say=say)
    write_results(
        options.out / f"{options.side}-{options.pixels}",
        results=[result],
        ratios=[],
        environment=describe_machine(),
        complete=True,
    )
    say.print(to_rich(case_table(result), case.title))
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
