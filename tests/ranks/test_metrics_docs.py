"""docs/metrics.md names what is logged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mrg_r1.labels.observations import OBSERVATIONS

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
DOCUMENTED = [name for row in ROWS for name in re.findall(r"`([^`]+)`", row)]
PATTERNS = {"OBSERVATION": "|".join(OBSERVATIONS), "TERM": "(mccs|length|format|contradiction)", "PHASE": "[a-z_]+"}
CONDITIONAL = {"validation/held_out_disease_micro13", "validation/hacking_gap"}  # only with evaluation.held_out_labeler
WEIGHTS = "reward.weights={mccs: 0.75, length: 0.25, format: 0.0, contradiction: 0.0}"


def pattern(name: str) -> str:
    for word, choice in PATTERNS.items():
        name = name.replace(word, f"({choice})")
    return name


@pytest.mark.ranks
def test_every_name_logged_is_documented_and_the_other_way_round(pool, world, tmp_path):
    overrides = ["steps=1", "evaluation.every=1", "evaluation.test=false"]
    pool.run(
        "train", recipe=str(world.recipe(tmp_path / "grpo")), overrides=[*overrides, "grpo.correction=tis", WEIGHTS]
    )
    pool.run(
        "sft",
        recipe=str(world.recipe(tmp_path / "sft", name="sft.yaml")),
        overrides=[*overrides, "rollout.max_new_tokens=80"],
    )
    logged = set()
    for run in ("grpo", "sft"):
        for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines():
            logged |= json.loads(line).keys() - {"step"}
    plain = [name for name in DOCUMENTED if name != "time/PHASE"]
    phases = re.split(r",\s+", re.search(r"rank 0 \(([^)]*)\)", TEXT).group(1))
    unknown = [name for name in logged if not any(re.fullmatch(pattern(one), name) for one in plain)]
    assert sorted(name for name in unknown if name.removeprefix("time/") not in phases) == []
    missing = [
        one for one in plain if one not in CONDITIONAL and not any(re.fullmatch(pattern(one), name) for name in logged)
    ]
    assert missing == []
