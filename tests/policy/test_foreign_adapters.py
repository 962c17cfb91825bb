"""Adapters that PEFT writes: merged as PEFT merges them, or refused by file and field wherever one is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import EvaConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.doctor import checks
from mrg_r1.policy.export.export import export
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import load_adapter, merge_adapter
from mrg_r1.policy.qwen_vl.checkpoint import LORA_TARGETS
from tests.conftest import each_family_once, each_family_slowly


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


@each_family_once(
    "head,config",
    [
        ("tied", lora(r".*visual.*\.qkv|.*vision_tower.*\.q_proj")),
        ("tied", lora()),
        ("tied", lora(use_rslora=True)),
        ("tied", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3, "k_proj": 16})),
        ("untied", lora(HEAD)),
        (
            "tied",
            lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={r"^model.language_model.layers.0.mlp": 3}),
        ),
        ("tied", lora(init_lora_weights="orthogonal", lora_alpha=8.5)),
        ("tied", lora(init_lora_weights="eva", eva_config=EvaConfig(), lora_dropout=0.2)),
        ("tied", lora(["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers", task_type=None)),
        ("tied", lora(["q_proj", "qkv"], exclude_modules=r".*layers\.0\..*")),
    ],
    ids=[
        *("vision", "plain", "rslora", "patterns", "untied head", "rslora and patterns", "orthogonal", "EVA"),
        *("one layer", "some excluded"),
    ],
)
def test_what_is_merged_has_the_logits_of_pefts_own_merge(tiny_policy_directory, untied, tmp_path, head, config):
    checkpoint = tiny_policy_directory if head == "tied" else untied
    adapter = written(checkpoint, tmp_path / "adapter", config)
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
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
    "Megatron's layers": ("tied", lora(), "adapter_config.*megatron_config", {"megatron_config": {"a": 1}}),
    "CorDA": ("tied", lora(), "adapter_config.*init_lora_weights", {"init_lora_weights": "corda"}),
    "LoftQ": ("tied", lora(), "adapter_config.*init_lora_weights", {"init_lora_weights": "loftq"}),
    "rows of a matrix": ("tied", lora(), "adapter_config.*target_parameters", {"target_parameters": ["weight"]}),
    "repeated layers": ("tied", lora(), "adapter_config.*layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    "turned matrices": ("tied", lora(), "adapter_config.*fan_in_fan_out", {"fan_in_fan_out": True}),
    "both ends of a tied weight": (
        "tied",
        lora(EMBEDDING, ensure_weight_tying=True),
        "adapter_model.*embed_tokens",
    ),
    "convolution": ("tied", lora(r".*patch_embed(ding|\.proj)"), "adapter_model.*patch_embed"),
    "IA3": (
        "tied",
        IA3Config(target_modules=LORA_TARGETS, feedforward_modules=[], task_type="CAUSAL_LM"),
        "adapter_config.*IA3",
    ),
}


def refused_by_all(world, checkpoint, tmp_path, message):
    """RUN/adapter by training, evaluation, export and doctor alike."""
    adapter = tmp_path / "run/adapter"
    for use in (merge_adapter, load_adapter):
        with pytest.raises(ValueError, match=message):
            use(load_policy(checkpoint, dtype=torch.float32), adapter)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", policy=checkpoint, cold_start=None, merged=tmp_path / "merged", adapter=None, card=str)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={checkpoint}", f"policy.adapter={adapter}"])
    with pytest.raises(RecipeError, match=f"policy.adapter .*{message}"):
        checks._policy(recipe)  # of doctor, and of a launch before it loads anything


def state(adapter, **settings):
    """Settings in the adapter's configuration; None takes one out."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("case", MORE_THAN_LORA.values(), ids=MORE_THAN_LORA.keys())
@each_family_slowly
def test_what_a_merge_would_pass_over_is_refused_by_all(world, tiny_policy_directory, untied, tmp_path, case):
    head, config, message, *settings = case
    checkpoint = tiny_policy_directory if head == "tied" else untied
    written(checkpoint, tmp_path / "run/adapter", config)
    state(tmp_path / "run/adapter", **(settings[0] if settings else {}))
    refused_by_all(world, checkpoint, tmp_path, message)


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
MORE_TARGETS = LORA_TARGETS + r"|.*visual.*\.qkv|.*vision_tower.*\.q_proj"
TWO_ADAPTERS = {
    "another rank": ({"r": 8}, None, r"adapter_config.*rank 8, in adapter_model.safetensors it has 4"),
    "another rank of one": ({"rank_pattern": {"q_proj": 2}}, None, r"adapter_config.*q_proj rank 2"),
    "fewer modules": ({"target_modules": r".*language_model.*\.q_proj"}, None, r"adapter_model.*LoRA of .* puts none"),
    "more modules": ({"target_modules": MORE_TARGETS}, None, r"adapter_model.*vis(ual|ion_tower)\..* is missing"),
    "no modules": ({"target_modules": ["nothing"]}, None, "adapter_config.*nothing"),
    "no pattern": ({"target_modules": "("}, None, "adapter_config.*PEFT cannot put it"),
    "no pattern of ranks": ({"rank_pattern": {"(": 2}}, None, r"adapter_config.*rank_pattern names '\('"),
    "a rank in words": ({"r": "4"}, None, "adapter_config.*r is '4'"),
    "an alpha of nothing": ({"lora_alpha": 0}, None, "adapter_config.*lora_alpha is 0"),
    "an alpha in words": ({"alpha_pattern": {"q_proj": "8"}}, None, "adapter_config.*alpha_pattern.q_proj is '8'"),
    "a module less": ({}, lambda t: [t.pop(Q.format(half)) for half in "AB"], "adapter_model.*q_proj is missing"),
    "half a module": ({}, lambda t: t.pop(Q.format("A")), "adapter_model.*q_proj has only lora_B"),
    "another width": ({}, lambda t: t.update({Q.format("A"): torch.ones(4, 63)}), r"adapter_model.*q_proj.*63\]"),
    "whole numbers": ({}, lambda t: t.update({Q.format("A"): torch.ones(4, 64).char()}), "adapter_model.*torch.int8"),
    "not finite": ({}, lambda t: t[Q.format("B")].fill_(torch.inf), "adapter_model.*q_proj is not finite"),
}


@each_family_slowly
@pytest.mark.parametrize(("settings", "change", "message"), TWO_ADAPTERS.values(), ids=TWO_ADAPTERS.keys())
def test_files_that_do_not_make_one_adapter_are_refused_by_all(
    world, tiny_policy_directory, tmp_path, settings, change, message
):
    adapter = written(tiny_policy_directory, tmp_path / "run/adapter", lora())
    state(adapter, **settings)
    if change is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
    refused_by_all(world, tiny_policy_directory, tmp_path, message)


def test_a_head_that_the_checkpoint_ties_in_its_text_config_alone_is_tied(world, tiny_policy_directory, tmp_path):
    checkpoint = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text()) | {"tie_word_embeddings": False}
    config["text_config"]["tie_word_embeddings"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    written(checkpoint, tmp_path / "run/adapter", lora(HEAD))
    refused_by_all(world, checkpoint, tmp_path, "adapter_model.*lm_head")


def test_a_setting_that_this_peft_does_not_know_is_refused(tiny_policy_directory, tmp_path):
    adapter = written(tiny_policy_directory, tmp_path / "adapter", lora())
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"use_newlora": true,', 1))
    with pytest.raises(ValueError, match=r"adapter_config.*use_newlora"):
        merge_adapter(load_policy(tiny_policy_directory, dtype=torch.float32), adapter)
