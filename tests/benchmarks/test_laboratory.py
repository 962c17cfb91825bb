"""The laboratory's units on small tasks: they break here when mrg_r1's inside changes, not in a bench of minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import laboratory
from benchmarks.demo_shaped import SIDE, write_demo_shaped
from benchmarks.task import Task
from benchmarks.workers import WORKER_ENVIRONMENT, Worker
from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.data.study import read_manifest
from mrg_r1.policy.load import load_image_processor, load_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    few = {"splits": {"train": 8, "sft": 8, "val": 2, "test": 2}, "steps": 2}
    assert write_demo_shaped(directory, **few) == write_demo_shaped(directory, **few)
    assert not list(directory.glob("*.tmp"))
    return directory


@pytest.mark.parametrize(
    ("unit", "ranks", "phases"),
    [
        ("gemm", 1, set()),
        ("lab_grpo", 2, {"vision", "rollout", "reference", "update", "labeler_cpu"}),
        ("lab_sft", 1, {"update"}),
        ("lab_sft_modules", 1, {"update"}),
    ],
)
def test_every_unit_runs_and_reports_what_it_took(unit: str, ranks: int, phases: set[str], folder: Path) -> None:
    task = Task(unit=unit, side=SIDE, studies=4, group=2, new_tokens=6, ranks=ranks)
    command = [sys.executable, "-m", "benchmarks.laboratory", str(folder), task.to_json()]
    worker = Worker(command, log=folder / f"{unit}.log", environment=WORKER_ENVIRONMENT)
    try:
        settings = worker.wait_ready(120)["settings"]
        answers = [worker.run(120), worker.run(60)]
    finally:
        worker.close()
    assert all(answer["seconds"] > 0 and phases <= set(answer["phases"]) for answer in answers)
    if unit == "lab_grpo":
        assert settings["rollouts"] == 8 and answers[1]["phases"]["labeler_cpu"] > 0
        assert 0 < settings["length"] <= 6
        assert {"vision", "rollout", "reference", "update"} == set(settings["counted"])


def test_both_sides_of_sft_have_one_loss(folder: Path) -> None:
    """In one process: the engine's pass and transformers' own modules, on the same studies."""
    task = Task(unit="lab_sft", side=SIDE, studies=4)
    recipe = laboratory.make_recipe(folder, task)
    policy = load_policy(recipe.policy.path, dtype=torch.float32)
    policy.requires_grad_(True)
    processor = load_image_processor(
        recipe.policy.path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels
    )
    words = PromptWords(instruction=recipe.prompt.words, show_view=False)
    build = PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=words)
    studies = read_manifest(recipe.data.manifest, split="train")[:4]
    prompts = build(studies)
    targets = [policy.tokenizer(study.report)["input_ids"] + [policy.end_id] for study in studies]
    ids = torch.full((4, max(map(len, targets))), policy.pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, target in enumerate(targets):
        ids[row, : len(target)], mask[row, : len(target)] = torch.tensor(target), True
    passed = (ids, mask, torch.arange(4))
    ours, _ = policy(prompts, policy.encode_images(prompts), *passed)
    laboratory.use_the_checkpoints_modules(policy)
    theirs, _ = policy(prompts, policy.encode_images(prompts), *passed)
    assert torch.allclose(ours, theirs, atol=1e-4)
