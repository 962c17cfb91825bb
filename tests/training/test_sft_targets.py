"""Reports that SFT would learn wrongly are refused before the first step, and a loss that is not finite is skipped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.loader import PromptError, check_context, special_tokens
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.doctor.texts import check_reports, unsafe_tokens
from mrg_r1.engine.zero import Engine
from mrg_r1.policy.load import load_tokenizer
from mrg_r1.training.sft import target_ids, train
from mrg_r1.types import Study
from tests.conftest import OneRank


@pytest.mark.usefixtures("inline_rewards")
@pytest.mark.parametrize("word", ["<|image_pad|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"])
def test_a_report_with_a_special_token_is_refused_with_its_study(world, tmp_path, word):
    studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
    bad = next(study for study in studies if study.split == "train")
    changed = [replace(study, report=f"Clear.{word} No more.") if study is bad else study for study in studies]
    write_manifest(tmp_path / "manifest.jsonl", changed)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"data.manifest={tmp_path / 'manifest.jsonl'}"])
    with pytest.raises(RecipeError) as caught:
        train(recipe, OneRank())
    assert bad.id in str(caught.value) and word in str(caught.value)


def study_of(report):
    return Study("s-1", "p", (), report=report, split="train")


def test_tags_are_refused_where_they_are_the_format_alone():
    study = study_of("The heart is enlarged.</report>")
    with pytest.raises(RecipeError, match="s-1"):
        check_reports([study], mode="think", unsafe=[])
    check_reports([study], mode="plain", unsafe=[])
    check_reports([study_of("The heart is < 1 > enlarged.")], mode="think", unsafe=[])


def test_a_target_ends_as_the_template_ends_a_turn(policy):
    recipe = SimpleNamespace(prompt=SimpleNamespace(mode="plain"), rollout=SimpleNamespace(max_new_tokens=99))
    ids = target_ids(SimpleNamespace(policy=policy, recipe=recipe), study_of("The heart is enlarged."))
    assert ids[-1] == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_instruction_with_a_special_token_is_refused_by_field(policy, build):
    with pytest.raises(PromptError, match=r"prompt.instruction.*<\|im_end\|>"):
        build(policy, instruction="Write.<|im_end|>")


def test_what_the_template_writes_is_refused_however_it_is_marked(tiny_policy_directory, tmp_path):
    """Some tokenizers have their template's tokens among the added ones without calling them special."""
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    unsafe = unsafe_tokens(folder, tokenizer)
    for word in ("<|im_start|>", "<|im_end|>", "<|image_pad|>"):
        with pytest.raises(RecipeError, match="s-1"):
            check_reports([study_of(f"The heart{word} is enlarged.")], mode="plain", unsafe=unsafe)
        study = Study("s-2", "p", (), report="x", split="train", indication=f"Cough. {word}")
        with pytest.raises(PromptError, match=r"s-2: its indication"):
            check_context(study, ("indication",), special_tokens(tokenizer))


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), 2.0])
def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(loss):
    """DeepSpeed leaves out an update by its gradient, and an infinite loss may have a finite one."""
    weight = torch.ones(3, requires_grad=True)
    engine = Engine.__new__(Engine)
    engine.ranks = SimpleNamespace(world_size=2)
    inner = SimpleNamespace(set_gradient_accumulation_boundary=lambda last: None, backward=lambda one: one.backward())
    engine._engine, engine._step = inner, lambda: None
    engine.backward(weight.sum() + loss, last=True)
    assert bool(weight.grad.isfinite().all()) == (loss == 2.0)
    if loss == 2.0:
        assert torch.equal(weight.grad, torch.full((3,), 2.0))
