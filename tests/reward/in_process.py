"""Rewards in the caller's own process, for tests that are not about processes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.reward.compute import RewardContext, RewardFunction
from mrg_r1.reward.service.interface import Health, Ticket, unknown_ticket
from mrg_r1.types import Rewards


class InProcessRewards:
    """A `RewardService` without a process of its own: the work is done inside `submit`."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self._outcomes: dict[str, Rewards | Exception] = {}
        self._seen = (0, 0)
        self._busy = 0.0

    def submit(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        study_ids: Sequence[str],
        references: Sequence[str],
        context: RewardContext = RewardContext(),  # noqa: B008 (frozen)
    ) -> Ticket:
        """Score the batch now; a failure is kept for `result`.

        Args:
            texts: B groups of G decoded completions.
            ended: [B, G] bool, an EOS was sampled.
            study_ids: B.
            references: B texts of the radiologists.
            context: this batch's margin, weights, known labels and constant report.
        """
        ticket = Ticket(study_ids=tuple(study_ids))
        began = time.perf_counter()
        try:
            self._outcomes[ticket.id] = self.function.score(texts, ended, references, context, study_ids=study_ids)
        except Exception as error:  # raised by `result`, where every service raises
            self._outcomes[ticket.id] = error
        self._busy += time.perf_counter() - began
        return ticket

    def hint(self, texts: Sequence[str]) -> None:
        """Nothing: there is no other process that could begin."""

    def result(self, ticket: Ticket) -> Rewards:
        """The rewards of a submitted batch.

        Raises:
            RewardError, ValueError: what `RewardFunction.score` raised on it.
            ValueError: a ticket of another service, or one that was waited for before.
        """
        if ticket.id not in self._outcomes:
            raise unknown_ticket(ticket)
        outcome = self._outcomes.pop(ticket.id)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def label(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """[N, 14] int64 classes of N reports; LabelError where the labeler fails."""
        return self.function.reader.label(texts)

    def health(self) -> Health:
        """Seconds inside `submit`, and texts."""
        reader, (asked, computed) = self.function.reader, self._seen
        health = Health(busy=self._busy, asked=reader.asked - asked, computed=reader.computed - computed)
        self._seen, self._busy = (reader.asked, reader.computed), 0.0
        return health

    def close(self) -> None:
        """Nothing to end."""
