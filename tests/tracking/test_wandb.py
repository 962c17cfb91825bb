"""What wandb is handed: numbers and the recipe. A stand-in records it, with the signatures of wandb 0.31."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrg_r1.tracking.log import RunLog


class Recorder:
    """Module, settings and run in one."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.init: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished += 1

    def module(self) -> SimpleNamespace:
        def start(**keywords: Any) -> Recorder:
            self.init = keywords
            return self

        def settings(**keywords: Any) -> dict[str, Any]:
            self.settings = keywords
            return keywords

        return SimpleNamespace(init=start, Settings=settings)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder.module())
    return recorder


def test_wandb_gets_numbers_and_the_recipe_and_nothing_of_the_machine(wandb: Recorder, tmp_path: Path) -> None:
    recipe = {"prompt": {"instruction": "Write."}}
    log = RunLog(tmp_path, active=True, steps=2, wandb_mode="online", wandb_project="p", config=recipe)
    log.log(0, {"reward/total": 0.5, "agreement/Edema": None, "groups/length": 7})
    log.say("a line for the terminal")
    log.close()
    assert wandb.logged == [(0, {"reward/total": 0.5, "groups/length": 7})] and wandb.finished == 1
    assert all(isinstance(value, int | float) for _, data in wandb.logged for value in data.values())
    assert wandb.init["config"] == recipe and wandb.init["mode"] == "online"
    assert set(wandb.init) == {"project", "name", "dir", "mode", "config", "settings"}
    on = ("disable_code", "disable_git", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    assert [name for name in on if wandb.settings.get(name) is not True] == []
    assert wandb.settings["console"] == "off" and wandb.settings["save_code"] is False


def test_wandb_is_not_touched_when_it_is_off_or_on_other_ranks(wandb: Recorder, tmp_path: Path) -> None:
    for mode, active in (("off", True), ("online", False)):
        log = RunLog(tmp_path, active=active, steps=2, wandb_mode=mode, wandb_project="p", config={})
        log.log(0, {"loss": 1.0})
        log.close()
    assert wandb.init == {} and wandb.logged == [] and wandb.finished == 0
