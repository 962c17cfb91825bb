"""A small table whose rows run under a stand-in for the launcher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml

FAKE = f"{shlex.quote(sys.executable)} -m tests.tables.fake_launch"


@pytest.fixture
def table(tmp_path):
    """Writes a table's file, with changes, and gives its path."""

    def write(**changes) -> Path:
        recipe = {"output_dir": "unnamed", "steps": 1, "data": {"manifest": "m.jsonl"}}
        recipe |= {"policy": {"path": str(tmp_path)}, "reward": {"labeler": str(tmp_path)}}
        recipe["optimizer"] = {"learning_rate": 0.01}
        for folder in ("d0", "d1"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "manifest.jsonl").touch()
        for name in ("grpo", "sft"):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        content = {
            "title": "A table",
            "made_on": "phantoms",
            "question": "Which is better?",
            "recipes": {"grpo": "grpo.yaml", "sft": "sft.yaml"},
            "seeds": {0: {"data": f"{tmp_path}/d0"}, 1: {"data": f"{tmp_path}/d1"}},
            "set": {"data.manifest": "{data}/manifest.jsonl"},
            "rows": [
                {"name": "Start", "before": "Four"},
                {"name": "Four", "set": {"grpo.group_size": 4}},
                {"name": "Eight & more", "set": {"grpo.group_size": 8}},
                {
                    "name": "SFT",
                    "task": "sft",
                    "cpu_seconds_of": "Four",
                    "set": {"policy.adapter": "{run:Eight & more}/adapter"},
                },
            ],
            "reference": "Four",
            "columns": [
                "truth:disease_micro13",
                "labeler:Pleural Effusion",
                "evaluation:distinct_share",
                "step:groups/zero_signal",
            ],
        }
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write
