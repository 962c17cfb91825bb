"""Random checkpoints of few layers: they need no weights, load as a published one does, and keep what names layers by
number in order.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from mrg_r1.policy.family import read_config, shape_of
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.shallow import Depth, shallow_config, two_depths, whole_depth, write_shallow
from tests.conftest import each_family

QWEN2_5_VL_7B = {
    "num_hidden_layers": 28,
    "vision_config": {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]},
}
QWEN3_VL_8B = {
    "text_config": {"num_hidden_layers": 36},
    "vision_config": {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
}
WINDOWED = {
    "text_config": {"num_hidden_layers": 34, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 6},
    "vision_config": {"num_hidden_layers": 27},
}


@pytest.mark.parametrize(
    ("config", "first", "second"),
    [
        (QWEN2_5_VL_7B, Depth(1, 8), Depth(2, 16)),
        (QWEN3_VL_8B, Depth(4, 3), Depth(5, 6)),
        (WINDOWED, Depth(6, 1), Depth(12, 2)),
    ],
)
def test_both_depths_have_the_whole_models_mixture_of_layers(config, first, second):
    assert two_depths(config) == (first, second)


def test_what_names_layers_by_number_names_those_that_are_left():
    vision = shallow_config(QWEN2_5_VL_7B, Depth(2, 16))["vision_config"]
    assert vision == {"depth": 16, "fullatt_block_indexes": [7, 15]}
    assert shallow_config(QWEN3_VL_8B, Depth(6, 6))["vision_config"]["deepstack_visual_indexes"] == [1, 3, 5]
    few = shallow_config(WINDOWED, Depth(6, 1))
    assert few["text_config"] == {"num_hidden_layers": 6, "layer_types": WINDOWED["text_config"]["layer_types"][:6]}
    assert few["vision_config"] == {"num_hidden_layers": 1} and WINDOWED["vision_config"]["num_hidden_layers"] == 27


def test_a_whole_model_of_few_layers_is_no_deeper_than_it_is():
    few = QWEN3_VL_8B | {"text_config": {"num_hidden_layers": 4}}
    assert two_depths(few) == (Depth(4, 3), Depth(4, 6)) and whole_depth(few) == Depth(4, 27)
    with pytest.raises(ValueError, match="no number of layers"):
        whole_depth({"vision_config": {}})


@each_family
def test_it_is_written_without_weights_and_loads_as_any_checkpoint(tiny_policy_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_policy_directory, source)
    (source / "model.safetensors").unlink()
    first, second = two_depths(read_config(source))
    folders = {first: tmp_path / "first", second: tmp_path / "second"}
    write_shallow(source, folders, dtype=torch.bfloat16)
    weights = {}
    for depth, folder in folders.items():
        policy = load_policy(folder, dtype=torch.bfloat16)
        assert whole_depth(read_config(folder)) == depth
        assert sum(parameter.numel() for parameter in policy.parameters()) == shape_of(folder).parameters
        weights[depth] = dict(policy.base.named_parameters())
    shared = weights[first].keys() & weights[second].keys()
    assert len(shared) > 10 and all(torch.equal(weights[first][name], weights[second][name]) for name in shared)
    matrices = [weight for weight in weights[second].values() if weight.ndim == 2 and weight.numel() > 4000]
    assert all(0.015 < weight.float().std() < 0.025 for weight in matrices)
