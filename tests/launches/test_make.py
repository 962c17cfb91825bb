"""The Makefile's own part of a run's terminal: what a stage shows, what it keeps for RUN/launch.log, how it fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.ranks.conftest import ROOT

LAUNCHER = """#!/bin/sh
echo "the launcher's own line"
echo "step 1/2" >&2
test "$CODE" -ge 128 || test "$CODE" = 0 || echo "error: a rank says why" >&2
echo "the launcher's last line"
exit "$CODE"
"""


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")} | variables
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def stage(tmp_path: Path):
    """Runs the demo's cold start, its inputs being there, with a launcher that ends with `code`."""
    demo, venv, launcher = tmp_path / "demo", tmp_path / "venv", tmp_path / "launcher"
    inputs = [demo / "phantoms/manifest.jsonl", demo / "labeler/training.json", demo / "tiny-policy/config.json"]
    for path in [venv / ".ready", *inputs]:
        path.parent.mkdir(parents=True)
        path.touch()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)

    def run(code: int) -> tuple[subprocess.CompletedProcess[str], str]:
        settings = [f"DEMO={demo}", f"VENV={venv}", f"LAUNCH={launcher}"]
        done = make(str(demo / "sft/summary.json"), *settings, CODE=str(code))
        return done, (demo / "sft/launch.log").read_text()

    return run


def test_a_stage_shows_one_line_and_the_ranks_and_keeps_what_the_launcher_says(stage):
    done, kept = stage(0)
    assert done.returncode == 0 and kept.splitlines() == ["the launcher's own line", "the launcher's last line"]
    assert len(done.stdout.split("\n\n")) == 1 and "launcher" not in done.stdout + done.stderr
    assert done.stderr == "step 1/2\n" and len(done.stdout.strip().splitlines()) == 1


def test_a_rank_that_fails_speaks_last(stage):
    done, _ = stage(3)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and said[-1] == "error: a rank says why" and "launcher" not in done.stderr


def test_of_a_rank_that_was_killed_the_launcher_tells(stage):
    done, _ = stage(247)
    assert done.returncode == 2 and "the launcher's last line" in done.stderr
    assert "247" in done.stderr and "launch.log" in done.stderr


def test_help_lists_the_targets_and_fits_a_screen():
    done = make("help")
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert {"setup", "demo", "demo-control", "test", "test-slow", "bench", "soak", "iu-phantom"} <= set(listed)
    assert {"table-NAME", "table-NAME-phantom"} <= set(listed) and len(listed) <= 24


@pytest.mark.parametrize(
    "target", ["demo", "demo-control", "iu-phantom", "table-main-iu", "table-margin-phantom", "bench"]
)
def test_every_target_can_be_planned(target, tmp_path):
    assert make("-n", target, f"VENV={tmp_path}", f"DEMO={tmp_path}/demo", "IU=nowhere").returncode == 0
