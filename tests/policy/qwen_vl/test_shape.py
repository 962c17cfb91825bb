"""What a config.json asks of Qwen2.5-VL's and Qwen3-VL's passes: what they do not compute is refused by name wherever
a checkpoint is read, what they do compute is as transformers' modules have it, and what is published is taken.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrg_r1.config.recipe import load_recipe
from mrg_r1.doctor import checks
from mrg_r1.policy.completeness import empty_model
from mrg_r1.policy.family import family_of, load_config, shape_of
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.training import rehearse
from tests.conftest import QWEN
from tests.policy.families.gemma3.test_gemma3 import text, tower

BOTH, OLD, NEW = QWEN, ["qwen2_5_vl"], ["qwen3_vl"]


def rope(**settings):
    """Of the rotation, beside what the checkpoint says of its axes."""

    def change(config):
        stated = config["text_config"]["rope_parameters"]
        return text(rope_parameters=stated | settings)(config)

    return change


def old_rope(**settings):
    """As files had it before transformers 5."""

    def change(config):
        stated = config["text_config"]["rope_parameters"]
        scaling = {"mrope_section": stated["mrope_section"], **settings}
        return text(rope_scaling=scaling, rope_parameters=None, rope_theta=stated["rope_theta"])(config)

    return change


def long_rope(config):
    factors = [1.5] * sum(config["text_config"]["rope_parameters"]["mrope_section"])
    change = rope(
        rope_type="longrope", short_factor=factors, long_factor=factors, original_max_position_embeddings=64, factor=4.0
    )
    return change(config)


def by_turns(config):
    return rope(mrope_interleaved=config["model_type"] == "qwen2_5_vl")(config)


def last_layer(kind):
    return lambda c: text(layer_types=["full_attention"] * (c["text_config"]["num_hidden_layers"] - 1) + [kind])(c)


YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
REFUSED = {
    "windows": (BOTH, text(use_sliding_window=True, sliding_window=8, max_window_layers=1), "use_sliding_window"),
    "a layer with a window": (BOTH, last_layer("sliding_attention"), "layer of type sliding_attention"),
    "yarn": (BOTH, rope(rope_type="yarn", **YARN), "positions of type yarn"),
    "an older file's yarn": (BOTH, old_rope(type="yarn", **YARN), "positions of type yarn"),
    "longrope": (BOTH, long_rope, "positions of type longrope"),
    "dynamic": (BOTH, rope(rope_type="dynamic", factor=2.0), "positions of type dynamic"),
    "half a head rotated": (BOTH, rope(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "axes the other way": (BOTH, by_turns, "mrope_interleaved"),
    "two axes": (BOTH, rope(mrope_section=[4, 4]), r"mrope_section \[4, 4\]"),
    "activation": (BOTH, text(hidden_act="gelu"), "hidden_act gelu"),
    "no activation": (BOTH, text(hidden_act="none of them"), "hidden_act none of them"),
    "keys": (BOTH, text(num_key_value_heads=3), "num_attention_heads 4 and num_key_value_heads 3"),
    "no keys": (BOTH, text(num_key_value_heads=0), "num_key_value_heads 0"),
    # the same tensors, and half the size of a head
    "heads doubled": (OLD, text(num_attention_heads=8, num_key_value_heads=4), r"mrope_section \[2, 3, 3\].* up to 4,"),
    "heads halved in size": (
        NEW,
        text(num_attention_heads=8, num_key_value_heads=4, head_dim=12),
        r"mrope_section \[6, 3, 3\].* up to 6,",
    ),
    "no heads": (OLD, text(num_attention_heads=0), "hidden_size 64, num_attention_heads 0 "),
    "heads of the width": (OLD, text(num_attention_heads=5), "hidden_size 64, num_attention_heads 5 "),
    "a head of another size": (OLD, text(head_dim=32), "num_attention_heads 4 and head_dim 32"),
    "the tower's heads": (OLD, tower(num_heads=3), "vision_config of hidden_size 64 and num_heads 3"),
    "its heads, of Qwen3": (NEW, tower(num_heads=3), "vision_config of hidden_size 32 and num_heads 3"),
    "heads of two numbers": (NEW, tower(num_heads=16), "vision_config of hidden_size 32 and num_heads 16"),
    "the tower's activation": (OLD, tower(hidden_act="gelu"), "vision_config of hidden_act gelu"),
    "the tower's rotation": (
        OLD,
        tower(rope_parameters={"rope_type": "axial", "rope_theta": 5000.0}),
        "vision_config of rope_theta 5000",
    ),
}


def of_families(table, outcome):
    return pytest.mark.parametrize(
        ("tiny_policy_directory", "change", outcome),
        [
            pytest.param(family, change, value, id=f"{family}-{name}")
            for name, (families, change, value) in table.items()
            for family in families
        ],
        indirect=["tiny_policy_directory"],
    )


def rewritten(source, folder, change):
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return folder


@of_families(REFUSED, "message")
def test_what_is_not_computed_is_refused_wherever_a_checkpoint_is_read(
    world, tiny_policy_directory, tmp_path, change, message
):
    folder = rewritten(tiny_policy_directory, tmp_path / "policy", change)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}"])
    readers = {
        "train, sft, evaluate, report": lambda: load_policy(folder, dtype=torch.float32),
        "export": lambda: empty_model(folder),
        "memory": lambda: shape_of(folder),
        "doctor, and a launch before it loads": lambda: checks._policy(recipe),
        "rehearse": lambda: rehearse._require_readable(recipe),
    }
    for read in readers.values():
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert f"{folder}: config.json has" in str(caught.value)


LLAMA_3 = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
COMPUTED = {
    "linear": (BOTH, rope(rope_type="linear", factor=3.0), True),
    "llama3": (BOTH, rope(rope_type="llama3", **LLAMA_3), True),
    "biases": (NEW, text(attention_bias=True), True),
    "an older file's name": (OLD, old_rope(type="mrope"), False),
    "an older file's names": (BOTH, old_rope(type="default", rope_type="default"), False),
    "windows that are off": (
        BOTH,
        text(use_sliding_window=False, sliding_window=32, max_window_layers=1),
        False,
    ),
}


@of_families(COMPUTED, "matters")
def test_what_is_computed_is_as_the_modules_have_it(
    policy, tiny_policy_directory, studies, build, tmp_path, change, matters
):
    """And says something else than the checkpoint without the change, where that `matters`."""
    folder = rewritten(tiny_policy_directory, tmp_path / "policy", change)
    if json.loads((folder / "config.json").read_text())["text_config"].get("attention_bias"):
        add_biases(folder / "model.safetensors")
    found = load_policy(folder, dtype=torch.float32)
    prompts = build(found)(studies)
    ids = torch.randint(20, 300, (4, 7), generator=torch.Generator().manual_seed(0))
    arguments = (ids, torch.ones_like(ids).bool(), torch.arange(4))
    with torch.no_grad():
        logp, _ = completion_logprobs(found, prompts, found.encode_images(prompts), *arguments)
        plain, _ = completion_logprobs_plain(found, prompts, found.encode_images(prompts), *arguments)
        before, _ = completion_logprobs(policy, prompts, policy.encode_images(prompts), *arguments)
    torch.testing.assert_close(logp, plain, atol=1e-5, rtol=0)
    assert ((logp - before).abs().max() > 1e-3) == matters


def add_biases(file):
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name, weight in list(tensors.items()):
        if "language_model" in name and "_proj.weight" in name and "self_attn" in name:
            tensors[name.replace("weight", "bias")] = torch.randn(len(weight), generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


def test_axes_that_are_left_out_are_the_published_ones(tiny_policies, tmp_path):
    def wide(config):
        theta = {"rope_type": "default", "rope_theta": 1e6}
        return tower(out_hidden_size=512)(text(hidden_size=512, rope_parameters=theta)(config))

    folder = rewritten(tiny_policies("qwen2_5_vl"), tmp_path / "policy", wide)
    axes = family_of(folder).rotation(empty_model(folder)).axis_of_frequency
    assert axes.bincount().tolist() == [16, 24, 24]


# config.json as published, but for what no model reads
QWEN2_5_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN3_VL_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
THREE_B = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
THREE_B |= {"max_window_layers": 70, "num_hidden_layers": 36, "tie_word_embeddings": True, "vocab_size": 151936}
PUBLISHED = {
    "3B": QWEN2_5_VL_7B | THREE_B | {"vision_config": QWEN2_5_VL_7B["vision_config"] | {"out_hidden_size": 2048}},
    "7B": QWEN2_5_VL_7B,
    "32B": QWEN2_5_VL_7B
    | {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "max_window_layers": 64}
    | {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}},
    "72B": QWEN2_5_VL_7B | {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8},
    "Qwen3 2B": QWEN3_VL_8B
    | {"text_config": QWEN3_VL_8B["text_config"] | {"hidden_size": 2048, "num_attention_heads": 16}}
    | {"vision_config": QWEN3_VL_8B["vision_config"] | {"hidden_size": 1024, "out_hidden_size": 2048}},
    "Qwen3 8B": QWEN3_VL_8B,
}


@pytest.mark.parametrize("written", ["as published", "by transformers"])
@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_what_is_published_is_taken(tmp_path, config, written):
    """Also where a fine-tune has written it anew, with everything stated that was left out."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    if written == "by transformers":
        load_config(tmp_path).save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    text_config = config.get("text_config", config)
    assert (shape.heads, shape.head_size) == (text_config["num_attention_heads"], 128)
