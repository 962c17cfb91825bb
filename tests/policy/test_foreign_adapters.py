"""Adapters that PEFT writes: merged as PEFT merges them, or refused by file and field wherever one is read."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.doctor import checks
from mrg_r1.policy.export.export import export
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import load_adapter, merge_adapter
from mrg_r1.policy.qwen_vl.checkpoint import LORA_TARGETS


def written(checkpoint, folder, config, *, source=None):
    """An adapter as PEFT saves it, far from its start; made on `source` where transformers cannot load `checkpoint`."""
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(source or checkpoint), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def lora(targets=LORA_TARGETS, **settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(20, 60)[None]).logits


HEAD = r".*lm_head|.*language_model.*\.q_proj"
EMBEDDING = r".*embed_tokens|.*language_model.*\.q_proj"


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("tied", lora()),
        ("tied", lora(use_rslora=True)),
        ("tied", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3, "k_proj": 16})),
        ("tied", lora(r".*visual.*\.qkv")),
        ("untied", lora(HEAD)),
    ],
    ids=["plain", "rslora", "patterns", "vision", "untied head"],
)
def test_what_is_merged_has_the_logits_of_pefts_own_merge(tiny_policy_directory, untied, tmp_path, head, config):
    checkpoint = tiny_policy_directory if head == "tied" else untied
    adapter = written(checkpoint, tmp_path / "adapter", config)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    wanted = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    policy = load_policy(checkpoint, dtype=torch.float32)
    merge_adapter(policy, adapter)
    torch.testing.assert_close(logits(policy.model), logits(wanted), atol=1e-5, rtol=0)
    found = policy.model.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.state_dict().items())


MORE_THAN_LORA = {
    "token rows": ("tied", lora(trainable_token_indices=[5, 7, 30]), "adapter_config.*trainable_token_indices"),
    "whole modules": ("tied", lora(modules_to_save=["merger"]), "adapter_config.*modules_to_save"),
    "whole head": ("untied", lora(modules_to_save=["lm_head"]), "adapter_config.*modules_to_save"),
    "tied head": ("tied", lora(HEAD), "adapter_model.*lm_head"),
    "tied embedding": ("tied", lora(EMBEDDING), "adapter_model.*embed_tokens"),
    "untied embedding": ("untied", lora(EMBEDDING), "adapter_model.*embed_tokens"),
    "DoRA": ("tied", lora(use_dora=True), "adapter_config.*use_dora"),
    "bias": ("tied", lora(bias="lora_only"), "adapter_config.*bias"),
    "LoRA's bias": ("tied", lora(lora_bias=True), "adapter_config.*lora_bias"),
    "PiSSA": ("tied", lora(init_lora_weights="pissa"), "adapter_config.*init_lora_weights"),
    "OLoRA": ("tied", lora(init_lora_weights="olora"), "adapter_config.*init_lora_weights"),
    "convolution": ("tied", lora(r".*patch_embed\.proj"), "adapter_model.*patch_embed"),
    "IA3": (
        "tied",
        IA3Config(target_modules=LORA_TARGETS, feedforward_modules=[], task_type="CAUSAL_LM"),
        "adapter_config.*IA3",
    ),
}


@pytest.mark.parametrize(("head", "config", "message"), MORE_THAN_LORA.values(), ids=MORE_THAN_LORA.keys())
def test_what_a_merge_would_pass_over_is_refused_by_all(
    world, tiny_policy_directory, untied, tmp_path, head, config, message
):
    checkpoint = tiny_policy_directory if head == "tied" else untied
    adapter = written(checkpoint, tmp_path / "run/adapter", config)
    for use in (merge_adapter, load_adapter):
        with pytest.raises(ValueError, match=message):
            use(load_policy(checkpoint, dtype=torch.float32), adapter)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", policy=checkpoint, cold_start=None, merged=tmp_path / "merged", adapter=None)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={checkpoint}", f"policy.adapter={adapter}"])
    with pytest.raises(RecipeError, match=f"policy.adapter .*{message}"):
        checks._policy(recipe)  # of doctor, and of a launch before it loads anything


def test_a_setting_that_this_peft_does_not_know_is_refused(tiny_policy_directory, tmp_path):
    adapter = written(tiny_policy_directory, tmp_path / "adapter", lora())
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"use_newlora": true,', 1))
    with pytest.raises(ValueError, match=r"adapter_config.*use_newlora"):
        merge_adapter(load_policy(tiny_policy_directory, dtype=torch.float32), adapter)
