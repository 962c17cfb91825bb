"""LoRA on merger and tower: which layers, and gradients, updates and reference against transformers' own modules."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from mrg_r1.config.recipe import load_recipe
from mrg_r1.policy.families.qwen2_5_vl import vision as first_tower
from mrg_r1.policy.families.qwen3_vl import vision as second_tower
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.lora import add_lora, load_adapter, merge_adapter, save_adapter
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training.grpo import frozen_logprobs
from mrg_r1.training.update import update
from mrg_r1.types import Experience, Sampled
from tests.conftest import OneRank, each_qwen, with_lora
from tests.policy.test_logprobs_trained import modules_features
from tests.training.test_grpo import PlainEngine, rewards_of

BEYOND = ["language+merger", "all"]
DECODER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
DECODER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MERGER = {
    "qwen2_5_vl": ["merger.mlp.0", "merger.mlp.2"],
    "qwen3_vl": [
        *("merger.linear_fc1", "merger.linear_fc2"),
        *("deepstack_merger_list.0.linear_fc1", "deepstack_merger_list.0.linear_fc2"),
        *("deepstack_merger_list.1.linear_fc1", "deepstack_merger_list.1.linear_fc2"),
    ],
}
BLOCK = {
    "qwen2_5_vl": ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen3_vl": ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"],
}


@each_qwen
@pytest.mark.parametrize("targets", ["language", *BEYOND])
def test_lora_is_on_these_layers_and_no_other(policy, targets):
    add_lora(policy, rank=2, alpha=4, seed=0, targets=targets)
    visual, family = policy.base.model.visual, policy.base.config.model_type
    wanted = [f"language_model.layers.{n}.{name}" for n in range(len(policy.language_model.layers)) for name in DECODER]
    if targets != "language":
        wanted += [f"visual.{name}" for name in MERGER[family]]
    if targets == "all":
        wanted += [f"visual.blocks.{n}.{name}" for n in range(len(visual.blocks)) for name in BLOCK[family]]
    trained = {name for name, one in policy.named_parameters() if one.requires_grad}
    assert trained == {
        f"model.base_model.model.model.{name}.lora_{half}.default.weight" for name in wanted for half in "AB"
    }


def test_targets_that_a_family_lacks_are_named(tiny_policies):
    policy = load_policy(tiny_policies("gemma3"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"policy.lora.targets all: .* LoRA on language only"):
        add_lora(policy, rank=2, alpha=4, seed=0, targets="all")


@pytest.fixture
def sampled(policy, studies, build):
    """Prompts, features and completions; `policy` has no LoRA yet."""

    def make(targets):
        with_lora(policy, targets=targets)
        prompts = build(policy)(studies)
        with torch.no_grad():
            vision = policy.encode_images(prompts)
        return (
            prompts,
            vision,
            rollout(policy, prompts, vision, Sampling(group_size=4, max_new_tokens=8, seed=0, step=0)),
        )

    return make


def recipe_of(world, tmp_path, *overrides):
    return load_recipe(
        world.recipe(tmp_path / "run"), ["grpo.group_size=4", "grpo.beta=0.1", "grpo.aggregation=dapo", *overrides]
    )


class RecordingEngine(PlainEngine):
    """Keeps the gradient of each optimizer step, by name."""

    def __init__(self, policy, rate):
        super().__init__(policy, rate)
        self.gradients = []

    def backward(self, loss, *, last):
        if last:
            loss.backward()
            named = self.policy.named_parameters()
            self.gradients.append({name: one.grad.clone() for name, one in named if one.requires_grad})
            loss = torch.zeros((), requires_grad=True)
        super().backward(loss, last=last)


def by_modules(policy, experience, recipe, rate):
    """The gradients of what `update` does with plain SGD, by transformers' modules and PEFT's, features made anew for
    each minibatch.
    """
    done, minibatches = experience.completions, recipe.grpo.minibatches
    length = done.token_ids.shape[2]
    ids, mask, old, ref = (
        tensor.view(-1, length)
        for tensor in (done.token_ids, done.mask, experience.old_logp, experience.reference_logp)
    )
    advantages, study_of_row = experience.advantages.view(-1, 1), torch.arange(4).repeat_interleave(4)
    trained, found = {name: one for name, one in policy.named_parameters() if one.requires_grad}, []
    for first in range(minibatches):
        rows = torch.arange(16)[first::minibatches]
        features = modules_features(policy, experience.prompts)
        logp, _ = completion_logprobs_plain(
            policy, experience.prompts, features, ids[rows], mask[rows], study_of_row[rows]
        )
        ratio, gap = (logp - old[rows]).exp(), ref[rows] - logp
        clipped = ratio.clamp(1 - recipe.grpo.clip_low, 1 + recipe.grpo.clip_high)
        gain = torch.min(ratio * advantages[rows], clipped * advantages[rows])
        loss = ((gap.exp() - gap - 1) * recipe.grpo.beta - gain)[mask[rows]].mean()
        found.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
        for name, one in trained.items():
            one.data -= rate * found[-1][name]
    return found


def assert_same(found, wanted):
    """Gradients by name, each and all together; 5e-7 is rounding of sums in float32."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 1e-4 and (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 5e-7, name
    together, all_wanted = (torch.cat([one[name].flatten() for name in wanted]) for one in (found, wanted))
    assert (together - all_wanted).norm() <= 1e-5 * all_wanted.norm()


@each_qwen
@pytest.mark.parametrize("targets", BEYOND)
@pytest.mark.parametrize("minibatches,budget,recompute", [(1, 60, False), (2, 4096, False), (1, 4096, True)])
def test_an_update_is_that_of_transformers_modules(
    policy, sampled, world, tmp_path, targets, minibatches, budget, recompute
):
    """Of two minibatches the second sees with the weights that the first has moved."""
    prompts, vision, done = sampled(targets)
    generator = torch.Generator().manual_seed(0)
    old, ref = (done.logp + 0.1 * torch.randn(done.logp.shape, generator=generator) * done.mask for _ in range(2))
    advantages = torch.randn(4, 4, generator=generator)
    experience = Experience(prompts, vision, done, rewards_of(torch.zeros(4, 4)), advantages, ref, old)
    settings = [f"grpo.minibatches={minibatches}", f"engine.micro_batch_tokens={budget}"]
    recipe, start = recipe_of(world, tmp_path, *settings), deepcopy(policy.state_dict())
    wanted = by_modules(policy, experience, recipe, rate=0.1)
    policy.load_state_dict(start)
    if recompute:
        policy.checkpoint_gradients()
    engine = RecordingEngine(policy, rate=0.1)
    update(experience, recipe=recipe, engine=engine, ranks=OneRank())
    for mine, theirs in zip(engine.gradients, wanted, strict=True):
        assert_same(mine, theirs)


@each_qwen
@pytest.mark.parametrize("targets", BEYOND)
def test_gradients_of_sft_are_those_of_transformers_modules(policy, studies, build, targets):
    with_lora(policy, targets=targets)
    prompts = build(policy)(studies)
    ids = torch.randint(20, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    mask, own = torch.arange(9) < torch.tensor([[9], [4], [1], [6]]), torch.arange(4)
    trained = {name: one for name, one in policy.named_parameters() if one.requires_grad}
    logp, _ = policy(prompts, policy.encode_images(prompts), ids, mask, own)
    theirs, _ = completion_logprobs_plain(policy, prompts, modules_features(policy, prompts), ids, mask, own)
    torch.testing.assert_close(logp, theirs, atol=1e-5, rtol=0)
    found, wanted = (
        dict(zip(trained, torch.autograd.grad(-one.sum() / mask.sum(), list(trained.values())), strict=True))
        for one in (logp, theirs)
    )
    assert_same(found, wanted)


@each_qwen
@pytest.mark.parametrize("targets", ["language", *BEYOND])
def test_the_reference_is_the_base_model_whatever_was_learned(
    policy, sampled, tiny_policy_directory, world, tmp_path, targets
):
    """Features of the rollout are the policy's: the reference has its own."""
    prompts, vision, done = sampled(targets)
    step = Sampled(prompts, done)
    run = SimpleNamespace(policy=policy, recipe=recipe_of(world, tmp_path))
    frozen_logprobs(step, vision, run=run, clock=Clock())
    base = load_policy(tiny_policy_directory, dtype=torch.float32)
    seen = base.encode_images(prompts)
    assert torch.equal(step.reference_logp, group_logprobs(base, prompts, seen, done, token_budget=96))
    moved = [not torch.equal(one, other) for one, other in zip(vision.per_study, seen.per_study, strict=True)]
    assert all(moved) if targets != "language" else not any(moved)


@each_qwen
@pytest.mark.parametrize("targets,runs", [("language", 1), ("language+merger", 1), ("all", 3)])
def test_the_tower_runs_once_a_step_unless_it_is_trained(policy, sampled, world, tmp_path, monkeypatch, targets, runs):
    """For rollout, reference and an update of one pass."""
    calls = []
    for module in (first_tower, second_tower):
        inner = module.run_tower
        monkeypatch.setattr(
            module, "run_tower", lambda *given, inner=inner, **more: calls.append(1) or inner(*given, **more)
        )
    prompts, vision, done = sampled(targets)
    step, recipe = Sampled(prompts, done), recipe_of(world, tmp_path, "engine.micro_batch_tokens=4096")
    frozen_logprobs(step, vision, run=SimpleNamespace(policy=policy, recipe=recipe), clock=Clock())
    rewards = rewards_of(torch.zeros(4, 4))
    experience = Experience(prompts, vision, done, rewards, torch.randn(4, 4), step.reference_logp, None)
    update(experience, recipe=recipe, engine=PlainEngine(policy), ranks=OneRank())
    assert len(calls) == runs


@each_qwen
@pytest.mark.parametrize("targets", BEYOND)
def test_an_adapter_is_loaded_and_merged_as_it_was_saved(
    policy, studies, build, tiny_policy_directory, tmp_path, targets
):
    with_lora(policy, targets=targets)
    prompts = build(policy)(studies)
    save_adapter(policy, tmp_path / "adapter")
    with torch.no_grad():
        wanted = policy.encode_images(prompts).per_study
    for use, exact in ((load_adapter, True), (merge_adapter, False)):
        fresh = load_policy(tiny_policy_directory, dtype=torch.float32)
        use(fresh, tmp_path / "adapter")
        for mine, other in zip(fresh.encode_images(prompts).per_study, wanted, strict=True):
            torch.testing.assert_close(mine, other, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-5)
            assert not mine.requires_grad
