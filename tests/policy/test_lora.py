"""Adapters that are read back: whole, or not at all."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import load_adapter, merge_adapter, save_adapter
from tests.conftest import each_family, with_lora


@pytest.fixture
def saved(policy, tmp_path):
    save_adapter(with_lora(policy), tmp_path / "adapter")
    return tmp_path / "adapter"


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


@each_family
def test_a_merged_cold_start_changes_the_weights_it_names_and_the_callers_seeds_stay(saved, tiny_policy_directory):
    policy = load_policy(tiny_policy_directory, dtype=torch.float32)
    before, state = weights(policy), torch.get_rng_state()
    merge_adapter(policy, saved)
    after = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = len(policy.language_model.layers)
    assert len(changed) == layers * 7 and all("language_model.layers" in name for name in changed)
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in policy.parameters())


@each_family
def test_a_cold_start_that_reaches_into_the_vision_tower_is_merged_there_too(tiny_policy_directory, tmp_path):
    policy = load_policy(tiny_policy_directory, dtype=torch.float32)
    targets = r".*visual.*\.qkv|.*vision_tower.*\.q_proj"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    policy.model = get_peft_model(policy.model, config, autocast_adapter_dtype=False)
    save_adapter(policy, tmp_path / "vision")
    fresh = load_policy(tiny_policy_directory, dtype=torch.float32)
    before = weights(fresh)
    merge_adapter(fresh, tmp_path / "vision")
    after = weights(fresh)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3 and all(re.fullmatch(rf"({targets})\.weight", name) for name in changed)
    assert before.keys() == after.keys()


@each_family
@pytest.mark.parametrize("use", [merge_adapter, load_adapter])
@pytest.mark.parametrize("fault", ["renamed", "missing"])
def test_an_adapter_that_would_change_nothing_or_half_is_refused(saved, tiny_policy_directory, use, fault):
    """PEFT alone warns and goes on: a run would train without its cold start."""
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    if fault == "renamed":
        tensors = {name.replace(".language_model.", "."): tensor for name, tensor in tensors.items()}
    else:
        tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="adapter.*missing"):
        use(load_policy(tiny_policy_directory, dtype=torch.float32), saved)
