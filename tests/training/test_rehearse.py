"""A rehearsal: real directories without weights become few layers, the step is the trainer's, bad input is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.policy.completeness import empty_model, stored_tensors
from mrg_r1.policy.family import read_config, shape_of
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.shallow import Depth, cut_config, write_shallow
from mrg_r1.training.rehearse import Sizes, at_size, rehearse
from tests.cli.command import refused, run
from tests.conftest import each_family

PUBLISHED = {  # of Qwen2.5-VL-7B and Qwen3-VL-8B, what layers are counted by
    "qwen2_5_vl": {
        "num_hidden_layers": 28,
        "vision_config": {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]},
    },
    "qwen3_vl": {
        "text_config": {"num_hidden_layers": 36},
        "vision_config": {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
    },
}


@each_family
def test_a_directory_without_weights_becomes_a_policy_of_few_layers(tiny_policy_directory, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(tiny_policy_directory, source, ignore=shutil.ignore_patterns("*.safetensors"))
    output.mkdir()
    told = []
    write_shallow(source, output, Depth(2, 1), narrowest=2, dtype=torch.bfloat16, seed=0, room=told.append)
    before, shape = shape_of(source), shape_of(output)
    assert (shape.layers, shape.vision.depth, shape.hidden, shape.vocabulary) == (
        2, 1, before.hidden, before.vocabulary,
    )  # fmt: skip
    stored = stored_tensors(output, empty_model(output))  # each tensor has its place
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    assert told == [2 * shape.parameters]
    policy = load_policy(output, dtype=torch.float32)
    matrix = policy.model.model.language_model.layers[1].mlp.up_proj.weight
    assert 0.01 < float(matrix.std()) < 0.03 and not torch.equal(matrix[0], matrix[1])


def test_layers_that_are_named_by_kind_or_number_stay_of_every_kind():
    qwen = cut_config(PUBLISHED["qwen2_5_vl"], Depth(2, 2), narrowest=2)
    assert qwen["num_hidden_layers"] == 2
    assert qwen["vision_config"] == {"depth": 2, "fullatt_block_indexes": [1]}
    assert cut_config(PUBLISHED["qwen2_5_vl"], Depth(4, 16), narrowest=2)["vision_config"]["fullatt_block_indexes"] == [
        7,
        15,
    ]
    for layers, depth, maps in ((2, 2, [1]), (4, 4, [0, 1, 3]), (8, 27, [8, 17, 26])):
        cut = cut_config(PUBLISHED["qwen3_vl"], Depth(layers, depth), narrowest=layers)
        assert cut["vision_config"]["deepstack_visual_indexes"] == maps
        assert cut["text_config"]["num_hidden_layers"] == layers
    kinds = (["sliding"] * 5 + ["global"]) * 5
    mixed = {"text_config": {"num_hidden_layers": 30, "layer_types": kinds}, "vision_config": {"num_hidden_layers": 9}}
    cut = cut_config(mixed, Depth(2, 3), narrowest=2)
    assert cut["text_config"]["layer_types"] == ["sliding", "global"] and cut["vision_config"]["num_hidden_layers"] == 3
    assert cut_config(mixed, Depth(7, 3), narrowest=7)["text_config"]["layer_types"] == kinds[:7]
    assert mixed["text_config"]["num_hidden_layers"] == 30


def test_all_layers_are_on_the_line_through_two_depths():
    assert at_size([2, 4], [10.0, 14.0], 28) == pytest.approx(62)
    assert at_size([2, 4], [10.0, 9.0], 28) == 9.0  # noise
    assert at_size([2], [10.0], 28) == 10.0


@pytest.fixture
def bare(world, tmp_path):
    """The world's recipe, and its policy without weights."""
    directory = tmp_path / "config-only"
    shutil.copytree(world.folder / "policy", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return world.recipe(tmp_path / "run"), directory


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_whole_step_is_taken_and_all_layers_are_foretold(bare, family, tiny_policies, tmp_path, capsys):
    recipe, directory = bare
    if family == "qwen3_vl":
        directory = tiny_policies(family)
    depth = shape_of(directory).layers
    file = tmp_path / "rehearsal.json"
    code, out, err = run(
        capsys, "rehearse", recipe, f"policy.path={directory}", "policy.adapter=nowhere", "policy.dtype=bfloat16",
        "--layers", 2 if depth > 2 else 1, "--vision-layers", 1, "--new-tokens", 5, "--output", file,
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(file.read_text())
    assert [one["language"] for one in result["depths"]] == [depth - 1, depth]
    assert {"start", "vision", "rollout", "reference", "update", "checkpoint", "export"} <= result["phases"].keys()
    assert all(value > 0 for value in result["grad_norm"]) and max(result["new_tokens"]) <= 5
    update = result["phases"]["update"]
    assert update["all_layers"] >= update["seconds"][-1] and update["recipe"] > update["all_layers"]
    assert result["memory"].keys() == {"vision", "rollout", "update"}
    assert all(one["recipe"] > one["formula"] > 0 for one in result["memory"].values())
    assert not (tmp_path / "run").exists()
    assert "policy.adapter nowhere" in out and "5 of 8 new tokens" in out and "recipe's step" in out


def test_what_is_missing_is_named_before_a_weight_is_written(bare, tmp_path, capsys):
    recipe, directory = bare
    given = ["rehearse", recipe, f"policy.path={directory}"]
    assert "data.manifest" in refused(capsys, *given, f"data.manifest={tmp_path}/none.jsonl")
    assert "reward.labeler" in refused(capsys, *given, f"reward.labeler={tmp_path}/none")
    assert "GRPO" in refused(capsys, *given, "control=sft")
    assert "the step is to have 99" in refused(capsys, *given, "--studies", 99)
    (directory / "tokenizer.json").unlink()
    assert "no weights" in refused(capsys, *given)
    assert not (tmp_path / "run").exists() and read_config(directory)["model_type"] == "qwen2_5_vl"


def test_what_a_step_says_as_it_fails_is_said(bare):
    recipe, directory = bare
    given = load_recipe(recipe, [f"policy.path={directory}"])
    sizes = Sizes(layers=1, vision_layers=1)
    with pytest.raises(ValueError, match=r"1 layers, 1 of the tower failed in the phase start \(exit code 2\)") as said:
        rehearse(given, sizes, command=["sh", "-c", "echo 'error: no such thing' >&2; exit 2"])
    assert "error: no such thing" in str(said.value) and not isinstance(said.value, RecipeError)
    with pytest.raises(ValueError, match=r"was killed \(signal 9\).*--layers 1"):
        rehearse(given, sizes, command=["sh", "-c", "kill -9 $$"])
