"""The memory formula: counts against a published checkpoint's and modules' own, growth in each number, real peaks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.doctor.memory import Workload, predict, resting_parts
from mrg_r1.policy.family import find_family, shape_of
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.policy.shape import PolicyShape
from tests.conftest import each_family

FACTOR = 1.25  # within which the formula must lie of a measured peak, both ways
# Qwen2.5-VL-7B as published: the sizes of its config.json
SEVEN_B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "num_heads": 16,
    },
}
# Qwen3-VL-8B-Instruct as published
EIGHT_B: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
# medgemma-4b-it as published: what it leaves out is transformers' to fill in
FOUR_B: dict[str, Any] = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
STEP = Workload(
    task="grpo",
    bytes=2,
    stage=2,
    world_size=1,
    lora_rank=32,
    studies=8,
    group_size=8,
    prompt_tokens=800,
    image_tokens=668,
    new_tokens=512,
    cache_tokens=262_144,
    micro_batch_tokens=8192,
    recompute=False,
    reuse_prefill=False,
    evaluated=16,
    device="cuda",
)


def shape_of_config(config: dict[str, Any]) -> PolicyShape:
    return find_family(config["model_type"]).shape(config)


def total(work: Workload, phase: str) -> int:
    return sum(predict(shape_of_config(SEVEN_B), work).phases[phase].values())


@pytest.mark.parametrize(
    ("config", "total_size"), [(SEVEN_B, 16_584_333_312), (EIGHT_B, 17_534_247_392), (FOUR_B, 8_600_158_944)]
)
def test_a_published_checkpoint_has_the_bytes_of_its_index(config: dict[str, Any], total_size: int) -> None:
    assert 2 * shape_of_config(config).parameters == total_size  # of its model.safetensors.index.json


@each_family
@pytest.mark.parametrize("targets", ["language", "language+merger", "all"])
def test_a_policy_and_its_lora_are_counted_as_their_modules_have_them(
    policy: Policy, tiny_policy_directory: Path, targets: str
) -> None:
    shape = shape_of(tiny_policy_directory)
    assert shape.parameters == sum(parameter.numel() for parameter in policy.parameters())
    seeing = policy.family.vision_modules(policy.base)
    assert shape.vision.parameters == sum(one.numel() for module in seeing for one in module.parameters())
    if targets not in policy.family.lora_targets:
        return
    add_lora(policy, rank=4, alpha=8, seed=0, targets=targets)
    trained = [parameter.numel() for parameter in policy.parameters() if parameter.requires_grad]
    assert shape.lora_parameters(4, targets) == sum(trained)


def test_a_7b_token_is_what_it_is_by_hand() -> None:
    shape = shape_of_config(SEVEN_B)
    assert 2 * shape.cache_values == 57_344  # 28 layers, 4 heads of 128, keys and values, two bytes each
    assert shape.lora_parameters(1) == 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))


def test_a_rollout_by_hand() -> None:
    parts = predict(shape_of_config(SEVEN_B), STEP).phases["rollout"]
    matrices = 28 * (3584 * (28 + 2 * 4) * 128 + 3584 * 3584 + 3 * 3584 * 18944)
    assert parts["merged decoder"] == 2 * matrices  # once beside the policy's own, in bfloat16
    assert (
        parts["prompts' keys and values"] == 8 * 800 * 57_344
        and parts["completions' keys and values"] == 64 * 512 * 57_344
    )
    few = predict(shape_of_config(SEVEN_B), replace(STEP, cache_tokens=2 * (800 + 8 * 512))).phases["rollout"]
    assert few["completions' keys and values"] == 2 * 8 * 512 * 57_344  # two studies at a time
    on_cpu = predict(shape_of_config(SEVEN_B), replace(STEP, bytes=4, device="cpu")).phases["rollout"]
    assert on_cpu["merged decoder"] == 2 * 4 * matrices  # and once more in oneDNN's layout


def test_an_update_by_hand() -> None:
    parts = predict(shape_of_config(SEVEN_B), STEP).phases["update"]
    # a token's kept numbers, and two scales a layer
    token = 28 * (2 * (4 * 3584 + 36 * 128 + 28 * 128 + 3 * 18944 + 7 * 32) + 8)
    # a study and its group fit into 8,192 tokens, a second study does not
    assert parts["completions' activations"] == 8 * 512 * token
    again = predict(shape_of_config(SEVEN_B), replace(STEP, recompute=True)).phases["update"]
    assert again["completions' activations"] == 8 * 512 * 28 * 3584 * 2  # each layer's input alone


def test_lora_on_merger_and_tower_by_hand() -> None:
    shape = shape_of_config(SEVEN_B)
    decoder, merger = shape.lora_parameters(32), 32 * (5120 + 5120 + 5120 + 3584)
    tower = 32 * 32 * (1280 + 3840 + 1280 + 1280 + 3 * (1280 + 3420))
    assert shape.lora_parameters(32, "language+merger") == decoder + merger
    assert shape.lora_parameters(32, "all") == decoder + merger + tower
    plain, with_merger, whole = (
        predict(shape, replace(STEP, lora_targets=targets)).phases["update"]
        for targets in ("language", "language+merger", "all")
    )
    assert with_merger["LoRA"] - plain["LoRA"] == 2 * merger and whole["LoRA"] - with_merger["LoRA"] == 2 * tower
    kept = 8 * 668 * 4 * 1280 * 2  # four patches of each image token before the merger, of all studies of the step
    assert with_merger["what the merger starts from"] == kept and "what the merger starts from" not in whole
    added = {"merger's graph", "vision tower's graph"}
    assert not added & set(plain) and added & set(with_merger) == {"merger's graph"} and added <= set(whole)
    again = predict(shape, replace(STEP, lora_targets="all", recompute=True)).phases["update"]
    assert again["vision tower's graph"] < 0.15 * whole["vision tower's graph"]


def test_features_added_to_prompts_and_norms_of_heads_are_counted() -> None:
    shape = shape_of_config(EIGHT_B)
    assert shape.vision.out == 4 * 4096 and shape.vision.pixels == 32 * 32 and shape.vision.patch_values == 1536
    token = 4 * 4096 + 2 * (32 + 2 * 8) * 128 + 32 * 128 + 3 * 12288 + 7 * 32
    assert shape.kept_values(32) == token  # queries, keys and values twice: before and after norm and rotation
    plain = replace(shape, added=0)
    for change in ({}, {"recompute": True}):
        work = replace(STEP, **change)
        more = predict(shape, work).phases["update"]["prompts' activations"]
        assert more - predict(plain, work).phases["update"]["prompts' activations"] == 800 * 3 * 4096 * 2


@pytest.mark.parametrize(("config", "text"), [(SEVEN_B, SEVEN_B), (EIGHT_B, EIGHT_B["text_config"])])
def test_a_config_without_a_number_says_which(config: dict[str, Any], text: dict[str, Any]) -> None:
    less = {key: value for key, value in text.items() if key != "num_hidden_layers"}
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        shape_of_config(less if text is config else {**config, "text_config": less})


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"new_tokens": 1024}, "rollout"),
        ({"group_size": 16}, "rollout"),
        ({"reuse_prefill": True}, "rollout"),
        ({"reuse_prefill": True}, "update"),
        ({"micro_batch_tokens": 16_384}, "update"),
        ({"labeler_bytes": 440_000_000}, "update"),
        ({"evaluated": 64}, "evaluation"),
        ({"image_tokens": 1300, "prompt_tokens": 1400}, "vision"),
        ({"bytes": 4}, "update"),
    ],
)
def test_more_work_needs_more(change: dict[str, Any], phase: str) -> None:
    assert total(replace(STEP, **change), phase) > 1.01 * total(STEP, phase)


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"recompute": True}, "update"),
        ({"cache_tokens": 10_000}, "rollout"),
        ({"micro_batch_tokens": 2048}, "update"),
        ({"stage": 3, "world_size": 8}, "update"),
    ],
)
def test_what_saves_memory_saves_it(change: dict[str, Any], phase: str) -> None:
    assert total(replace(STEP, **change), phase) < 0.95 * total(STEP, phase)


def test_zero_cuts_what_its_stage_says() -> None:
    shape = shape_of_config(SEVEN_B)
    trained = shape.lora_parameters(32)

    def parts(**change: Any) -> dict[str, int]:
        return resting_parts(shape, replace(STEP, world_size=4, bucket=0, **change))

    assert parts(stage=1)["gradients"] == 2 * trained and parts(stage=2)["gradients"] == 2 * (trained // 4)
    assert parts(stage=2)["Adam's moments"] == 8 * trained // 4 and "Adam's moments" not in parts(
        stage=2, offload_optimizer=True
    )
    assert parts(stage=2)["language model"] == 2 * shape.language_parameters
    assert parts(stage=3)["language model"] == 2 * shape.language_parameters // 4
    assert parts(stage=3, offload_parameters=True)["language model"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rollout", "update", "merger", "tower", "tower recomputed"])
def test_the_formula_lies_near_the_peak_of_a_real_step(case: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.doctor.measured", case, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    measured = json.loads(line.removeprefix("RESULT "))
    if case not in ("rollout", "update"):  # small, but for what LoRA on merger and tower keeps for its update
        measured.pop("rollout")
    for phase, found in measured.items():
        assert found["predicted"] / FACTOR < found["measured"] < found["predicted"] * FACTOR, (phase, found)
