"""A tiny policy's tower is taught to see: it then tells findings apart, and what cannot be taught is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import read_manifest
from mrg_r1.policy.family import find_family
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.training import seeing
from mrg_r1.types import Study, StudyImage
from tests.world import few_texts

SIDE = 56


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with few_texts():
        return write_phantoms(
            tmp_path_factory.mktemp("films"),
            preset="five",
            seed=0,
            side=SIDE,
            splits={"train": 200, "val": 60},
            workers=1,
        )


@pytest.fixture(scope="module")
def studies(films: Path) -> dict[str, list[Study]]:
    return {split: read_manifest(films, split=split) for split in ("train", "val")}


def untaught(folder: Path, family: str = "qwen2_5_vl") -> Path:
    find_family(family).create_tiny(folder, ["No nodule.", "Write."], image_side=SIDE, hidden=64, layers=2, seed=0)
    return folder


def teach(folder: Path, studies: dict[str, list[Study]], **settings: Any) -> dict:
    return seeing.teach_tower(folder, studies["train"], studies["val"], image_side=SIDE, **settings)


@pytest.mark.parametrize(
    ("family", "head"),
    [("qwen2_5_vl", "tokens"), pytest.param("qwen3_vl", "tokens", marks=pytest.mark.slow), ("qwen2_5_vl", "mean")],
)
def test_a_taught_tower_tells_findings_apart_and_the_language_model_is_as_it_was(
    tmp_path: Path, studies: dict[str, list[Study]], family: str, head: str
) -> None:
    policy = untaught(tmp_path / "policy", family)
    before = load_policy(policy, dtype=torch.float32).state_dict()
    summary = teach(policy, studies, steps=50 if head == "mean" else 25, head=head)
    assert (
        summary["head"] == head
        and summary["labels"] == "drawn"
        and summary["images"] == 200
        and summary["watched_studies"] == 60
    )
    assert len(summary["auc"]) == 5 and summary["mean_auc"] > 0.6
    written = json.loads((policy / "training.json").read_text())["tower"]
    assert written == summary
    best = max(summary["curve"], key=lambda look: look["mean_auc"])
    assert summary["mean_auc"] == best["mean_auc"] and summary["steps"] == best["step"]
    after = load_policy(policy, dtype=torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".visual." in name for name in changed)


def test_the_tower_of_the_best_look_stays(
    tmp_path: Path, studies: dict[str, list[Study]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeing, "LOOK_EVERY", 1)
    kept = []
    areas = iter([0.6, 0.7, 0.65, 0.6, 0.5])

    def look(sight: seeing._Sight, others: seeing.Films) -> dict[str, float]:
        kept.append(sight.weights())
        return {"Cardiomegaly": next(areas)}

    monkeypatch.setattr(seeing, "_look", look)
    policy = untaught(tmp_path / "policy")
    summary = teach(policy, studies, steps=100)
    assert [row["mean_auc"] for row in summary["curve"]] == [0.6, 0.7, 0.65, 0.6, 0.5]  # three without a better one
    assert summary["steps"] == 2 and summary["mean_auc"] == 0.7
    tower = load_policy(policy, dtype=torch.float32).base.model.visual.state_dict()
    assert all(torch.equal(tower[name], kept[1][f"0.{name}"]) for name in tower)
    assert any(not torch.equal(kept[1][f"0.{name}"], kept[4][f"0.{name}"]) for name in tower)


def test_said_labels_teach_where_nothing_is_drawn_and_a_tenth_is_held_out(
    tmp_path: Path, studies: dict[str, list[Study]]
) -> None:
    said = [replace(study, drawn=None) for study in studies["train"]]
    summary = seeing.teach_tower(untaught(tmp_path / "policy"), said, [], image_side=SIDE, steps=2)
    assert summary["labels"] == "said" and summary["studies"] == 180 and summary["watched_studies"] == 20


def test_a_mean_head_reads_as_many_numbers_as_one_token_has(tmp_path: Path, studies: dict[str, list[Study]]) -> None:
    policy = load_policy(untaught(tmp_path / "policy"), dtype=torch.float32)
    processor = load_image_processor(tmp_path / "policy", min_pixels=56 * 56, max_pixels=SIDE**2)
    films = seeing._films(studies["val"], policy, processor, "drawn")
    placed, pooled = (seeing._Sight(policy, films, [1], seed=0, pooled=pooled) for pooled in (False, True))
    width = policy.base.config.text_config.hidden_size
    assert pooled.heads["frontal"].in_features == width < placed.heads["frontal"].in_features
    with torch.no_grad():
        every = placed._features(films.images[0])
        assert torch.allclose(pooled._features(films.images[0]), every.view(1, -1, width).mean(1), atol=1e-6)


def test_what_cannot_be_taught_is_refused(tmp_path: Path, studies: dict[str, list[Study]]) -> None:
    bare = replace(studies["train"][0], drawn=None, said=None)
    with pytest.raises(ValueError, match=rf"study {bare.id}: no labels .*mrg-r1 label"):
        seeing.labels_of([bare])
    with pytest.raises(ValueError, match="no studies"):
        seeing.labels_of([])
    with pytest.raises(ValueError, match="head 'max'.*tokens and mean"):
        teach(untaught(tmp_path / "policy"), studies, steps=2, head="max")
    healthy = {split: [replace(s, drawn=(0,) * 14) for s in part] for split, part in studies.items()}
    with pytest.raises(ValueError, match="no observation of labels.drawn"):
        teach(untaught(tmp_path / "policy"), healthy, steps=2)


def test_images_that_one_head_cannot_take_are_refused_before_the_first_step(
    tmp_path: Path, studies: dict[str, list[Study]]
) -> None:
    wide = tmp_path / "wide.png"
    Image.open(studies["val"][0].images[0].path).resize((112, 56)).save(wide)
    odd = replace(studies["val"][0], images=(StudyImage(wide, "frontal"),))
    with pytest.raises(ValueError, match="images of several sizes"):
        teach(untaught(tmp_path / "policy"), {**studies, "val": [*studies["val"], odd]}, steps=2)
    lateral = replace(studies["val"][0], images=(replace(studies["val"][0].images[0], view="lateral"),))
    with pytest.raises(ValueError, match="view 'lateral' is in the watched studies"):
        teach(untaught(tmp_path / "other"), {**studies, "val": [*studies["val"], lateral]}, steps=2)


def test_the_command_writes_a_taught_policy_or_none(
    tmp_path: Path, films: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", "tiny-policy", "--manifest", str(films), "--side", str(SIDE), "--teach-tower", str(films)]
    assert main([*command, "-o", str(tmp_path / "seeing"), "--teach-steps", "3"]) in (0, None)
    said = capsys.readouterr().out
    assert "200 images by drawn labels for 3 steps" in said and "Pneumothorax" in said
    assert (tmp_path / "seeing/training.json").is_file() and (tmp_path / "seeing/config.json").is_file()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seeing, "teach_tower", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "-o", str(tmp_path / "half")])
    assert not (tmp_path / "half/config.json").exists()
    untaught_again = [*command[:-2], "-o", str(tmp_path / "seeing")]
    assert main(untaught_again) in (0, None)
    assert not (tmp_path / "seeing/training.json").exists()  # it told of a tower that is no more
    assert main([*untaught_again, "--teach-steps", "3"]) != 0
    assert "--teach-tower" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "none"), "--teach-split", "tests"]) != 0
    assert "tests" in capsys.readouterr().err and not (tmp_path / "none").exists()
