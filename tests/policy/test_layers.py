"""Layers read as raw tensors: LoRA, merging, and weights that are never changed by it."""

from __future__ import annotations

import copy

import pytest
import torch

from mrg_r1 import products
from mrg_r1.policy.load import load_policy, save_policy
from mrg_r1.policy.lora import add_lora, reference
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import each_family


def qkv_modules(policy, layer=0):
    attention = policy.language_model.layers[layer].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


@pytest.mark.parametrize("worth", [1, 2**60])
@each_family
def test_projection_and_its_gradients_are_those_of_the_peft_modules(lora_policy, worth, monkeypatch):
    monkeypatch.setattr(products, "WORTH", worth)  # oneDNN's products, or torch's
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    modules = qkv_modules(lora_policy)
    trained = [module.get_parameter(f"lora_{half}.default.weight") for module in modules for half in "AB"]
    expected = torch.cat([module(x) for module in modules], dim=1)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *trained])
    found = lora_policy.read_language().layers[0].qkv(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found * weights).sum(), [x, *trained]), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@each_family
def test_merged_equals_unmerged_and_adapters_off_is_the_base(lora_policy, tiny_policy_directory):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        language = lora_policy.read_language()
        torch.testing.assert_close(
            language.merged().layers[1].gate_up(x), language.layers[1].gate_up(x), atol=1e-5, rtol=1e-5
        )
        with reference(lora_policy):
            off = lora_policy.read_language().layers[1].gate_up
        base = load_policy(tiny_policy_directory, dtype=torch.float32).read_language().layers[1].gate_up
        assert not off.adapters and torch.equal(off(x), base(x))
        assert (off(x) - language.layers[1].gate_up(x)).abs().max() > 1e-2


@each_family
def test_a_rollout_leaves_every_weight_bitwise_as_it_was(lora_policy, studies, build):
    before = {name: parameter.detach().clone() for name, parameter in lora_policy.named_parameters()}
    prompts = build(lora_policy)(studies)
    rollout(
        lora_policy,
        prompts,
        lora_policy.encode_images(prompts),
        Sampling(group_size=3, max_new_tokens=6, seed=0, step=0),
    )
    for name, parameter in lora_policy.named_parameters():
        assert torch.equal(parameter, before[name]), name


@each_family
def test_frozen_projections_are_held_once_and_the_policy_can_still_be_saved(policy, tiny_policy_directory, tmp_path):
    """One memory for q, k and v; the checkpoint written afterwards is the one that was read."""
    fused = policy.read_language().layers[0].qkv.weight
    assert policy.read_language().layers[0].qkv.weight.data_ptr() == fused.data_ptr(), (
        "moved once, not at every reading"
    )
    for module in qkv_modules(policy):
        assert module.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    save_policy(policy, tmp_path / "copy", source=tiny_policy_directory)
    again = load_policy(tmp_path / "copy", dtype=torch.float32)
    original = load_policy(tiny_policy_directory, dtype=torch.float32)
    for (name, mine), (_, theirs) in zip(again.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@each_family
def test_weights_that_an_optimizer_trains_stay_where_they_are(policy):
    policy.requires_grad_(True)
    places = [module.weight.data_ptr() for module in qkv_modules(policy)]
    policy.read_language()
    assert [module.weight.data_ptr() for module in qkv_modules(policy)] == places


@each_family
def test_weights_replaced_after_a_reading_are_read_anew(lora_policy):
    """A merge or a load puts new tensors into the modules: the fused matrix must not be the old one."""
    lora_policy.read_language()
    before, module, _ = (one.base_layer for one in qkv_modules(lora_policy))
    module.weight.data = module.weight.data * 2
    rows = lora_policy.read_language().layers[0].qkv.weight[before.out_features :][: module.out_features]
    assert torch.equal(rows, module.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_computed_in_the_models_precision(tiny_policy_directory, dtype):
    policy = load_policy(tiny_policy_directory, dtype=dtype)
    add_lora(policy, rank=4, alpha=8, seed=0)
    language = policy.read_language()
    assert {tensor.dtype for adapter in language.layers[0].qkv.adapters for tensor in (adapter.a, adapter.b)} == {dtype}
    assert language.layers[0].qkv(torch.zeros(2, 64, dtype=dtype)).dtype == dtype


def test_several_active_adapters_add_up(lora_policy):
    """A second frozen adapter beside the trained one: what PEFT sums, the raw reading sums."""
    model = lora_policy.model
    model.add_adapter("cold", copy.deepcopy(model.peft_config["default"]))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".cold." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "cold"])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([module(x) for module in qkv_modules(lora_policy)], dim=1)
    projection = lora_policy.read_language().layers[0].qkv
    assert len(projection.adapters) == 6
    torch.testing.assert_close(projection(x), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_not_active_takes_no_part(lora_policy):
    model = lora_policy.model
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert len(lora_policy.read_language().layers[0].qkv.adapters) == 3
    model.base_model.set_adapter("other")
    (first, *_) = lora_policy.read_language().layers[0].qkv.adapters
    assert first.a is qkv_modules(lora_policy)[0].lora_A["other"].weight
