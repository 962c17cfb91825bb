"""What a launch refuses before it loads a model, naming the study or field, the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

import mrg_r1.training.run as run_module
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import ManifestError, read_manifest, write_manifest
from mrg_r1.kernels import library
from mrg_r1.policy.family import find_family
from mrg_r1.training.preflight import is_finished
from mrg_r1.training.probe import probe
from mrg_r1.training.run import open_run
from tests.conftest import OneRank


@pytest.fixture
def copied(world, tmp_path):
    """The world's phantoms, to be broken."""
    shutil.copytree(world.folder / "phantoms", tmp_path / "phantoms")
    return tmp_path / "phantoms" / "manifest.jsonl"


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test where a model would be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(run_module, "load_policy", refuse)
    monkeypatch.setattr(run_module.rewards, "start_service", refuse)


def opened(world, tmp_path, *overrides, task="grpo"):
    return open_run(load_recipe(world.recipe(tmp_path / "run"), overrides), OneRank(), task=task)


def refused(world, tmp_path, *overrides, error=RecipeError):
    with pytest.raises(error) as caught:
        opened(world, tmp_path, *overrides)
    return str(caught.value)


def test_a_truncated_image_is_named_with_its_study(world, copied, tmp_path, no_model):
    study = read_manifest(copied, split="train")[3]
    image = study.images[0].path
    image.write_bytes(image.read_bytes()[:200])
    message = refused(world, tmp_path, f"data.manifest={copied}")
    assert study.id in message and str(image) in message


def test_a_missing_image_is_named_with_its_study(world, copied, tmp_path, no_model):
    study = read_manifest(copied, split="test")[0]
    study.images[0].path.unlink()
    message = refused(world, tmp_path, f"data.manifest={copied}")
    assert study.id in message and study.images[0].path.name in message


@pytest.mark.parametrize("change", ["duplicate", "empty", "broken"])
def test_a_bad_manifest_is_named_with_line_and_study(world, copied, tmp_path, no_model, change):
    lines = copied.read_text().splitlines()
    if change == "duplicate":
        lines.append(lines[2])
    elif change == "empty":
        lines[2] = json.dumps(json.loads(lines[2]) | {"report": " "})
    else:
        lines[2] = lines[2][:50]
    copied.write_text("\n".join(lines) + "\n")
    message = refused(world, tmp_path, f"data.manifest={copied}", error=ManifestError)
    assert str(copied) in message and ("phantom-000002" in message or "line 3" in message)


def test_a_split_that_the_manifest_lacks_is_refused(world, tmp_path, no_model):
    message = refused(world, tmp_path, "data.train_split=trian")
    assert "data.train_split 'trian'" in message and "['test', 'train', 'val']" in message


def test_a_full_disk_is_refused_at_the_start(world, tmp_path, no_model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "GB free on that disk" in refused(world, tmp_path)


def test_an_output_that_cannot_be_written_is_refused(world, tmp_path, no_model):
    (tmp_path / "run").write_text("a file where the folder should be")
    assert "cannot be written" in refused(world, tmp_path)


def test_a_batch_that_does_not_divide_is_refused(world, tmp_path, no_model):
    class Two(OneRank):
        def __init__(self):
            super().__init__()
            object.__setattr__(self, "world_size", 2)

    with pytest.raises(RecipeError, match="grpo.studies_per_step 5 does not divide over 2 ranks"):
        open_run(load_recipe(world.recipe(tmp_path / "run"), ["grpo.studies_per_step=5"]), Two(), task="grpo")


@pytest.mark.parametrize(
    ("override", "task", "message"),
    [
        ("sft.trainable=all", "sft", "sft.trainable all with ds_configs/zero3.json"),
        ("rollout.reuse_prefill=true", "grpo", "rollout.reuse_prefill with ds_configs/zero3.json"),
    ],
)
def test_what_stage_3_cannot_do_is_refused(world, tmp_path, no_model, override, task, message):
    with pytest.raises(RecipeError, match=message):
        opened(world, tmp_path, "engine.deepspeed=ds_configs/zero3.json", override, task=task)


def test_lora_targets_that_the_family_lacks_are_refused(world, tmp_path, no_model, monkeypatch):
    family = find_family("qwen2_5_vl")
    poorer = replace(family, lora_targets={"language": family.lora_targets["language"]})
    monkeypatch.setattr("mrg_r1.policy.families.qwen2_5_vl.FAMILY", poorer)
    text = refused(world, tmp_path, "policy.lora.targets=language+merger")
    assert "policy.lora.targets language+merger: this policy's family has LoRA on language only" in text
    with pytest.raises(ValueError, match=r"policy.lora.targets all: this policy's family"):
        probe(load_recipe(world.recipe(tmp_path / "run"), ["policy.lora.targets=all"]), studies=2)


def test_a_deepspeed_configuration_that_cannot_be_run_is_refused(world, tmp_path, no_model):
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 0}}')
    assert f"{path}: zero_optimization.stage is 0" in refused(world, tmp_path, f"engine.deepspeed={path}")


def test_a_good_run_opens_and_says_what_it_is(world, tmp_path, inline_rewards):
    run = opened(world, tmp_path)
    assert {part: len(studies) for part, studies in run.studies.items()} == {"train": 16, "val": 8, "test": 8}
    assert load_recipe(tmp_path / "run" / "config.yaml") == run.recipe
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["world_size"] == 1 and environment["packages"]["torch"]
    assert environment["kernels"] == library.state().text
    assert not any(parameter.requires_grad for parameter in run.policy.parameters())
    assert not is_finished(run.directory, run.ranks)
    run.write_summary({"status": "complete"})
    assert is_finished(run.directory, run.ranks)


def test_image_checks_can_be_left_out(world, copied, tmp_path, inline_rewards):
    studies = read_manifest(copied)
    studies[0].images[0].path.unlink()
    write_manifest(copied, studies)
    assert opened(world, tmp_path, f"data.manifest={copied}", "data.check_images=false").studies["train"]
