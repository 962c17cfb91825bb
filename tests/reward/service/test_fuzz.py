"""Bad text: never an exception, never a reward outside its range, never think text at the labeler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrg_r1.report_format import Mode
from mrg_r1.reward.compute import RewardContext, RewardFunction
from mrg_r1.reward.terms import BUILT_IN
from mrg_r1.tracking.completions import write_completions
from tests.reward.in_process import InProcessRewards
from tests.reward.keyword_labeler import KeywordLabeler

TAGS = ["<think>", "</think>", "<report>", "</report>", "< think>", "<THINK>", "</report", "<report/>"]
ODD = [
    "",
    " ",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "\udfff",
    "\u202e",
    "\ufeff",
    "نص",
    "报告",
    "🫁",
    "\r\n",
    "<",
    ">",
    "&amp;",
    "\\",
    '"',
    "{}",
]
WEIGHTS = {name: 1.0 for name in BUILT_IN}


@st.composite
def completions(draw: st.DrawFn) -> tuple[str, set[str]]:
    """A completion, and the words that stand where a `<think>` is open: to its `</think>`, or to the end."""
    pieces = draw(st.lists(st.sampled_from([*TAGS, *ODD, "WORD", "WORD", "WORD"]) | st.text(max_size=5), max_size=14))
    text, thoughts, thinking = "", set(), False
    for number, piece in enumerate(pieces):
        if piece == "WORD":
            piece = f" word{number} "
            if thinking:
                thoughts.add(piece.strip())
        text += piece
        for tag in re.findall(r"</?think>", piece):
            thinking = tag == "<think>"
    return text, thoughts


@settings(max_examples=300, deadline=None)
@given(st.lists(completions(), min_size=1, max_size=3), st.sampled_from(["binary", "graded"]), st.booleans())
def test_whatever_a_policy_writes_is_scored_and_its_thoughts_are_not_labelled(
    written: list[tuple[str, set[str]]], style: Any, ended: bool
) -> None:
    labeler = KeywordLabeler()
    function = RewardFunction(labeler, weights=WEIGHTS, format_style=style)
    texts = [[text for text, _ in written]]
    context = RewardContext(constant="no effusion", thresholds=np.full(13, 0.4))
    rewards = function.score(texts, torch.full((1, len(written)), ended), ["edema \udc80"], context)
    labelled = " ".join(text for call in labeler.calls for text in call).split()
    assert not set(labelled) & {word for _, thoughts in written for word in thoughts}
    for values in rewards.terms.values():
        assert torch.isfinite(values).all() and (values >= -1).all() and (values <= 1).all()
    for report, mccs in zip(rewards.report_texts[0], rewards.terms["mccs"][0], strict=True):
        assert report is not None or mccs == 0


LONG = "no effusion. " * 8000  # 104,000 characters


@pytest.mark.parametrize("mode", ["think", "plain"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "\x00",
        "\ud800",
        LONG,
        "x" * 100_000,
        f"<think>a</think><report>{LONG}</report>",
        "<report>" * 5000,
        "<think>" + LONG,
    ],
    ids=["empty", "space", "null", "surrogate", "long", "one word", "long report", "tags", "unclosed"],
)
def test_odd_completions_pass_the_real_labeler_and_are_written_down(
    text: str, mode: Mode, world: Any, tmp_path: Path
) -> None:
    from mrg_r1.labels.labeler import Labeler

    service = InProcessRewards(RewardFunction(Labeler.load(world.folder / "labeler"), weights=WEIGHTS, mode=mode))
    ended = torch.ones(1, 2, dtype=torch.bool)
    context = RewardContext(thresholds=np.full(13, 0.4))
    rewards = service.result(service.submit([[text, "edema"]], ended, ["s"], ["The heart is enlarged."], context))
    assert torch.isfinite(rewards.total).all()
    done: Any = SimpleNamespace(texts=[[text, "edema"]], ended=ended, lengths=torch.ones(1, 2))
    # type: ignore[arg-type]
    write_completions(
        tmp_path, step=0, rank=0, prompts=SimpleNamespace(study_ids=["s"]), completions=done, rewards=rewards
    )
    first = json.loads((tmp_path / "step_000000_rank0.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["text"] == text
