"""Real launches to which something happens: a signal, a rank that raises, a rank that hangs, numbers that are not
finite.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launches.test_launch import command, environment, launch, steps_of
from tests.ranks.conftest import ROOT

pytestmark = pytest.mark.slow


def begin(world, run: Path, *overrides: str, log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a run of two ranks; its output goes to `log`."""
    recipe = world.recipe(run, name=f"{run.name}.yaml")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command("train", recipe, *overrides),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return process, recipe


def ranks_of(recipe: Path) -> list[int]:
    """Process ids of the ranks of a run, in their order."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if (
            str(recipe).encode() in words
            and b"launch/train.py" in words
            and any(word.startswith(b"--local_rank") for word in words)
        ):
            if b"RANK" in variables and b"deepspeed.launcher.launch" not in words:
                found[int(variables[b"RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def until(condition, process: subprocess.Popen[bytes], *, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


EIGHT = ["steps=8", "evaluation.test=false", "checkpoint.every=50"]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> list[dict]:
    """The steps of a run to which nothing happens."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert launch("train", world.recipe(run), *EIGHT).returncode == 0
    return steps_of(run)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on(world, tmp_path, straight, number):
    """And a third start finds it complete. kill -9 is what tests/soak does."""
    run, log = tmp_path / "run", tmp_path / "log"
    process, recipe = begin(world, run, *EIGHT, log=log)
    until(lambda: lines(run) >= 2, process)
    os.kill(ranks_of(recipe)[1], number)
    assert process.wait(timeout=60) == 75
    output = log.read_text()
    assert output.count(f"{number.name} on rank 1") == 1 and "Traceback" not in output
    done = lines(run)
    assert (run / "checkpoints" / "latest").read_text() == f"step_{done}" and done < 8
    again = launch("train", recipe, *EIGHT)
    assert again.returncode == 0 and "resuming" in again.stdout + again.stderr
    assert steps_of(run) == straight
    if number == signal.SIGTERM:
        third = launch("train", recipe, *EIGHT)
        assert third.returncode == 0 and "complete" in third.stdout and steps_of(run) == straight


def test_a_rank_that_raises_ends_all_within_seconds_and_speaks_last(world, tmp_path):
    """An image that goes missing while the run is on: the error is one rank's, the other waits in a collective."""
    run, log, data = tmp_path / "run", tmp_path / "log", tmp_path / "phantoms"
    subprocess.run(["cp", "-r", str(world.folder / "phantoms"), str(data)], check=True)
    overrides = [f"data.manifest={data}/manifest.jsonl", "steps=500", "evaluation.test=false"]
    process, _ = begin(world, run, *overrides, log=log)
    until(lambda: lines(run) >= 2, process)
    lost = [json.loads(line)["images"][0]["path"] for line in (data / "manifest.jsonl").read_text().splitlines()][3]
    (data / lost).unlink()
    began = time.monotonic()
    assert process.wait(timeout=60) == 2 and time.monotonic() - began < 30
    said = [line for line in log.read_text().splitlines() if "] [INFO]" not in line and "] [ERROR]" not in line]
    assert said[-1].startswith("error on rank ") and Path(lost).name in said[-1] and "Traceback" not in log.read_text()
    assert sum(line.startswith("error") for line in said) == 1 and "gloo" not in log.read_text().lower()


def test_a_rank_that_hangs_is_named(world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process, recipe = begin(world, run, "steps=500", "evaluation.test=false", "engine.hang_timeout=12", log=log)
    until(lambda: lines(run) >= 2, process)
    frozen = ranks_of(recipe)[1]
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: "Hanging: rank 1 in" in log.read_text(), process, seconds=120)
    os.kill(frozen, signal.SIGKILL)  # the launcher would wait half a minute for it
    assert process.wait(timeout=60) != 0
    assert "; waiting: ranks 0" in log.read_text() and log.read_text().count("nothing has moved for 12 s") == 1


def test_steps_whose_rewards_are_not_finite_are_skipped_and_too_many_stop_the_run(world, tmp_path):
    overrides = ["steps=6", "evaluation.test=false", "evaluation.before=false", "engine.max_skipped=2"]
    overrides += ["reward.weights={mccs: 1.0, 'tests.reward.custom_terms:nan_at': 0.0}"]

    def train(run: Path, first: int, last: int) -> subprocess.CompletedProcess[str]:
        extra = {"NAN_COUNTER": f"{run}.count", "NAN_FROM": str(first), "NAN_TO": str(last)}
        return launch("train", world.recipe(run, name=f"{run.name}.yaml"), *overrides, extra=extra)

    once, often = tmp_path / "once", tmp_path / "often"
    # a call for a rank's reports and one for the constant report: in the second step, on one rank
    done = train(once, 5, 6)
    assert done.returncode == 0 and (done.stdout + done.stderr).count("step 1 is skipped: rank ") == 1
    rows = steps_of(once)
    assert [row["policy/skipped_updates"] for row in rows] == [0, 1, 0, 0, 0, 0] and "loss" not in rows[1]
    assert {path.name for path in (once / "not_finite").glob("*.json")} == {
        "step_000001_rank0.json",
        "step_000001_rank1.json",
    }
    stopped = train(often, 5, 1000)
    output = stopped.stdout + stopped.stderr
    assert stopped.returncode == 3 and output.count("2 steps in a row") == 1
    assert (often / "checkpoints" / "latest").read_text() == "step_3" and "Traceback" not in output
