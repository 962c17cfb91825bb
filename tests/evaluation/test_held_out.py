"""A held-out labeler that is never rewarded: what it reads, what it refuses to be, and what happens when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import mrg_r1.evaluation.evaluate as evaluate_module
import mrg_r1.evaluation.generate as generate_module
import mrg_r1.reward.service.supervisor as supervisor_module
import mrg_r1.training.validation as validation_module
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.evaluation.evaluate import short_summary, write_evaluation
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.metrics import lexical
from mrg_r1.reward.compute import RewardFunction
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.reward.service.interface import RewardServiceError, RewardsMissing
from mrg_r1.reward.service.supervisor import ServiceState
from mrg_r1.score.card import score_files
from mrg_r1.tracking.evaluation_tables import print_evaluation
from mrg_r1.tracking.gaps import GapWatch
from mrg_r1.training import rewards as rewarding
from mrg_r1.training.looks import Looks
from mrg_r1.training.run import open_run
from mrg_r1.training.validation import keep_best, validate_before, warn_at_close
from tests.conftest import OneRank
from tests.reward.in_process import InProcessRewards
from tests.reward.keyword_labeler import WORDS, KeywordLabeler

JUDGE = {"name": "second", "fingerprint": "b" * 16}


class Misreads(KeywordLabeler):
    """Takes `fluid` for an effusion: what a policy may learn to write."""

    def label(self, texts):
        return super().label([text.replace("fluid", "effusion") for text in texts])


@pytest.fixture
def two_readers(monkeypatch):
    """Runs whose rewarded labeler misreads, and whose held-out labeler does not; both in this process."""

    def service(labeler, mode):
        return InProcessRewards(RewardFunction(labeler, weights={"format": 1.0}, mode=mode))

    def rewards(recipe, ranks, supervisor, studies):
        labeler = {"name": "first", "fingerprint": "a" * 16}
        return rewarding.prepare(recipe, ranks, service(Misreads(), recipe.prompt.mode), labeler, None, studies)

    def held_out(recipe, ranks, supervisor, studies, *, rewarded):
        return rewarding.prepare_held_out(
            recipe, service(KeywordLabeler(), recipe.prompt.mode), JUDGE, None, studies, rewarded=rewarded
        )

    for name, function in (("open_rewards", rewards), ("open_held_out", held_out)):
        monkeypatch.setattr(rewarding, name, function)
    for name in ("start_service", "start_held_out"):
        monkeypatch.setattr(rewarding, name, lambda recipe, ranks: None)
    monkeypatch.setattr(lexical, "why_no_meteor", lambda: "this test has no time for it")


def opened(world, tmp_path, *overrides):
    shutil.copytree(world.folder / "labeler", tmp_path / "held_out", dirs_exist_ok=True)
    recipe = load_recipe(
        world.recipe(tmp_path / "run"),
        [f"evaluation.held_out_labeler={tmp_path / 'held_out'}", "evaluation.before=false", *overrides],
    )
    return open_run(recipe, OneRank(), task="evaluate")


def writes(monkeypatch, run, text_of):
    """Let the policy write `text_of(study)`."""
    studies = {study.id: study for part in run.studies.values() for study in part}

    def greedy(policy, prompts, vision, *, max_new_tokens):
        return SimpleNamespace(
            texts=[[text_of(studies[name])] for name in prompts.study_ids],
            ended=torch.ones(len(prompts), 1, dtype=torch.bool),
        )

    monkeypatch.setattr(generate_module, "greedy", greedy)


def effusion(study):
    return KeywordLabeler().label([study.report])[0, WORDS["effusion"]] == 1


def test_the_gap_moves_when_a_policy_fools_one_labeler_only(world, tmp_path, two_readers, monkeypatch):
    run = opened(world, tmp_path)
    test = run.studies["train"]  # 16, among them effusions
    # what is evaluated
    assert run.held_out.references.keys() == {study.id for part in ("val", "test") for study in run.studies[part]}
    run.held_out.references = {study.id: KeywordLabeler().label([study.report])[0].tolist() for study in test}
    assert any(map(effusion, test)) and not all(map(effusion, test))

    writes(monkeypatch, run, lambda study: study.report)
    honest, _ = run.evaluate(test, title="")
    assert honest["hacking_gap"] == 0 and honest["held_out_disease_micro13"] == 1
    writes(monkeypatch, run, lambda study: "fluid." if effusion(study) else "clear.")
    fooled, rows = run.evaluate(test, title="")
    assert fooled["disease_micro13"] > 0.2 and fooled["held_out_disease_micro13"] == 0
    assert fooled["hacking_gap"] == fooled["disease_micro13"] == short_summary(fooled)["hacking_gap"]
    held_out = fooled["held_out"]
    assert (
        held_out["labeler"] == JUDGE
        and held_out["disease_micro13"] == 0
        and held_out["definitions"].keys() == fooled["definitions"].keys()
    )
    assert (
        held_out["observations"]["Pleural Effusion"]["f1"] == 0
        and len(held_out["definitions"]["example14"]["f1_ci"]) == 2
    )
    for row, study in zip(rows, test, strict=True):
        assert row["held_out_labels"][WORDS["effusion"]] is None and row["labels"][WORDS["effusion"]] == (
            1 if effusion(study) else None
        )
        assert row["held_out_reference_labels"] == values_of_classes(KeywordLabeler().label([study.report])[0])


def test_agreement_is_the_share_of_equal_classes_of_the_references(world, tmp_path, two_readers, monkeypatch):
    run = opened(world, tmp_path)
    writes(monkeypatch, run, lambda study: "clear.")
    for number, study in enumerate(run.studies["test"]):
        other = list(run.rewards.labels[study.id])
        other[2] = (other[2] + 1) % 3 if number < 3 else other[2]
        run.held_out.references[study.id] = other
    result, _ = run.evaluate(run.studies["test"], title="")
    assert result["held_out"]["agreement_on_references"] == pytest.approx(1 - 3 / (8 * 14))
    own = {"said": 0, "read": 8, "labeler": result["held_out"]["labeler"]}
    assert result["held_out"]["reference_labels"] == own != result["reference_labels"]


def test_only_the_report_is_read_and_a_malformed_one_is_blank(world, tmp_path, two_readers, monkeypatch):
    run = opened(world, tmp_path, "prompt.mode=think", "evaluation.lexical=r2gen-iu")
    ids = [study.id for study in run.studies["test"]]

    def text_of(study):
        if study.id == ids[0]:
            return "<think>effusion</think><report>edema"
        return f"<think>effusion cardiomegaly</think><report>{study.report}</report>"

    writes(monkeypatch, run, text_of)
    result, rows = run.evaluate(run.studies["test"], title="")
    assert rows[0]["held_out_labels"] == [None] * 14 and rows[0]["report"] is None
    assert [row["held_out_labels"] for row in rows[1:]] == [row["held_out_reference_labels"] for row in rows[1:]]
    # cleaned, nothing is " ."
    assert result["lexical"]["cleaning"] == "r2gen-iu" and result["lexical"]["empty_predictions"] == 0
    # seven are the references' own words
    assert result["lexical"]["scores"]["rouge_l"] == pytest.approx(7 / 8, abs=0.02)


def test_closing_evaluations_have_lexical_metrics_and_validations_have_none(
    world, tmp_path, two_readers, monkeypatch, capsys
):
    run = opened(world, tmp_path, "evaluation.lexical=raw")
    ids = [study.id for study in run.studies["test"]]
    writes(monkeypatch, run, lambda study: "  " if study.id == ids[0] else study.report)
    result, rows = run.evaluate(run.studies["test"], title="")
    found = result["lexical"]
    assert found["scores"]["rouge_l"] == pytest.approx(7 / 8) and found["empty_predictions"] == 1  # malformed: no words
    assert (
        found["left_out"] == {"meteor": "METEOR left out: this test has no time for it"}
        and "white space" in found["cleaning_is"]
    )
    assert run.validate()[0]["lexical"] is None
    print_evaluation(Console(width=200), result, "test")
    printed = " ".join(capsys.readouterr().out.split())  # captions wrap
    assert (
        "disease_micro13 (held-out)" in printed
        and "hacking gap +0.000" in printed
        and "they agree on 100.0%" in printed
    )
    assert "Lexical metrics, cleaning raw" in printed and "BLEU-4" in printed and "METEOR left out" in printed
    # what a score card of the same predictions says, so that the two can be told to be of one thing
    write_evaluation(tmp_path / "evaluation", "test", result, rows)
    card = score_files(tmp_path / "evaluation" / "test_predictions.jsonl", samples=2)
    assert result["ids_sha256"] == card["studies"]["ids_sha256"] and result["labeler"] == card["labeler"]
    assert result["reference_labels_sha256"] == card["reference"]["labels_sha256"] and card["lexical"] == found
    off = opened(world, tmp_path, "evaluation.lexical=off")
    assert off.evaluate(off.studies["test"], title="")[0]["lexical"] is None


def test_a_run_without_a_held_out_labeler_says_null(world, tmp_path, two_readers):
    run = open_run(load_recipe(world.recipe(tmp_path / "run")), OneRank(), task="evaluate")
    run.held_out = None
    result, rows = run.evaluate(run.studies["test"], title="")
    assert (
        result["held_out"] is result["hacking_gap"] is result["held_out_disease_micro13"] is None
        and "minus" in result["hacking_gap_is"]
    )
    assert rows[0]["held_out_labels"] is rows[0]["held_out_reference_labels"] is None


def test_the_rewarded_labeler_is_not_held_out(world, tmp_path, two_readers, monkeypatch):
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"evaluation.held_out_labeler={tmp_path}"])
    with pytest.raises(RecipeError, match="evaluation.held_out_labeler .* would agree with itself"):
        rewarding.prepare_held_out(
            recipe, None, JUDGE, None, [], rewarded={"name": "another name", "fingerprint": JUDGE["fingerprint"]}
        )
    monkeypatch.setattr(
        rewarding, "start_held_out", lambda *arguments: pytest.fail("a model was loaded before the input was checked")
    )
    with pytest.raises(RecipeError, match="would agree with itself"):
        opened(world, tmp_path, f"evaluation.held_out_labeler={world.folder / 'phantoms' / '..' / 'labeler'}")
    with pytest.raises(RecipeError, match="evaluation.held_out_labeler .*nowhere: no such file"):
        opened(world, tmp_path, f"evaluation.held_out_labeler={tmp_path / 'nowhere'}")


def test_references_are_read_once_for_a_held_out_labeler(world, tmp_path):
    shutil.copytree(world.folder / "phantoms", tmp_path / "phantoms")
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"data.manifest={tmp_path / 'phantoms/manifest.jsonl'}"])
    studies = read_manifest(recipe.data.manifest, split="test")

    def held_out(fingerprint):
        labeler = KeywordLabeler()
        service = InProcessRewards(RewardFunction(labeler, mode="plain"))
        made = rewarding.prepare_held_out(
            recipe,
            service,
            {"name": "second", "fingerprint": fingerprint},
            None,
            studies,
            rewarded={"name": "a", "fingerprint": "a"},
        )
        return made.references, len(labeler.calls)

    first, calls = held_out("b")
    assert calls == 1 and held_out("b") == (first, 0) and held_out("c")[1] == 1
    assert first[studies[0].id] == KeywordLabeler().label([studies[0].report])[0].tolist()


def test_a_held_out_labeler_that_fails_stops_the_evaluation(world, tmp_path, two_readers):
    """Never a silent null."""
    run = opened(world, tmp_path)

    class Gone(InProcessRewards):
        def label(self, texts):
            raise RewardServiceError("the held-out labeler has died 4 times")

    run.held_out.service = Gone(RewardFunction(KeywordLabeler(), mode="plain"))
    run.held_out.read = lambda reports, shown: run.held_out.service.label(reports)
    with pytest.raises(
        RewardsMissing,
        match="evaluation.held_out_labeler: the held-out labeler has died 4 times; .*evaluation.held_out_labeler=null",
    ):
        run.evaluate(run.studies["test"], title="")


def test_many_reports_are_read_in_batches_that_are_told_of():
    told = []
    held_out = HeldOutLabeler(InProcessRewards(RewardFunction(KeywordLabeler(), mode="plain")), JUDGE, {})
    reports = [None if number % 3 == 0 else f"edema {number}" for number in range(200)]
    classes = held_out.read(reports, lambda starts: told.extend(starts) or starts)
    assert told == [0, 64, 128] and np.array_equal(
        classes[:, WORDS["edema"]], [int(report is not None) for report in reports]
    )


def test_a_held_out_labeler_in_its_own_process_reads_and_is_missed_when_it_is_gone(
    world, tmp_path, inline_rewards, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(world.folder / "labeler", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors")
    run = opened(world, tmp_path, f"evaluation.held_out_labeler={other}")
    assert (tmp_path / "run" / "held_out_service.log").is_file() and run.held_out.labeler[
        "fingerprint"
    ] != run.rewards.labeler["fingerprint"]
    writes(monkeypatch, run, lambda study: study.report)
    result, _ = run.evaluate(run.studies["test"], title="")
    assert result["held_out"]["labeler"] == run.held_out.labeler and result["hacking_gap"] is not None
    monkeypatch.setattr(supervisor_module, "RESTARTS", 0)
    directory = run.held_out.supervisor.directory
    os.kill(ServiceState.read(directory).pid, signal.SIGKILL)
    with pytest.raises(RewardsMissing, match="evaluation.held_out_labeler: its process was killed by SIGKILL"):
        run.evaluate(run.studies["val"], title="")
    run.close()
    assert not directory.exists()


def result_of(fooled):
    """A validation as `Run.validate` answers."""
    rows = []
    for number in range(100):
        says = [None, 1] + [None] * 12
        rows.append(
            {
                "id": str(number),
                "labels": says if number < 50 + fooled else [None] * 14,
                "reference_labels": says,
                "held_out_labels": says if number < 50 else [None] * 14,
                "held_out_reference_labels": says,
                "drawn": None,
            }
        )
    keys = dict.fromkeys(evaluate_module.SUMMARY_KEYS, 0.5)
    result = {**keys, "hacking_gap": fooled / 100, "labeler_gap": None, "no_finding_rate": 0.0}
    return result | {"labeler": {"name": "first", "fingerprint": "a"}, "held_out": {"labeler": JUDGE}}, rows


def test_validations_log_the_gap_and_say_when_it_widens(world, tmp_path, monkeypatch):
    said, fooled = [], iter([0, 5, 40])
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"evaluation.held_out_labeler={tmp_path}"])
    run = SimpleNamespace(
        recipe=recipe,
        ranks=OneRank(),
        directory=tmp_path,
        studies={"val": [1]},
        validate=lambda: result_of(next(fooled)),
    )
    log, gaps, best = SimpleNamespace(say=said.append), GapWatch(), {"step": 0, "score": 1.0}
    monkeypatch.setattr(validation_module, "save_adapter", lambda policy, folder: folder.mkdir())
    run.policy, looks = None, Looks(recipe.evaluation.select)
    assert validate_before(run, gaps, looks, log) == {"step": 0, "score": 0.5} and (tmp_path / "adapter").is_dir()
    assert gaps.state["hacking_gap"]["when"] == "before training" and len(said) == 1 and "hacking_gap +0.000" in said[0]
    for step in (1, 2):
        metrics = {}
        assert keep_best(run, best, step=step, metrics=metrics, gaps=gaps, looks=looks, log=log) is best
        assert (
            metrics["validation/hacking_gap"] == (0.05, 0.4)[step - 1]
            and metrics["validation/held_out_disease_micro13"] == 0.5
        )
    assert len(said) == 2 and "hacking_gap has widened" in said[1] and "after step 2" in said[1]


def test_without_an_evaluation_before_nothing_is_validated_before_training(world, tmp_path):
    for held_out in ([], [f"evaluation.held_out_labeler={tmp_path}"]):
        recipe = load_recipe(world.recipe(tmp_path / "run"), [*held_out, "evaluation.before=false"])
        run = SimpleNamespace(recipe=recipe, studies={"val": [1]}, validate=pytest.fail)
        assert validate_before(run, GapWatch(), Looks("mean_reward"), SimpleNamespace(say=pytest.fail)) is None


def test_the_closing_says_where_the_reports_repeat_or_contradict_themselves_more(tmp_path):
    said = []
    run = SimpleNamespace(ranks=OneRank(), directory=tmp_path)
    for name, twice, contradiction in (("test_before", 0.01, None), ("test", 0.26, 0.5)):
        result, rows = result_of(0)
        wording = {"repeated_sentence": twice, "repetition": 0.1, "contradiction": contradiction}
        write_evaluation(tmp_path / "evaluation", name, result | wording, rows)
    warn_at_close(run, SimpleNamespace(say=said.append))
    assert len(said) == 1 and "repeated_sentence has risen from 1.0% to 26.0% on the test split" in said[0]


def test_the_closing_evaluations_are_compared_too(tmp_path):
    said = []
    run = SimpleNamespace(ranks=OneRank(), directory=tmp_path)
    for name, fooled in (("test_before", 0), ("test", 40)):
        result, rows = result_of(fooled)
        rows[0]["text"] = "line\u2028separator"
        write_evaluation(tmp_path / "evaluation", name, result, rows)
    warn_at_close(run, SimpleNamespace(say=said.append))
    assert len(said) == 1 and "after training, on the test split" in said[0]
    other = json.loads((tmp_path / "evaluation" / "test_before.json").read_text()) | {"held_out": None}
    (tmp_path / "evaluation" / "test_before.json").write_text(json.dumps(other))
    warn_at_close(run, SimpleNamespace(say=pytest.fail))  # another held-out labeler: no comparison
