"""ZeRO-3 on two real ranks: what each holds, that nobody waits in a rollout, that it trains what ZeRO-2 trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import each_family_slowly
from tests.ranks.test_engine import RECIPE

pytestmark = pytest.mark.ranks


@pytest.fixture
def setting(tiny_policy_directory, tmp_path) -> dict[str, str]:
    """Arguments of `start_engine`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path))
    return {"directory": str(tiny_policy_directory), "images": str(tmp_path / "images"), "recipe": str(recipe)}


@pytest.mark.parametrize("targets", ["language", "all"])
def test_frozen_weights_are_parts_and_never_all_whole_in_an_update(pool, setting, targets):
    """A rank holds half of them at rest; in a pass a layer at a time, or the embeddings, is whole, and autograd keeps
    none of it.
    """
    overrides = [
        f"policy.lora.targets={targets}",
        "engine.deepspeed=ds_configs/zero3.json",
        "engine.micro_batch_tokens=70",
    ]
    for answer in pool.run("weights_in_memory", **setting, overrides=overrides):
        assert answer["parts"] == pytest.approx(answer["total"] / 2, rel=0.01)
        assert answer["absent"] > 0.95 * answer["total"], "only small parameters stay whole"
        assert answer["left"] < 0.05 * answer["total"]
        # in a layer's backward pass: its weights as they were brought together, and as the recomputation has saved them
        largest = max(answer["layer"], answer["embeddings"], answer["merger"] if targets == "all" else 0)
        assert answer["layer"] <= answer["most"] <= 1.2 * largest
        assert answer["most"] < 0.5 * answer["total"]


@each_family_slowly
def test_ranks_sample_unequally_long_and_often_without_hanging(pool, tiny_policy_directory, tmp_path):
    """Trap 18: one rank ends at token 3, the other at 40; one samples once more, the other three times."""
    answers = pool.run("unequal_rollouts", directory=str(tiny_policy_directory), images=str(tmp_path / "images"))
    assert [answer["length"] for answer in answers] == [3, 40]
    assert all(answer["equal"] and answer["gap"] < 1e-5 and answer["vision"] < 1e-5 for answer in answers), answers


@each_family_slowly
def test_ranks_pass_equally_often_where_one_has_next_to_nothing(pool, setting):
    """Fewer passes, and none over completions, on a rank whose completions end with their first token: the same as at
    stage 2.
    """

    def answers(stage: int) -> list[dict]:
        overrides = [f"engine.deepspeed=ds_configs/zero{stage}.json", "engine.micro_batch_tokens=70"]
        return pool.run("one_rank_ends_at_once", **setting, overrides=overrides)

    for two, three in zip(answers(2), answers(3), strict=True):
        assert three["scored"] == pytest.approx(two["scored"], abs=1e-4)
        assert three["losses"] == pytest.approx(two["losses"], abs=1e-6) and three["norm"] == pytest.approx(
            two["norm"], rel=1e-5
        )


def test_offloaded_states_train_the_same(pool, setting):
    """Weights' parts, masters and moments in the CPU's memory: on this machine the same memory, by DeepSpeed's other
    path.
    """
    answers = {}
    for name in ("zero2", "zero2_offload", "zero3", "zero3_offload"):
        overrides = [f"engine.deepspeed=ds_configs/{name}.json"]
        answers[name] = [answer["losses"] for answer in pool.run("update_on_ranks", **setting, overrides=overrides)]
    for losses in answers.values():
        for found, wanted in zip(losses, answers["zero2"], strict=True):
            assert found == pytest.approx(wanted, abs=1e-6)


@each_family_slowly
def test_a_checkpoint_goes_through_the_stages(pool, setting, tmp_path):
    for answer in pool.run("through_stages", **setting, checkpoints=str(tmp_path / "checkpoints"), overrides=[]):
        assert answer["arrived"] == [True, True]
        assert answer["changing"] == pytest.approx(answer["straight"], abs=1e-6)


@pytest.mark.slow
def test_recipes_train_the_same_at_stage_2_and_3(pool, world, tmp_path):
    """SFT, then GRPO from its adapter: cold start, reference, groups sampled again, rollouts in parts, validation and
    both evaluations.
    """

    def adapter(run: Path) -> dict[str, torch.Tensor]:
        return load_file(run / "adapter" / "adapter_model.safetensors")

    runs: dict[str, list[Path]] = {"sft": [], "train": []}
    for task in runs:
        for stage in (2, 3):
            run = tmp_path / f"{task}{stage}"
            overrides = [f"engine.deepspeed=ds_configs/zero{stage}.json", "steps=2", "optimizer.learning_rate=1e-3"]
            if task == "sft":
                overrides += ["evaluation.before=false", "evaluation.test=false", "rollout.max_new_tokens=80"]
            else:
                overrides += [
                    "grpo.max_resample=1",
                    "rollout.cache_tokens=120",
                    "grpo.inner_iterations=2",
                    "evaluation.every=2",
                ]
                overrides += [
                    "evaluation.max_test_studies=5",
                    "evaluation.batch_size=2",
                    f"policy.adapter={runs['sft'][0]}/adapter",
                ]
            pool.run(task, recipe=str(world.recipe(run)), overrides=overrides)
            runs[task].append(run)
    assert [json.loads((run / "summary.json").read_text())["zero_stage"] for run in runs["train"]] == [2, 3]
    for two, three in runs.values():
        assert adapter(two).keys() == adapter(three).keys()
        for name, value in adapter(two).items():
            torch.testing.assert_close(adapter(three)[name], value, atol=1e-5, rtol=0)
