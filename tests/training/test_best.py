"""Which adapter is a run's best, and that a kill at any moment leaves one that the newest checkpoint names."""

from types import SimpleNamespace

import pytest

import mrg_r1.training.validation as validation
from mrg_r1.training.looks import Looks
from mrg_r1.training.validation import keep_best, settle_best
from tests.conftest import OneRank


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose policy is a word, and the folder of an adapter that word in a file."""

    def save(policy, folder):
        folder.mkdir()
        (folder / "of").write_text(policy)

    monkeypatch.setattr(validation, "save_adapter", save)
    return SimpleNamespace(policy="start", ranks=OneRank(), directory=tmp_path, studies={"val": []})


def keep(run, best, step):
    run.policy = f"step {step}"
    return keep_best(run, best, step=step, metrics={}, gaps=None, looks=None, log=None)


def adapter(run):
    return (run.directory / "adapter" / "of").read_text()


def test_a_kill_before_the_checkpoint_leaves_the_adapter_that_the_older_one_names(run):
    first = keep(run, None, 1)
    settle_best(run.directory, first)
    keep(run, first, 2)  # killed here: no checkpoint names step 2
    assert adapter(run) == "step 1"
    settle_best(run.directory, first)  # a resume from the checkpoint of step 1
    assert adapter(run) == "step 1" and not list(run.directory.glob(".adapter_step_*"))


def test_a_kill_after_the_checkpoint_is_made_good_by_the_resume(run):
    first = keep(run, None, 1)
    settle_best(run.directory, first)
    second = keep(run, first, 2)  # its checkpoint is written, and the run killed
    settle_best(run.directory, second)
    assert adapter(run) == "step 2"


def test_what_is_not_better_than_the_start_is_not_kept(run):
    scores = iter([0.5, 0.4, 0.5])
    run.studies = {"val": [1]}
    run.recipe = SimpleNamespace(evaluation=SimpleNamespace(select="mean_reward", before=True, held_out_labeler=None))

    def validate():
        score = next(scores)
        rows = [{"id": name, "total": score + more} for name, more in (("a", -0.1), ("b", 0.1))]
        return {"mean_reward": score, "labeler_gap": None, "no_finding_rate": 0.0}, rows

    run.validate, looks = validate, Looks("mean_reward")
    gaps, said = SimpleNamespace(update=lambda *a, **k: []), []
    validation.short_summary, original = (lambda result: {}), validation.short_summary
    validation._readers, readers = (lambda result: ""), validation._readers
    try:
        best = validation.validate_before(run, gaps, looks, SimpleNamespace(say=said.append))
        for step in (1, 2):
            assert keep_best(run, best, step=step, metrics={}, gaps=gaps, looks=looks, log=None) is best
    finally:
        validation.short_summary, validation._readers = original, readers
    assert best == {"step": 0, "score": 0.5} and adapter(run) == "start" and "0.500 (standard error 0.100)" in said[0]
    closing = looks.closing(best)
    assert closing["over_last"]["step"] == 2 and closing["over_last"]["difference"] == 0
