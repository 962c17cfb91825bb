"""Studies with labels and no report: what they are refused for, what is chosen without them, what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mrg_r1 import cli
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.evaluation import evaluate as evaluating
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.training.run import open_run
from mrg_r1.training.state import open_loader
from tests.conftest import OneRank
from tests.labels_only import WEIGHTS, all_of_them, every_other, labels_only

ROOM = "rollout.max_new_tokens=99"  # for every report


def opened(world, tmp_path, *overrides, task="grpo"):
    return open_run(load_recipe(world.recipe(tmp_path / "run"), overrides), OneRank(), task=task)


def no_policy(monkeypatch):
    """What is refused is refused before a model is loaded."""

    def never(*arguments, **more):
        raise AssertionError("a policy was loaded")

    monkeypatch.setattr("mrg_r1.training.run.open_policy", never)


@pytest.mark.parametrize("term", ["bleu4", "rouge_l", "length", "tests.reward.custom_terms:brevity"])
@pytest.mark.parametrize("task", ["grpo", "sft", "evaluate"])
def test_a_term_that_reads_words_is_refused_by_name_and_so_is_the_study(world, tmp_path, monkeypatch, term, task):
    no_policy(monkeypatch)
    last = len(read_manifest(world.folder / "phantoms/manifest.jsonl")) - 1
    manifest, studies = labels_only(world, tmp_path / "one", lambda number, study: number == last)
    (bare,) = (study.id for study in studies.values() if study.report is None)
    weights = json.dumps({"mccs": 0.75, term: 0.0})
    with pytest.raises(RecipeError, match=rf"reward.weights {term}: .*\('{bare}' of split 'test' first\)"):
        opened(world, tmp_path, manifest, f"reward.weights={weights}", task=task)


def test_sft_may_have_a_term_that_reads_words_where_only_training_studies_have_labels_alone(
    world, tmp_path, monkeypatch
):
    manifest, _ = labels_only(world, tmp_path / "train", lambda number, study: study.split == "train" and number > 0)
    monkeypatch.setattr("mrg_r1.training.run.open_policy", lambda *a: (_ for _ in ()).throw(KeyError("reached")))
    monkeypatch.setattr("mrg_r1.training.rewards.start_service", lambda recipe, ranks: None)
    with pytest.raises(KeyError, match="reached"):
        opened(world, tmp_path, manifest, ROOM, task="sft")
    with pytest.raises(RecipeError, match="length: read the reference's words, and 15 of the 32"):
        opened(world, tmp_path, manifest)


def test_the_doctor_says_the_same_and_counts_them(world, tmp_path, capsys):
    manifest, _ = labels_only(world, tmp_path / "mixed", every_other)

    def data(*overrides):
        cli.main(["doctor", str(world.recipe(tmp_path / "run")), manifest, *overrides, "--json"])
        return next(one for one in json.loads(capsys.readouterr().out)["findings"] if one["name"] == "data")

    refused = data()
    assert refused["state"] == "failure" and "reward.weights length" in refused["text"]
    found = data(WEIGHTS)
    assert found["state"] == "ok" and "16 studies in 'train' (8 with labels alone)" in found["text"]


def test_sft_without_one_report_to_learn_is_refused(world, tmp_path, monkeypatch):
    no_policy(monkeypatch)
    manifest, _ = labels_only(world, tmp_path / "bare", all_of_them)
    with pytest.raises(
        RecipeError, match="data.train_split 'train': its 16 studies .* no report, and SFT learns reports"
    ):
        opened(world, tmp_path, manifest, WEIGHTS, task="sft")


def test_sft_steps_through_the_studies_with_a_report_and_reads_labels_of_all(world, tmp_path, inline_rewards):
    manifest, studies = labels_only(world, tmp_path / "mixed", every_other)
    wanted = [study.id for study in studies.values() if study.split == "train" and study.report is not None]
    run = opened(world, tmp_path, manifest, WEIGHTS, "data.sampling=rare_findings", ROOM, task="sft")
    assert [study.id for study in run.learned] == wanted and len(run.studies["train"]) == 16
    loader = open_loader(run, {"step": 0}, batch_size=4)
    assert {study.id for step in range(8) for study in loader.studies_of(step)} <= set(wanted)
    loader.close()
    assert run.rewards.classes("train").shape == (16, 14)


def test_what_the_manifest_says_of_reports_counts_where_the_recipe_asks_for_it(world, tmp_path, inline_rewards):
    manifest, _ = labels_only(world, tmp_path / "said", lambda number, study: False)
    path = Path(manifest.partition("=")[2])
    fracture = [1 if name == "Fracture" else None for name in OBSERVATIONS]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"labels": {"said": fracture, "drawn": None}}) + "\n" for line in lines))
    asked = opened(world, tmp_path, manifest, "reward.references=said").rewards.classes("train")
    assert (asked == classes_of_values(fracture)).all() and asked.shape == (16, 14)
    run = opened(world, tmp_path, manifest, "reward.references=said")
    result, _ = run.evaluate(run.studies["test"], title="")
    assert result["reference_labels"] == {"said": 8, "read": 0, "labeler": None}, "the evaluation says so"
    assert not (opened(world, tmp_path, manifest).rewards.classes("train") == classes_of_values(fracture)).all()


def test_the_best_constant_is_a_report_and_its_value_is_over_all_labels(world, tmp_path, inline_rewards, monkeypatch):
    """What most studies say has no report; of the rest the one that earns most over all of them is chosen."""
    manifest, studies = labels_only(world, tmp_path / "mixed", lambda number, study: number % 4 > 1)
    vectors = [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]]  # labels alone say the third

    def said(studies, **_):
        return {study.id: vectors[number % 4] + [0] * 10 for number, study in enumerate(studies)}

    monkeypatch.setattr("mrg_r1.training.rewards.reference_labels", said)
    run = opened(world, tmp_path, manifest, WEIGHTS, "reward.margin=0.0")
    reports = [study.report for study in run.studies["train"]]
    assert reports.index(run.rewards.constant_at(0.0)) % 4 == 0
    assert (
        opened(world, tmp_path, labels_only(world, tmp_path / "bare", all_of_them)[0], WEIGHTS).rewards.constant is None
    )


def test_clinical_scores_are_over_all_studies_and_lexical_ones_over_those_with_a_report(
    world, tmp_path, inline_rewards, monkeypatch
):
    manifest, studies = labels_only(world, tmp_path / "mixed", every_other)
    run = opened(world, tmp_path, manifest, WEIGHTS)
    result, rows = run.evaluate(run.studies["test"], title="", samples=10)
    bare = [row for row in rows if row["reference"] is None]
    assert result["n"] == len(rows) == 8 and len(bare) == 4
    said = np.array([classes_of_values(studies[row["id"]].said) for row in bare])
    assert (np.array([classes_of_values(row["reference_labels"]) for row in bare]) == said).all()
    scored = []

    def described(predicted, reference, cleaning, *, shown):
        scored.append((list(predicted), list(reference.values())))
        return {"scores": {}}

    monkeypatch.setattr(evaluating.lexical, "described_scores", described)
    assert evaluating._lexical(rows, "raw") == {"scores": {}, "studies": 4}
    names = sorted(row["id"] for row in rows if row["reference"] is not None)
    assert scored == [(names, [studies[name].report for name in names])]
    assert evaluating._lexical(bare, "raw") is None


def test_a_study_without_reference_labels_or_report_beside_one_with_labels_is_refused_in_an_evaluation(
    world, tmp_path, inline_rewards
):
    labels_only(world, tmp_path / "half", every_other)
    lines = [json.loads(line) for line in (tmp_path / "half/manifest.jsonl").read_text().splitlines()]
    lines[-1] |= {"report": None, "labels": {"said": None, "drawn": None}}
    (tmp_path / "half/manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecipeError, match="1 of 8 studies of data.test_split 'test' have neither report nor labels"):
        opened(world, tmp_path, f"data.manifest={tmp_path}/half/manifest.jsonl", WEIGHTS, task="evaluate")
