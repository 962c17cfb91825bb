"""Runs that score in their own process: starting a reward service takes seconds, and few tests are about it."""

from __future__ import annotations

from typing import Any

import pytest

from mrg_r1.engine.ranks import Ranks
from mrg_r1.labels.labeler import Labeler
from mrg_r1.reward.compute import RewardFunction
from mrg_r1.training import rewards as rewarding
from mrg_r1.types import Study
from tests.reward.in_process import InProcessRewards


def score_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone, runs that are opened in this process start no service."""

    def opened(recipe: Any, ranks: Ranks, supervisor: None, studies: dict[str, list[Study]]) -> rewarding.RunRewards:
        reward = recipe.reward
        labeler = Labeler.load(reward.labeler)
        stage = RewardFunction(
            labeler,
            weights=reward.weights,
            margin=reward.margin,
            format_style=reward.format,
            mode=recipe.prompt.mode,
            normalise=reward.normalise,
            outside=rewarding.outside_settings(recipe, threads=1),
        )
        known = {"name": labeler.name, "fingerprint": labeler.fingerprint}
        return rewarding.prepare(recipe, ranks, InProcessRewards(stage), known, None, studies)

    monkeypatch.setattr(rewarding, "start_service", lambda recipe, ranks: None)
    monkeypatch.setattr(rewarding, "open_rewards", opened)
