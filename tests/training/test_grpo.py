"""The loop in one process: inner iterations, a reward that fails, advantages over ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mrg_r1.training.grpo as trainer
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.grpo.advantages import group_advantages
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.reward.compute import NotFiniteError, RewardContext, RewardError, RewardFunction
from mrg_r1.reward.service.interface import RewardsMissing, RewardsNotFinite
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training import update
from mrg_r1.training.rewards import on_all_ranks
from mrg_r1.training.validation import warn_of_gap
from mrg_r1.types import Experience, Rewards
from tests.conftest import OneRank, each_family, each_family_once
from tests.reward.in_process import InProcessRewards
from tests.reward.keyword_labeler import KeywordLabeler


class PlainEngine:
    """An engine of plain SGD: what `update` needs of one."""

    def __init__(self, policy, rate=0.5):
        self.policy, self.updates, self.skipped = policy, 0, False
        self.optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=rate)

    def __call__(self, *args):
        return self.policy(*args)

    def finish_backward(self, loss):
        self.backward(loss, last=True)

    def backward(self, loss, *, last):
        loss.backward()
        if last:
            self.updates += 1
            self.optimizer.step()
            self.optimizer.zero_grad()


def rewards_of(total):
    return Rewards(
        total,
        {"a": total},
        {"a": 1.0},
        torch.zeros(*total.shape, 14, dtype=torch.long),
        [[None] * total.shape[1]] * len(total),
    )


@pytest.fixture
def experience(lora_policy, studies, build):
    prompts = build(lora_policy)(studies)
    vision = lora_policy.encode_images(prompts)
    done = rollout(lora_policy, prompts, vision, Sampling(group_size=4, max_new_tokens=8, seed=0, step=0))
    total = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    old = group_logprobs(lora_policy, prompts, vision, done, token_budget=4096)
    return Experience(prompts, vision, done, rewards_of(total), group_advantages(total), None, old)


def recipe_of(world, tmp_path, *overrides):
    return load_recipe(
        world.recipe(tmp_path / "run"),
        ["grpo.group_size=4", "engine.micro_batch_tokens=4096", "grpo.beta=0", *overrides],
    )


@each_family
def test_old_logp_stays_the_rollouts_in_every_inner_iteration(lora_policy, experience, world, tmp_path, monkeypatch):
    """Trap 16: with mu 3 the ratio's denominator is the rollout's in all three, while the policy moves."""
    olds, ratios = [], []
    inner = update.grpo_loss

    def recording(**arguments):
        loss, metrics = inner(**arguments)
        olds.append(arguments["old_logp"].clone())
        ratios.append(float(metrics["ratio"][0] / metrics["ratio"][1]))
        return loss, metrics

    monkeypatch.setattr(update, "grpo_loss", recording)
    before = experience.old_logp.clone()
    recipe = recipe_of(world, tmp_path, "grpo.inner_iterations=3")
    update.update(experience, recipe=recipe, engine=PlainEngine(lora_policy), ranks=OneRank())
    rollouts = sorted(before.flatten(0, 1).tolist())  # a pass takes its rows in an order of its own
    assert len(olds) == 3 and all(sorted(old.tolist()) == rollouts for old in olds)
    assert ratios[0] == pytest.approx(1, abs=1e-6) and abs(ratios[2] - 1) > 1e-4


@each_family
def test_first_update_moves_towards_the_better_reports(lora_policy, experience, world, tmp_path):
    """Trap 4: at ratio 1 the loss says nothing, but the gradient is alive: better reports become more probable, worse
    ones less.
    """
    ids, rate = experience.completions, 1e-3

    def objective():
        """Mean over reports of advantage times mean log-prob, whose gradient is the loss's at ratio 1."""
        logp = group_logprobs(lora_policy, experience.prompts, experience.vision, ids, token_budget=4096).double()
        return float((experience.advantages * (logp * ids.mask).sum(-1) / ids.lengths).mean().detach())

    before, start = objective(), [p.detach().clone() for p in lora_policy.parameters() if p.requires_grad]
    once = replace(experience, old_logp=None)
    metrics = update.update(
        once, recipe=recipe_of(world, tmp_path), engine=PlainEngine(lora_policy, rate=rate), ranks=OneRank()
    )
    assert float(metrics["policy/ratio"][0] / metrics["policy/ratio"][1]) == pytest.approx(1, abs=1e-6)
    moved = [p.detach() for p in lora_policy.parameters() if p.requires_grad]
    squares = sum(float((now - then).double().square().sum()) for now, then in zip(moved, start, strict=True))
    assert squares > 0 and objective() - before == pytest.approx(squares / rate, rel=0.05)  # what ascent gains


@each_family_once("budget,recompute", [(100, False), (1, False), (100_000, False), (100, True)])
def test_going_on_from_the_prefill_gives_the_same_update(lora_policy, experience, world, tmp_path, budget, recompute):
    """The rollout's prompt pass kept with its graph: the same gradient, however completions are cut into passes, and
    one update.
    """
    lora_policy.recompute = recompute
    trained = [p for p in lora_policy.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    recipe = recipe_of(world, tmp_path, f"engine.micro_batch_tokens={budget}")
    once, moves, counts = replace(experience, old_logp=None), [], []
    for reuse in (False, True):
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        states = lora_policy.prompt_cache(once.prompts, once.vision) if reuse else None
        again = rollout(lora_policy, once.prompts, once.vision, Sampling(4, 8, seed=0, step=0), states=states)
        assert torch.equal(again.token_ids, once.completions.token_ids)
        engine = PlainEngine(lora_policy)
        metrics = update.update(once, recipe=recipe, engine=engine, ranks=OneRank(), states=states)
        assert engine.updates == 1
        counts.append(float(metrics["loss"][1]))
        moves.append(torch.cat([(p.detach() - value).flatten() for p, value in zip(trained, start, strict=True)]))
    assert moves[0].norm() > 1e-3 and counts == [pytest.approx(1), pytest.approx(1)]
    assert (moves[1] - moves[0]).norm() / moves[0].norm() < 1e-5


def test_reuse_of_the_prefill_is_refused_where_weights_change_in_between(world, tmp_path):
    with pytest.raises(RecipeError, match="reuse_prefill with grpo.inner_iterations 2"):
        recipe_of(world, tmp_path, "rollout.reuse_prefill=true", "grpo.inner_iterations=2")


def test_a_gap_between_sampling_and_scoring_is_said():
    said = []
    log = SimpleNamespace(say=said.append)
    warn_of_gap(log, 3, 0.051, "none")
    warn_of_gap(log, 4, 0.049, "none")
    warn_of_gap(log, 5, None, "tis")
    assert len(said) == 1 and "step 3: sampling/logp_gap 0.051" in said[0] and "grpo.correction=tis" in said[0]


@each_family
def test_truncated_completions_leave_the_loss_when_masked(lora_policy, experience, world, tmp_path):
    experience.completions.ended[:] = False
    metrics = update.update(
        experience,
        recipe=recipe_of(world, tmp_path, "grpo.mask_truncated=true"),
        engine=PlainEngine(lora_policy),
        ranks=OneRank(),
    )
    assert float(metrics["loss"][0]) == 0 and float(metrics["policy/entropy"][1]) == 0


class BrokenLabeler:
    def label(self, texts):
        raise MemoryError("the labeler's device is full")


def test_a_reward_that_fails_stops_the_step_and_names_the_studies(lora_policy, studies, build, world, tmp_path):
    """Trap 22: never a silent zero."""
    recipe = recipe_of(world, tmp_path)
    stage = RewardFunction(BrokenLabeler(), weights={"mccs": 1.0}, mode="plain")
    prompts = build(lora_policy)(studies)

    class Loader:
        def batch(self, step):
            return prompts

    class FakeRun:
        ranks, policy, directory = OneRank(), lora_policy, tmp_path
        rewards = SimpleNamespace(context_of=lambda study_ids, step: RewardContext())

    FakeRun.recipe = recipe
    weights = torch.cat([p.detach().flatten() for p in lora_policy.parameters()])
    with pytest.raises(RewardError, match="rank 0: the reports of studies a, b, c, d: the labeler failed: MemoryError"):
        trainer.grpo_step(
            0,
            run=FakeRun(),
            engine=PlainEngine(lora_policy),
            loader=Loader(),
            reward_service=InProcessRewards(stage),
            clock=Clock(),
        )
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in lora_policy.parameters()]))


def test_per_term_normalisation_keeps_a_term_alive_beside_a_saturated_one(world, tmp_path):
    """Trap 24, the advantages' half: format is 1 for everyone, findings differ, and the advantage is the
    findings' own.
    """
    findings = torch.tensor([[0.0, 0.2, 0.4, 0.6]])
    rewards = Rewards(
        findings + 1,
        {"mccs": findings, "format": torch.ones(1, 4)},
        {"mccs": 1.0, "format": 1.0},
        torch.zeros(1, 4, 14),
        [[]],
    )
    for normalise in ("total", "per_term"):
        advantages = update.global_advantages(
            rewards, recipe_of(world, tmp_path, f"reward.normalise={normalise}"), OneRank()
        )
        torch.testing.assert_close(advantages, group_advantages(findings), atol=1e-3, rtol=0)


def test_a_rank_whose_rewards_are_there_stops_with_the_one_whose_are_not():
    """Trap 22 over ranks: both raise the same message, and nobody waits for a rank that has left."""
    rewards = rewards_of(torch.rand(2, 2))

    class Pair(OneRank):
        def __init__(self, others):
            super().__init__()
            object.__setattr__(self, "others", others)

        def gather(self, value):
            return [value, self.others]

    assert on_all_ranks(rewards, Pair(None)) is rewards
    with pytest.raises(RewardsMissing, match="^rank 1: the labeler failed on CXR7$"):
        on_all_ranks(rewards, Pair(("the labeler failed on CXR7", False)))
    with pytest.raises(RewardsMissing, match="^rank 0: NaN\nrank 1: broken$") as stopped:
        on_all_ranks(NotFiniteError("NaN"), Pair(("broken", False)))
    assert not isinstance(stopped.value, RewardsNotFinite)
    with pytest.raises(
        RewardsNotFinite, match="^rank 1: NaN$"
    ):  # nothing but numbers that are not finite: the step can be skipped
        on_all_ranks(rewards, Pair(("NaN", True)))


def test_resampling_stops_where_a_reward_fails(lora_policy, studies, build, world, tmp_path, monkeypatch):
    """The failure of the first attempt is the step's; no group is sampled again on it."""
    recipe = recipe_of(world, tmp_path, "grpo.max_resample=3")
    prompts = build(lora_policy)(studies)
    monkeypatch.setattr(
        trainer, "resample_groups", lambda *arguments, **options: pytest.fail("sampled again without a reward")
    )

    class FakeRun:
        ranks, policy, directory = OneRank(), lora_policy, tmp_path
        rewards = SimpleNamespace(context_of=lambda study_ids, step: RewardContext())

    FakeRun.recipe = recipe
    rewards = InProcessRewards(RewardFunction(BrokenLabeler(), weights={"mccs": 1.0}, mode="plain"))
    loader = SimpleNamespace(batch=lambda step: prompts)
    with pytest.raises(RewardsMissing, match="the labeler's device is full"):
        trainer.grpo_step(
            0, run=FakeRun(), engine=PlainEngine(lora_policy), loader=loader, reward_service=rewards, clock=Clock()
        )


@each_family
def test_the_frozen_log_probs_are_made_while_the_labeler_works(
    lora_policy, studies, build, world, tmp_path, monkeypatch
):
    """The first half hands over reports whose rewards are on their way; the second asks for them once it must."""
    order = []

    class Service(InProcessRewards):
        def submit(self, *arguments):
            order.append("submit")
            return super().submit(*arguments)

        def result(self, ticket):
            order.append("result")
            return super().result(ticket)

    inner = trainer.frozen_logprobs

    def frozen(*arguments, **options):
        order.append("frozen")
        inner(*arguments, **options)

    monkeypatch.setattr(trainer, "frozen_logprobs", frozen)
    prompts = build(lora_policy)(studies)

    class FakeRun:
        ranks, policy, directory = OneRank(), lora_policy, tmp_path
        rewards = SimpleNamespace(context_of=lambda study_ids, step: RewardContext())

    FakeRun.recipe = recipe_of(world, tmp_path, "grpo.beta=0.1", "rollout.max_new_tokens=8")
    reward_service = Service(RewardFunction(KeywordLabeler(), weights={"format": 1.0}, mode="plain"))
    loader, run, clock = SimpleNamespace(batch=lambda step: prompts), FakeRun(), Clock()
    pending = trainer.sample_step(0, run=run, loader=loader, reward_service=reward_service, clock=clock)
    assert order == ["submit"] and pending.sampled.rewards is None
    metrics = trainer.update_step(0, pending, run=run, engine=PlainEngine(lora_policy), clock=clock)
    assert order == ["submit", "frozen", "result"] and pending.sampled.reference_logp is not None
    assert {"loss", "policy/kl", "reward/total", "time/update_tflops"} <= metrics.keys()
    assert pending.rewards() is pending.sampled.rewards and order.count("result") == 1  # a ticket is good once


@each_family
def test_groups_of_equal_rewards_are_sampled_again_and_the_last_rewards_count(
    lora_policy, studies, build, world, tmp_path
):
    """Study 1's rewards are equal at first and not after one more attempt, which is for that study alone."""
    prompts = build(lora_policy)(studies)
    varied = torch.arange(4.0).repeat(4, 1)
    equal = varied.clone()
    equal[1] = 0.5
    answers, submitted = [rewards_of(equal), rewards_of(varied)], []

    class Service:
        def hint(self, texts):
            pass

        def submit(self, texts, *rest):
            submitted.append([list(group) for group in texts])
            return len(submitted) - 1

        def result(self, ticket):
            return answers[ticket]

    class FakeRun:
        ranks, policy, directory = OneRank(), lora_policy, tmp_path
        rewards = SimpleNamespace(context_of=lambda study_ids, step: RewardContext())

    FakeRun.recipe = recipe_of(world, tmp_path, "grpo.max_resample=3", "rollout.max_new_tokens=8")
    loader, run, clock = SimpleNamespace(batch=lambda step: prompts), FakeRun(), Clock()
    pending = trainer.sample_step(5, run=run, loader=loader, reward_service=Service(), clock=clock)
    vision = lora_policy.encode_images(prompts)
    first, again = (
        rollout(lora_policy, prompts, vision, Sampling(4, 8, seed=0, step=5, attempt=attempt)) for attempt in (0, 1)
    )
    wanted = [first.texts[0], again.texts[1], first.texts[2], first.texts[3]]
    assert submitted == [first.texts, wanted] and pending.sampled.completions.texts == wanted
    assert trainer.take_rewards(5, pending, run=run, clock=clock) is answers[1]
