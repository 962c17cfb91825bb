"""The service's process with terms that others score: what it says when it is ready, and whose the answers are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.metrics.radeval import RadEvalSettings
from mrg_r1.reward.judge import HttpSettings
from mrg_r1.reward.outside import OutsideSettings
from mrg_r1.reward.service.client import ServiceRewards
from mrg_r1.training import rewards
from tests.conftest import OneRank
from tests.metrics.radeval_stand_in import install
from tests.reward.judge_server import judging
from tests.reward.service.rank import SETTINGS, FaultySupervisor
from tests.world import World

ROOT = Path(__file__).parents[3]


def test_a_service_asks_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = install(tmp_path / "env", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'env'}:{ROOT}")
    with judging() as server:
        settings = OutsideSettings(RadEvalSettings(python, ()), workers=2, http=HttpSettings(retries=0))
        function = {
            "weights": {"radeval:ratescore": 0.5, server.url: 0.5},
            "mode": "plain",
            "outside": asdict(settings),
        }
        supervisor = FaultySupervisor(replace(SETTINGS, reward_function=function), log=tmp_path / "service.log")
        try:
            supervisor.wait()
            service = ServiceRewards(supervisor.directory, keeper=os.getpid(), timeout=60)
            assert service.radeval is not None and service.radeval["version"] == "2.2.1"
            ended = torch.ones(1, 2, dtype=torch.bool)
            found = service.result(service.submit([["edema", "clear lungs"]], ended, ["s1"], ["clear lungs"]))
            assert found.terms["radeval:ratescore"].tolist() == [[0.0, 1.0]]
            assert found.total[0].tolist() == pytest.approx([0.05, 0.6])
            assert supervisor.cpu_seconds > 0
            service.close()
        finally:
            supervisor.close()


def test_a_service_that_cannot_ask_others_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = OutsideSettings(http=HttpSettings(timeout=1, retries=0))
    function = {"weights": {"http://127.0.0.1:1/score": 1.0}, "outside": asdict(settings)}
    supervisor = FaultySupervisor(replace(SETTINGS, reward_function=function), log=tmp_path / "service.log")
    with pytest.raises(ValueError, match="http://127.0.0.1:1/score: asked 1 times about 2 reports: ConnectionRefused"):
        supervisor.wait()
    supervisor.close()


def test_a_run_goes_on_with_the_radeval_that_it_began_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(world.recipe(tmp_path / "run"))
    recipe.output_dir.mkdir()
    rewards.keep_radeval(recipe, OneRank(), {"version": "2.2.1"})
    assert json.loads((recipe.output_dir / "radeval.json").read_text()) == {"version": "2.2.1"}
    rewards.keep_radeval(recipe, OneRank(), {"version": "2.3.0"})  # it has no checkpoint: it begins anew
    monkeypatch.setattr(rewards, "recorded_recipe", lambda checkpoints: {})
    with pytest.raises(
        RecipeError, match="this run began with {'version': '2.3.0'} .* it is {'version': '2.2.1'} by now"
    ):
        rewards.keep_radeval(recipe, OneRank(), {"version": "2.2.1"})
    allowed = load_recipe(tmp_path / "recipe.yaml", ["resume.allow_changes=true"])
    rewards.keep_radeval(allowed, OneRank(), {"version": "2.2.1"})
