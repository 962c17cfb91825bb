"""A run of two real ranks that can be watched, killed at a chosen place, and compared with another when it has
ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 300.0  # seconds that anything here may take
_LEFT_WITHIN = 60.0  # seconds in which the rest of a run must have ended by itself after a part of it was killed


class Job:
    """One launch of `rank.py`: the launcher, two ranks and their reward service."""

    def __init__(self, recipe: Path, overrides: list[str], *, log: Path) -> None:
        self.tag = uuid.uuid4().hex
        self.notes = log.with_suffix(".notes")
        self.log = log
        port = str(random.randint(20000, 40000))
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", port]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "SOAK_TAG": self.tag,
            "SOAK_NOTES": str(self.notes),
        }
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [*launcher, "tests/soak/rank.py", str(recipe), *overrides],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def places(self) -> list[tuple[float, str]]:
        """Where rank 0 has been: when it came there, and the name of the phase."""
        path = Path(f"{self.notes}.0")
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1].strip()) for line in lines if line.endswith("\n")]

    def wait_for(self, phase: str, occurrence: int) -> bool:
        """Return when rank 0 enters the `occurrence`-th phase of this name (counted from 1), at once; False where the
        run ended before.
        """
        deadline = time.monotonic() + LONGEST
        path, seen, position = Path(f"{self.notes}.0"), 0, 0
        before = ""
        while time.monotonic() < deadline:
            size = path.stat().st_size if path.is_file() else 0
            if size > position:
                with open(path, "rb") as file:
                    file.seek(position)
                    text = file.read().decode()
                whole = text[: text.rfind("\n") + 1]
                position += len(whole.encode())
                for line in whole.splitlines():
                    name = line.split(" ", 1)[1]
                    seen += name == phase and name != before  # the passes of an update note its name again
                    before = name
                    if seen == occurrence:
                        return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        raise TimeoutError(f"{self.log}: no {occurrence}. {phase} within {LONGEST:.0f} s")

    def members(self) -> dict[int, str]:
        """Process id -> `launcher`, `rank 0`, `rank 1`, `service` or `other`, of every living process of this run."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                variables = dict(
                    item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if b"=" in item
                )
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue  # it has ended
            if variables.get(b"SOAK_TAG") != self.tag.encode() or state == "Z":
                continue
            if b"mrg_r1.reward.service.server" in words:
                found[int(entry.name)] = "service"
            elif b"tests/soak/rank.py" in words and b"deepspeed.launcher.launch" not in words and b"RANK" in variables:
                found[int(entry.name)] = f"rank {variables[b'RANK'].decode()}"
            else:
                found[int(entry.name)] = "launcher"
        return found

    def kill(self, members: dict[int, str], which: str) -> None:
        """SIGKILL to every process whose name begins with `which`; `all` means all of them."""
        for pid, name in sorted(
            members.items(), key=lambda item: item[1] == "launcher"
        ):  # the ranks first, or it would end them kindly
            if which == "all" or name.startswith(which):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def leave(self) -> dict[int, str]:
        """Wait until nothing of this run lives. Returns what still does after `_LEFT_WITHIN` seconds, having
        killed it.
        """
        deadline = time.monotonic() + _LEFT_WITHIN
        left = self.members()
        while left and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
            left = self.members()
        self.kill(left, "all")
        self.process.wait(timeout=LONGEST)
        return left


def durations(places: list[tuple[float, str]]) -> dict[str, float]:
    """The median seconds of each phase, from the moments at which phases began."""
    spans: dict[str, list[float]] = defaultdict(list)
    began, name = places[0]
    for moment, other in places[1:]:
        if other != name:
            spans[name].append(moment - began)
            began, name = moment, other
    return {phase: sorted(times)[len(times) // 2] for phase, times in spans.items()}


def facts(run: Path) -> dict[str, Any]:
    """What a finished run has come to: two runs are the same where these are equal.

    Raises:
        AssertionError: a step stands twice in metrics.jsonl.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"{run}/metrics.jsonl: steps {steps}"
    last = (run / "checkpoints" / "latest").read_text()
    state = json.loads((run / "checkpoints" / last / "state.json").read_text())
    evaluations = {path.name: json.loads(path.read_text()) for path in sorted((run / "evaluation").glob("*.json"))}
    return {
        "adapter": _digest(run / "adapter" / "adapter_model.safetensors"),
        "metrics": [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows],
        "completions": {path.name: _digest(path) for path in sorted((run / "completions").iterdir())},
        "evaluations": evaluations,
        "predictions": {path.name: _digest(path) for path in sorted((run / "evaluation").glob("*.jsonl"))},
        "checkpoint": {key: state[key] for key in ("step", "optimizer_steps", "best", "sha256")},
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
