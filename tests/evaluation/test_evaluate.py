"""Evaluation: every definition beside its baselines, and the drawn truth beside the labeler's reading."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mrg_r1.config.recipe import load_recipe
from mrg_r1.evaluation import generate
from mrg_r1.evaluation.evaluate import SUMMARY_KEYS, short_summary, summarise
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.metrics.clinical import DEFINITIONS
from mrg_r1.tracking.evaluation_tables import evaluation_table, other_readers_table
from mrg_r1.training.run import open_run
from mrg_r1.types import Study
from tests.conftest import OneRank


def rows(predicted, reference, drawn):
    made = []
    for number in range(len(predicted)):
        made.append(
            {
                "id": str(number),
                "report": "a report",
                "labels": values_of_classes(predicted[number]),
                "reference_labels": values_of_classes(reference[number]),
                "drawn": None if drawn is None else drawn[number],
                "total": 0.5,
                "terms": {"mccs": 0.5, "format": 1.0},
                "constant": {"total": 0.25},
            }
        )
    studies = [
        Study(id=str(n), patient_id="p", images=(), report="r", split="test", rendered=drawn is not None)
        for n in range(len(predicted))
    ]
    return made, studies


def test_a_policy_that_fools_its_labeler_is_seen():
    """Trap 26: the labeler reads cardiomegaly in every report, as in the references; but it was drawn in none
    of them.
    """
    predicted = np.zeros((6, 14), dtype=int)
    predicted[:, 1] = 1
    drawn = [[0] * 13 + [1]] * 6
    result = summarise(*rows(predicted, predicted, drawn), train=None, seed=0, bootstrap_samples=100)
    assert result["disease_micro13"] == 1.0 and result["disease_micro13_truth"] == 0.0 and result["labeler_gap"] == 1.0
    honest = [[0] + [1] + [0] * 11 + [None]] * 6
    assert (
        summarise(*rows(predicted, predicted, honest), train=None, seed=0, bootstrap_samples=100)["labeler_gap"] == 0.0
    )


def test_real_studies_have_no_truth_and_say_so():
    predicted = np.zeros((3, 14), dtype=int)
    result = summarise(*rows(predicted, predicted, None), train=None, seed=0, bootstrap_samples=100)
    assert result["labeler_gap"] is None and "truth" not in result and result["rendered"] == 0


def test_what_the_labeler_does_not_see_is_counted():
    predicted = np.zeros((4, 14), dtype=int)
    made, studies = rows(predicted, predicted, None)
    for row, report, count in zip(
        made, ["Clear. Clear.", "Clear. No edema.", "Edema. No edema.", None], [0, 0, 1, None], strict=True
    ):
        row |= {"report": report, "contradictions": count, "reference": "Clear. No edema. Clear. No edema."}
    result = summarise(made, studies, train=None, seed=0, bootstrap_samples=100)
    summary = short_summary(result)
    assert summary["repeated_sentence"] == result["repeated_sentence"] == pytest.approx(1 / 3)
    assert summary["repetition"] == pytest.approx(0.5 / 3) and summary["contradiction"] == pytest.approx(1 / 3)
    of_references = {"repeated_sentence": 1.0, "repetition": 0.5, "contradiction": None}
    assert result["references_wording"] == of_references
    unread = [{name: value for name, value in row.items() if name != "contradictions"} for row in made]  # of 0.1.0
    assert summarise(unread, studies, train=None, seed=0, bootstrap_samples=100)["contradiction"] is None


def test_an_evaluation_reads_the_sentences_of_its_reports(world, tmp_path, inline_rewards, monkeypatch):
    def greedy(policy, prompts, vision, *, max_new_tokens):
        said = ["The heart is enlarged. The heart is not enlarged.", "Clear lungs.", ""]
        texts = [[said[int(name[-1]) % 3]] for name in prompts.study_ids]
        return SimpleNamespace(texts=texts, ended=torch.ones(len(texts), 1, dtype=torch.bool))

    run = open_run(load_recipe(world.recipe(tmp_path / "run")), OneRank(), task="evaluate")
    monkeypatch.setattr(run.rewards.service.function.reader, "labeler", _Heart())
    monkeypatch.setattr(generate, "greedy", greedy)
    result, predictions = run.evaluate(run.studies["test"], title="")
    counts = [row["contradictions"] for row in predictions]
    assert counts == [{"T": 1, "C": 0, "": None}[row["text"][:1]] for row in predictions] and {0, 1} <= set(counts)
    known = [count for count in counts if count is not None]
    assert result["contradiction"] == pytest.approx(sum(known) / len(known))
    ids = [study.id for study in run.studies["test"]]
    assert run.rewards.context_of(ids).contradictions and not run.rewards.context_of(ids, step=0).contradictions


class _Heart:
    """Reads a heart that is enlarged or is not."""

    def label(self, texts):
        rows = np.zeros((len(texts), 14), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            row[1] = 2 if "not enlarged" in text else int("enlarged" in text)
        return rows


def test_every_definition_stands_with_interval_and_baselines(world, tmp_path, inline_rewards):
    run = open_run(load_recipe(world.recipe(tmp_path / "run")), OneRank(), task="evaluate")
    result, predictions = run.evaluate(run.studies["test"], title="")
    assert set(result["definitions"]) == set(DEFINITIONS) and result["n"] == 8 and result["rendered"] == 8
    for score in result["definitions"].values():
        low, high = score["f1_ci"]
        assert 0 <= low <= high <= 1 and set(score) == {"precision", "recall", "f1", "f1_ci"}
    assert set(result["baselines"]) == {"constant_normal", "blank", "random_train", "reference"}
    assert (
        result["baselines"]["blank"]["disease_micro13"]["f1"] == 0 and result["baselines"]["random_train"] is not None
    )
    assert result["labeler"]["name"] == "labeler" and len(result["labeler"]["fingerprint"]) == 16
    assert result["reference_labels"] == {"said": 0, "read": 8, "labeler": result["labeler"]}
    assert [row["id"] for row in predictions] == [study.id for study in run.studies["test"]]
    assert set(short_summary(result)) == set(SUMMARY_KEYS)
    assert evaluation_table(result).row_count == len(DEFINITIONS)
    others = other_readers_table(result)
    assert others is not None and others.row_count == 2


def test_batches_do_not_change_the_reports(world, tmp_path, inline_rewards):
    reports = []
    for size in (8, 3):
        recipe = load_recipe(world.recipe(tmp_path / f"run{size}"), [f"evaluation.batch_size={size}"])
        run = open_run(recipe, OneRank(), task="evaluate")
        reports.append([row["text"] for row in run.evaluate(run.studies["test"], title="")[1]])
    assert reports[0] == reports[1]


def test_no_studies_are_refused(world, tmp_path, inline_rewards):
    run = open_run(load_recipe(world.recipe(tmp_path / "run")), OneRank(), task="evaluate")
    with pytest.raises(ValueError, match="no studies to evaluate"):
        run.evaluate([], title="")
