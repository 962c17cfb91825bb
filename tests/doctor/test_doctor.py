"""`mrg-r1 doctor` finds each thing that would stop a run, names it with its remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
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
from mrg_r1.kernels import library
from mrg_r1.tracking import tensorboard_run
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
    assert names == ["python", "packages", "devices", "attention", "java", "cores", "kernels"]


def test_missing_kernels_are_a_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "state", lambda: library.State(None, "torch's own: no compiler", missing=True))
    finding = machine.compiled_finding()
    assert (finding.state, finding.text) == ("warning", "torch's own: no compiler") and "gcc" in (finding.remedy or "")
    monkeypatch.setattr(library, "state", lambda: library.State(None, "torch's own: as you wish"))
    assert machine.compiled_finding().state == "ok"


def test_a_bad_recipe_is_exit_code_2(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(world.recipe(tmp_path / "run")), "grpo.grop_size=4"]) == 2
    assert "grpo.group_size" in capsys.readouterr().err


def test_a_package_outside_of_its_range_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "4.57.0" if name == "transformers" else version(name))
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert all(word in said for word in ("transformers", "4.57.0", "5.17", "pip install"))


def test_missing_java_is_a_warning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_no_meteor", lambda: "no java on PATH")
    assert cli.main(["doctor"]) == 0
    assert re.search("warning +java: .*METEOR.* no java on PATH", capsys.readouterr().out)


def other_tensors(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    path = folder / "labeler/model.safetensors"
    state = load_file(path)
    state["stranger"] = state.pop("linear_heads.3.weight")
    save_file(state, path)
    return ["linear_heads.3.weight", "stranger", path.parent]


def another_shape(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    path = folder / "labeler/model.safetensors"
    state = load_file(path)
    save_file(state | {"linear_heads.3.weight": torch.zeros(9, state["linear_heads.3.weight"].shape[1])}, path)
    return ["linear_heads.3.weight", "(9, "]


def damaged(part: str, content: str) -> Callable[[Path, pytest.MonkeyPatch], list[object]]:
    """A file of the labeler or the policy with other content."""

    def damage(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
        (folder / part).write_text(content)
        return [Path(part).name]

    return damage


def odd_labeler_config(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    path = folder / "labeler/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": "2"}))
    return ["labeler/config.json", "num_hidden_layers"]


def no_labeler_tokenizer(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    (folder / "labeler/tokenizer.json").unlink()
    return ["tokenizer.json", "vocab.txt"]


def truncated_image(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    study = read_manifest(folder / "phantoms/manifest.jsonl", split="val")[1]
    image = study.images[0].path
    image.write_bytes(image.read_bytes()[:200])
    return [study.id, image]


def missing_shard(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    shard_policy(folder / "policy")
    (folder / "policy/model-00002-of-00002.safetensors").unlink()
    return ["model-00002-of-00002.safetensors"]


def missing_layer(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    path = folder / "policy/model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return ["config.json"]


def no_policy_tokenizer(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "policy" / name).unlink()
    return [folder / "policy", "tokenizer"]


def file_above_output(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    (folder.parent / "taken").write_text("a file")
    return [folder.parent / "taken", "output_dir"]


def another_labeler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    shutil.copytree(folder / "labeler", folder / "another")
    return ["evaluation.held_out_device=cpu"]


def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(GB, GB, 1000))
    return ["GB", "output_dir"]


def little_memory(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr(fitting, "host_memory", lambda: GB)
    return ["1.00 GB", "ZeRO-3"]


def names(*said: object) -> Callable[[Path, pytest.MonkeyPatch], list[object]]:
    """Nothing is damaged: the override alone is wrong."""
    return lambda folder, patch: list(said)


@pytest.mark.parametrize(
    ("name", "damage", "overrides"),
    [
        ("labeler", names("reward.labeler /nowhere"), ["reward.labeler=/nowhere"]),
        ("labeler", other_tensors, []),
        ("labeler", another_shape, []),
        ("labeler", no_labeler_tokenizer, []),
        ("labeler", damaged("labeler/tokenizer.json", '{"a": 1}'), []),
        ("labeler", damaged("labeler/config.json", "[]"), []),
        ("labeler", odd_labeler_config, []),
        ("held-out labeler", names("held_out_labeler /nowhere"), ["evaluation.held_out_labeler=/nowhere"]),
        ("held-out labeler", names("is reward.labeler"), ["evaluation.held_out_labeler={parent}/world/labeler"]),
        ("labeler's device", names("reward.device=cpu"), ["reward.device=cuda:7"]),
        (
            "held-out labeler's device",
            another_labeler,
            ["evaluation.held_out_labeler={parent}/world/another", "evaluation.held_out_device=cuda:7"],
        ),
        ("images", truncated_image, []),
        ("data", names("data.test_split 'tset'", "['test', 'train', 'val']"), ["data.test_split=tset"]),
        ("output_dir", file_above_output, ["output_dir={parent}/taken/run"]),
        ("policy", missing_shard, []),
        ("policy", missing_layer, []),
        ("tokenizer", no_policy_tokenizer, []),
        ("tokenizer", damaged("policy/tokenizer.json", '{"a": 1}'), []),
        ("recipe", names("3 ranks", "3 or 6"), ["--world-size", "3"]),
        ("disk", full_disk, []),
        ("memory of the host", little_memory, []),
    ],
)
def test_what_would_stop_a_run_is_one_failure_that_names_it(
    broken: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[Path, pytest.MonkeyPatch], list[object]],
    overrides: list[str],
) -> None:
    named = damage(broken.folder, monkeypatch)
    said = failure(broken, tmp_path, capsys, name, *(text.format(parent=tmp_path) for text in overrides))
    assert [one for one in named if str(one) not in said] == [], said


def shard_policy(folder: Path) -> None:
    """Its weights in two files and an index."""
    whole = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(whole))}
    for file in set(weight_map.values()):
        shard = {name: tensor for name, tensor in whole.items() if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_policy_in_shards_is_well(broken: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard_policy(broken.folder / "policy")
    assert examine(broken, tmp_path / "run", capsys)[0] == 0


def test_a_device_that_is_too_small(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(index: int, free: int) -> Device:
        return Device(index, "a card", free, 80 * GB, (9, 0))

    monkeypatch.setattr(machine.torch.backends.cuda, "is_flash_attention_available", lambda: True)
    cards = [card(0, 40 * GB), card(1, GB // 2)]
    monkeypatch.setattr(machine, "cuda_devices", lambda: cards)
    said = failure(world, tmp_path, capsys, "memory cuda:1", "evaluation.test=false")
    assert "0.50 GB" in said
    assert "fail" not in examine(world, tmp_path / "run", capsys, "--world-size", "1")[1]["memory cuda:0"]["state"]


def test_wandb_online_without_a_key(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wandb_version", lambda: "0.31.0")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "WANDB_API_KEY" in failure(world, tmp_path, capsys, "wandb", "tracking.wandb=online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert examine(world, tmp_path / "run", capsys, "tracking.wandb=online")[0] == 0


def test_wandb_that_is_asked_for_and_missing_is_a_failure(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wandb_version", lambda: None)
    code, findings = examine(world, tmp_path / "run", capsys, "tracking.wandb=offline")
    assert code == 1 and findings["wandb"]["state"] == "failure" and "tracking.wandb" in findings["wandb"]["remedy"]
    assert examine(world, tmp_path / "run", capsys, "tracking.wandb=off")[1]["wandb"]["state"] == "ok"


def test_tensorboard_that_is_asked_for_and_missing_is_a_failure(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = f"tracking.tensorboard={tmp_path / 'board'}"
    monkeypatch.setattr(tensorboard_run, "find_spec", lambda name: None)
    assert "pip install tensorboard" in failure(world, tmp_path, capsys, "tensorboard", board)
    monkeypatch.setattr(tensorboard_run, "find_spec", lambda name: "there")
    assert examine(world, tmp_path / "run", capsys, board)[1]["tensorboard"]["state"] == "ok"
    assert "tensorboard" not in examine(world, tmp_path / "run", capsys)[1]


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
    named = ("labeler/model.safetensors", str(broken.folder / "policy"), "mrg-r1 doctor")
    assert [name for name in named if name not in said] == []


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


@pytest.mark.parametrize(
    ("zero", "well"),
    [
        ({"stage": 2, "reduce_bucket_size": "auto"}, True),
        ({"stage": 3, "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": "auto"}, True),
        ({"stage": 2, "offload_optimizer": "auto"}, True),
        ({"stage": 2, "reduce_bucket_size": "five"}, False),
        ({"stage": 2, "reduce_bucket_size": None}, False),
        (None, False),
    ],
)
def test_a_deepspeed_value_ends_no_report(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], zero: Any, well: bool
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    code, findings = examine(world, tmp_path / "run", capsys, f"engine.deepspeed={path}")
    assert code == (0 if well else 1) and (findings["deepspeed"]["state"] == "ok") == well
    assert ("memory of the host" in findings) == well and "disk" in findings
    assert well or str(path) in findings["deepspeed"]["text"]


def test_the_flash_attn_package_asked_for_where_it_cannot_be_used(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("policy.attention=flash_attn", "policy.dtype=bfloat16")
    said = failure(world, tmp_path, capsys, "flash-attn", *settings)
    assert "CUDA devices only" in said and "policy.attention=torch" in said
