"""What was sampled, as the disk keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mrg_r1.tracking.completions import write_completions
from mrg_r1.types import Rewards


def test_a_step_that_is_repeated_clears_what_a_kill_left_of_it(tmp_path: Path) -> None:
    mine, others = tmp_path / ".step_000001_rank0.jsonl.4711.tmp", tmp_path / ".step_000001_rank1.jsonl.4712.tmp"
    mine.write_text('{"text": "half')
    others.write_text('{"text": "half')
    done: Any = SimpleNamespace(texts=[["Clear."]], ended=torch.ones(1, 1), lengths=torch.ones(1, 1))
    prompts: Any = SimpleNamespace(study_ids=["s"])
    rewards = Rewards(torch.ones(1, 1), {}, {}, torch.full((1, 1, 14), -1), [["Clear."]])
    write_completions(tmp_path, step=1, rank=0, prompts=prompts, completions=done, rewards=rewards)
    assert not mine.exists() and others.exists()  # another rank's is its own to clear
    assert json.loads((tmp_path / "step_000001_rank0.jsonl").read_text())["text"] == "Clear."


def test_contradictions_stand_beside_the_labels_where_sentences_were_read(tmp_path: Path) -> None:
    done: Any = SimpleNamespace(texts=[["Clear.", ""]], ended=torch.ones(1, 2), lengths=torch.ones(1, 2))
    prompts: Any = SimpleNamespace(study_ids=["s"])
    labels = torch.stack([torch.zeros(14, dtype=torch.long), torch.full((14,), -1)])[None]
    rewards = Rewards(torch.ones(1, 2), {}, {}, labels, [["Clear.", None]], contradictions=torch.tensor([[2, -1]]))
    write_completions(tmp_path, step=1, rank=0, prompts=prompts, completions=done, rewards=rewards)
    lines = [json.loads(line) for line in (tmp_path / "step_000001_rank0.jsonl").read_text().splitlines()]
    assert lines[0]["contradictions"] == 2 and "contradictions" not in lines[1]
