"""Pools of real DeepSpeed ranks, started once in a test run and of two unless a test says so: a launch costs ten
seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
PATIENCE = 30  # seconds in which the other ranks may raise too, once one has


class Pool:
    """Gives tasks (functions of tests/ranks/tasks.py) to all ranks and collects what each returned."""

    def __init__(self, folder: Path, *, ranks: int = 2) -> None:
        self.parent, self.ranks, self.starts = folder, ranks, 0
        self.start()

    def start(self) -> None:
        """In a folder of its own: a rank that hung may still write into the last one."""
        self.folder, self.number = self.parent / f"start_{self.starts}", 0
        self.folder.mkdir()
        self.starts += 1
        self.log = open(self.folder / "log.txt", "w")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        port = random.randint(20000, 40000)
        command = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_gpus",
            str(self.ranks),
            "--master_port",
            str(port),
        ]
        self.process = subprocess.Popen(
            [*command, str(ROOT / "tests/ranks/worker.py"), str(self.folder)],
            cwd=ROOT,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """The answers of the ranks, in order.

        Raises:
            RuntimeError: a rank raised (its traceback), or the pool died or is stuck; the next task finds a new pool.
        """
        number, self.number = self.number, self.number + 1
        task = self.folder / f".task_{number}.json"
        task.write_text(json.dumps({"function": function, "arguments": arguments}))
        task.rename(self.folder / f"task_{number}.json")
        paths = [self.folder / f"answer_{number}_{rank}.json" for rank in range(self.ranks)]
        deadline = time.monotonic() + TIMEOUT
        alone: float | None = None  # since when an error of some ranks waits for the others
        while not all(path.is_file() for path in paths):
            now = time.monotonic()
            if alone is None and any("error" in answer for answer in answers_of(paths)):
                alone = now
            if self.process.poll() is not None or now > deadline or (alone is not None and now > alone + PATIENCE):
                raised = "\n".join(answer["error"] for answer in answers_of(paths) if "error" in answer)
                log = (self.folder / "log.txt").read_text()[-4000:]
                self.kill()
                self.start()
                raise RuntimeError(f"the pool of ranks ended or is stuck in {function}:\n{raised or log}")
            time.sleep(0.02)
        answers = answers_of(paths)
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise RuntimeError(f"rank {rank} in {function}:\n{answer['error']}")
        return [answer["value"] for answer in answers]

    def kill(self) -> None:
        """The launcher ends its ranks on SIGTERM."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def stop(self) -> None:
        (self.folder / "stop").touch()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def answers_of(paths: list[Path]) -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
