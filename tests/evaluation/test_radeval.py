"""RadEval's metrics in a closing evaluation: in the file, in every row, and no evaluation is lost with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from mrg_r1 import cli
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.evaluation.evaluate import write_evaluation
from mrg_r1.metrics import lexical
from mrg_r1.score.card import score_files
from mrg_r1.tracking.evaluation_tables import print_evaluation
from mrg_r1.training.run import Run, open_run
from tests.conftest import OneRank
from tests.metrics.radeval_stand_in import install
from tests.world import World

ASKED = ["evaluation.radeval=[radgraph, bertscore]", "evaluation.lexical=off"]


def opened(world: World, tmp_path: Path, python: str) -> Run:
    recipe = load_recipe(world.recipe(tmp_path / "run"), [*ASKED, f"radeval.python={python}"])
    return open_run(recipe, OneRank(), task="evaluate")


def test_a_closing_evaluation_has_them_and_a_validation_has_not(
    world: World, tmp_path: Path, inline_rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(world, tmp_path, install(tmp_path / "env", monkeypatch))
    result, predictions = run.evaluate(run.studies["test"], title="")
    assert list(result["radeval"]["scores"]) == [
        "radgraph_simple",
        "radgraph_partial",
        "radgraph_complete",
        "bertscore",
    ]
    assert result["radeval"]["package"] == "radeval 2.2.1" and result["radeval"]["studies"] == 8
    mean = sum(row["radeval"]["bertscore"] for row in predictions) / 8
    assert result["radeval"]["scores"]["bertscore"]["mean"] == pytest.approx(mean)
    console = Console(record=True, width=200)
    print_evaluation(console, result, "test")
    assert "radeval 2.2.1, 8 studies" in console.export_text()
    validation, rows = run.evaluate(run.studies["val"], title="", samples=100)
    assert validation["radeval"] is None and "radeval" not in rows[0]
    # the same numbers as in a card of what the evaluation left
    monkeypatch.setattr(lexical, "why_no_meteor", lambda: "this test has no time for it")
    write_evaluation(tmp_path, "test", result, predictions)
    rows = [json.loads(line) for line in (tmp_path / "test_predictions.jsonl").read_text().splitlines()]
    assert rows[0]["radeval"] == predictions[0]["radeval"]
    assert score_files(tmp_path / "test_predictions.jsonl", samples=5)["radeval"] is None


def test_an_evaluation_outlives_them(
    world: World,
    tmp_path: Path,
    inline_rewards: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = opened(world, tmp_path, install(tmp_path / "env", monkeypatch))
    install(tmp_path / "env", monkeypatch, fault="kill:radgraph")
    result, predictions = run.evaluate(run.studies["test"], title="")
    assert "SIGKILL" in result["radeval"]["left_out"]["radgraph"] and list(predictions[0]["radeval"]) == ["bertscore"]
    assert "warning: RadEval: radgraph left out" in capsys.readouterr().err
    (tmp_path / "env/radeval/__init__.py").unlink()
    result, predictions = run.evaluate(run.studies["test"], title="")
    assert result["disease_micro13"] is not None and predictions[0]["radeval"] is None
    assert list(result["radeval"]["left_out"]) == ["radeval"]
    print_evaluation(Console(quiet=True), result, "test")


def test_a_launch_and_the_doctor_ask_the_process_first(
    world: World,
    tmp_path: Path,
    inline_rewards: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = install(tmp_path / "env", monkeypatch)
    recipe = str(world.recipe(tmp_path / "run"))
    assert cli.main(["doctor", recipe, *ASKED, f"radeval.python={python}", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "radeval 2.2.1, radgraph, bertscore loaded" in findings["radeval"]["text"]
    install(tmp_path / "env", monkeypatch, fault="weights:bertscore")
    with pytest.raises(RecipeError, match="radeval: .*metric bertscore: OSError: not found in the local cache"):
        opened(world, tmp_path, python)


def test_a_recipe_that_asks_must_be_able_to(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(tmp_path / "run")
    with pytest.raises(RecipeError, match="without radeval.python: name the interpreter"):
        load_recipe(recipe, ASKED)
    with pytest.raises(RecipeError, match="crimson sends the reports to an API of somebody's.* `mrg-r1 score --send"):
        load_recipe(recipe, ["evaluation.radeval=[crimson]", "radeval.python=python"])
