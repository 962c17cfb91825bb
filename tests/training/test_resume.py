"""A run that goes on: changed recipes, damaged checkpoints, a full disk, what is kept."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch

import mrg_r1.engine.checkpoint as checkpoint
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.engine.checkpoint import CheckpointError, latest_step, recorded_recipe, save_checkpoint
from mrg_r1.training.resume import check_changes, differences, what_rounds_otherwise
from tests.conftest import OneRank


class SmallEngine:
    """As much of an engine as the files of a checkpoint need."""

    ranks, stage = OneRank(), 2


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Checkpoints of a vector that holds the step, without DeepSpeed."""
    monkeypatch.setattr(checkpoint, "gather_state", lambda engine: {"live/a": engine.tensor})
    monkeypatch.setattr(checkpoint, "optimizer_steps", lambda engine: 1)
    folder = tmp_path / "checkpoints"

    def save(step, **options):
        engine = SmallEngine()
        engine.tensor = torch.full((4,), float(step))
        save_checkpoint(
            engine, folder, step=step, extra=options.pop("extra", {}), keep=options.pop("keep", 2), **options
        )
        return folder

    return save


@pytest.fixture
def load(monkeypatch):
    """What a resume takes: the record and the tensor, and what was said."""

    def run(folder, **options):
        taken, said = [], []
        engine = SmallEngine()
        engine.trainable = {}
        monkeypatch.setattr(checkpoint, "scatter_state", lambda engine, state, steps: taken.append(state))
        monkeypatch.setattr(checkpoint, "load_file", lambda path: taken.append(path.parent.name) or {})
        record = checkpoint.load_checkpoint(engine, folder, say=said.append, **options)
        return record, taken, said

    return run


def test_the_last_ones_and_the_best_are_kept(write):
    for step in (2, 4, 6, 8, 10):
        folder = write(step, best=4)
    assert (
        sorted(path.name for path in folder.iterdir()) == ["latest", "step_10", "step_4", "step_8"]
        and latest_step(folder) == 10
    )


def test_a_damaged_checkpoint_is_passed_over_and_named(write, load):
    for step in (2, 4, 6):
        folder = write(step, keep=3)
    file = folder / "step_6" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"\xff\xff\xff")
    record, taken, said = load(folder)
    assert record["step"] == 4 and taken[0] == "step_4"
    assert said == [
        f"{folder}/step_6: state.safetensors is damaged (its digest is not the recorded one); step_4 is used instead"
    ]
    (folder / "step_4" / "state.json").write_text("{")
    assert load(folder)[0]["step"] == 2
    shutil.rmtree(folder / "step_2")
    with pytest.raises(
        CheckpointError,
        match="(?s)step_6: state.safetensors is damaged.*step_4: state.json is damaged.*remove the folder",
    ):
        load(folder)
    shutil.rmtree(folder)
    assert load(folder)[0] is None


def test_latest_that_points_nowhere_is_not_trusted(write, load):
    folder = write(2)
    (folder / "latest").write_text("step_9")
    record, _, said = load(folder)
    assert record["step"] == 2 and "step_9: state.json is missing; step_2 is used instead" in said[0]


@pytest.mark.parametrize("stage", ["tensors", "rename"])
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so_on_every_rank(write, load, monkeypatch, stage):
    folder = write(2)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((checkpoint, "save_tensors") if stage == "tensors" else (checkpoint.os, "replace")), full)
        with pytest.raises(
            CheckpointError, match=r"step_4: .*No space left on device.*step_2 is whole and is what a resume takes"
        ):
            write(4)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_2"] and load(folder)[0]["step"] == 2
    assert latest_step(write(6)) == 6  # and once there is room again, it goes on


def test_what_a_kill_left_half_written_is_cleared(write, load):
    folder = write(2)
    (folder / ".step_4.tmp").mkdir()
    (folder / ".step_4.tmp" / "state.safetensors").write_bytes(b"half")
    assert load(folder)[0]["step"] == 2
    write(6)
    assert not list(folder.glob(".step_*"))


def recipe_of(world, tmp_path, *overrides):
    return load_recipe(world.recipe(tmp_path / "run"), overrides)


def test_a_changed_recipe_is_shown_and_refused(world, tmp_path, write):
    before = recipe_of(world, tmp_path)
    write(2, extra={"recipe": before.model_dump(mode="json")})
    (tmp_path / "run").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "run" / "checkpoints")
    check_changes(before, OneRank())
    free = [
        "steps=9",
        "evaluation.every=3",
        "tracking.wandb=offline",
        "checkpoint.every=7",
        "engine.micro_batch_tokens=50",
    ]
    check_changes(recipe_of(world, tmp_path, *free), OneRank())
    changed = recipe_of(world, tmp_path, "grpo.beta=0.5", "reward.weights={ccs: 1.0}", "optimizer.learning_rate=1e-5")
    with pytest.raises(RecipeError) as caught:
        check_changes(changed, OneRank())
    assert "grpo.beta: 0.02 -> 0.5" in str(caught.value) and "optimizer.learning_rate: 0.01 -> 1e-05" in str(
        caught.value
    )
    assert "-> {'ccs': 1.0}" in str(caught.value) and "resume.allow_changes=true" in str(caught.value)
    check_changes(recipe_of(world, tmp_path, "grpo.beta=0.5", "resume.allow_changes=true"), OneRank())
    scheduled = recipe_of(world, tmp_path, "optimizer.schedule=cosine")
    write(4, extra={"recipe": scheduled.model_dump(mode="json")}).rename(tmp_path / "again")
    assert differences(
        recorded_recipe(tmp_path / "again"), recipe_of(world, tmp_path, "optimizer.schedule=cosine", "steps=9")
    ) == ["steps: 4 -> 9"]


def test_a_field_that_is_younger_than_the_checkpoint_counts_as_its_default(world, tmp_path):
    recipe = recipe_of(world, tmp_path)
    old = json.loads(json.dumps(recipe.model_dump(mode="json")))
    del old["reward"]["ccs_weights"], old["resume"]
    assert differences(old, recipe) == []
    assert differences(old, recipe_of(world, tmp_path, "reward.ccs_weights=inverse_prevalence")) == [
        "reward.ccs_weights: equal -> inverse_prevalence"
    ]


def test_other_ranks_another_stage_and_other_passes_are_said(world, tmp_path):
    recipe = recipe_of(world, tmp_path)
    record = {"world_size": 2, "zero_stage": 2, "recipe": recipe.model_dump(mode="json")}
    assert what_rounds_otherwise(record, recipe, world_size=2, stage=2) == []
    other = recipe_of(world, tmp_path, "engine.micro_batch_tokens=50")
    reasons = what_rounds_otherwise(record, other, world_size=4, stage=1)
    assert reasons == ["ZeRO stage 2 -> 1", "2 -> 4 ranks", "engine.micro_batch_tokens: 96 -> 50"]


def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(write, load):
    folder = write(2, extra={"best": None})
    assert load(folder, needed=("best",))[0]["best"] is None
    with pytest.raises(CheckpointError, match="step_2.*'seconds'.*another version.*another output_dir"):
        load(folder, needed=("best", "seconds"))


def test_a_checkpoint_of_version_0_1_0_belongs_to_its_run(world, tmp_path, write):
    recipe = recipe_of(world, tmp_path)
    old = recipe.model_dump(mode="json")
    for name in ("labeler", "tokenizer", "device"):
        old["evaluation"]["judge" if name == "labeler" else f"judge_{name}"] = old["evaluation"].pop(f"held_out_{name}")
    write(2, extra={"recipe": old})
    (tmp_path / "run").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "run" / "checkpoints")
    check_changes(recipe, OneRank())
    record = {"world_size": 2, "zero_stage": 2, "recipe": old}
    assert what_rounds_otherwise(record, recipe, world_size=2, stage=2) == []
