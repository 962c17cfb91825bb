"""The loader in real runs: other batches at a resume, rare findings, images read by processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks.test_train import completions, metrics

pytestmark = pytest.mark.ranks


def studies_of_steps(run: Path, steps: range) -> list[list[str]]:
    """Of each step the studies that were sampled, rank after rank."""
    seen = []
    for step in steps:
        texts = [(run / "completions" / f"step_{step:06d}_rank{rank}.jsonl").read_text() for rank in range(2)]
        seen.append([json.loads(line)["study"] for text in texts for line in text.splitlines()][::3])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "rare_findings"])
def test_a_resume_with_smaller_batches_neither_repeats_nor_passes_over_a_study(pool, world, tmp_path, sampling):
    """Two steps of four studies, then two of two and one of four: the same sixteen that four steps of four take."""
    fixed = ["evaluation.test=false", f"data.sampling={sampling}"]
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    pool.run("train", recipe=str(world.recipe(straight)), overrides=fixed)
    recipe = str(world.recipe(changed, name="other.yaml"))
    for steps, batch in ((2, 4), (4, 2), (5, 4)):
        change = ["resume.allow_changes=true", f"steps={steps}", f"grpo.studies_per_step={batch}"]
        pool.run("train", recipe=recipe, overrides=fixed + change)
        (changed / "summary.json").unlink()
    whole = [study for step in studies_of_steps(straight, range(4)) for study in step]
    steps = studies_of_steps(changed, range(5))
    assert [len(step) for step in steps] == [4, 4, 2, 2, 4]
    assert [study for step in steps for study in step] == whole
    if sampling == "uniform":
        assert len(set(whole)) == 16
    assert all(
        0 <= row["time/load_share"] <= 1
        for row in map(json.loads, (straight / "metrics.jsonl").read_text().splitlines())
    )


@pytest.mark.slow
def test_a_run_whose_images_are_read_by_workers_is_the_same_run(pool, world, tmp_path):
    plain, working = tmp_path / "plain", tmp_path / "working"
    for number, run in enumerate((plain, working)):
        recipe = str(world.recipe(run, name=f"{number}.yaml"))
        pool.run("train", recipe=recipe, overrides=["steps=2", f"data.workers={number}", "evaluation.before=false"])
    assert metrics(plain) == metrics(working) and len(metrics(plain)) == 2
    assert completions(plain) == completions(working) and len(completions(plain)) == 4
    files = [(run / "evaluation" / "test_predictions.jsonl").read_text() for run in (plain, working)]
    assert files[0] == files[1]
