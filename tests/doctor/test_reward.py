"""The doctor and a launch say where a recipe undoes what its reward was chosen for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mrg_r1
from mrg_r1 import cli
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.doctor.finding import examined
from mrg_r1.doctor.reward import judge_findings, own_term_findings, radeval_finding, reward_findings
from mrg_r1.training.run import open_run
from tests.conftest import OneRank
from tests.metrics.radeval_stand_in import install
from tests.reward.judge_server import judging
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
    open_run(
        load_recipe(Path(recipe), [*ADDITIVE, f"output_dir={tmp_path / 'sft'}", "rollout.max_new_tokens=200"]),
        OneRank(),
        task="sft",
    )
    assert "additive" not in capsys.readouterr().err  # SFT has no advantages


def test_whoever_is_asked_for_rewards_must_answer_first(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.recipe(tmp_path / "run")
    python = install(tmp_path / "env", monkeypatch)
    with judging() as server:
        weights = f"reward.weights={{mccs: 0.5, 'radeval:radgraph': 0.25, '{server.url}': 0.25}}"
        recipe = load_recipe(path, [weights, f"radeval.python={python}", "reward.http.retries=0"])
        (judge,) = judge_findings(recipe)
        assert judge.state == "ok" and "of two invented reports, the first right, 0.7 and 0.4" in judge.text
        (radeval,) = radeval_finding(recipe)
        assert radeval.state == "ok" and "radeval 2.2.1, radgraph loaded" in radeval.text
        for fault in ("prose", "nested"):
            server.faults = [fault]
            (judge,) = judge_findings(recipe)
            assert judge.state == "failure" and "that is not JSON" in judge.text
    install(tmp_path / "env", monkeypatch, fault="weights:radgraph")
    assert "not found in the local cache" in radeval_finding(recipe)[0].text
    assert not judge_findings(load_recipe(path)) and not radeval_finding(load_recipe(path))


OWN = {  # what stands in my_terms.py, and what doctor says of my_terms:fn
    "well": ("def fn(*texts): return []", None),
    "no module": (None, "no module 'my_terms' on Python's path"),
    "no function": ("", "my_terms has no function 'fn'"),
    "an import of its own": ("import a_package_that_nobody_has", "No module named 'a_package_that_nobody_has'"),
    "broken": ("def fn(:", "SyntaxError"),
    "loud": ("print('{')\ndef fn(*texts): return []", None),
    "an end": ("import sys\nsys.exit()", "cannot be imported: exit code 0"),
    "a crash": ("import os\nos.abort()", "cannot be imported: exit code -6"),
}


@pytest.mark.parametrize(("content", "said"), OWN.values(), ids=OWN.keys())
def test_a_term_of_the_users_own_is_imported_as_the_reward_service_will(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    said: str | None,
) -> None:
    recipe = load_recipe(world.recipe(tmp_path / "run"), ["reward.weights={mccs: 1.0, 'my_terms:fn': 0.0}"])
    if content is not None:
        (tmp_path / "my_terms.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(Path(mrg_r1.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)  # the folder that a launch is started from
    (finding,) = own_term_findings(recipe)
    assert finding.state == ("ok" if said is None else "failure") and "my_terms:fn" in finding.text
    assert said is None or said in finding.text
    assert capsys.readouterr().out == "", "doctor's own output may be JSON"


def test_doctor_lists_terms_of_the_users_own(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "reward.weights={mccs: 0.5, 'nope_mod:fn': 0.5}"
    assert cli.main(["doctor", str(world.recipe(tmp_path / "run")), weights, "--json"]) == 1
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["reward term"]["state"] == "failure" and "nope_mod:fn" in findings["reward term"]["text"]


def test_a_check_that_fails_itself_takes_no_other_with_it() -> None:
    def look() -> str:
        raise RecursionError("maximum depth")

    finding = examined("judge", look)
    assert finding.state == "failure" and "RecursionError: maximum depth" in finding.text and __file__ in finding.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.weights={'http://127.0.0.1/s\u00e4': 1.0}"], "a URL is written in ASCII"),
        (["reward.weights={'HTTP://h.example/': 1.0}"], r"reward.send_text_to=\[h.example\]"),
        (["reward.weights={'ftp://h.example/': 1.0}"], "expected 'module:function'"),
        (["reward.weights={'radeval:radgraph': 1.0}"], "radeval:radgraph without radeval.python"),
        (["reward.weights={'radeval:radcliq': 1.0}"], "depends on the references that come with it"),
        (["reward.weights={'http://h.example/': 1.0}"], r"reward.send_text_to=\[h.example\]"),
        (
            ["reward.weights={'http://127.0.0.1/': 1.0}", "reward.timeout=100"],
            "sent 4 times can take 244 s, and reward.timeout 100 s would end the reward service",
        ),
    ],
)
def test_a_recipe_that_cannot_ask_is_refused(world: World, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(world.recipe(tmp_path / "run"), overrides)
