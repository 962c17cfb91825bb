"""`mrg-r1 export` from the outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import save_adapter
from tests.cli.command import refused, run, usage_error
from tests.conftest import with_lora


@pytest.fixture
def trained(capsys: pytest.CaptureFixture[str], tiny_policy_directory: Path, tmp_path: Path) -> Path:
    """RUN of a recipe with a cold start, as far as an export reads it."""
    run = tmp_path / "run"
    for directory in (run / "adapter", tmp_path / "cold"):
        save_adapter(with_lora(load_policy(tiny_policy_directory, dtype=torch.float32)), directory)
    policy = {"path": str(tiny_policy_directory), "adapter": str(tmp_path / "cold")}
    recipe = {
        "output_dir": str(run),
        "steps": 1,
        "data": {"manifest": "m.jsonl"},
        "policy": policy,
        "reward": {"labeler": "labeler"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()  # transformers' bars
    return run


def test_export_writes_a_checkpoint_and_an_adapter(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    code, output, _ = run(
        capsys, "export", trained, "--merged", tmp_path / "out/merged", "--adapter", tmp_path / "out/adapter"
    )
    assert code == 0 and f"{tmp_path}/out/merged: written" in output and f"{tmp_path}/out/adapter: written" in output
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["r"] == 8, (
        "cold start and adapter, rank 4 each"
    )
    assert "out/merged" in refused(capsys, "export", trained, "--merged", tmp_path / "out/merged")
    load_policy(tmp_path / "out/merged", dtype=torch.float32)


def test_the_card_beside_the_weights_is_ours_and_not_the_bases(
    capsys: pytest.CaptureFixture[str], trained: Path, tiny_policy_directory: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_policy_directory, tmp_path / "base")
    (base / "README.md").write_text("what the base can do")
    merged, adapter = tmp_path / "out/merged", tmp_path / "out/adapter"
    assert run(capsys, "export", trained, "--merged", merged, "--adapter", adapter, "--policy", base)[0] == 0
    for folder, relation in ((merged, "finetune"), (adapter, "adapter")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model_relation == relation and "what the base can do" not in card.text
        assert "Cold start, merged before training: rank 4" in card.text and str(tmp_path) not in card.text
    (adapter / "README.md").write_text("my own words")
    assert "out/adapter" in refused(capsys, "export", trained, "--adapter", adapter, "--policy", base)
    assert (adapter / "README.md").read_text() == "my own words"


def test_export_finds_what_has_moved_where_it_is_told(
    capsys: pytest.CaptureFixture[str], trained: Path, tiny_policy_directory: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((trained / "config.yaml").read_text())
    recipe["policy"]["path"] = str(tmp_path / "gone")
    (trained / "config.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "cold").rename(tmp_path / "moved")
    command = ["export", trained, "--adapter", tmp_path / "out"]
    message = refused(capsys, *command)
    assert f"{tmp_path}/gone" in message and "policy.path" in message and "--policy" in message
    command += ["--policy", tiny_policy_directory]
    message = refused(capsys, *command)
    assert f"{tmp_path}/cold" in message and "policy.adapter" in message and "--cold-start" in message
    assert run(capsys, *command, "--cold-start", tmp_path / "moved")[0] == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_policy_directory
    )


def test_export_of_what_cannot_be_exported_is_refused(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    assert all(option in usage_error(capsys, "export", trained) for option in ("--merged", "--adapter"))
    assert "config.yaml" in refused(capsys, "export", tmp_path, "--merged", tmp_path / "out")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (pickled / "pytorch_model.bin").touch()
    assert "pickled" in refused(capsys, "export", trained, "--merged", tmp_path / "out", "--policy", pickled)
    (trained / "adapter").rename(trained / "other")
    assert "adapter/" in refused(capsys, "export", trained, "--merged", tmp_path / "out")
    recipe = yaml.safe_load((trained / "config.yaml").read_text())
    del recipe["policy"]["adapter"]
    (trained / "config.yaml").write_text(yaml.safe_dump(recipe))
    unused = refused(capsys, "export", trained, "--merged", tmp_path / "out", "--cold-start", tmp_path / "cold")
    assert "policy.adapter" in unused
    assert not (tmp_path / "out").exists()
