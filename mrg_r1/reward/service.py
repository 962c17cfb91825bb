"""Rewards as tickets: texts are handed in, work goes on elsewhere, rewards are fetched (architecture.md).

The trainer submits the completions, scores the reference model meanwhile, and then redeems the ticket. `RewardService` is that
interface; `InProcessRewards` keeps it without another process, for one device and for tests.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mrg_r1.reward.stage import RewardStage
from mrg_r1.types import Rewards


@dataclass(frozen=True)
class Ticket:
    """A claim on the rewards of one submitted batch, good once, at the service that gave it out."""

    study_ids: tuple[str, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # unique over services and processes


class RewardService(Protocol):
    """What every reward service keeps.

    - `submit` checks nothing and returns at once where the work is done elsewhere; the trainer may go on.
    - `result` waits for that batch. Whatever went wrong with it, at any time, is raised there and nowhere else, so that
      the fault surfaces at the same line for every service.
    - Tickets may be redeemed in any order, each once; a ticket that is unknown or spent is a ValueError.
    """

    def submit(self, texts: Sequence[Sequence[str]], ended: Tensor, study_ids: Sequence[str], references: Sequence[str]) -> Ticket:
        """Hand in B groups of G completions, [B, G] bool ended, B study ids and B references."""

    def result(self, ticket: Ticket) -> Rewards:
        """The rewards of that batch, on the CPU."""


class InProcessRewards:
    """A `RewardService` that scores in the caller's own process: the work is done inside `submit`.

    Args:
        stage: what scores a batch.
    """

    def __init__(self, stage: RewardStage) -> None:
        self.stage = stage
        self._outcomes: dict[str, Rewards | Exception] = {}

    def submit(self, texts: Sequence[Sequence[str]], ended: Tensor, study_ids: Sequence[str], references: Sequence[str]) -> Ticket:
        """Score the batch now; a failure is kept for `result`.

        Args:
            texts: B groups of G decoded completions.
            ended: [B, G] bool, an EOS was sampled.
            study_ids: B.
            references: B texts of the radiologists.
        """
        ticket = Ticket(study_ids=tuple(study_ids))
        try:
            self._outcomes[ticket.id] = self.stage.score(texts, ended, references, study_ids=study_ids)
        except Exception as error:  # raised by `result`, where every service raises
            self._outcomes[ticket.id] = error
        return ticket

    def result(self, ticket: Ticket) -> Rewards:
        """The rewards of a submitted batch.

        Raises:
            RewardError, ValueError: what `RewardStage.score` raised on it.
            ValueError: a ticket of another service, or one that was redeemed before.
        """
        if ticket.id not in self._outcomes:
            raise ValueError(
                f"ticket {ticket.id} (studies {', '.join(ticket.study_ids[:8])}) is unknown here or was redeemed before; "
                "each ticket is good once, at the service that gave it out"
            )
        outcome = self._outcomes.pop(ticket.id)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
