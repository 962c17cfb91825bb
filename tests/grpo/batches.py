"""Batches that the tests of the loss share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mrg_r1.grpo.loss import LossConfig, Metrics, grpo_loss

AGGREGATIONS = ["grpo", "dapo", "dr_grpo"]
CLIP: Any = {"clip_low": 0.2, "clip_high": 0.28}


def by_hand() -> dict[str, Any]:
    """Three sequences with ratios 1.25, 0.5 (A 1), 1.5 (A -2, one token), 1.5, 1 (A 1)."""
    return {
        "logp": torch.tensor([[0.5, 0.25], [0.6, 0.9], [0.6, 0.3]]).log().requires_grad_(),
        "old_logp": torch.tensor([[0.4, 0.5], [0.4, 0.1], [0.4, 0.3]]).log(),
        "reference_logp": None,
        "advantages": torch.tensor([1.0, -2.0, 1.0]),
        "mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "max_length": 4,
        "beta": 0.0,
        **CLIP,
    }


def loss_of(**values: Any) -> tuple[Tensor, Metrics]:
    """`grpo_loss` of a batch and of settings that stand side by side."""
    names = {field.name for field in fields(LossConfig)}
    config = LossConfig(**{name: value for name, value in values.items() if name in names})
    return grpo_loss(**{name: value for name, value in values.items() if name not in names}, config=config)


def mean(metrics: Metrics, name: str) -> float:
    total, count = metrics[name]
    return (total / count).item()
