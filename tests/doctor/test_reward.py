"""The doctor and a launch say where a recipe undoes what its reward was chosen for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrg_r1 import cli
from mrg_r1.config.recipe import load_recipe
from mrg_r1.doctor.reward import reward_findings
from mrg_r1.training.run import open_run
from tests.conftest import OneRank
from tests.world import World

ADDITIVE = ("reward.weights={additive: 3.0, length: 0.25}", "reward.threshold=0.3")
BATCH = "grpo.advantage_scale=batch"


def said(world: World, tmp_path: Path, *overrides: str) -> list[tuple[str, str]]:
    findings = reward_findings(load_recipe(world.recipe(tmp_path / "run"), overrides))
    return [(finding.state, str(finding)) for finding in findings]


def test_a_threshold_that_the_groups_std_erases_is_warned_of(world: World, tmp_path: Path) -> None:
    ((state, text),) = said(world, tmp_path, *ADDITIVE)
    assert state == "warning" and "reward.threshold 0.3" in text and "grpo.advantage_scale=batch" in text
    assert [one[0] for one in said(world, tmp_path, *ADDITIVE, BATCH)] == ["ok"]
    assert [one[0] for one in said(world, tmp_path, *ADDITIVE, "grpo.advantage_scale=none")] == ["ok"]


def test_a_second_term_of_labels_is_warned_of_and_one_that_is_only_logged_is_not(world: World, tmp_path: Path) -> None:
    mixed = ("reward.weights={additive: 1.0, mccs: 1.0, ce_f1: 0.0}", "reward.threshold=auto", BATCH)
    ((state, text),) = said(world, tmp_path, *mixed)
    assert state == "warning" and "beside mccs:" in text and "reward.threshold auto" in text
    logged = ("reward.weights={additive: 0.0, mccs: 1.0}", "reward.threshold=auto")
    assert [one[0] for one in said(world, tmp_path, *logged)] == ["ok"]


def test_the_papers_reward_and_scale_are_as_they_should_be(world: World, tmp_path: Path) -> None:
    ((state, text),) = said(world, tmp_path)
    assert state == "ok" and "mccs" in text and "grpo.advantage_scale group" in text


def test_the_doctor_and_a_launch_say_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], inline_rewards: None
) -> None:
    recipe = str(world.recipe(tmp_path / "run"))
    assert cli.main(["doctor", recipe, *ADDITIVE, "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["reward"]["state"] == "warning" and "additive" in findings["reward"]["text"]
    open_run(load_recipe(Path(recipe), ADDITIVE), OneRank(), task="grpo")
    assert "warning: reward: additive (reward.threshold 0.3)" in capsys.readouterr().err
    open_run(load_recipe(Path(recipe), [*ADDITIVE, f"output_dir={tmp_path / 'sft'}"]), OneRank(), task="sft")
    assert "additive" not in capsys.readouterr().err  # SFT has no advantages
