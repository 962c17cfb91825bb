"""Rows are run in order, several at a time, kept when finished, and one that fails does not take the others with it."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from mrg_r1.cores import Cores
from mrg_r1.tables import run as table_run
from mrg_r1.tables.plan import plan_table
from mrg_r1.tables.run import RowsFailed, run_rows
from tests.ranks.conftest import ROOT
from tests.tables.conftest import FAKE


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def _events(folder) -> list[tuple[str, str]]:
    lines = [line.split() for line in (folder / "started.txt").read_text().splitlines()]
    return [(kind, name) for _, kind, name in sorted(lines, key=lambda line: float(line[0]))]


def test_rows_wait_for_those_they_need_and_finished_ones_are_kept(table, tmp_path):
    path, rows = table(), tmp_path / "rows"
    plan = plan_table(path, rows_folder=rows, seeds=[0])
    run_rows(plan, launch=FAKE, parallel=2, console=Console(quiet=True))
    assert all(run.finished for run in plan.runs.values())
    events = _events(rows)
    sft = plan.runs["SFT", 0]
    assert events.index(("begin", sft.folder.name)) > max(
        events.index(("end", folder.name)) for folder in sft.waits_for
    )
    asked = json.loads((sft.folder / "summary.json").read_text())["asked"]
    assert asked == {
        "sft.max_cpu_seconds": 12.5,
        "script": "launch/sft.py",
        "adapter": f"{plan.runs['Eight & more', 0].folder}/adapter",
    }
    run_rows(plan_table(path, rows_folder=rows, seeds=[0]), launch="false", parallel=2, console=Console(quiet=True))
    assert _events(rows) == events


def test_as_many_rows_as_asked_for_run_at_a_time(table, tmp_path):
    rows = tmp_path / "rows"
    plan = plan_table(table(), rows_folder=rows, overrides=["optimizer.learning_rate=0.3"])
    run_rows(plan, launch=FAKE, parallel=2, console=Console(quiet=True))
    running, most = 0, 0
    for kind, _ in _events(rows):
        running += 1 if kind == "begin" else -1
        most = max(most, running)
    assert most == 2


def test_a_failing_row_has_the_last_word_and_the_others_come_to_their_end(table, tmp_path):
    rows = [
        {"name": "Bad", "set": {"grpo.beta": 0.9}},
        {"name": "Needs it", "set": {"policy.adapter": "{run:Bad}/adapter"}},
        {"name": "Good", "set": {"grpo.group_size": 4}},
    ]
    plan = plan_table(table(rows=rows, reference="Good"), rows_folder=tmp_path / "rows", seeds=[0])
    with pytest.raises(RowsFailed) as failed:
        run_rows(plan, launch=FAKE, parallel=1, console=Console(quiet=True))
    assert plan.runs["Good", 0].finished and not plan.runs["Needs it", 0].folder.exists()
    assert "the labeler has died" in str(failed.value) and "Needs it, seed 0: not started" in str(failed.value)


def test_rows_beside_one_another_share_the_cores(monkeypatch):
    monkeypatch.setattr(table_run, "read_cores", lambda: Cores(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert table_run._threads(1) == {}  # a row alone takes what there is
    assert table_run._threads(2) == {"OMP_NUM_THREADS": "3"} and table_run._threads(16) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert table_run._threads(2) == {}
