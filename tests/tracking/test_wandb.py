"""wandb offline: one run through interruptions, numbers only, and never a reason to stop."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from PIL import Image

import mrg_r1.tracking.wandb_run as wandb_run
from mrg_r1.config.sections import TrackingSection
from mrg_r1.tracking.log import Clock, RunLog
from mrg_r1.tracking.sharing import without_paths
from mrg_r1.tracking.wandb_run import check_wandb
from mrg_r1.types import Study, StudyImage

CONFIG = {"data": {"manifest": "/data/smith_john/manifest.jsonl"}, "prompt": {"instruction": "Findings / impression."}}


def open_log(directory, *, start=0, mode="offline", **share):
    options = TrackingSection(wandb=mode, wandb_project="p", **share)
    return RunLog(directory, active=True, steps=9, options=options, config=CONFIG, start_step=start)


class FakeRun:
    """What is handed to wandb; fails from the step `fails` on."""

    def __init__(self, fails=99):
        self.rows, self.fails = [], fails

    def define_metric(self, name, **options):
        pass

    def log(self, row, step):
        if step >= self.fails:
            raise OSError(28, "No space left on device")
        self.rows.append((step, row))

    def finish(self):
        pass


@pytest.fixture
def runs(monkeypatch):
    """wandb.init hands out fakes; they and the arguments are recorded."""
    made = []

    def init(**arguments):
        made.append((FakeRun(init.fails), arguments))
        return made[-1][0]

    init.fails = 99
    monkeypatch.setattr(wandb, "init", init)
    return SimpleNamespace(made=made, init=init)


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    study = Study("patient-17", "p", (StudyImage(path),), "Heart grossly enlarged.", "val")
    return study, {"text": "Lungs are clear zebra."}


def test_steps_repeated_after_crashes_reach_wandb_once(tmp_path, runs):
    """Two crashes over the same steps: the second resume starts below what wandb has, and metrics.jsonl no longer says
    so.
    """
    for start, stop in ((0, 7), (4, 5), (4, 9)):
        log = open_log(tmp_path, start=start)
        for step in range(start, stop):
            log.log(step, {"loss": float(step)})
    assert [step for run, _ in runs.made for step, _ in run.rows] == list(range(9))
    assert len({arguments["id"] for _, arguments in runs.made}) == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(
        range(9)
    )


def test_online_goes_on_with_the_same_run_and_a_new_start_is_another(tmp_path, runs):
    for start in (0, 2, 0):
        open_log(tmp_path, start=start, mode="online").log(start, {})
    (_, first), (_, second), (_, third) = runs.made
    assert first["id"] == second["id"] != third["id"] and second["resume"] == "allow"


def test_a_failing_wandb_is_said_once_and_at_the_end(tmp_path, runs, capsys):
    runs.init.fails = 1
    log = open_log(tmp_path)
    for step in range(4):
        log.log(step, {"loss": 1.0})
    log.close()
    said = capsys.readouterr().err
    assert said.count("wandb failed (OSError") == 1 and "wandb has only a part of this run" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_without_the_package_a_run_that_wants_it_is_refused(monkeypatch, mode):
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    check_wandb("off")
    with pytest.raises(ValueError, match="tracking.wandb"):
        check_wandb(mode)


def test_off_opens_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = open_log(tmp_path, mode="off")
    log.log(0, {"loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_offline_files_hold_numbers_and_no_patient(tmp_path, sample):
    """docs/traps.md #27, in wandb's real files: no report, no folder of the manifest, no image; the instruction and the
    numbers are there.
    """
    log = open_log(tmp_path / "")
    log.log(0, {"validation/mean_reward": 0.5}, [sample])
    log.close()
    files, content = [], b""
    deadline = time.monotonic() + 60
    # wandb's own process may write its file a moment after the run has ended
    while b"validation/mean_reward" not in content and time.monotonic() < deadline:
        time.sleep(0.1)
        files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and "logs" not in path.parts]
        content = b"".join(path.read_bytes() for path in files)
    assert b"validation/mean_reward" in content and b"Findings / impression" in content
    for secret in (b"zebra", b"grossly", b"patient-17", b"smith_john"):
        assert secret not in content
    assert not [path for path in files if path.suffix == ".png"]


def test_shared_reports_are_announced_and_given(tmp_path, sample, capsys):
    log = open_log(tmp_path, share_text=True, share_images=True)
    assert "at each validation sampled reports and their references" in " ".join(capsys.readouterr().err.split())
    log.log(0, {"validation/mean_reward": 0.5}, [sample])
    log.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.table.json"))
    assert b"zebra" in content and b"patient-17" not in content
    assert list((tmp_path / "wandb").rglob("*.png"))


def test_paths_are_cut_to_their_last_part():
    assert without_paths(CONFIG) == {
        "data": {"manifest": "manifest.jsonl"},
        "prompt": {"instruction": "Findings / impression."},
    }


def test_tokens_per_second_counts_all_ranks():
    """docs/traps.md #20 on unequal counts: 100 tokens in 2 s and 20 in 4 s on two ranks are 120 tokens in 3 s."""
    parts = []
    for tokens, seconds in ((100, 2.0), (20, 4.0)):
        clock = Clock()
        clock._step = {"rollout": seconds, "validation": 50.0}
        parts.append(clock.costs(tokens, world_size=2)["time/tokens_per_second"])
    assert float(sum(part[0] for part in parts) / sum(part[1] for part in parts)) == pytest.approx(40)
