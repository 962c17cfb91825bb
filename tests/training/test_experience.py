"""Saved experience: parts of any number of ranks read by any other number, what is refused, and rollout-only runs that
go on.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mrg_r1.config.recipe import RecipeError, check_recipe, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.training import grpo as trainer
from mrg_r1.training import state as state_module
from mrg_r1.training.experience import (
    adapter_folder,
    keep_newest_adapters,
    next_step,
    open_experience,
    prompt_digests,
    write_step,
)
from mrg_r1.types import Completions, ImageInputs, Prompts, Rewards, Sampled, Study
from tests.conftest import OneRank, World, make_study


class Numbered(OneRank):
    """One of several ranks, which need not meet."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "world_size", world_size)


class FakeTokenizer:
    pad_token_id = 7


class FakeBuild:
    """A prompt that says its study's id and its first image, without a tokenizer."""

    tokenizer = FakeTokenizer()

    def __call__(self, studies: list[Study]) -> Prompts:
        rows = len(studies)
        ids = torch.tensor([[0, *study.id.encode()[-3:]] for study in studies])
        images = [
            torch.tensor(Image.open(study.images[0].path).getdata(), dtype=torch.float32)[:4].view(1, 4)
            for study in studies
        ]
        return Prompts(
            [study.id for study in studies],
            [study.report for study in studies],
            ids,
            torch.tensor([[0, 1, 1, 1]] * rows),
            torch.zeros(rows, 4, 3, dtype=torch.long),
            torch.full((rows,), 3),
            ImageInputs({"pixels": torch.cat(images)}, {"pixels": [1] * rows}),
            [1] * rows,
        )


@pytest.fixture
def studies(tmp_path) -> list[Study]:
    return [make_study(tmp_path, f"s{number:02d}", [(28, 28)]) for number in range(4)]


@pytest.fixture
def recipe(world: World, tmp_path):
    """For four studies of three members."""
    return load_recipe(
        world.recipe(tmp_path / "run"), ["phases=update", f"experience={tmp_path}/experience", "steps=2"]
    )


def sampled_of(studies: list[Study], *, first: int, length: int, step: int = 0, rewarded: bool = True) -> Sampled:
    """Studies number `first` and on: every number says its study and member."""
    rows = len(studies)
    ids = (
        1000 * (first + torch.arange(rows))[:, None, None]
        + 10 * torch.arange(3)[:, None]
        + torch.arange(length)
        + 100_000 * step
    )
    mask = torch.arange(length) < torch.arange(1, 4)[None, :, None].expand(rows, 3, 1)
    total = (first + torch.arange(rows))[:, None] + 0.1 * torch.arange(3)
    made = Rewards(
        total=total,
        terms={"mccs": total / 2, "a.b:c": total / 4},
        weights={"mccs": 0.75, "a.b:c": 0.0},
        labels=torch.arange(rows * 3 * 14).view(rows, 3, 14) % 4,
        report_texts=[["r", None, f"{study.id}"] for study in studies],
        reference_labels=torch.full((rows, 14), first),
        constant={"total": total[:, 0]},
        contradictions=(first + torch.arange(rows))[:, None] * 10 + torch.arange(3),
    )
    # a lone surrogate: a policy can sample it
    texts = [[f"{study.id}-{g}\ud800" for g in range(3)] for study in studies]
    done = Completions(ids, mask, -ids.float(), mask.all(-1), texts)
    return Sampled(
        FakeBuild()(studies), done, made if rewarded else None, reference_logp=ids.float(), old_logp=ids.float() + 1
    )


def write(folder: Path, studies: list[Study], recipe, *, ranks: int = 2, step: int = 0, **options) -> None:
    share = len(studies) // ranks
    for rank in range(ranks):
        part = studies[rank * share : (rank + 1) * share]
        sampled = sampled_of(part, first=rank * share, length=4 + rank, step=step, rewarded="problem" not in options)
        write_step(folder, step, sampled, recipe=recipe, ranks=Numbered(rank, ranks), **options)


def read(folder: Path, recipe, studies: list[Study], *, ranks: int, number: int = 0) -> list[tuple[Sampled, Rewards]]:
    saved = open_experience(folder, recipe)
    by_id = {study.id: study for study in studies}
    return [saved.read(number, build=FakeBuild(), studies=by_id, ranks=Numbered(rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_what_some_ranks_wrote_others_read_in_the_global_order(studies, recipe, tmp_path, writers, readers):
    folder = tmp_path / "experience"
    for step in range(2):
        write(folder, studies, recipe, ranks=writers, step=step)
    seen = []
    for sampled, rewards in read(folder, recipe, studies, ranks=readers, number=1):
        done = sampled.completions
        for row, study in enumerate(sampled.prompts.study_ids):
            number = int(study[1:])
            seen.append(number)
            for g in range(3):
                kept = done.mask[row, g]
                ids = done.token_ids[row, g][kept]
                assert ids.tolist() == [100_000 + 1000 * number + 10 * g + t for t in range(g + 1)]
                assert torch.equal(done.logp[row, g][kept], -ids.float()) and not done.mask[row, g, g + 1 :].any()
                assert torch.equal(sampled.reference_logp[row, g][kept], ids.float())
                assert torch.equal(sampled.old_logp[row, g][kept], ids.float() + 1)
                assert done.texts[row][g] == f"{study}-{g}\ud800" and rewards.total[row, g] == pytest.approx(
                    number + 0.1 * g
                )
            assert rewards.report_texts[row] == ["r", None, study] and rewards.constant["total"][row] == number
            assert rewards.terms["a.b:c"][row, 2] == pytest.approx((number + 0.2) / 4)
            assert rewards.contradictions[row].tolist() == [10 * number + g for g in range(3)]
            assert rewards.weights == {"mccs": 0.75, "a.b:c": 0.0} and rewards.labels.dtype == torch.int64
    assert seen == [0, 1, 2, 3]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def refused(path: Path, recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        open_experience(path, recipe)
    return str(caught.value)


def test_a_missing_or_damaged_part_is_named(studies, recipe, tmp_path):
    folder = tmp_path / "experience"
    assert f"experience {folder}: no saved experience there" in refused(folder, recipe)
    for step in range(2):
        write(folder, studies, recipe, step=step)
    tensors = folder / "step_000001_rank1.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    assert f"{tensors}: damaged" in refused(folder, recipe)
    tensors.unlink()
    assert f"{tensors}: missing; a step has a part of each rank" in refused(folder, recipe)
    write(folder, studies, recipe, step=1)
    record = folder / "step_000000_rank1.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"recipe": content["recipe"] | {"seed": 5}}))
    assert f"{record}: its recipe is not that of rank 0's part" in refused(folder, recipe)
    record.write_text(record.read_text()[:50])
    assert f"{record}: damaged" in refused(folder, recipe)
    record.write_text(json.dumps(content | {"format": 2}))
    assert "format 2, this version reads 1" in refused(folder, recipe)


def test_parts_that_more_ranks_had_left_are_not_read(studies, recipe, tmp_path):
    folder = tmp_path / "experience"
    for ranks in (4, 2):
        for step in range(2):
            write(folder, studies, recipe, ranks=ranks, step=step)
    assert [part["rank"] for part in open_experience(folder, recipe).steps[0]] == [0, 1]


def test_too_few_steps_and_other_sizes_are_refused_with_the_value_to_set(studies, recipe, tmp_path):
    folder = tmp_path / "experience"
    write(folder, studies, recipe)
    assert "1 saved step(s), steps is 2; set steps=1" in refused(folder, recipe)
    one = recipe.model_copy(update={"steps": 1})
    assert len(open_experience(folder / "step_000000_rank1.safetensors", one).steps) == 1
    for key, value, there in (("group_size", 4, 3), ("studies_per_step", 8, 4)):
        other = one.model_copy(update={"grpo": one.grpo.model_copy(update={key: value})})
        assert f"grpo.{key} is {there} there and {value} in the recipe; set grpo.{key}={there}" in refused(
            folder, other
        )


def test_another_manifest_policy_or_prompt_is_named(studies, recipe, world, tmp_path):
    """And learned from all the same where that is meant."""
    folder = tmp_path / "experience"
    for step in range(2):
        write(folder, studies, recipe, step=step)
    shutil.copytree(world.folder / "policy", tmp_path / "policy")
    weights = tmp_path / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    # weights all over, the file's size kept
    content[100_000::4096] = bytes(256 - byte if byte else 1 for byte in content[100_000::4096])
    weights.write_bytes(content)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text((world.folder / "phantoms" / "manifest.jsonl").read_text() + "\n")
    changed = ["prompt.mode=think", "data.max_pixels=6272", "rollout.temperature=0.5", f"policy.path={tmp_path}/policy"]
    changed += [
        f"data.manifest={manifest}",
        "phases=update",
        f"experience={folder}",
        "steps=2",
        "optimizer.learning_rate=1.0",
    ]
    other = load_recipe(world.recipe(tmp_path / "run"), changed)
    message = refused(folder, other)
    for line in ("prompt.mode: plain -> think", "data.max_pixels: 3136 -> 6272", "rollout.temperature: 1.0 -> 0.5"):
        assert f"  {line}\n" in message
    assert (
        f"  data.manifest {manifest}: fingerprint " in message
        and f"  policy.path {tmp_path}/policy: fingerprint " in message
    )
    assert "learning_rate" not in message and "resume.allow_changes=true" in message
    meant = other.model_copy(update={"resume": other.resume.model_copy(update={"allow_changes": True})})
    assert len(open_experience(folder, meant).steps) == 2


def test_a_study_that_is_gone_or_whose_image_has_changed_is_named(studies, recipe, tmp_path):
    folder = tmp_path / "experience"
    for step in range(2):
        write(folder, studies, recipe, step=step)
    with pytest.raises(RecipeError, match="step 0: study s03 is not in split 'train'"):
        read(folder, recipe, studies[:3], ranks=1)
    Image.new("L", (28, 28), 255).save(studies[2].images[0].path)
    with pytest.raises(RecipeError, match="step 0: the prompt of study s02 is not the one that was sampled for"):
        read(folder, recipe, studies, ranks=2)
    meant = recipe.model_copy(update={"resume": recipe.resume.model_copy(update={"allow_changes": True})})
    assert len(read(folder, meant, studies, ranks=2)) == 2


def test_a_batch_without_rewards_says_why(studies, recipe, tmp_path):
    one = recipe.model_copy(update={"steps": 1})
    write(
        tmp_path / "not_finite",
        studies,
        recipe,
        problem="rank 1: reward term 'x' is not finite for studies s03 (member 2: nan)",
    )
    assert "no rewards to learn from: rank 1: reward term 'x' is not finite" in refused(tmp_path / "not_finite", one)


def test_steps_with_weights_of_their_own_are_taken_one_at_a_time(studies, recipe, tmp_path):
    folder = tmp_path / "not_finite"
    for step in range(2):
        write(folder, studies, recipe, step=step, own_weights=True)
        adapter_folder(folder, step).mkdir()
    assert f"give one step's file, as {folder}/step_000000_rank0.json, and steps=1" in refused(folder, recipe)
    one = recipe.model_copy(update={"steps": 1})
    assert open_experience(folder / "step_000001_rank0.json", one).adapter == adapter_folder(folder, 1)
    keep_newest_adapters(folder, 1)
    assert (
        not adapter_folder(folder, 0).exists()
        and adapter_folder(folder, 1).exists()
        and (folder / "step_000000_rank0.json").exists()
    )
    assert "missing (only the newest are kept)" in refused(folder / "step_000000_rank0.json", one)
    lora = one.policy.lora.model_copy(update={"rank": 8})
    other = one.model_copy(update={"policy": one.policy.model_copy(update={"lora": lora})})
    assert "policy.lora.rank: 4 -> 8" in refused(folder / "step_000001_rank0.json", other)


def test_prompts_differ_by_words_images_and_grids_and_not_by_padding(studies):
    prompts = FakeBuild()(studies)
    digests = prompt_digests(prompts)
    assert len(set(digests)) == 4 and prompt_digests(prompts.select([3, 1])) == [digests[3], digests[1]]
    wider = replace(
        prompts,
        input_ids=torch.nn.functional.pad(prompts.input_ids, (5, 0), value=9),
        attention_mask=torch.nn.functional.pad(prompts.attention_mask, (5, 0)),
    )
    assert prompt_digests(wider) == digests
    ids, images = prompts.input_ids.clone(), copy.deepcopy(prompts.images)
    ids[1, 2] += 1
    images.tensors["pixels"][1, 0] += 1
    for changed in (replace(prompts, input_ids=ids), replace(prompts, images=images)):
        found = prompt_digests(changed)
        assert [a != b for a, b in zip(found, digests, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("overrides", "task", "words"),
    [
        (["phases=update"], "grpo", "phases update without experience: give RUN/experience"),
        (["experience=a"], "grpo", "experience a with phases all: only phases=update reads it"),
        (["experience=a", "phases=rollout"], "grpo", "experience a with phases rollout"),
        (["phases=rollout"], "sft", "phases rollout: only launch/train.py has phases; launch/sft.py wants phases=all"),
        (["phases=update", "experience=a"], "evaluate", "launch/evaluate.py wants phases=all experience=null"),
    ],
)
def test_phases_that_contradict_are_refused(world, tmp_path, overrides, task, words):
    with pytest.raises(RecipeError, match=words):
        check_recipe(load_recipe(world.recipe(tmp_path / "run"), overrides), world_size=1, task=task)


def test_only_an_update_needs_no_labeler(world, tmp_path):
    for overrides, needed in ((["phases=update", "experience=a"], False), (["phases=rollout"], True), ([], True)):
        recipe = load_recipe(world.recipe(tmp_path / "run"), ["reward.labeler=/no/such", *overrides])
        if needed:
            with pytest.raises(RecipeError, match="reward.labeler /no/such"):
                check_recipe(recipe, world_size=1, task="grpo")
        else:
            check_recipe(recipe, world_size=1, task="grpo")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_rollout_only_run_goes_on_at_the_first_step_that_is_not_whole(world, tmp_path, inline_rewards, monkeypatch):
    """No engine, no weights; the same bytes whether it was interrupted or not; another recipe is refused."""
    monkeypatch.setattr(state_module, "build_engine", lambda run: pytest.fail("an engine was built"))
    monkeypatch.setattr(trainer, "Signals", lambda: type("Signals", (), {"received": None, "deferring": False})())
    path, run = world.recipe(tmp_path / "run"), tmp_path / "run"

    def start(*overrides: str) -> list[int]:
        (run / "summary.json").unlink(missing_ok=True)
        taken = []
        inner = trainer.rollout_step
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "rollout_step", lambda step, **rest: taken.append(step) or inner(step, **rest))
            trainer.train(load_recipe(path, ["phases=rollout", "steps=3", *overrides]), OneRank())
        return taken

    assert start() == [0, 1, 2]
    whole, logged = content_of(run / "experience"), (run / "metrics.jsonl").read_text().count("\n")
    assert logged == 3 and len(whole) == 6 and json.loads((run / "summary.json").read_text())["zero_stage"] is None
    assert not (run / "adapter").exists() and not (run / "checkpoints").exists() and not (run / "evaluation").exists()
    assert "ZeRO" not in (run / "page" / "index.html").read_text()
    (run / "experience" / "step_000001_rank0.json").unlink()
    assert start() == [1, 2] and content_of(run / "experience") == whole
    assert (run / "metrics.jsonl").read_text().count("\n") == 3
    damaged = run / "experience" / "step_000002_rank0.safetensors"
    damaged.write_bytes(b"cut off")
    assert start() == [2] and content_of(run / "experience") == whole
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))  # killed between the step and its line
    assert (
        start() == [2]
        and content_of(run / "experience") == whole
        and (run / "metrics.jsonl").read_text().count("\n") == 3
    )
    with pytest.raises(RecipeError, match="step 0 was sampled under another recipe:\n  seed: 0 -> 1\n"):
        start("seed=1")
    assert start("optimizer.learning_rate=1.0", "engine.micro_batch_tokens=7") == []
    recipe = load_recipe(path, ["phases=rollout", "steps=5"])
    assert next_step(run, recipe, OneRank()) == 3
    studies = {study.id: study for study in read_manifest(world.folder / "phantoms/manifest.jsonl")}
    parts = open_experience(
        run / "experience", load_recipe(path, ["phases=update", f"experience={run}/experience", "steps=3"])
    ).steps
    assert all(study in studies for (part,) in parts for study in part["studies"])
    assert yaml.safe_load((run / "config.yaml").read_text())["phases"] == "rollout"
