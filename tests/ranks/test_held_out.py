"""A held-out labeler over two real ranks: rank 0 alone asks it, both have its answers, and a resumed run remembers the
first gap.
"""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks.test_train import metrics

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_a_run_with_a_held_out_labeler_resumes_with_its_first_gap(pool, world, tmp_path):
    held_out = tmp_path / "held_out"
    shutil.copytree(world.folder / "labeler", held_out)
    weights = load_file(held_out / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, held_out / "model.safetensors")
    overrides = [
        "evaluation.every=1",
        "checkpoint.every=1",
        f"evaluation.held_out_labeler={held_out}",
        "checkpoint.keep=9",
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pool.run("train", recipe=str(world.recipe(straight)), overrides=[*overrides, "steps=2"])
    recipe = str(world.recipe(stopped, name="other.yaml"))
    pool.run("train", recipe=recipe, overrides=[*overrides, "steps=1", "evaluation.test=false"])
    (stopped / "summary.json").unlink()
    pool.run("train", recipe=recipe, overrides=[*overrides, "steps=2"])

    assert metrics(straight) == metrics(stopped) and all(
        row["validation/hacking_gap"] is not None for row in metrics(straight)
    )
    states = [json.loads((stopped / f"checkpoints/step_{step}/state.json").read_text())["gaps"] for step in (1, 2)]
    assert states[0] == states[1] and states[0]["hacking_gap"]["when"] == "before training"
    result = json.loads((stopped / "evaluation" / "test.json").read_text())
    assert result["held_out"]["labeler"]["name"] == "held_out" and result["held_out"]["labeler"] != result["labeler"]
    assert json.loads((stopped / "summary.json").read_text())["after"]["hacking_gap"] == result["hacking_gap"]
    rows = [json.loads(line) for line in (stopped / "evaluation" / "test_predictions.jsonl").read_text().splitlines()]
    assert all(len(row["held_out_labels"]) == 14 for row in rows)
    assert [path.name for path in stopped.glob("held_out_service*")] == ["held_out_service.log"]
