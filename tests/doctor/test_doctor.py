"""`mrg-r1 doctor` finds each thing that would stop a run, names it with its remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrg_r1 import cli
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.doctor import checks, fitting, machine
from mrg_r1.doctor.machine import Device
from mrg_r1.training import run as run_module
from mrg_r1.training.run import open_run
from tests.conftest import OneRank
from tests.world import World

GB = 10**9


@pytest.fixture(autouse=True)
def _java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_no_meteor", lambda: None)


@pytest.fixture
def broken(world: World, tmp_path: Path) -> World:
    """A copy of the world, to be broken."""
    shutil.copytree(world.folder, tmp_path / "world")
    return World(tmp_path / "world")


def examine(
    world: World, output: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code and the findings by name."""
    code = cli.main(["doctor", str(world.recipe(output)), *arguments, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (code == 1) == (said["state"] == "failure")
    return code, {finding["name"]: finding for finding in said["findings"]}


def failure(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    """What the one failure says."""
    code, findings = examine(world, tmp_path / "run", capsys, *arguments)
    assert code == 1 and [one for one, finding in findings.items() if finding["state"] == "failure"] == [name]
    return f"{findings[name]['text']}; {findings[name]['remedy']}"


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_good_setup_is_well_and_nothing_is_left(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.recipe(tmp_path / "run")
    before = files(tmp_path) | files(world.folder)
    code, findings = examine(world, tmp_path / "run", capsys)
    assert code == 0 and {finding["state"] for finding in findings.values()} == {"ok"}, findings
    assert "16 studies in 'train', 8 studies in 'val', 8 studies in 'test'" in findings["data"]["text"]
    assert files(tmp_path) | files(world.folder) == before
    assert {"packages", "attention", "java", "policy", "tokenizer", "labeler", "memory of the host", "disk"} <= set(
        findings
    )


def test_piped_text_is_a_line_a_finding_and_shows_no_report(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(world.recipe(tmp_path / "run"))]) == 0
    said = capsys.readouterr().out
    assert all(line.startswith(("ok ", "warning ", "failure ")) for line in said.splitlines())
    assert not any(study.report in said for study in read_manifest(world.folder / "phantoms/manifest.jsonl"))


def test_without_a_recipe_it_looks_at_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    names = [finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert names == ["python", "packages", "devices", "attention", "java"]


def test_a_bad_recipe_is_exit_code_2(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(world.recipe(tmp_path / "run")), "grpo.grop_size=4"]) == 2
    assert "did you mean grpo.group_size" in capsys.readouterr().err


def test_a_package_outside_of_its_range_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "4.57.0" if name == "transformers" else version(name))
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "package transformers: 4.57.0 is installed" in said and "5.17" in said and "pip install" in said


def test_missing_java_is_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_no_meteor", lambda: "no java on PATH")
    assert cli.main(["doctor"]) == 0
    assert "warning  java: METEOR will be left out: no java on PATH" in capsys.readouterr().out


def test_a_missing_labeler(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "reward.labeler /nowhere: no such file" in failure(
        world, tmp_path, capsys, "labeler", "reward.labeler=/nowhere"
    )


def test_a_labeler_with_other_tensors(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken.folder / "labeler/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.startswith("linear_heads.3.") and name.endswith("weight"))
    state["stranger"] = state.pop(name)
    save_file(state, path)
    said = failure(broken, tmp_path, capsys, "labeler")
    assert f"missing {name}" in said and "unexpected stranger" in said and str(path.parent) in said


def test_a_labeler_with_a_tensor_of_another_shape(
    broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken.folder / "labeler/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.startswith("linear_heads.3.") and name.endswith("weight"))
    save_file(state | {name: torch.zeros(9, state[name].shape[1])}, path)
    assert f"{name} has shape (9, " in failure(broken, tmp_path, capsys, "labeler")


def test_a_labeler_without_its_tokenizer(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken.folder / "labeler/tokenizer.json").unlink()
    assert "neither tokenizer.json nor vocab.txt" in failure(broken, tmp_path, capsys, "labeler")


def test_a_truncated_image(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = read_manifest(broken.folder / "phantoms/manifest.jsonl", split="val")[1]
    image = study.images[0].path
    image.write_bytes(image.read_bytes()[:200])
    said = failure(broken, tmp_path, capsys, "images")
    assert study.id in said and str(image) in said


def test_a_split_without_studies(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(world, tmp_path, capsys, "data", "data.test_split=tset")
    assert "data.test_split 'tset'" in said and "['test', 'train', 'val']" in said


def test_an_output_dir_below_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    said = failure(world, tmp_path, capsys, "output_dir", f"output_dir={tmp_path / 'taken' / 'run'}")
    assert f"{tmp_path / 'taken'} is a file" in said and "another output_dir" in said


def test_a_shard_that_the_index_names_and_nobody_has(
    broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken.folder / "policy"
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    weight_map = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file(
            {name: whole[name] for name in names if weight_map[name] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert examine(broken, tmp_path / "run", capsys)[0] == 0
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in failure(broken, tmp_path, capsys, "policy")


def test_a_checkpoint_short_of_a_layer(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken.folder / "policy/model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    assert "config.json describes" in failure(broken, tmp_path, capsys, "policy")


def test_a_checkpoint_without_a_tokenizer(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken.folder / "policy" / name).unlink()
    assert "no tokenizer and image processor" in failure(broken, tmp_path, capsys, "tokenizer")


def test_ranks_that_do_not_share_a_batch(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not divide over 3 ranks; take 3 or 6" in failure(
        world, tmp_path, capsys, "recipe", "--world-size", "3"
    )


def test_a_disk_that_is_too_small(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GB, GB, 1000))
    assert "GB free on that disk" in failure(world, tmp_path, capsys, "disk")


def test_a_device_that_is_too_small(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(index: int, free: int) -> Device:
        return Device(index, "a card", free, 80 * GB, (9, 0))

    monkeypatch.setattr(machine.torch.backends.cuda, "is_flash_attention_available", lambda: True)
    cards = [card(0, 40 * GB), card(1, GB // 2)]
    monkeypatch.setattr(machine, "cuda_devices", lambda: cards)
    said = failure(world, tmp_path, capsys, "memory cuda:1", "evaluation.test=false")
    assert "of 0.50 GB free" in said and "lower" in said
    assert "fail" not in examine(world, tmp_path / "run", capsys, "--world-size", "1")[1]["memory cuda:0"]["state"]


def test_a_machine_with_too_little_memory(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "host_memory", lambda: GB)
    said = failure(world, tmp_path, capsys, "memory of the host")
    assert "of 1.00 GB free" in said and "ZeRO-3" in said


def test_a_labeler_on_a_gpu_that_is_not_there(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(world, tmp_path, capsys, "labeler's device", "reward.device=cuda:7")
    assert "this machine shows no GPU" in said and "reward.device=cpu" in said


def test_wandb_online_without_a_key(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wandb_version", lambda: "0.31.0")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "no key" in failure(world, tmp_path, capsys, "wandb", "tracking.wandb=online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert examine(world, tmp_path / "run", capsys, "tracking.wandb=online")[0] == 0


def test_wandb_that_is_asked_for_and_missing_is_a_failure(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wandb_version", lambda: None)
    code, findings = examine(world, tmp_path / "run", capsys, "tracking.wandb=offline")
    assert code == 1 and findings["wandb"]["state"] == "failure" and "tracking.wandb" in findings["wandb"]["remedy"]
    assert examine(world, tmp_path / "run", capsys, "tracking.wandb=off")[1]["wandb"]["state"] == "ok"


def test_a_launch_stops_before_the_policy_is_loaded_and_names_every_failure(
    broken: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(run_module, "load_policy", refuse)
    monkeypatch.setattr(run_module.rewards, "start_service", refuse)
    (broken.folder / "labeler/model.safetensors").unlink()
    (broken.folder / "policy/preprocessor_config.json").unlink()
    with pytest.raises(RecipeError) as caught:
        open_run(load_recipe(broken.recipe(tmp_path / "run")), OneRank(), task="grpo")
    said = str(caught.value)
    assert (
        "labeler/model.safetensors: no such file" in said
        and "no tokenizer and image processor" in said
        and "mrg-r1 doctor" in said
    )


def test_a_launch_says_warnings_once(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inline_rewards: None,
) -> None:
    monkeypatch.setattr(fitting, "_TIGHT", 0.0)
    open_run(load_recipe(world.recipe(tmp_path / "run")), OneRank(), task="grpo")
    assert capsys.readouterr().err.count("warning: memory of the host") == 1
