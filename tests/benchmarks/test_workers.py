"""Step servers, with workers of a few lines: turns, failures, and what a failure leaves in the results."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.bench import Budget, run_case
from benchmarks.cases import Case, Contender, Ratio
from benchmarks.results import compute_ratios
from benchmarks.task import Task
from benchmarks.workers import Worker, WorkerError

GOOD = """
import time
from benchmarks.workers import Channel, serve
channel = Channel()
print("what a library prints must not reach the parent")
def unit():
    time.sleep(0.02)
    return {"sleep": 0.02}
serve(channel, unit, {"micro_batch": 8})
"""
BREAKS = """
from benchmarks.workers import Channel, serve
def unit():
    raise MemoryError("no room for the cache")
serve(Channel(), unit, {})
"""
SILENT = """
import time
from benchmarks.workers import Channel
channel = Channel()
channel.ready({})
channel.wait()
print("thinking")
time.sleep(60)
"""
ROOT = Path(__file__).parents[2]


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def start(program: str, tmp_path: Path) -> Worker:
    return Worker(command(program), log=tmp_path / "log", environment={"PYTHONPATH": str(ROOT)})


def test_a_worker_answers_each_unit_with_seconds_phases_and_memory(tmp_path: Path) -> None:
    worker = start(GOOD, tmp_path)
    ready = worker.wait_ready(30)
    answers = [worker.run(30), worker.run(30)]
    worker.close()
    assert ready["settings"] == {"micro_batch": 8} and ready["resident_mb"] > 1
    for answer in answers:
        assert answer["phases"] == {"sleep": 0.02} and 0.02 <= answer["seconds"] < 1
        assert answer["peak_mb"] >= answer["resident_mb"] - 5 and answer["cpu_seconds"] < answer["seconds"]
    assert "what a library prints" in (tmp_path / "log").read_text()


def test_a_worker_that_raises_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    worker = start(BREAKS, tmp_path)
    worker.wait_ready(30)
    with pytest.raises(WorkerError, match="1.*MemoryError: no room for the cache"):
        worker.run(30)
    worker.close()


def test_a_worker_that_never_answers_is_ended(tmp_path: Path) -> None:
    worker = start(SILENT, tmp_path)
    worker.wait_ready(30)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="1 s"):
        worker.run(1)
    worker.close()
    assert time.monotonic() - began < 10


def test_a_command_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="no-such-python"):
        Worker([str(tmp_path / "no-such-python")], log=tmp_path / "log", environment={})


def run(program: str, tmp_path: Path, *, minutes: float = 1, repetitions: int = 3):
    case = Case(
        "pair", "two", (Contender("ours", "ours", Task()), Contender("TRL", "trl", Task())), repetitions, estimate=1
    )
    commands = {"ours": command(GOOD), "trl": command(program)}
    return run_case(case, commands=commands, folder=tmp_path, budget=Budget(minutes, [case]), say=Console(quiet=True))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_failing_contender_leaves_its_reason_and_the_other_goes_on(tmp_path: Path) -> None:
    result = run(BREAKS, tmp_path)
    ours, theirs = result.measurements
    assert ours.error is None and len(ours.repetitions) == 3 and ours.warm_up is not None
    assert theirs.error is not None and "no room for the cache" in theirs.error
    ratios, reasons = compute_ratios([result], [Ratio("step", "pair", over="TRL", under="ours")])
    assert ratios == {"step": None} and "no room for the cache" in reasons["step"]


def test_contenders_take_turns_until_all_repetitions_are_done(tmp_path: Path) -> None:
    result = run(GOOD, tmp_path)
    assert [len(one.repetitions) for one in result.measurements] == [3, 3] and not result.errors


def test_without_time_a_case_is_left_out_and_says_so(tmp_path: Path) -> None:
    result = run(GOOD, tmp_path, minutes=0)
    assert len(result.errors) == 2 and "not run" in result.errors[0]


def test_a_case_that_runs_out_of_time_keeps_what_it_has(tmp_path: Path) -> None:
    result = run(GOOD, tmp_path, minutes=4 / 60, repetitions=100_000)
    assert (
        all(one.repetitions and one.note and "ran out" in one.note for one in result.measurements) and not result.errors
    )
