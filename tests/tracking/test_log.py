"""metrics.jsonl through interruption, the clock, and the closing table."""

from __future__ import annotations

import json
import time

import pytest

from mrg_r1.tracking.log import Clock, RunLog
from mrg_r1.tracking.report import print_report, read_summary, training_seconds


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def open_log(directory, *, start=0, active=True):
    return RunLog(directory, active=active, steps=5, wandb_mode="off", wandb_project="p", config={}, start_step=start)


def test_a_resumed_run_writes_each_step_once(tmp_path):
    log = open_log(tmp_path)
    for step in range(3):
        log.log(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    log = open_log(tmp_path, start=2)
    log.log(2, {"loss": 20.0})
    log.close()
    assert lines(tmp_path) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 20.0}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path, active=False)
    log.log(0, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_clock_adds_phases_and_counts_only_training(capsys):
    clock = Clock()
    for name in ("rollout", "rollout", "validation"):
        with clock.phase(name):
            time.sleep(0.01)
    assert clock.totals["rollout"] >= 0.02 and clock.training_seconds == clock.totals["rollout"]
    assert set(clock.end_step()) == {"time/rollout", "time/validation"} and clock.end_step() == {}
    clock.add({"rollout": 5.0})
    assert clock.training_seconds > 5


def test_clock_keeps_processor_seconds_of_training_through_an_interruption(monkeypatch):
    processor = iter([10.0, 13.0, 100.0, 20.0, 21.0])
    monkeypatch.setattr(time, "process_time", lambda: next(processor))
    clock = Clock()
    for name in ("update", "validation", "rollout"):
        with clock.phase(name):
            pass
    assert clock.training_cpu_seconds == 4.0  # 3 of update and 1 of rollout, nothing of validation
    clock.add({}, 6.5)
    assert clock.training_cpu_seconds == 10.5


def summary(before, after, **more):
    return {
        "before": {"f1": before},
        "after": {"f1": after},
        "seconds": {"rollout": 1},
        "training_seconds": 7.5,
        "world_size": 2,
    } | {
        "zero_stage": 2,
        "seed": 0,
        "note": "phantoms",
        **more,
    }


def test_report_prints_the_gain_beside_the_control(tmp_path, capsys):
    for seed, (before, after, other) in enumerate([(0.5, 0.6, 0.55), (0.4, 0.6, 0.5)]):
        run = tmp_path / f"run{seed}"
        (run / "control").mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(summary(before, after)))
        (run / "control" / "summary.json").write_text(json.dumps(summary(None, other)))
    print_report([tmp_path / "run0", tmp_path / "run1"])
    text = capsys.readouterr().out
    assert "+0.150 (+0.100 to +0.200)" in text  # GRPO: mean of 0.1 and 0.2
    assert "+0.075 (+0.050 to +0.100)" in text  # control, from the same start
    assert "phantoms" in text
    assert training_seconds(tmp_path / "run0") == 7.5


def test_report_of_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no summary.json; the run has not ended"):
        read_summary(tmp_path)
