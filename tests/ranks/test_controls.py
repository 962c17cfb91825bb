"""Controls on two real ranks: interrupted and resumed as any run, and further SFT at a run's time."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.ranks.test_train import completions, metrics

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("control", ["rft", pytest.param("random", marks=pytest.mark.slow)])
def test_an_interrupted_control_continues_as_the_uninterrupted_one(pool, world, tmp_path, control):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    overrides = [f"control={control}", "evaluation.test=false", "evaluation.before=false", "evaluation.every=2"]
    pool.run("train", recipe=str(world.recipe(straight)), overrides=overrides)
    recipe = str(world.recipe(stopped, name="other.yaml"))
    pool.run("train", recipe=recipe, overrides=[*overrides, "steps=2"])
    (stopped / "summary.json").unlink()
    with pytest.raises(RuntimeError, match=f"control: {control} -> None"):
        pool.run("train", recipe=recipe, overrides=overrides[1:])
    pool.run("train", recipe=recipe, overrides=overrides)
    assert metrics(straight) == metrics(stopped) and len(metrics(straight)) == 4
    assert completions(straight) == completions(stopped)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, stopped))
    assert all((one[name] == two[name]).all() for name in one)
    assert json.loads((straight / "summary.json").read_text())["control"] == control
    assert f"control: {control}\n" in (straight / "config.yaml").read_text()


def test_further_sft_is_one_key_away(pool, world, tmp_path):
    run, control = tmp_path / "run", tmp_path / "control"
    overrides = ["evaluation.before=false", "steps=1", "rollout.max_new_tokens=80"]
    pool.run("train", recipe=str(world.recipe(run)), overrides=overrides)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["control"] is None and summary["training_cpu_seconds"] > 0
    (run / "summary.json").write_text(json.dumps(summary | {"training_cpu_seconds": 0.4}))
    recipe = str(world.recipe(control, name="other.yaml"))
    pool.run("train", recipe=recipe, overrides=[*overrides, "control=sft", f"control_of={run}"])
    done = json.loads((control / "summary.json").read_text())
    assert done["control"] == "sft" and done["after"] is not None
    assert 0.4 <= done["training_cpu_seconds"] < 5  # it stops after the step in which its time is over
    assert (control / "adapter" / "adapter_config.json").is_file() and len(metrics(control)) > 1
