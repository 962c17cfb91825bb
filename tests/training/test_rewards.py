"""How a run's batches are rewarded: the references' labels, the margin of the step, the weights and the constant
report.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import signed_vector
from mrg_r1.reward.additive import FINDINGS, additive, attainable_f1, f1_threshold
from mrg_r1.reward.card.card import best_real_constants
from mrg_r1.reward.references import FOLDER
from mrg_r1.reward.terms import ccs, inverse_prevalence, mccs
from mrg_r1.training.run import open_run
from mrg_r1.training.thresholds import resolve_thresholds
from tests.conftest import OneRank


def opened(world, tmp_path, *overrides):
    return open_run(load_recipe(world.recipe(tmp_path / "run"), overrides), OneRank(), task="grpo")


def test_every_study_is_rewarded_by_its_own_reference_and_the_margin_of_the_step(world, tmp_path, inline_rewards):
    annealed = ["reward.margin=0.2", "reward.margin_end=0.6", "reward.margin_steps=2"]
    run = opened(world, tmp_path, *annealed, "reward.ccs_weights=inverse_prevalence")
    studies = [run.studies["test"][3], run.studies["train"][5], run.studies["val"][0]]
    labels = Labeler.load(world.folder / "labeler").label([study.report for study in studies])
    context_of = run.rewards.context_of([study.id for study in studies], step=1)
    assert np.array_equal(context_of.reference_labels, labels) and context_of.margin == pytest.approx(0.4)
    assert run.rewards.context_of([studies[0].id]).margin == pytest.approx(0.6)  # evaluations are at the last one
    train = Labeler.load(world.folder / "labeler").label([study.report for study in run.studies["train"]])
    assert np.array_equal(context_of.ccs_weights, inverse_prevalence(train)) and np.array_equal(
        run.rewards.classes("train"), train
    )
    assert list((world.folder / "phantoms" / FOLDER).glob("labeler-*.csv"))


@pytest.mark.parametrize("weights", ["equal", "inverse_prevalence"])
def test_the_constant_report_is_the_training_report_that_would_earn_most_at_this_step(
    world, tmp_path, inline_rewards, weights, monkeypatch
):
    # most often one finding alone; more often, but never quite alike, several others
    kinds = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1]]

    def drawn(studies, **_):
        return {study.id: kinds[number % 5] + [0] * 10 for number, study in enumerate(studies)}

    monkeypatch.setattr("mrg_r1.training.rewards.reference_labels", drawn)
    annealed = ["reward.margin=0.0", "reward.margin_end=0.9", "reward.margin_steps=2", "steps=3"]
    run = opened(world, tmp_path, *annealed, f"reward.ccs_weights={weights}")
    reports = [study.report for study in run.studies["train"]]
    vectors = signed_vector(run.rewards.classes("train"))
    chosen = []
    for step, margin in ((0, 0.0), (1, 0.45), (None, 0.9)):
        context = run.rewards.context_of([], step=step)
        cosines = [ccs(np.broadcast_to(vector, vectors.shape), vectors, context.ccs_weights) for vector in vectors]
        earned = [mccs(cosine, margin).mean() for cosine in cosines]
        assert earned[reports.index(context.constant)] == pytest.approx(max(earned), rel=1e-5)
        chosen.append(context.constant)
    assert len(set(chosen)) > 1  # or nothing was tested
    result, _ = run.evaluate(run.studies["val"], title="")
    assert set(result["constant"]) == {"total", *run.recipe.reward.weights}
    assert result["constant"]["total"] == pytest.approx(
        0.75 * result["constant"]["mccs"] + 0.25 * result["constant"]["length"], abs=1e-5
    )


ADDITIVE = "reward.weights={additive: 1.0, length: 0.25}"


def test_thresholds_by_auto_are_those_of_the_start_for_as_long_as_the_run_goes_on(
    world, tmp_path, inline_rewards, monkeypatch, capsys
):
    run = opened(world, tmp_path, ADDITIVE, "reward.threshold=auto")
    classes = run.rewards.classes("train")
    value = f1_threshold(attainable_f1(classes))
    context = run.rewards.context_of([run.studies["train"][0].id], step=0)
    assert context.thresholds == pytest.approx(np.full(13, value))
    assert f"reward.threshold auto: {value:.3f}" in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "thresholds.json").read_text())
    assert kept["thresholds"] == dict.fromkeys(FINDINGS, value) and kept["studies"] == len(classes)

    monkeypatch.setattr("mrg_r1.training.thresholds.attainable_f1", lambda classes: 0.9)
    assert resolve_thresholds(run.recipe, classes) == pytest.approx(np.full(13, 0.45))  # no checkpoint: a new start
    monkeypatch.setattr("mrg_r1.training.thresholds.attainable_f1", lambda classes: 0.5)
    monkeypatch.setattr("mrg_r1.training.thresholds.recorded_recipe", lambda directory: {})
    assert resolve_thresholds(run.recipe, classes) == pytest.approx(np.full(13, 0.45))
    assert "reward.threshold auto: 0.450, as this run began with" in capsys.readouterr().out


def test_thresholds_stand_as_the_recipe_has_them_and_the_constant_follows(world, tmp_path, inline_rewards):
    by_name = {name: 0.1 + 0.05 * place for place, name in enumerate(FINDINGS)}
    run = opened(world, tmp_path, ADDITIVE, f"reward.threshold={json.dumps(by_name)}")
    context = run.rewards.context_of([])
    assert context.thresholds == pytest.approx(list(by_name.values()))
    classes, texts = run.rewards.classes("train"), [study.report for study in run.studies["train"]]
    (best,) = best_real_constants(
        classes, texts, [0.5], of_mccs=0.0, of_additive=1.0, thresholds=np.array(list(by_name.values()))
    )
    assert context.constant == texts[best]
    result, _ = run.evaluate(run.studies["val"], title="")
    assert result["constant"].keys() == {"total", "additive", "length"}
    signs = signed_vector(run.rewards.classes("val"))
    one = signed_vector(classes[best])
    assert result["constant"]["additive"] == pytest.approx(
        additive(np.broadcast_to(one, signs.shape), signs, context.thresholds).mean(), abs=1e-6
    )


def test_auto_without_a_positive_finding_is_bad_input(world, tmp_path, inline_rewards, monkeypatch):
    def blank(studies, **_):
        return {study.id: [0] * 14 for study in studies}

    monkeypatch.setattr("mrg_r1.training.rewards.reference_labels", blank)
    with pytest.raises(RecipeError, match="auto: no reference has a positive finding"):
        opened(world, tmp_path, ADDITIVE, "reward.threshold=auto")


def test_a_labeler_that_does_not_load_is_bad_input_on_every_rank(world, tmp_path, monkeypatch):
    """With a real process: its message arrives, no model and no run is left waiting. (A launch looks at the labeler
    before; not here.)
    """
    monkeypatch.setattr("mrg_r1.training.preflight.launch_findings", lambda *args, **kwargs: [])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(RecipeError, match="this directory holds another model"):
        opened(world, tmp_path, f"reward.labeler={broken}")


def test_a_run_with_its_own_process_opens_rewards_and_closes(world, tmp_path):
    run = opened(world, tmp_path)
    result, _ = run.evaluate(run.studies["val"], title="")
    assert result["labeler"] == run.rewards.labeler and result["n"] == 8
    directory = run.rewards.supervisor.directory
    run.rewards.close()
    assert not directory.exists() and (tmp_path / "run" / "reward_service_0.log").is_file()
