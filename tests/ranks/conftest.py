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


class Pool:
    """Gives tasks (functions of tests/ranks/tasks.py) to all ranks and collects what each returned."""

    def __init__(self, folder: Path, *, ranks: int = 2) -> None:
        self.folder, self.number, self.ranks = folder, 0, ranks
        self.log = open(folder / "log.txt", "w")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        port = random.randint(20000, 40000)
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]
        self.process = subprocess.Popen(
            [*command, str(ROOT / "tests/ranks/worker.py"), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """The answers of the ranks, in order.

        Raises:
            RuntimeError: a rank raised (its traceback), or the pool died or is stuck.
        """
        number, self.number = self.number, self.number + 1
        task = self.folder / f".task_{number}.json"
        task.write_text(json.dumps({"function": function, "arguments": arguments}))
        task.rename(self.folder / f"task_{number}.json")
        paths = [self.folder / f"answer_{number}_{rank}.json" for rank in range(self.ranks)]
        deadline = time.monotonic() + TIMEOUT
        while not all(path.is_file() for path in paths):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    "the pool of ranks ended or is stuck in "
                    f"{function}:\n{(self.folder / 'log.txt').read_text()[-4000:]}"
                )
            time.sleep(0.02)
        answers = [json.loads(path.read_text()) for path in paths]
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise RuntimeError(f"rank {rank} in {function}:\n{answer['error']}")
        return [answer["value"] for answer in answers]

    def stop(self) -> None:
        (self.folder / "stop").touch()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
