"""Our worker's units on the smallest task there is: they break here when mrg_r1's inside changes, and not in a bench of
20 minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.model import write_model
from benchmarks.task import Task, images_of
from benchmarks.workers import WORKER_ENVIRONMENT, Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    write_model(directory, [112])
    return directory


def test_the_model_is_written_once_and_whole(folder: Path) -> None:
    policy = folder / "policy"
    written = (policy / "model.safetensors").stat().st_mtime_ns
    write_model(folder, [112])
    assert (policy / "model.safetensors").stat().st_mtime_ns == written and not list(folder.glob("*.tmp"))
    assert len(images_of(folder, 112)) == 8
    with pytest.raises(FileNotFoundError, match="56"):
        images_of(folder, 56)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["step", "rollout", "hf_generate", "scoring", "scoring_naive"])
def test_every_unit_runs_and_reports_what_it_took(unit: str, folder: Path) -> None:
    task = Task(unit=unit, side=112, studies=2, group=2, new_tokens=4)
    command = [sys.executable, "-m", "benchmarks.ours", str(folder), task.to_json()]
    worker = Worker(command, log=folder / f"{unit}.log", environment=WORKER_ENVIRONMENT)
    try:
        ready = worker.wait_ready(120)
        answers = [worker.run(60), worker.run(60)]
    finally:
        worker.close()
    assert ready["settings"]["prompt_tokens"] > 16 and ready["settings"]["trained_parameters"] > 0
    assert all(answer["seconds"] > 0 and answer["peak_mb"] >= ready["resident_mb"] - 5 for answer in answers)
