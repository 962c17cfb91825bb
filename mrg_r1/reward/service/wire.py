"""What the reward service and its ranks say to each other: JSON over a Unix socket. No pickle, and any string survives.

Requests of a rank, each answered on the same connection, answers in the order of the requests:
    {"kind": "score", "id", "texts", "ended", "study_ids", "references", "context"}
        -> {"id", "rewards", "busy", "asked", "computed"}
    {"kind": "label", "id", "texts"}
        -> {"id", "classes", "busy", "asked", "computed"}
Either is answered with {"id", "error", "not_finite", ...} where it failed; every answer has "notes", warnings to print.
And, answered at once by another thread or not at all:
    {"kind": "ping"} -> {"pong": ids that are queued or at work, "working": seconds}
    {"kind": "hint", "texts"}, {"kind": "bye"}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrg_r1.reward.compute import RewardContext
from mrg_r1.types import Rewards

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """JSON in ASCII: lone surrogates and control characters come out as they went in."""
    return json.dumps(message, separators=(",", ":")).encode("ascii")


def unpack(data: bytes) -> Message:
    message: Message = json.loads(data)
    return message


def score_request(
    id: str,
    texts: Sequence[Sequence[str]],
    ended: Tensor,
    study_ids: Sequence[str],
    references: Sequence[str | None],
    context: RewardContext,
) -> Message:
    """A batch as a request."""
    labels, weights, thresholds = context.reference_labels, context.ccs_weights, context.thresholds
    return {
        "kind": "score",
        "id": id,
        "texts": [list(group) for group in texts],
        "ended": ended.tolist(),
        "study_ids": list(study_ids),
        "references": list(references),
        "context": {
            "reference_labels": None if labels is None else np.asarray(labels).tolist(),
            "margin": context.margin,
            "ccs_weights": None if weights is None else weights.tolist(),
            "constant": context.constant,
            "thresholds": None if thresholds is None else thresholds.tolist(),
            "contradictions": context.contradictions,
        },
    }


def context_of(request: Message) -> RewardContext:
    """The request's context as the reward function takes it."""
    stored = request["context"]
    labels, weights, thresholds = stored["reference_labels"], stored["ccs_weights"], stored["thresholds"]
    return RewardContext(
        reference_labels=None if labels is None else np.array(labels, dtype=np.int64),
        margin=stored["margin"],
        ccs_weights=None if weights is None else np.array(weights, dtype=np.float64),
        constant=stored["constant"],
        thresholds=None if thresholds is None else np.array(thresholds, dtype=np.float64),
        contradictions=stored["contradictions"],
    )


def rewards_message(rewards: Rewards) -> Message:
    """Rewards as JSON; float32 survives exactly, since every float32 is a float64."""
    return {
        "total": rewards.total.tolist(),
        "terms": {name: values.tolist() for name, values in rewards.terms.items()},
        "weights": rewards.weights,
        "labels": rewards.labels.tolist(),
        "report_texts": rewards.report_texts,
        "reference_labels": rewards.reference_labels.tolist(),
        "constant": {name: values.tolist() for name, values in rewards.constant.items()},
        "contradictions": None if rewards.contradictions is None else rewards.contradictions.tolist(),
    }


def rewards_of(message: Message) -> Rewards:
    """The inverse of `rewards_message`."""
    return Rewards(
        total=torch.tensor(message["total"]),
        terms={name: torch.tensor(values) for name, values in message["terms"].items()},
        weights=message["weights"],
        labels=torch.tensor(message["labels"]),
        report_texts=message["report_texts"],
        reference_labels=torch.tensor(message["reference_labels"]),
        constant={name: torch.tensor(values) for name, values in message["constant"].items()},
        contradictions=None if message["contradictions"] is None else torch.tensor(message["contradictions"]),
    )
