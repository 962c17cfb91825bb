"""The controls: rejection fine-tuning is the likelihood of the best reports and nothing else, dealt rewards say
nothing, further SFT gets the time of the run that it is compared with.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mrg_r1.training.grpo as trainer
from mrg_r1.config.control import at_equal_time
from mrg_r1.config.recipe import RecipeError, check_numbers, dump_recipe
from mrg_r1.doctor.checks import task_of
from mrg_r1.grpo.advantages import group_advantages, zero_signal
from mrg_r1.policy.lora import reference
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training.controls import best_of_groups, control_words, dealt_at_random
from mrg_r1.training.resume import differences
from mrg_r1.types import Sampled
from tests.conftest import OneRank
from tests.training.test_grpo import PlainEngine, recipe_of, rewards_of

# a tie, a group without signal, a best one at the end, a clear case
TOTAL = torch.tensor([[0.2, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5], [0.0, 0.1, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
BEST, KEPT = [1, 0, 3, 0], [0, 2, 3]
RATE = 1e-2


@pytest.fixture
def sampled(lora_policy, studies, build):
    """Four groups of four reports of unequal length."""
    prompts = build(lora_policy)(studies)
    vision = lora_policy.encode_images(prompts)
    done = rollout(lora_policy, prompts, vision, Sampling(group_size=4, max_new_tokens=8, seed=0, step=0))
    limit = torch.tensor([[8, 3, 8, 8], [5, 8, 8, 8], [8, 8, 8, 6], [7, 8, 8, 8]])
    done.mask &= torch.arange(done.mask.shape[2]) < limit[:, :, None]
    return Sampled(prompts, done), vision


def step_of(policy, sampled, vision, recipe):
    """One second half of a step on the rewards of `TOTAL`, and how it moved the policy."""
    rewards = rewards_of(TOTAL)
    prefill = policy.prompt_cache(sampled.prompts, vision) if recipe.rollout.reuse_prefill else None
    pending = trainer.Pending(replace(sampled), vision, prefill, lambda: rewards)
    run = SimpleNamespace(recipe=recipe, policy=policy, ranks=OneRank(), directory=recipe.output_dir)
    return trainer.update_step(0, pending, run=run, engine=PlainEngine(policy, rate=RATE), clock=Clock())


def trained(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def likelihood(policy, sampled, vision, studies, aggregation, beta=0.0):
    """The negative log-likelihood of the best reports of some studies, and `beta` times k3 of its tokens, written down
    anew.
    """
    losses, tokens = [], 0
    for study in studies:
        ids = sampled.completions.token_ids[study, BEST[study]]
        length = int(sampled.completions.mask[study, BEST[study]].sum())
        one = torch.ones(1, length, dtype=torch.bool)
        prompts, seen = sampled.prompts.select([study]), vision.select([study])
        logp, _ = policy(prompts, seen, ids[None, :length], one, torch.zeros(1, dtype=torch.long))
        with torch.no_grad(), reference(policy):
            frozen, _ = policy(prompts, seen, ids[None, :length], one, torch.zeros(1, dtype=torch.long))
        apart = (frozen - logp).double()
        per_token = -logp.double() + beta * (apart.exp() - apart - 1)
        losses.append(per_token.sum() / (length if aggregation == "grpo" else 1))
        tokens += length
    total = torch.stack(losses).sum()
    return total / {"grpo": len(studies), "dapo": tokens, "dr_grpo": len(studies) * 8}[aggregation]


@pytest.mark.parametrize(
    "aggregation, beta, reuse",
    [("grpo", 0.0, "false"), ("dapo", 0.0, "false"), ("dr_grpo", 0.0, "true"), ("grpo", 0.3, "true")],
)
def test_rejection_fine_tuning_is_the_likelihood_of_the_best_reports(
    lora_policy, sampled, world, tmp_path, aggregation, beta, reuse
):
    settings = [f"grpo.aggregation={aggregation}", f"grpo.beta={beta}", f"rollout.reuse_prefill={reuse}"]
    recipe = recipe_of(world, tmp_path, "control=rft", "rollout.max_new_tokens=8", *settings)
    wanted = likelihood(lora_policy, *sampled, KEPT, aggregation, beta)
    gradient = torch.autograd.grad(wanted, trained(lora_policy))
    start = [parameter.detach().clone() for parameter in trained(lora_policy)]
    metrics = step_of(lora_policy, *sampled, recipe)
    assert float(metrics["loss"][0]) == pytest.approx(wanted.item(), rel=1e-5)
    moved = torch.cat([(now.detach() - then).flatten() for now, then in zip(trained(lora_policy), start, strict=True)])
    asked = torch.cat([-RATE * part.flatten() for part in gradient])
    assert asked.norm() > 1e-4 and (moved - asked).norm() / asked.norm() < 1e-4
    assert float(metrics["reward/total"][1]) == 16  # all that was sampled is measured


def test_with_several_updates_a_rollout_it_stays_the_likelihood(lora_policy, sampled, world, tmp_path):
    """Three passes of two minibatches at a rate at which a ratio would be clipped: no clip, and no ratio in the
    gradient.
    """
    recipe = recipe_of(
        world, tmp_path, "control=rft", "grpo.inner_iterations=3", "grpo.minibatches=2", "rollout.max_new_tokens=8"
    )
    parameters = trained(lora_policy)
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for _ in range(3):
        for studies in ([0, 2], [3]):  # studies 0 and 2, then 1 and 3, of which 1 has no signal
            optimizer.zero_grad()
            likelihood(lora_policy, *sampled, studies, "grpo").backward()
            optimizer.step()
    wanted = [parameter.detach().clone() for parameter in parameters]
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    metrics = step_of(lora_policy, *sampled, recipe)
    far = torch.cat([(now.detach() - then).flatten() for now, then in zip(parameters, wanted, strict=True)])
    way = torch.cat([(now - then).flatten() for now, then in zip(wanted, start, strict=True)])
    assert far.norm() / way.norm() < 1e-4
    assert float(metrics["policy/ratio_max"][0]) > 1  # how far the policy has moved


def test_the_best_is_the_first_of_the_best_and_equal_groups_are_left_out(sampled):
    groups, kept = best_of_groups(sampled[0], rewards_of(TOTAL))
    done = sampled[0].completions
    assert kept.squeeze(1).tolist() == [True, False, True, True]
    assert groups.completions.texts == [[done.texts[study][member]] for study, member in enumerate(BEST)]
    assert groups.completions.lengths.squeeze(1).tolist() == [
        int(done.lengths[study, member]) for study, member in enumerate(BEST)
    ]
    length = groups.completions.token_ids.shape[2]
    for study, member in enumerate(BEST):
        assert torch.equal(groups.completions.token_ids[study, 0], done.token_ids[study, member, :length])


def test_a_batch_without_any_signal_teaches_nothing(lora_policy, sampled, world, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.test_controls.TOTAL", torch.full((4, 4), 0.3))
    start = [parameter.detach().clone() for parameter in trained(lora_policy)]
    metrics = step_of(lora_policy, *sampled, recipe_of(world, tmp_path, "control=rft"))
    assert float(metrics["loss"][0]) == 0
    assert all(torch.equal(now, then) for now, then in zip(trained(lora_policy), start, strict=True))


def test_dealt_rewards_are_the_groups_own_and_the_same_for_any_number_of_ranks(sampled):
    rewards, prompts = rewards_of(TOTAL), sampled[0].prompts
    dealt = dealt_at_random(rewards, prompts, seed=0, step=3)
    assert torch.equal(dealt.total.sort(dim=1).values, TOTAL.sort(dim=1).values)
    assert torch.equal(dealt.terms["a"], dealt.total)  # a report's terms stay together
    assert torch.equal(zero_signal(dealt.total), zero_signal(TOTAL))
    for rows in ([0, 1], [2, 3], [3, 1]):
        part = dealt_at_random(rewards_of(TOTAL[rows]), prompts.select(rows), seed=0, step=3)
        assert torch.equal(part.total, dealt.total[rows])
    assert torch.equal(dealt_at_random(rewards, prompts, seed=0, step=3).total, dealt.total)
    others = [dealt_at_random(rewards, prompts, seed=seed, step=step).total for seed, step in ((0, 4), (1, 3))]
    assert all(not torch.equal(other, dealt.total) for other in others)
    again = replace(prompts, occurrences=[1] * len(prompts))  # a study's second time in a step
    assert not torch.equal(dealt_at_random(rewards, again, seed=0, step=3).total, dealt.total)


def test_dealt_rewards_know_nothing_of_the_reports(sampled):
    """Over 400 steps the advantage of each report is 0 on average, within what chance allows."""
    prompts = sampled[0].prompts
    advantages = torch.stack(
        [group_advantages(dealt_at_random(rewards_of(TOTAL), prompts, seed=0, step=step).total) for step in range(400)]
    )
    assert advantages.std(dim=0)[0].min() > 0.5 and advantages.mean(dim=0).abs().max() < 4 / 400**0.5


def test_a_random_reward_is_learned_from_and_the_real_one_is_logged(lora_policy, sampled, world, tmp_path, monkeypatch):
    taken = []
    inner = trainer.global_advantages
    monkeypatch.setattr(
        trainer, "global_advantages", lambda rewards, *rest: taken.append(rewards) or inner(rewards, *rest)
    )
    metrics = step_of(lora_policy, *sampled, recipe_of(world, tmp_path, "control=random"))
    dealt = dealt_at_random(rewards_of(TOTAL), sampled[0].prompts, seed=0, step=0)
    assert torch.equal(taken[0].total, dealt.total)
    assert float(metrics["reward/total"][0]) == pytest.approx(float(TOTAL.double().sum()))


# --- the recipe


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["control=rtf"], "control"),
        (["control=sft"], "control_of=RUN"),
        (["control=rft", "control_of=runs/a"], "only control sft has a time"),
        (["control=sft", "control_of=runs/a", "sft.stop_at=0.5"], "sft.stop_at 0.5"),
        (["control=rft", "grpo.correction=tis"], "grpo.correction tis"),
    ],
)
def test_a_control_that_cannot_be_is_refused(world, tmp_path, overrides, said):
    with pytest.raises(RecipeError, match=said):
        recipe_of(world, tmp_path, *overrides)


def test_controls_are_refused_where_they_cannot_run(world, tmp_path):
    with pytest.raises(RecipeError, match="launch/train.py"):
        check_numbers(recipe_of(world, tmp_path, "control=rft"), world_size=1, task="sft")
    timed = recipe_of(world, tmp_path, "control=sft", "sft.max_cpu_seconds=3", "phases=rollout")
    with pytest.raises(RecipeError, match="SFT has no phases"):
        check_numbers(timed, world_size=1, task="grpo")
    halves = recipe_of(world, tmp_path, "control=rft", "grpo.minibatches=3")  # 4 studies of one report each
    with pytest.raises(RecipeError, match="x the best report"):
        check_numbers(halves, world_size=1, task="grpo")


def test_another_control_is_another_run(world, tmp_path):
    """What a checkpoint's resume refuses."""
    plain, control = recipe_of(world, tmp_path), recipe_of(world, tmp_path, "control=rft")
    before = plain.model_dump(mode="json")
    assert differences(before, control) == ["control: None -> rft"]
    del before["control"], before["control_of"]  # of a checkpoint that is older than the key
    assert differences(before, plain) == [] and differences(before, control) == ["control: None -> rft"]


@pytest.fixture
def finished(world, tmp_path):
    """A finished run on two ranks, and what a control of it is asked for with."""

    def make(**summary):
        run = tmp_path / "finished"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(dump_recipe(recipe_of(world, tmp_path)))
        content = {"status": "complete", "training_cpu_seconds": 12.5, "world_size": 2} | summary
        (run / "summary.json").write_text(json.dumps(content))
        return run

    return make


def test_further_sft_gets_the_processor_seconds_of_the_run(world, tmp_path, finished):
    run = finished()
    recipe = recipe_of(world, tmp_path, "control=sft", f"control_of={run}", "steps=4", "evaluation.every=2")
    control = at_equal_time(recipe, world_size=2)
    assert control.sft.max_cpu_seconds == 12.5 and control.steps == 1_000_000
    assert (control.evaluation.every, control.checkpoint.every) == (0, 1000)
    assert at_equal_time(control, world_size=2) == control  # RUN/config.yaml as a recipe
    assert task_of(recipe) == "sft" and "12 processor seconds, those of" in control_words(control)
    given = at_equal_time(recipe_of(world, tmp_path, "control=sft", "sft.max_cpu_seconds=3"), world_size=1)
    assert given.sft.max_cpu_seconds == 3 and given.steps == 1_000_000
    plain = recipe_of(world, tmp_path)
    assert at_equal_time(plain, world_size=1) == plain


@pytest.mark.parametrize(
    "summary, overrides, said",
    [
        ({"status": "running"}, [], "no finished run"),
        ({"training_cpu_seconds": None}, [], "no training_cpu_seconds"),
        ({"world_size": 4}, [], r"ran on 4 rank\(s\), this is started on 2"),
        ({}, ["policy.path=elsewhere"], "its policy.path"),
        ({}, ["data.manifest=other.jsonl"], "its data.manifest"),
        ({}, ["sft.max_cpu_seconds=7"], "leave one of them out"),
    ],
)
def test_a_run_that_is_no_measure_is_refused(world, tmp_path, finished, summary, overrides, said):
    recipe = recipe_of(world, tmp_path, "control=sft", f"control_of={finished(**summary)}", *overrides)
    with pytest.raises(RecipeError, match=said):
        at_equal_time(recipe, world_size=2)


def test_a_run_that_is_not_there_is_refused(world, tmp_path):
    recipe = recipe_of(world, tmp_path, "control=sft", f"control_of={tmp_path / 'nowhere'}")
    with pytest.raises(RecipeError, match="no finished run is there"):
        at_equal_time(recipe, world_size=2)
