"""The operations counted for an update, against those that torch dispatches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrg_r1.config.recipe import load_recipe
from mrg_r1.grpo.advantages import group_advantages
from mrg_r1.policy.shape import PolicyShape, VisionShape
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.training.update import tokens_of, update
from mrg_r1.training.utilisation import Tokens, update_flops, utilisation
from mrg_r1.types import Experience
from tests.conftest import OneRank, each_family
from tests.training.test_grpo import PlainEngine, rewards_of


class Products(TorchDispatchMode):
    """Operations of all products of two matrices inside."""

    def __init__(self):
        super().__init__()
        self.flops = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        pair = {"aten::mm": args[:2], "aten::addmm": args[1:3], "aten::bmm": args[:2]}.get(name)
        out = func(*args, **(kwargs or {}))
        if pair is not None:
            self.flops[name] = self.flops.get(name, 0) + 2 * pair[0].numel() * pair[1].shape[-1]
        return out


def products_of(run):
    """Operations of the products of two matrices in `run()`; batched ones are attention's."""
    with Products() as counter:
        run()
    return counter.flops.get("aten::mm", 0) + counter.flops.get("aten::addmm", 0)


def counted(policy, tokens, *, lora, frozen):
    shape = policy.shape
    return update_flops(
        shape.layers * shape.layer_matrices, lora, shape.vocabulary * shape.hidden, tokens, frozen=frozen
    )


@each_family
@pytest.mark.parametrize("prefilled", [False, True])
def test_operations_of_an_update_of_lora_are_those_that_torch_dispatches(
    lora_policy, studies, build, world, tmp_path, prefilled
):
    """But for three things: the gradient of the first layer's input, which nothing asks for, what the last layer makes
    of prompts beyond their keys and values, and LoRA's forward products, which in float32 are part of the layers' own.
    """
    changed = ["grpo.group_size=4", "engine.micro_batch_tokens=100000", "grpo.beta=0"]
    recipe = load_recipe(world.recipe(tmp_path / "run"), changed)
    prompts = build(lora_policy)(studies)
    vision = lora_policy.encode_images(prompts)
    done = rollout(lora_policy, prompts, vision, Sampling(group_size=4, max_new_tokens=8, seed=0, step=0))
    total = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    shape = lora_policy.shape
    found, formula, tokens = [], [], []
    for length in (4, 8):
        cut = {name: getattr(done, name)[..., :length] for name in ("token_ids", "mask", "logp")}
        experience = Experience(
            prompts, vision, replace(done, **cut), rewards_of(total), group_advantages(total), None, None
        )
        states = lora_policy.prompt_cache(prompts, vision) if prefilled else None
        engine = PlainEngine(lora_policy)
        found.append(
            products_of(partial(update, experience, recipe=recipe, engine=engine, ranks=OneRank(), states=states))
        )
        tokens.append(tokens_of(experience, recipe, prefilled=prefilled))
        formula.append(counted(lora_policy, tokens[-1], lora=shape.lora_parameters(4), frozen=True))
    first = 2 * shape.hidden * (shape.qkv_rows + 3 * 4)  # of a token
    more = tokens[1].completions - tokens[0].completions
    merged = 2 * shape.lora_parameters(4)  # of a token that goes forward
    assert formula[1] - formula[0] - (first + merged) * more <= found[1] - found[0]
    assert found[1] - found[0] <= formula[1] - formula[0] - merged * more
    last = (2 if prefilled else 4) * shape.layer_matrices * tokens[1].prompts
    least = formula[1] - first * (tokens[1].prompts + tokens[1].completions) - 1.1 * last
    assert least - merged * (tokens[1].prompts_forward + tokens[1].completions) <= found[1] <= formula[1]


@each_family
def test_operations_of_training_everything_are_those_that_torch_dispatches(policy, studies, build):
    """Of the language model: features of images come without a graph here."""
    prompts = build(policy)(studies)
    with torch.no_grad():
        vision = policy.encode_images(prompts)
    policy.requires_grad_(True)
    word = policy.tokenizer("heart", add_special_tokens=False)["input_ids"][-1]
    found, formula = [], []

    def learn(ids):
        logp, _ = policy(prompts, vision, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4))
        logp.sum().backward()

    for length in (4, 8):
        found.append(products_of(partial(learn, torch.full((4, length), word))))
        read = sum(prompts.lengths)
        formula.append(counted(policy, Tokens(read, read, 4 * (length - 1), 4 * length), lora=0, frozen=False))
    assert found[1] - found[0] == pytest.approx(formula[1] - formula[0], rel=0.01)
    layer = policy.shape.layer_matrices
    assert 0.99 * formula[1] - 6 * layer * read <= found[1] <= 1.01 * formula[1]


SHAPE = PolicyShape(
    hidden=4, layers=2, heads=2, key_heads=1, head_size=2, intermediate=8, vocabulary=10, tied=True, layer_vectors=0,
    vision=VisionShape(*[0] * 10),
)  # fmt: skip


def test_seconds_become_a_rate_and_on_a_known_card_in_bfloat16_a_share(monkeypatch):
    tokens = Tokens(prompts=30, prompts_forward=10, completions=5, scored=7)
    layers, head = 2 * (4 * 8 + 4 * 4 + 3 * 4 * 8), 40
    assert SHAPE.layers * SHAPE.layer_matrices == layers
    lora = SHAPE.lora_parameters(3)
    flops = 2 * layers * (15 + 35) + 2 * lora * (15 + 2 * 35) + 4 * head * 7

    def of(dtype):
        found = utilisation(SHAPE, tokens, lora_rank=3, seconds=2.0, dtype=dtype)
        return {name: float(total / count) for name, (total, count) in found.items() if count}

    assert of(torch.bfloat16) == {"time/update_tflops": pytest.approx(flops / 2e12)}  # no card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert of(torch.bfloat16)["time/update_mfu"] == pytest.approx(flops / 2 / 989e12)
    assert "time/update_mfu" not in of(torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert "time/update_mfu" not in of(torch.bfloat16)


def test_minibatches_go_through_their_prompts_again_and_reports_once(lora_policy, studies, build, world, tmp_path):
    prompts = build(lora_policy)(studies)
    vision = lora_policy.encode_images(prompts)
    done = rollout(lora_policy, prompts, vision, Sampling(group_size=4, max_new_tokens=8, seed=0, step=0))
    total = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    experience = Experience(prompts, vision, done, rewards_of(total), group_advantages(total), None, None)
    changed = ["grpo.group_size=4", "grpo.minibatches=2", "grpo.inner_iterations=3"]
    counts = tokens_of(experience, load_recipe(world.recipe(tmp_path / "run"), changed), prefilled=False)
    read, scored = sum(prompts.lengths), int(done.mask.sum())
    assert counts == Tokens(6 * read, 6 * read, 3 * (scored - 16), 3 * scored)
