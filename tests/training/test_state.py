"""What GRPO and SFT keep alike: when a checkpoint is written and what it holds, and how a run ends."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import pytest

import mrg_r1.training.state as state_module
from mrg_r1.engine.faults import NotFinite, Requeue
from mrg_r1.reward.service.interface import RewardsMissing
from mrg_r1.tracking.log import Clock
from mrg_r1.training.run import Run
from mrg_r1.training.state import RunState
from mrg_r1.training.validation import warn_at_close
from tests.conftest import OneRank


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state of four steps without a policy; `saved` has what was given to its checkpoints, `closed` what was
    closed.
    """
    saved, closed, lines = [], [], []
    recipe = SimpleNamespace(
        steps=4,
        checkpoint=SimpleNamespace(every=3, keep=2),
        engine=SimpleNamespace(max_skipped=2),
        model_dump=lambda mode: {"steps": 4},
    )
    monkeypatch.setattr(state_module, "save_checkpoint", lambda engine, folder, **given: saved.append(given))
    state = RunState(
        run=SimpleNamespace(
            recipe=recipe,
            ranks=OneRank(),
            directory=tmp_path,
            close=lambda: closed.append("run"),
            take_validated=lambda: [],
        ),
        engine_if_any=SimpleNamespace(stage=2),
        loader=SimpleNamespace(position=lambda step: 8 * step, fingerprint="f", close=lambda: closed.append("loader")),
        log=SimpleNamespace(log=lambda *line: lines.append(line), sync=lambda: None),
        clock=Clock(),
        signals=SimpleNamespace(received=None, deferring=False),
        record={"step": 0},
        before=None,
        best=None,
        skipped_in_a_row=0,
        own=lambda: {"stopped": "enough"},
    )
    state.saved, state.closed, state.lines = saved, closed, lines
    return state


def take(state, step, *, skipped=0.0, **how):
    state.log_step(step, {"policy/skipped_updates": skipped})
    state.end_step(step, last=step + 1 == 4, **how)


def test_a_checkpoint_is_written_where_it_is_due_and_at_the_last_step(state):
    with state.stepping():
        for step in range(4):
            take(state, step, due=step == 1)
        assert state.signals.deferring
    assert [given["step"] for given in state.saved] == [2, 3, 4] and len(state.lines) == 4
    assert not state.signals.deferring and state.closed == ["loader"]


def test_what_is_there_before_the_first_step_is_not_collected_in_each(state):
    there = [[number] for number in range(1000)]
    before = gc.get_freeze_count()
    with state.stepping():
        assert gc.get_freeze_count() >= before + len(there)


def test_a_checkpoint_holds_what_both_keep_and_what_is_the_tasks_own(state):
    state.best, state.skipped_in_a_row = {"step": 2, "score": 0.5}, 1
    state.save(3)
    (given,) = state.saved
    assert given["best"] == 2 and given["keep"] == 2
    assert given["extra"] == {
        "best": {"step": 2, "score": 0.5},
        "seconds": {},
        "cpu_seconds": 0.0,
        "labeler_cpu_seconds": {},
        "skipped_in_a_row": 1,
        "position": 24,
        "studies": "f",
        "recipe": {"steps": 4},
        "stopped": "enough",
    }


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(state):
    with pytest.raises(Requeue, match="SIGTERM on rank 0.*step 1 of 4"):
        with state.stepping():
            state.signals.received = "SIGTERM"
            take(state, 0)
    assert [given["step"] for given in state.saved] == [1] and state.closed == ["run"]
    state.end_step(3, last=True)  # a run that ends anyway is finished


def test_steps_that_leave_their_updates_out_end_the_run_only_in_a_row(state):
    for step, skipped in enumerate((1.0, 0.0, 1.0)):
        take(state, step, skipped=skipped)
    with pytest.raises(NotFinite, match="2 steps in a row.*engine.max_skipped.*step 3"):
        take(state, 3, skipped=1.0)
    assert state.saved[-1]["step"] == 4 and state.saved[-1]["extra"]["skipped_in_a_row"] == 2


def test_a_run_without_an_engine_writes_no_checkpoint(state):
    state.engine_if_any = None
    for step in range(4):
        take(state, step, due=True)
    state.signals.received = "SIGUSR1"
    with pytest.raises(Requeue, match="experience"):
        state.end_step(2, last=False)
    assert state.saved == []


@pytest.mark.parametrize(("error", "closed"), [(RewardsMissing("gone"), ["run"]), (KeyError("a bug"), [])])
def test_only_an_end_that_all_ranks_come_to_closes_the_labelers(state, error, closed):
    """One rank's own failure must be the first thing that the others hear of it, not a labeler that is gone."""
    with pytest.raises(type(error)):
        with state.stepping():
            raise error
    assert state.closed == closed


@pytest.mark.parametrize(("step", "latest", "saves"), [(0, None, []), (2, "step_2", []), (2, "step_1", [2])])
def test_what_was_learned_is_saved_once(state, step, latest, saves):
    if latest is not None:
        (state.run.directory / "checkpoints").mkdir()
        (state.run.directory / "checkpoints" / "latest").write_text(latest)
    state.save_what_was_learned(step)
    assert [given["step"] for given in state.saved] == saves


def test_an_evaluation_that_version_0_1_0_left_is_read(tmp_path):
    """A resumed run compares with it: its judge is the held-out labeler."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    labeler = {"labeler": {"fingerprint": "a"}, "judge": {"labeler": {"fingerprint": "b"}}}
    positive, negative = [1] + [0] * 13, [0] * 14
    for name, read in (("test_before", positive), ("test", negative)):
        rows = [
            {
                "id": f"s{number}",
                "labels": positive,
                "reference_labels": positive,
                "judge_labels": read,
                "judge_reference_labels": positive,
                "drawn": None,
            }
            for number in range(40)
        ]
        (folder / f"{name}.json").write_text(json.dumps({**labeler, "judge_disease_micro13": 0.5}))
        (folder / f"{name}_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = SimpleNamespace(directory=tmp_path, ranks=OneRank())
    before = Run.evaluate_test(run, "test_before", title="")
    assert before["held_out_disease_micro13"] == 0.5 and before["held_out"]["labeler"]["fingerprint"] == "b"
    said = []
    warn_at_close(run, SimpleNamespace(say=said.append))
    assert len(said) == 1 and "hacking_gap" in said[0]
