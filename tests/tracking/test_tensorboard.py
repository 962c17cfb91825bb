"""TensorBoard's event files: wandb's numbers, each step once through interruptions, and never a reason to stop.

The package is optional, so a stand-in takes its writer's place here: it keeps points until they are flushed, as
the writer's queue does, and its files are read as TensorBoard reads them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import wandb

import mrg_r1.tracking.tensorboard_run as tensorboard_run
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.config.sections import TrackingSection
from mrg_r1.tracking.log import RunLog
from mrg_r1.tracking.tensorboard_run import check_tensorboard
from mrg_r1.types import Study
from tests.tracking.test_wandb import FakeRun


class FakeWriter:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used: a file for each writer; fails from the step `fails`
    on.
    """

    made = 0
    fails = 99

    def __init__(self, log_dir, purge_step=None):
        FakeWriter.made += 1
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._path = Path(log_dir) / f"events.{FakeWriter.made:03d}"
        self._queue = [] if purge_step is None else [["start", purge_step]]
        self.flush()

    def add_scalar(self, tag, scalar_value, global_step):
        if global_step >= self.fails:
            raise OSError(28, "No space left on device")
        self._queue.append([tag, float(scalar_value), global_step])

    def flush(self):
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self._queue)
        self._queue = []

    close = flush


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(FakeWriter, "fails", 99)


def shown(folder):
    """(step, name, value) of the points that TensorBoard shows of a folder: its first mark of a start is no restart, a
    later one drops what stands from its step on (`_CheckForRestartAndMaybePurge` of its event accumulator).
    """
    points, started = [], False
    for path in sorted(folder.glob("events.*")):
        for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if entry[0] == "start":
                points = [point for point in points if point[0] < entry[1]] if started else points
                started = True
            else:
                points.append((entry[2], entry[0], entry[1]))
    return points


def open_log(run, board, *, start=0, active=True, **options):
    run.mkdir(parents=True, exist_ok=True)
    section = TrackingSection(**{"wandb": "off", **options}, tensorboard=board)
    return RunLog(run, active=active, steps=9, options=section, config={}, start_step=start)


def test_it_gets_the_numbers_that_wandb_gets(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    log = open_log(tmp_path / "run", tmp_path / "board", wandb="offline")
    log.log(0, {"loss": 0.25, "reward/total": 1.0, "policy/kl": None, "policy/passes": 3})
    log.log(1, {"loss": 0.5, "validation/mean_reward": 0.75})
    log.close()
    given = [(step, name, float(value)) for step, row in run.rows for name, value in row.items() if name != "step"]
    assert shown(tmp_path / "board/run") == given and len(given) == 5


def test_a_killed_run_goes_on_with_each_step_once(tmp_path):
    """Killed three times behind a checkpoint: what was flushed behind it comes again, what was not flushed is lost."""
    board = tmp_path / "board"
    for start, stop, flushed, left in ((0, 6, True, 6), (4, 7, True, 7), (4, 6, False, 4), (4, 9, True, 9)):
        log = open_log(tmp_path / "run", board, start=start)
        for step in range(start, stop):
            log.log(step, {"loss": float(step)})
        if flushed:
            log.sync()
        assert shown(board / "run") == [(step, "loss", float(step)) for step in range(left)]
    assert [path.name for path in board.iterdir()] == ["run"]


def test_a_folder_for_each_run_and_for_each_start(tmp_path):
    board = tmp_path / "board"
    for number, run in enumerate((tmp_path / "a/seed0", tmp_path / "b/seed0", tmp_path / "a/seed0")):
        log = open_log(run, board)
        log.log(0, {"loss": float(number)})
        log.close()
    found = {folder.name: shown(folder) for folder in board.iterdir()}
    assert found == {"seed0": [(0, "loss", 0.0)], "seed0_2": [(0, "loss", 1.0)], "seed0_3": [(0, "loss", 2.0)]}


def test_another_directory_at_a_resume_is_begun_there(tmp_path):
    other = tmp_path / "other/run"
    other.mkdir(parents=True)  # somebody else's
    open_log(tmp_path / "run", tmp_path / "board").close()
    log = open_log(tmp_path / "run", tmp_path / "other", start=2)
    log.log(2, {"loss": 1.0})
    log.close()
    assert not list(other.iterdir()) and shown(tmp_path / "other/run_2") == [(2, "loss", 1.0)]


def test_a_failing_writer_is_said_once_and_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FakeWriter, "fails", 1)
    log = open_log(tmp_path / "run", tmp_path / "board")
    for step in range(4):
        log.log(step, {"loss": 1.0})
        log.sync()
    log.close()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("TensorBoard failed (OSError") == 1 and "TensorBoard has only a part of this run" in said
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path / "run", tmp_path / "board", active=False)
    log.log(0, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "board").exists()


def test_what_is_shared_with_wandb_does_not_come_here(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **arguments: FakeRun())
    study = Study("patient-17", "p", (), "Heart grossly enlarged.", "val")
    log = open_log(tmp_path / "run", tmp_path / "board", wandb="offline", share_text=True)
    log.log(0, {"validation/mean_reward": 0.5}, [(study, {"text": "Lungs are clear zebra."})])
    log.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("events.*"))
    assert b"validation/mean_reward" in content and b"zebra" not in content and b"patient-17" not in content


def test_without_the_package_a_run_that_wants_it_is_refused(monkeypatch):
    monkeypatch.setattr(tensorboard_run, "find_spec", lambda name: None)
    check_tensorboard("off")
    with pytest.raises(ValueError, match=r"tracking.tensorboard runs/board: .* pip install tensorboard"):
        check_tensorboard(Path("runs/board"))


def test_a_file_in_its_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_run, "find_spec", lambda name: SimpleNamespace())
    check_tensorboard(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file; give a directory"):
        check_tensorboard(tmp_path / "file")


def test_a_recipe_takes_a_directory_or_off():
    demo = Path("launch/recipes/demo.yaml")
    assert load_recipe(demo).tracking.tensorboard == "off"
    assert load_recipe(demo, ["tracking.tensorboard=off"]).tracking.tensorboard == "off"  # YAML's false
    assert load_recipe(demo, ["tracking.tensorboard=runs/board"]).tracking.tensorboard == Path("runs/board")
    with pytest.raises(RecipeError, match="tracking.tensorboard"):
        load_recipe(demo, ["tracking.tensorboard=true"])
