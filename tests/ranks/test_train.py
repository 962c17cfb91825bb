"""GRPO on two real ranks: interrupted and resumed, and every switch of the method taken once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mrg_r1.tracking.report import print_report
from tests.conftest import each_world_slowly

pytestmark = pytest.mark.ranks


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def completions(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "completions").iterdir())}


@each_world_slowly
def test_an_interrupted_run_continues_as_the_uninterrupted_one(pool, world, tmp_path):
    """Two steps, a stop, two more: the same numbers, completions and adapter as four in a row; and what section 8 says
    a run leaves.
    """
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    # the first whole run of the pool: its time is the start of the ranks, of a reward service, and eight steps
    pool.run("train", recipe=str(world.recipe(straight)), overrides=["evaluation.every=2"], service=True)
    recipe = str(world.recipe(stopped, name="other.yaml"))
    pool.run("train", recipe=recipe, overrides=["evaluation.every=2", "steps=2", "evaluation.test=false"])
    best = json.loads((stopped / "summary.json").read_text())["best"]["step"]
    (stopped / "summary.json").unlink()  # the run was killed before it could say that it had ended,
    (stopped / "adapter").rename(stopped / f".adapter_step_{best}")  # and before the best adapter took its place
    pool.run("train", recipe=recipe, overrides=["evaluation.every=2"])  # that it has no service must not be seen

    assert metrics(straight) == metrics(stopped) and len(metrics(straight)) == 4
    assert completions(straight) == completions(stopped) and len(completions(straight)) == 8
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, stopped))
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    assert not list(stopped.glob(".adapter*"))

    left = {path.relative_to(straight).as_posix() for path in straight.rglob("*") if path.is_file()}
    wanted = [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "page/index.html",
        "checkpoints/latest",
    ]
    wanted += [
        "adapter/adapter_config.json",
        "evaluation/test.json",
        "evaluation/test_predictions.jsonl",
        "checkpoints/step_4/state.json",
    ]
    assert set(wanted) <= left
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["zero_stage"] == 2 and summary["status"] == "complete"
    assert sum(summary["labeler_cpu_seconds"].values()) > 0.1  # of a process of its own, which has imported torch
    assert "time/labeler_cpu" in (straight / "metrics.jsonl").read_text().splitlines()[0]
    for side in ("before", "after"):
        keys = {
            "disease_micro13",
            "disease_macro13",
            "disease_micro13_truth",
            "disease_macro13_truth",
            "mean_reward",
            "format_rate",
        }
        keys |= {"repeated_sentence", "repetition", "contradiction"}
        assert keys | {"distinct_share", "held_out_disease_micro13", "hacking_gap"} == summary[side].keys()


@each_world_slowly
def test_members_of_a_group_stand_together_with_their_terms(pool, world, tmp_path):
    """Trap 7 in what a run writes: each study's three members on one rank, each step the loader's studies."""
    run = tmp_path / "run"
    pool.run("train", recipe=str(world.recipe(run)), overrides=["steps=2", "evaluation.test=false"])
    for step in range(2):
        seen: list[str] = []
        for rank in range(2):
            rows = [
                json.loads(line)
                for line in (run / "completions" / f"step_{step:06d}_rank{rank}.jsonl").read_text().splitlines()
            ]
            assert [row["member"] for row in rows] == [0, 1, 2] * 2
            studies = [row["study"] for row in rows]
            assert studies == [studies[0]] * 3 + [studies[3]] * 3
            seen += studies[::3]
            for row in rows:
                assert row["total"] == pytest.approx(
                    0.75 * row["terms"]["mccs"] + 0.25 * row["terms"]["length"], abs=1e-5
                )
        assert len(set(seen)) == 4
        logged = metrics(run)[step]
        assert logged["reward/total"] == pytest.approx(
            0.75 * logged["reward/mccs"] + 0.25 * logged["reward/length"], abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "stage"), [("language+merger", 3), ("all", 2), ("all", 3), ("language+merger", 2), ("all", 1)]
)
def test_a_run_that_trains_merger_or_tower_is_interrupted_and_ends(pool, world, tmp_path, capsys, targets, stage):
    """Cold start by SFT of the same targets, merged; minibatches, groups sampled again, validation, a resume."""
    sft, straight, stopped = tmp_path / "sft", tmp_path / "straight", tmp_path / "stopped"
    same = [f"policy.lora.targets={targets}", f"engine.deepspeed=ds_configs/zero{stage}.json"]
    few = ["evaluation.max_test_studies=4", "evaluation.max_studies=4"]
    overrides = [*same, "steps=2", "rollout.max_new_tokens=80", "evaluation.test=false"]
    pool.run("sft", recipe=str(world.recipe(sft)), overrides=overrides)
    grpo = [*same, *few, f"policy.adapter={sft}/adapter", "grpo.minibatches=2", "grpo.max_resample=1"]
    grpo += ["evaluation.every=2", "grpo.beta=0.1"]
    pool.run("train", recipe=str(world.recipe(straight)), overrides=[*grpo, "steps=2"])
    pool.run("train", recipe=str(world.recipe(stopped)), overrides=[*grpo, "steps=1", "evaluation.test=false"])
    (stopped / "summary.json").unlink()
    pool.run("train", recipe=str(world.recipe(stopped)), overrides=[*grpo, "steps=2"])
    # a validation at the end of the first step chose it, where it was the last
    rows = [
        [{name: value for name, value in row.items() if not name.startswith("validation")} for row in metrics(run)]
        for run in (straight, stopped)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert rows[0][0]["sampling/logp_gap"] < 1e-4 and rows[0][1]["policy/kl"] > 0
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["lora_targets"] == targets and summary["status"] == "complete"
    assert f"LoRA on {targets}" in (straight / "page/index.html").read_text()
    capsys.readouterr()
    print_report([straight])
    assert f"ZeRO-{stage}, LoRA on {targets}" in capsys.readouterr().out
    for run in (sft, straight):
        learned = load_file(run / "checkpoints/step_2/state.safetensors")
        moved = [name for name, one in learned.items() if "live" in name and "lora_B" in name and one.abs().max() > 0]
        assert any("visual" in name and "merger" in name for name in moved)
        assert any("visual.blocks" in name for name in moved) == (targets == "all")


@pytest.mark.parametrize(
    "overrides",
    [
        ["grpo.inner_iterations=2", "grpo.minibatches=2", "grpo.aggregation=dapo"],
        pytest.param(
            ["grpo.ratio=sequence", "grpo.clip_low=3e-4", "grpo.clip_high=4e-4", "grpo.advantage_scale=batch"],
            marks=pytest.mark.slow,
        ),
        ["reward.normalise=per_term", "grpo.advantage_scale=batch", "grpo.correction=tis"],
        pytest.param(["grpo.beta=0", "grpo.advantage_scale=none", "grpo.aggregation=dr_grpo"], marks=pytest.mark.slow),
        [
            "grpo.max_resample=2",
            "reward.weights={mccs: 1.0}",
            "rollout.temperature=0.7",
            "policy.gradient_checkpointing=true",
        ],
        [
            "prompt.mode=think",
            "reward.weights={mccs: 0.75, format: 0.25}",
            "reward.format=graded",
            "policy.dtype=bfloat16",
        ],
        pytest.param(
            [
                "reward.weights={ce_f1: 1.0, bleu4: 0.5, rouge_l: 0.5, ccs: 0.1}",
                "engine.deepspeed=ds_configs/zero1.json",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_switch_of_the_method_runs(pool, world, tmp_path, overrides):
    run = tmp_path / "run"
    pool.run("train", recipe=str(world.recipe(run)), overrides=["steps=1", "evaluation.test=false", *overrides])
    (row,) = metrics(run)
    assert row["sampling/logp_gap"] < (0.05 if "policy.dtype=bfloat16" in overrides else 1e-4)
    first = row["policy/ratio"]  # of all updates of the step: 1 where there is only one
    assert first == pytest.approx(1, abs=1e-6 if "grpo.inner_iterations=2" not in overrides else 0.5)
    if "grpo.beta=0" in overrides:
        assert "policy/kl" not in row
    elif len(overrides) and "grpo.inner_iterations=2" not in overrides:
        assert row["policy/kl"] == pytest.approx(0, abs=1e-6)  # LoRA's B is 0 at the start
    assert row["policy/grad_norm"] >= 0


def test_a_step_whose_completions_are_all_truncated_and_masked_changes_nothing(pool, world, tmp_path):
    """A random policy hardly ever ends in 8 tokens: nothing is kept anywhere, the loss is 0 and not 0 / 0."""
    run = tmp_path / "run"
    pool.run(
        "train",
        recipe=str(world.recipe(run)),
        overrides=["steps=1", "evaluation.test=false", "grpo.mask_truncated=true"],
    )
    (row,) = metrics(run)
    assert (
        row["groups/truncated"] == 1
        and row["loss"] == 0
        and row["policy/grad_norm"] == 0
        and row["policy/entropy"] is None
    )


def test_sft_that_explodes_stops_with_a_checkpoint(pool, world, tmp_path):
    """Weights of 1e30 give gradients that are not finite: two updates are left out on all ranks, and the third step is
    not begun.
    """
    run = tmp_path / "run"
    overrides = [
        "steps=6",
        "rollout.max_new_tokens=80",
        "optimizer.learning_rate=1e30",
        "engine.max_skipped=2",
        "evaluation.test=false",
    ]
    with pytest.raises(
        RuntimeError,
        match="NotFinite: 2 steps in a row had a loss, gradient or reward that is not finite .* the last one step 2",
    ):
        pool.run("sft", recipe=str(world.recipe(run)), overrides=overrides)
    assert [row["policy/skipped_updates"] for row in metrics(run)] == [0, 1, 1]
    state = json.loads((run / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["skipped_in_a_row"] == 2 and state["optimizer_steps"] == 1


@pytest.mark.slow
def test_an_adapter_of_sft_is_merged_as_a_cold_start(pool, world, tmp_path):
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    overrides = ["rollout.max_new_tokens=200", "steps=3", "evaluation.test=false", "sft.max_seconds=1000"]
    pool.run("sft", recipe=str(world.recipe(sft, name="sft.yaml")), overrides=overrides)
    overrides = [f"policy.adapter={sft}/adapter", "steps=1", "evaluation.test=false"]
    pool.run("train", recipe=str(world.recipe(grpo)), overrides=overrides)
    (row,) = metrics(grpo)
    assert row["policy/kl"] == pytest.approx(0, abs=1e-6)  # the reference has the cold start too
