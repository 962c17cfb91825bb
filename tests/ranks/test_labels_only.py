"""Training on studies that have labels and no report, from the manifest to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.reward.references import FOLDER
from mrg_r1.types import LABELS_ONLY
from tests.labels_only import WEIGHTS, all_of_them, every_other, labels_only

pytestmark = pytest.mark.ranks


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grpo_takes_reference_labels_from_the_manifest_where_there_is_no_report(pool, world, tmp_path):
    manifest, studies = labels_only(world, tmp_path / "mixed", every_other)
    run = tmp_path / "run"
    overrides = [manifest, WEIGHTS, "steps=2", "evaluation.every=1"]
    pool.run("train", recipe=str(world.recipe(run)), overrides=overrides)
    rows = lines(run / "evaluation/test_predictions.jsonl")
    bare = [row for row in rows if row["reference"] is None]
    assert len(rows) == 8 and len(bare) == 4
    assert all(row["reference_labels"] == list(studies[row["id"]].said) for row in bare)
    assert all(row["reference"] == studies[row["id"]].report for row in rows)
    sampled = {row["study"] for path in (run / "completions").iterdir() for row in lines(path)}
    assert any(studies[name].report is None for name in sampled)
    assert all(row["reward/constant"] is not None for row in lines(run / "metrics.jsonl"))
    assert LABELS_ONLY in (run / "page/index.html").read_text()


def test_grpo_on_labels_alone_asks_no_labeler_for_references_and_leaves_the_constant_out(pool, world, tmp_path):
    manifest, _ = labels_only(world, tmp_path / "bare", all_of_them)
    run = tmp_path / "run"
    overrides = [manifest, WEIGHTS, "steps=2", "evaluation.every=2", "reward.ccs_weights=inverse_prevalence"]
    pool.run("train", recipe=str(world.recipe(run)), overrides=overrides)
    assert not (tmp_path / "bare" / FOLDER).exists()
    logged = lines(run / "metrics.jsonl")
    assert len(logged) == 2 and not any("reward/constant" in row for row in logged)
    assert all(row["reward/mccs"] is not None and row["loss"] is not None for row in logged)
    assert "reward/constant is left out" in (pool.folder / "log.txt").read_text()
    after = json.loads((run / "evaluation/test.json").read_text())
    assert after["constant"] == {} and after["n"] == 8 and after["lexical"] is None
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"


def test_sft_leaves_out_studies_without_a_report_and_says_how_many(pool, world, tmp_path):
    manifest, studies = labels_only(world, tmp_path / "mixed", every_other)
    run = tmp_path / "run"
    overrides = [manifest, "steps=2", "evaluation.every=0", "rollout.max_new_tokens=60", WEIGHTS]
    pool.run("sft", recipe=str(world.recipe(run)), overrides=overrides)
    train = [study for study in studies.values() if study.split == "train"]
    bare = sum(study.report is None for study in train)
    said = f"{bare} of {len(train)} training studies have no report: SFT leaves them out"
    assert bare and said in " ".join((pool.folder / "log.txt").read_text().split())
    assert (run / "adapter/adapter_config.json").is_file()
    assert json.loads((run / "evaluation/test.json").read_text())["n"] == 8
