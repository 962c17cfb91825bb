"""Rewards as tickets: texts are handed in, work goes on elsewhere, rewards are fetched (docs/architecture.md).

The trainer submits the completions, computes the frozen model's log-probs meanwhile, and then waits for the ticket's
rewards. `RewardService` is that interface; `reward.service.client.ServiceRewards` keeps it with a process of its own on
the labeler's device.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.reward.compute import RewardContext, RewardError
from mrg_r1.types import Rewards


class RewardServiceError(RewardError):
    """The process that makes the rewards is gone for good; the message names the cause."""


class RewardsMissing(RewardError):
    """A step has no rewards on some rank; every rank raises this together, with the message of the one at fault."""


class RewardsNotFinite(RewardsMissing):
    """As `RewardsMissing`, because of NaN or an infinity and nothing else: the step can be skipped."""


@dataclass(frozen=True)
class Ticket:
    """A claim on the rewards of one submitted batch, good once, at the service that gave it out."""

    study_ids: tuple[str, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # unique over services and processes


@dataclass(frozen=True)
class Health:
    """What a service did for this rank since it was asked last.

    Attributes:
        busy: seconds that it worked, wherever it runs.
        asked: texts whose labels were needed.
        computed: of these, texts that the labeler had to read (of all ranks of the node that came in the same batch).
        restarts: of the service's process, since the run was started.
    """

    busy: float = 0.0
    asked: int = 0
    computed: int = 0
    restarts: int = 0


class RewardService(Protocol):
    """What every reward service keeps.

    - `submit` checks nothing and returns at once where the work is done elsewhere; the trainer may go on.
    - `hint` hands in completions whose batch will follow, so that their labels are known by then; nothing depends on
      it.
    - `result` waits for that batch. Whatever went wrong with it, at any time, is raised there and nowhere else, so that
      the fault surfaces at the same line for every service.
    - Tickets may be waited for in any order, each once; a ticket that is unknown or spent is a ValueError.
    """

    def submit(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        study_ids: Sequence[str],
        references: Sequence[str | None],
        context: RewardContext = ...,
    ) -> Ticket:
        """Hand in B groups of G completions, [B, G] bool ended, B study ids and B references (None: the context has
        their labels).
        """

    def hint(self, texts: Sequence[str]) -> None:
        """Hand in completions early."""

    def result(self, ticket: Ticket) -> Rewards:
        """The rewards of that batch, on the CPU."""

    def label(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """[N, 14] int64 classes of N reports."""

    def health(self) -> Health:
        """What was done since the last call."""

    def close(self) -> None:
        """The run needs no more rewards."""


def unknown_ticket(ticket: Ticket) -> ValueError:
    return ValueError(
        f"ticket {ticket.id} (studies {', '.join(ticket.study_ids[:8])}) is unknown here or was waited for before; "
        "each ticket is good once, at the service that gave it out"
    )
