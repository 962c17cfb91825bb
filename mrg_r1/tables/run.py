"""Run what a table asks for, several rows at a time: finished rows are kept, interrupted ones go on where they
stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from mrg_r1.console import progress_bar
from mrg_r1.cores import Cores, asked_for, read_cores, share_cores
from mrg_r1.tables.plan import SCRIPTS, Plan, RowRun, keep_protocol

_LOG = "table_row.log"
_TAIL = 15  # lines of a failed row's log that are shown
_PATIENCE = 120.0  # seconds in which an interrupted row may write its checkpoint


class RowsFailed(ValueError):
    """Rows that did not come to an end; the message has each one's last words. What the others made is kept."""


@dataclass
class _Started:
    run: RowRun
    process: subprocess.Popen[bytes]


def run_rows(plan: Plan, *, launch: str, parallel: int, console: Console) -> None:
    """Run every row that is not finished.

    A failing row does not stop the others. On Ctrl-C or SIGTERM the running rows are told to write their checkpoints.

    Args:
        launch: how ranks are started, as in "deepspeed --num_gpus 1"; a free port is added for each row.
        parallel: rows at a time.

    Raises:
        RowsFailed: rows that ended otherwise than complete.
    """
    waiting = list({run.folder: run for run in plan.runs.values() if not run.finished}.values())
    done = {run.folder for run in plan.runs.values() if run.finished}
    started: list[_Started] = []
    failed: list[RowRun] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    environment = {**os.environ, **_threads(parallel)}
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with progress_bar(*columns, console=console) as shown:
            bar = shown.add_task("rows", total=len(waiting))
            while waiting or started:
                ready = [run for run in waiting if all(folder in done for folder in run.waits_for)]
                for run in ready[: parallel - len(started)]:
                    waiting.remove(run)
                    started.append(_start(run, launch, environment))
                    console.print(
                        f"{run.row}, seed {run.seed}: running in {run.folder}", highlight=False, soft_wrap=True
                    )
                if not started:  # what is left waits for rows that have failed
                    failed += waiting
                    break
                time.sleep(0.5)
                for one in [one for one in started if one.process.poll() is not None]:
                    started.remove(one)
                    shown.advance(bar)
                    if one.run.finished:
                        done.add(one.run.folder)
                    else:
                        failed.append(one.run)
                        console.print(
                            f"{one.run.row}, seed {one.run.seed}: ended with {one.process.returncode}", highlight=False
                        )
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(started)
    if failed:
        raise RowsFailed("\n".join(_last_words(run) for run in failed))


def command(run: RowRun, launch: str, *, port: int) -> list[str]:
    """The command line that starts a row's run."""
    overrides = list(run.overrides)
    if run.cpu_seconds_of is not None:
        summary = json.loads((run.cpu_seconds_of / "summary.json").read_text(encoding="utf-8"))
        overrides.append(f"sft.max_cpu_seconds={summary['training_cpu_seconds']}")
    return [*shlex.split(launch), "--master_port", str(port), SCRIPTS[run.task], str(run.recipe_file), *overrides]


def _threads(parallel: int) -> dict[str, str]:
    """The variable that keeps rows beside one another from each taking every core; a user's own comes first."""
    if parallel == 1 or asked_for() is not None:
        return {}
    each = max(1, read_cores().usable // parallel)
    return {"OMP_NUM_THREADS": str(share_cores(Cores(each), ranks=1, labeler=True, environment={}).rank)}


def _start(run: RowRun, launch: str, environment: dict[str, str]) -> _Started:
    run.folder.mkdir(parents=True, exist_ok=True)
    keep_protocol(run)
    with open(run.folder / _LOG, "ab") as log:
        # a session of its own: Ctrl-C reaches this process alone, which tells the rows
        process = subprocess.Popen(
            command(run, launch, port=_free_port()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return _Started(run, process)


def _stop(started: Sequence[_Started]) -> None:
    """Have running rows write their checkpoints, and wait for them; what has not ended by then is killed."""
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    for one in started:
        try:
            one.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _last_words(run: RowRun) -> str:
    path = run.folder / _LOG
    if not path.is_file():
        return f"{run.row}, seed {run.seed}: not started, it waits for a row that failed"
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    return f"{run.row}, seed {run.seed}: not complete; the end of {path}:\n" + "\n".join(
        f"    {line}" for line in lines
    )
