"""The scripts a person starts, as they are started: bad input, a service that dies, a cold start, --help."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import FAMILIES
from tests.ranks.conftest import ROOT

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def command(script: str, recipe: Path, *overrides: str, ranks: int = 2) -> list[str]:
    port = str(random.randint(20000, 40000))
    return [
        str(BIN / "deepspeed"),
        "--num_gpus",
        str(ranks),
        "--master_port",
        port,
        f"launch/{script}.py",
        str(recipe),
        *overrides,
    ]


def launch(*arguments, extra: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    env = environment() | (extra or {})
    return subprocess.run(
        command(*arguments, **options), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


def steps_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.grup_size=4", "grpo.group_size"),
        ("grpo.studies_per_step=5", "4 or 6"),
    ],
)
def test_bad_recipe_ends_all_ranks_with_one_message(world, tmp_path, override, words):
    done = launch("train", world.recipe(tmp_path / "run"), override)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and output.count(words) == 1 and "Traceback" not in output
    assert words in done.stderr.rpartition("error:")[2], "nothing is said after it"


def test_a_reward_service_that_dies_costs_no_step_and_one_that_keeps_dying_leaves_a_checkpoint(world, tmp_path):
    """Killed in the middle of a batch of step 2: the same run. Killed whenever it comes back: a checkpoint, the cause,
    and a resume.
    """
    overrides = [
        "steps=4",
        "evaluation.test=false",
        "evaluation.before=false",
        "reward.weights={mccs: 1.0, 'tests.reward.custom_terms:dies': 0.0}",
    ]
    folder = tempfile.mkdtemp()  # a short name: sockets lie in it

    def train(run: Path, *, at: int, times: int) -> subprocess.CompletedProcess[str]:
        extra = {"DIES_COUNTER": f"{run}-{times}.count", "DIES_AT": str(at), "DIES_TIMES": str(times), "TMPDIR": folder}
        return launch(
            "train", world.recipe(run, name=f"{run.name}.yaml"), *overrides, "checkpoint.every=50", extra=extra
        )

    straight, killed, dead = tmp_path / "straight", tmp_path / "killed", tmp_path / "dead"
    assert train(straight, at=0, times=0).returncode == 0
    done = train(killed, at=9, times=1)  # two ranks, and twice a batch: the completions and the constant report
    assert done.returncode == 0 and (done.stdout + done.stderr).count("started again (1 of 3)") == 1
    assert steps_of(killed) == steps_of(straight)
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["time/reward_restarts_max"] for row in rows] == [0, 0, 1, 1]

    stopped = train(dead, at=9, times=1000)
    output = stopped.stdout + stopped.stderr
    assert stopped.returncode != 0 and len(re.findall("rank 0: .*4 times", output)) == 1
    assert "killed by SIGKILL" in output and "Traceback" not in output
    # the failing rank speaks last, and the run keeps its words
    assert "no rewards" in stopped.stderr.rpartition("error:")[2]
    assert "no rewards" in (dead / "launch.log").read_text()
    assert (dead / "checkpoints" / "latest").read_text() == "step_2" and len(steps_of(dead)) == 2
    again = train(dead, at=0, times=0)
    assert again.returncode == 0 and "resuming" in again.stdout + again.stderr
    assert steps_of(dead) == steps_of(straight)
    assert not list(Path(folder).glob("mrg-r1-reward-*")), "services leave nothing behind"


@pytest.mark.parametrize(
    ("world", "evaluated"),
    [(family, family == "qwen2_5_vl") for family in FAMILIES],  # a launch more, of what no family changes
    indirect=["world"],
)
def test_sft_of_all_parameters_leaves_a_policy_that_grpo_starts_from(world, tmp_path, evaluated):
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    recipe = world.recipe(sft, name="sft.yaml")
    overrides = [
        "sft.trainable=all",
        "rollout.max_new_tokens=200",
        "prompt.mode=think",
        "steps=3",
        "evaluation.test=false",
    ]
    assert launch("sft", recipe, *overrides).returncode == 0
    losses = [row["loss"] for row in steps_of(sft)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    overrides = [f"policy.path={sft}/policy", "steps=1", "prompt.mode=think", f"evaluation.test={evaluated}"]
    done = launch("train", world.recipe(grpo), *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (grpo / "page" / "index.html").is_file() and len(steps_of(grpo)) == 1
    if evaluated:
        assert (grpo / "evaluation" / "test.json").is_file()
        done = launch("evaluate", grpo / "config.yaml")
        assert done.returncode == 0 and "disease_micro13" in done.stdout


def test_help_explains_every_key():
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "grpo.group_size  (default 8; ours)" in done.stdout and "arXiv" not in done.stderr
