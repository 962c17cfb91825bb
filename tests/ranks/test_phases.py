"""The debugging phases on two real ranks: two halves make a step, an update-only run resumes, a dumped batch really
replays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launches.test_launch import launch

pytestmark = pytest.mark.ranks
QUIET = ["evaluation.test=false", "data.val_split=nobody"]
NO_LABELER = "reward.labeler=/no/such/labeler"


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(pool, world, run: Path, *overrides: str, task: str = "train", **more: Any) -> Path:
    pool.run(task, recipe=str(world.recipe(run, name=f"{run.name}.yaml")), overrides=[*QUIET, *overrides], **more)
    return run


@pytest.mark.parametrize(
    "setting",
    [
        ["grpo.inner_iterations=2", "grpo.minibatches=2"],
        pytest.param(["rollout.reuse_prefill=true"], marks=pytest.mark.slow),
        pytest.param(["engine.deepspeed=ds_configs/zero3.json"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rollout_and_an_update_are_a_step(pool, world, tmp_path, setting):
    """To the last bit: all metrics and the adapter. The update knows no labeler, and no service is started for it."""
    whole = train(pool, world, tmp_path / "whole", "steps=1", *setting)
    sampled = train(pool, world, tmp_path / "sampled", "steps=1", "phases=rollout", *setting, service=True)
    given = [f"experience={sampled}/experience", NO_LABELER]
    learned = train(pool, world, tmp_path / "learned", "steps=1", "phases=update", *given, *setting, service=True)
    (row,) = rows_of(whole)
    assert rows_of(learned) == [row] and row["loss"] != 0 and row["policy/skipped_updates"] == 0
    assert equal(adapter_of(learned), adapter_of(whole))
    assert rows_of(sampled) == [{name: row[name] for name in row if name in rows_of(sampled)[0]}]
    assert "loss" not in rows_of(sampled)[0] and rows_of(sampled)[0]["reward/total"] == row["reward/total"]
    assert not (sampled / "adapter").exists() and not (sampled / "checkpoints").exists()
    assert (learned / "checkpoints" / "latest").read_text() == "step_1"
    assert not list(learned.glob("reward_service_*")) and list(sampled.glob("reward_service_*"))
    assert {path.suffix for path in (sampled / "experience").iterdir()} == {".json", ".safetensors"}


@pytest.mark.slow
def test_an_interrupted_update_run_continues_as_the_uninterrupted_one(pool, world, tmp_path):
    sampled = train(pool, world, tmp_path / "sampled", "steps=4", "phases=rollout")
    given = ["phases=update", f"experience={sampled}/experience"]
    straight = train(pool, world, tmp_path / "straight", "steps=4", *given)
    stopped = train(pool, world, tmp_path / "stopped", "steps=2", *given)
    (stopped / "summary.json").unlink()
    train(pool, world, stopped, "steps=4", *given)
    assert rows_of(stopped) == rows_of(straight) and len(rows_of(straight)) == 4
    assert equal(adapter_of(stopped), adapter_of(straight))


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("weight", 2),
        *(
            pytest.param(fault, stage, marks=pytest.mark.slow)
            for fault, stage in [("reference", 2), ("reference", 3), ("weight", 3)]
        ),
    ],
)
def test_a_batch_that_could_not_be_learned_from_replays_to_the_same_loss(pool, world, tmp_path, fault, stage):
    """The dump alone makes the fault again, in code that has none: the same metrics and the same NaN; without what was
    kept it is finite.

    The faults: one NaN among the reference's log-probs, of one rank; a weight that is infinite, from the update on.
    """
    zero = f"engine.deepspeed=ds_configs/zero{stage}.json"
    run = train(pool, world, tmp_path / "run", "steps=2", zero, task="train_with_fault", fault=fault, step=1)
    first, failed = rows_of(run)
    assert first["loss"] is not None and failed["loss"] is None and failed["policy/skipped_updates"] == 1
    file = run / "not_finite" / "step_000001_rank1.json"
    given = [f"experience={file}", "phases=update", "steps=1", zero, NO_LABELER]
    (replayed,) = rows_of(train(pool, world, tmp_path / "replayed", *given))
    assert {**replayed, "step": 1} == failed
    kept = failed["policy/entropy"]
    assert (kept is not None) == (fault == "reference")

    record = json.loads(file.read_text())
    for rank in range(2):  # without its weights, and without the log-probs that it came with
        path = file.with_name(f"step_000001_rank{rank}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"own_weights": False}))
    again = train(pool, world, tmp_path / "again", *given)
    (fresh,) = rows_of(again)
    assert (fresh["loss"] is None) == (fault == "reference") and fresh["policy/entropy"] != kept
    assert (
        record["own_weights"] and (run / "not_finite" / "step_000001_adapter" / "adapter_model.safetensors").is_file()
    )


@pytest.mark.slow
def test_both_phases_as_a_person_starts_them(world, tmp_path):
    """Sampled by two ranks, learned from by one; a contradiction ends all ranks with one message, before anything is
    loaded.
    """
    sampled, learned = tmp_path / "sampled", tmp_path / "learned"
    assert launch("train", world.recipe(sampled), *QUIET, "steps=2", "phases=rollout").returncode == 0
    recipe = world.recipe(learned, name="learned.yaml")
    given = [*QUIET, "phases=update", f"experience={sampled}/experience", NO_LABELER]
    refused = launch("train", recipe, *given, "steps=3")
    output = refused.stdout + refused.stderr
    assert (
        refused.returncode == 2
        and output.count("2 saved step(s), steps is 3; set steps=2") == 1
        and "Traceback" not in output
    )
    assert launch("train", recipe, *given, "steps=2", ranks=1).returncode == 0
    assert len(rows_of(learned)) == 2 and (learned / "adapter" / "adapter_config.json").is_file()
