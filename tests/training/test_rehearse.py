"""A rehearsal: a step of few layers by the trainer itself, and what all layers are reckoned to take."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mrg_r1.training.rehearse as rehearsing
from mrg_r1 import cli
from mrg_r1.config.recipe import Recipe, load_recipe
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.policy.shallow import Depth
from mrg_r1.training.rehearse import _at, _whole_step, _write_manifest
from mrg_r1.types import Study
from tests.cli.command import refused, run
from tests.conftest import FAMILIES, make_study
from tests.ranks.conftest import ROOT


def taken(decoder: int, tower: int, **seconds: float) -> dict:
    return {"decoder": decoder, "tower": tower, "seconds": seconds, "start": 10.0 + decoder}


WHOLE = Depth(28, 32)


def test_all_layers_lie_on_the_line_through_both_depths():
    both = [taken(1, 8, vision=2.0, update=5.0), taken(2, 16, vision=3.0, update=5.5)]
    assert _at(WHOLE, both, "update", by="decoder") == pytest.approx(5.5 + 26 * 0.5)
    assert _at(WHOLE, both, "vision", by="tower") == pytest.approx(3.0 + 16 * 0.125)
    assert _at(WHOLE, both, "start", by="decoder") == pytest.approx(12.0 + 26)


def test_noise_never_makes_more_layers_faster():
    both = [taken(1, 8, update=5.0), taken(2, 16, update=4.8)]
    assert _at(WHOLE, both, "update", by="decoder") == pytest.approx(4.8)


def test_a_model_that_ran_whole_is_not_reckoned():
    assert _at(Depth(2, 2), [taken(2, 2, update=3.0)], "update", by="decoder") == 3.0


def test_a_phase_grows_with_what_it_is_spent_on():
    one = [taken(28, 32, load=1.0, vision=1.0, rollout=1.0, reference=1.0, update=1.0, advantages=1.0)]
    assert _whole_step(WHOLE, one, studies=4.0, length=16.0, tokens=8.0) == {
        "load": 4.0,
        "vision": 4.0,
        "rollout": 64.0,
        "reference": 32.0,
        "update": 32.0,
        "advantages": 4.0,
    }


@pytest.fixture
def recipe(world, tmp_path):
    """A recipe whose policy has no weights yet."""
    source = tmp_path / "published"
    shutil.copytree(world.folder / "policy", source)
    (source / "model.safetensors").unlink()
    return [str(world.recipe(tmp_path / "run")), f"policy.path={source}"]


def test_a_step_that_fails_is_named_and_leaves_nothing(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    seen = []
    monkeypatch.setattr(rehearsing, "_child", lambda code, arguments: seen.append(arguments) or 3)
    code, _, message = run(capsys, "rehearse", *recipe, "--folder", tmp_path / "here")
    assert code == 2 and message.splitlines()[-1].startswith("mrg-r1: rehearsal with 1 layers")
    assert "the step ended with exit code 3" in message
    assert list((tmp_path / "here").iterdir()) == []
    [arguments] = seen
    assert arguments[:2] == recipe and not (tmp_path / "run").exists()
    assert {"steps=1", "grpo.studies_per_step=1", "policy.adapter=null"} <= set(arguments)


def test_a_queues_signal_leaves_no_checkpoint_behind(recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    before = signal.getsignal(signal.SIGTERM)

    def stopped(code: str, arguments: object) -> int:
        assert len(list((tmp_path / "here").rglob("*.safetensors"))) > 1
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(rehearsing, "_child", stopped)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["rehearse", *recipe, "--folder", str(tmp_path / "here")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 128 + signal.SIGTERM and list((tmp_path / "here").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU can run is left as it is")
def test_without_a_gpu_kernels_of_a_gpu_are_not_asked_for(recipe, capsys, monkeypatch, tmp_path):
    """In float32 such a recipe would be refused."""
    asked = ["policy.attention=flash_attn", "policy.dtype=bfloat16", "reward.device=cuda:0"]
    seen = []
    monkeypatch.setattr(rehearsing, "_child", lambda code, arguments: seen.append(arguments) or 3)
    run(capsys, "rehearse", *recipe, *asked, "--folder", tmp_path)
    found = load_recipe(Path(seen[0][0]), seen[0][1:])
    assert (found.policy.attention, found.policy.dtype, found.reward.device) == ("torch", "float32", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["policy.path=nowhere"], "nowhere: no config.json there"),
        (["data.val_split=none"], "data.val_split 'none'"),
        (["data.manifest=missing.jsonl"], "missing.jsonl"),
        (["grpo.group_sise=4"], "group_size"),
        (["reward.labeler=nowhere"], "reward.labeler"),
        (["policy.lora.targets=tower"], "policy.lora.targets"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(recipe, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr(rehearsing, "write_shallow", lambda *arguments, **options: pytest.fail("written"))
    assert message in refused(capsys, "rehearse", *recipe, *change, "--folder", tmp_path)


@pytest.mark.parametrize(
    ("file", "message"), [("tokenizer.json", "tokenizer"), ("preprocessor_config.json", "preprocessor_config.json")]
)
def test_a_folder_without_tokenizer_or_processor_is_named(recipe, tmp_path, capsys, monkeypatch, file, message):
    monkeypatch.setattr(rehearsing, "write_shallow", lambda *arguments, **options: pytest.fail("written"))
    (tmp_path / "published" / file).unlink()
    said = refused(capsys, "rehearse", *recipe, "--folder", tmp_path)
    assert message in said and "no weights are needed" in said


def test_the_longest_prompts_are_rehearsed_with_what_they_quote(tmp_path):
    def study(name: str, images: int, split: str = "train", prior: str | None = None) -> Study:
        shown = tuple(make_study(tmp_path, name, [(8, 8)] * images).images)
        return replace(make_study(tmp_path, name, [(8, 8)]), images=shown, split=split, prior=prior, patient_id="p")

    first, old = study("first", 1, split="test"), study("old", 1, prior="first")
    two, quoting = study("two", 3), study("quoting", 2, prior="old")
    write_manifest(tmp_path / "all.jsonl", [first, old, study("one", 1), two, quoting, study("v", 1, split="val")])
    given = Recipe.model_validate(
        {
            "output_dir": tmp_path / "run",
            "steps": 1,
            "data": {"manifest": tmp_path / "all.jsonl", "train_split": "train", "val_split": "val"},
            "policy": {"path": tmp_path},
            "reward": {"labeler": tmp_path},
        }
    )
    few = tmp_path / "few.jsonl"
    _write_manifest(given, few, train=1)
    assert [one.id for one in read_manifest(few)] == ["two", "v"]
    data = given.data.model_copy(update={"context": ["prior_report"]})
    _write_manifest(given.model_copy(update={"data": data}), few, train=1)
    found = {one.id: one.split for one in read_manifest(few)}
    assert found.keys() == {"quoting", "v", "old", "first"}  # the whole chain of priors
    assert [name for name, split in found.items() if split in ("train", "val", "test")] == ["quoting", "v"]


def test_a_full_disk_is_refused_before_it_is_filled(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearsing.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    message = refused(capsys, "rehearse", *recipe, "--folder", tmp_path)
    assert "0.0 GB are free" in message and "--folder" in message


SHIPPED = {"iu_7b": "qwen2_5_vl", "qwen3_vl_8b": "qwen3_vl", "medgemma_4b": "gemma3"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiny_policy_directory"), SHIPPED.items(), indirect=["tiny_policy_directory"])
def test_a_whole_step_of_each_shipped_recipe_is_taken_at_two_depths_and_exported(
    name, tiny_policy_directory, world, tmp_path, capsys, monkeypatch
):
    """As it stands but for where things lie, at reduced depth and width; the shapes of 7B are in docs/gpus.md."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    source = tmp_path / "published"
    shutil.copytree(tiny_policy_directory, source)
    (source / "model.safetensors").unlink()
    report = tmp_path / "rehearsal.json"
    asked = [ROOT / f"launch/recipes/{name}.yaml", f"policy.path={source}", f"output_dir={tmp_path}/run"]
    asked += [f"data.manifest={world.folder}/phantoms/manifest.jsonl", f"reward.labeler={world.folder}/labeler"]
    code, said, complaint = run(
        capsys, "rehearse", *asked, "--new-tokens", 4, "--world-size", 7, "--folder", tmp_path, "--json", report
    )
    assert code == 0, complaint
    assert "a rank's step" in said and not (tmp_path / "run").exists()
    result = json.loads(report.read_text())
    depths = [(one["decoder"], one["tower"]) for one in result["depths"]]
    assert depths[-1][0] == FAMILIES[SHIPPED[name]] == result["whole"]["decoder"] and depths[0] != depths[1]
    for one in result["depths"]:
        assert {"load", "vision", "rollout", "reference", "update"} <= one["seconds"].keys() and one["memory_gib"] > 0
        assert {"start", "rollout", "update"} <= one["memory_gib_by_phase"].keys()
        assert one["update_tflops"] > 0 and one["update_mfu"] is None  # no card
    assert result["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert result["memory"]["formula_gib_by_phase"].keys() >= {"vision", "rollout", "update"} and "GiB at most" in said
    assert result["rank_studies"] == 4 and result["group_size"] == 8 and result["recipe_dtype"] == "bfloat16"
    assert result["new_tokens"] == 4 and result["recipe_new_tokens"] == 512
    assert result["whole"]["seconds"]["update"] > result["depths"][-1]["seconds"]["update"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("mrg-r1")) == []
