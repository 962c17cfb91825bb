"""Two real ranks under ZeRO: the same global batch cut six ways, metrics over ranks, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from tests.conftest import FAMILIES, QWEN
from tests.policy.test_logprobs_trained import modules_features
from tests.ranks.tasks import GROUP, fixed_experience, fixed_policy

pytestmark = pytest.mark.ranks

RECIPE = """
output_dir: {out}
steps: 1
data: {{manifest: none}}
policy: {{path: none, dtype: float32}}
rollout: {{max_new_tokens: 13}}
grpo: {{group_size: 4, beta: 0.1, clip_low: 0.2, clip_high: 0.28}}
reward: {{labeler: none}}
"""


def oracle(directory: Path, images: Path, aggregation: str, targets: str = "language") -> tuple[float, float]:
    """Loss and gradient norm of the whole batch in one process, written row by row from docs/method.md §3."""
    policy = fixed_policy(str(directory), targets=targets)
    experience = fixed_experience(policy, str(directory), str(images), [0, 1, 2, 3])
    done = experience.completions
    length = done.token_ids.shape[2]
    rows_of = torch.arange(4).repeat_interleave(GROUP)
    logp, _ = completion_logprobs_plain(
        policy,
        experience.prompts,
        modules_features(policy, experience.prompts),
        done.token_ids.view(-1, length),
        done.mask.view(-1, length),
        rows_of,
    )
    old, ref = experience.old_logp.reshape(-1, length), experience.reference_logp.reshape(-1, length)
    rows, tokens = [], []
    for row in range(4 * GROUP):
        advantage = experience.advantages.view(-1)[row]
        for t in range(int(done.mask.view(-1, length)[row].sum())):
            ratio = torch.exp(logp[row, t] - old[row, t])
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.28))
            gap = ref[row, t] - logp[row, t]
            tokens.append((row, -torch.min(ratio * advantage, clipped * advantage) + 0.1 * (torch.exp(gap) - gap - 1)))
    for row in range(4 * GROUP):
        rows.append([loss for at, loss in tokens if at == row])
    everything = torch.stack([loss for _, loss in tokens])
    loss = {
        "grpo": lambda: torch.stack([torch.stack(row).mean() for row in rows]).mean(),
        "dapo": lambda: everything.mean(),
        "dr_grpo": lambda: everything.sum() / (len(rows) * 13),
    }[aggregation]()
    loss.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in policy.parameters() if p.grad is not None))
    return loss.item(), norm.item()


SIX_CUTS = [
    (10_000, 2, ""),
    (1, 2, ""),
    (70, 1, "reuse"),
    (70, 2, "recompute"),
    (10_000, 3, ""),
    (70, 3, ""),
]
MORE_CUTS = [
    (70, 2, ""),
    (10_000, 1, ""),
    (70, 2, "reuse"),
    (10_000, 2, "reuse"),
    (1, 3, ""),
    (70, 3, "recompute"),
]
FEW_CUTS = [(10_000, 2, ""), (70, 2, "reuse"), (1, 3, ""), (70, 3, "recompute")]


@pytest.mark.parametrize(
    ("tiny_policy_directory", "aggregation", "cuts"),
    [  # an engine each: every cut has been wrong in somebody's trainer
        ("qwen2_5_vl", "grpo", SIX_CUTS),
        pytest.param("qwen2_5_vl", "grpo", MORE_CUTS, marks=pytest.mark.slow),
        ("qwen2_5_vl", "dapo", [(70, 2, "")]),
        ("qwen2_5_vl", "dr_grpo", [(70, 2, "")]),
        pytest.param("qwen3_vl", "grpo", FEW_CUTS, marks=pytest.mark.slow),
        pytest.param("gemma3", "grpo", FEW_CUTS, marks=pytest.mark.slow),
    ],
    indirect=["tiny_policy_directory"],
)
def test_loss_and_gradient_are_the_same_however_the_batch_is_cut(
    pool, tiny_policy_directory, tmp_path, aggregation, cuts
):
    """Traps 5 and 17: two ranks of unequal token counts, a batch in one pass to one a row, ZeRO 1 to 3, with gradient
    checkpointing and without, against the naive pass in one process.

    `reuse` keeps the prefill's graph: gradients gather at the prompts' states and go through them once at the end.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path))
    images = tmp_path / "images"
    loss, norm = oracle(tiny_policy_directory, images, aggregation)
    weights = []
    for budget, stage, switch in cuts:
        overrides = [
            f"engine.micro_batch_tokens={budget}",
            f"engine.deepspeed=ds_configs/zero{stage}.json",
            f"grpo.aggregation={aggregation}",
            f"rollout.reuse_prefill={switch == 'reuse'}",
            f"policy.gradient_checkpointing={switch == 'recompute'}",
        ]
        answers = pool.run(
            "update_on_ranks",
            directory=str(tiny_policy_directory),
            images=str(images),
            recipe=str(recipe),
            overrides=overrides,
        )
        for answer in answers:
            assert answer["losses"][0] == pytest.approx(loss, abs=2e-6)
            assert answer["norms"][0] == pytest.approx(norm, rel=2e-5)
            weights.append(torch.tensor(answer["weights"]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "targets"),
    [  # the rest of the table is slow, not other
        pytest.param(family, targets, marks=[] if (family, targets) == (QWEN[0], "all") else pytest.mark.slow)
        for family in QWEN
        for targets in ("language+merger", "all")
    ],
)
def test_lora_on_merger_and_tower_moves_alike_under_every_stage(pool, tiny_policies, tmp_path, family, targets):
    """Two ranks, ZeRO 1 to 3, against transformers' modules in one process."""
    recipe, directory = tmp_path / "recipe.yaml", tiny_policies(family)
    recipe.write_text(RECIPE.format(out=tmp_path))
    loss, norm = oracle(directory, tmp_path / "images", "grpo", targets)
    weights = []
    for budget, stage, recompute in [(70, 1, False), (70, 2, False), (70, 3, False), (10_000, 3, False), (70, 2, True)]:
        overrides = [
            f"policy.lora.targets={targets}",
            f"engine.micro_batch_tokens={budget}",
            f"engine.deepspeed=ds_configs/zero{stage}.json",
            f"policy.gradient_checkpointing={recompute}",
        ]
        answers = pool.run(
            "update_on_ranks",
            directory=str(directory),
            images=str(tmp_path / "images"),
            recipe=str(recipe),
            overrides=overrides,
        )
        for answer in answers:
            assert answer["losses"][0] == pytest.approx(loss, abs=5e-6)
            assert answer["norms"][0] == pytest.approx(norm, rel=5e-5)
            weights.append(torch.tensor(answer["weights"]))
    for other in weights[1:]:
        # a step of Adam is as long for a gradient that is next to nothing, whose rounding then shows
        torch.testing.assert_close(other, weights[0], atol=2e-5, rtol=0)


def test_metrics_weigh_ranks_by_their_counts(pool):
    """Trap 20: 1 value of mean 1 on rank 0 and 3 of mean 3 on rank 1 make 2.5, not 2."""
    for answer in pool.run("reduce_unequal"):
        assert answer == {"mean": 2.5, "largest_max": 5.0, "nothing": None, "only_rank_one": 4.0}


RESUMED = {(1, "float32", 1), (2, "bfloat16", 3), (3, "bfloat16", 3)}


@pytest.mark.parametrize(
    ("tiny_policy_directory", "stage", "dtype", "mu"),
    [  # the rest of the table is slow, not other
        pytest.param(
            "qwen2_5_vl",
            stage,
            dtype,
            mu,
            marks=[] if (stage, dtype, mu) in RESUMED else pytest.mark.slow,
        )
        for stage in (1, 2, 3)
        for dtype in ("float32", "bfloat16")
        for mu in (1, 3)
    ]
    + [
        pytest.param(family, stage, dtype, mu, marks=pytest.mark.slow)
        for family in list(FAMILIES)[1:]
        for stage, dtype, mu in ((2, "float32", 1), (3, "bfloat16", 3))
    ],
    indirect=["tiny_policy_directory"],
)
def test_checkpoint_resumes_every_later_loss(pool, tiny_policy_directory, tmp_path, stage, dtype, mu):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path))
    answers = pool.run(
        "save_and_load",
        directory=str(tiny_policy_directory),
        images=str(tmp_path / "images"),
        recipe=str(recipe),
        checkpoints=str(tmp_path / "checkpoints"),
        overrides=[f"engine.deepspeed=ds_configs/zero{stage}.json", f"grpo.inner_iterations={mu}"],
        dtype=dtype,
    )
    for answer in answers:
        assert answer["resumed"] == answer["straight"] and len(set(answer["straight"])) == 3
        assert answer["equal"] and answer["note"] == "one" and answer["step"] == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_1"]
    assert not any(path.suffix in {".pt", ".pkl", ".bin"} for path in tmp_path.rglob("*"))
    # adapters (at most fp32) with their masters and two moments; not the model, nor a share for each rank
    size = (tmp_path / "checkpoints" / "step_1" / "state.safetensors").stat().st_size
    names = 10_000 * FAMILIES[tiny_policy_directory.name]  # bytes, of each layer
    for answer in answers:
        assert answer["trained"] * (2 + 3 * 4) < size < answer["trained"] * 4 * 4 + names


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(pool, tiny_policy_directory, tmp_path, stage):
    """And the next update is as if it had never been, also where it was the run's first and a checkpoint was taken
    between.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path))
    mu = ["grpo.inner_iterations=3"] if stage == 2 else []
    answers = pool.run(
        "update_with_nan",
        directory=str(tiny_policy_directory),
        images=str(tmp_path / "images"),
        recipe=str(recipe),
        overrides=[f"engine.deepspeed=ds_configs/zero{stage}.json", *mu],
    )
    for answer in answers:
        assert answer["skipped"] == (3 if mu else 1) and answer["kept"]
        assert answer["blank"] and answer["after"] == 0 and answer["moved"] and answer["same"]


def test_groups_stay_whole_over_ranks(pool):
    """Trap 7: the ranks' studies of a step are the global batch, in order, whoever asks."""
    from mrg_r1.data.order import StudyOrder

    for step in (0, 4):
        first, second = pool.run("indices", step=step)
        assert first + second == StudyOrder(10, seed=3).share(4 * step, batch_size=4, rank=0, world_size=1)
