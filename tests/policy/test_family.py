"""Families are found by their names; what each must do stands in tests marked `each_family`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import mrg_r1
from mrg_r1.config.paths import check_checkpoint_directory
from mrg_r1.config.recipe import RecipeError
from mrg_r1.model_types import family_names
from mrg_r1.policy.family import family_of, find_family, shape_of
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import completion_logprobs
from tests.conftest import FAMILIES, each_family


def test_a_checkpoint_names_its_family(tiny_policies):
    assert set(FAMILIES) <= set(family_names())
    for family in FAMILIES:
        assert family_of(tiny_policies(family)) is find_family(family)
        assert shape_of(tiny_policies(family)).layers == FAMILIES[family]


@pytest.mark.parametrize(
    ("config", "named"), [('{"model_type": "llava"}', "'llava'"), ("{}", "None"), ("{", "config.json"), (None, "no")]
)
def test_a_checkpoint_of_no_family_is_refused_with_its_type_and_those_that_load(tmp_path, config, named):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError) as caught:
        load_policy(tmp_path, dtype=torch.float32)
    assert str(tmp_path) in str(caught.value) and named in str(caught.value)
    if config is not None and json_of(config) is not None:
        assert "qwen2_5_vl" in str(caught.value)


def json_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("qwen3_vl_moe", r"\(a mixture of experts\).*qwen3_vl"),
        ("qwen3_5", r"\(linear attention\).*qwen3_vl"),
        ("qwen3", r"\(text alone\).*qwen3_vl"),
        ("qwen2_vl", r"\(another tower than Qwen2.5-VL's\).*qwen2_5_vl"),
        ("gemma3_text", r"\(text alone\).*gemma3"),
        ("gemma3n", r"\(another .*\).*gemma3"),
        ("gemma4", r"\(another .*\).*gemma3"),
        ("internvl", r"\(InternVL's own tower.*\).*gemma3"),
        ("internvl_chat", r"\(InternVL's own tower.*\).*gemma3"),
        ("llava_next", r"\(LLaVA's own tower.*\).*gemma3"),
        ("never_heard_of", "is no family.*gemma3"),
    ],
)
def test_a_relative_of_a_family_is_refused_by_its_name_and_by_what_it_is(tmp_path, name, near):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    for read in (family_of, shape_of, lambda path: load_policy(path, dtype=torch.float32)):
        with pytest.raises(ValueError, match=f"'{name}' {near}"):
            read(tmp_path)
    with pytest.raises(RecipeError, match=f"'{name}' {near}"):
        check_checkpoint_directory(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}', " of Qwen/Qwen2.5-VL-7B-Instruct; put Qwen/"),
        ('{"base_model_name_or_path": ""}', "; put the checkpoint that it was trained on into"),
        ("{}", "; put the checkpoint that it was trained on into"),
        ("[]", "; put the checkpoint that it was trained on into"),
        ("{", "; put the checkpoint that it was trained on into"),
    ],
)
def test_an_adapter_in_place_of_its_checkpoint_is_told_from_one(tmp_path, content, named):
    (tmp_path / "adapter_config.json").write_text(content)
    readers = (family_of, shape_of, lambda path: load_policy(path, dtype=torch.float32), check_checkpoint_directory)
    for read in readers:
        with pytest.raises(
            ValueError, match=f"a LoRA adapter{named}.* policy.path and this folder into policy.adapter"
        ):
            read(tmp_path)


def test_a_family_is_named_in_its_folder_alone():
    """A further one needs no line elsewhere; the default of `mrg-r1 prepare tiny-policy` is no case of one."""
    source = Path(mrg_r1.__file__).parent
    own = (source / "policy/families", source / "policy/qwen_vl", source / "cli/prepare/tiny_policy.py")
    quoted = re.compile("|".join(f"[\"']{name}[\"']" for name in family_names()))
    elsewhere = [file for file in source.rglob("*.py") if not any(file.is_relative_to(place) for place in own)]
    assert len(elsewhere) > 200 and not [file for file in elsewhere if quoted.search(file.read_text(encoding="utf-8"))]


@each_family
def test_every_parameter_can_be_trained(tiny_policy_directory, studies, build):
    """SFT of all parameters: by the checkpoint's own modules, the tower included."""
    policy = load_policy(tiny_policy_directory, dtype=torch.float32).requires_grad_(True)
    prompts = build(policy)(studies[:2])
    ids = torch.randint(20, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    logp, _ = policy(prompts, policy.encode_images(prompts), ids, mask, torch.arange(2))
    logp.sum().backward()
    without = [name for name, parameter in policy.named_parameters() if parameter.grad is None]
    assert not without
    with torch.no_grad():
        again, _ = completion_logprobs(policy, prompts, policy.encode_images(prompts), ids, mask, torch.arange(2))
    torch.testing.assert_close(again, logp.detach(), atol=1e-5, rtol=0)
