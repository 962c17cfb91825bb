"""Tickets: good once, at their own service; errors wait for the one who redeems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mrg_r1.reward.compute import RewardError, RewardFunction
from mrg_r1.reward.service.interface import RewardService, Ticket
from tests.reward.in_process import InProcessRewards
from tests.reward.keyword_labeler import KeywordLabeler

ENDED = torch.ones(1, 2, dtype=torch.bool)


def plain_rewards() -> RewardService:
    return InProcessRewards(RewardFunction(KeywordLabeler(), mode="plain"))


def test_tickets_are_waited_for_in_any_order() -> None:
    service = plain_rewards()
    first = service.submit([["edema", "effusion"]], ENDED, ["CXR1"], ["edema"])
    second = service.submit([["edema", "effusion"]], ENDED, ["CXR2"], ["effusion"])
    assert service.result(second).terms["mccs"].tolist() == [[0, 1]]
    assert service.result(first).terms["mccs"].tolist() == [[1, 0]]


def test_a_ticket_is_good_once_and_only_here() -> None:
    service, other = plain_rewards(), plain_rewards()
    ticket = service.submit([["edema", "effusion"]], ENDED, ["CXR1"], ["edema"])
    with pytest.raises(ValueError, match="CXR1"):
        other.result(ticket)
    service.result(ticket)
    with pytest.raises(ValueError, match="CXR1"):
        service.result(ticket)
    with pytest.raises(ValueError, match="CXR9"):
        service.result(Ticket(study_ids=("CXR9",)))


class DeadLabeler:
    def label(self, texts: list[str]) -> NDArray[np.int64]:
        raise RuntimeError("device lost")


def test_errors_are_raised_where_the_ticket_is_waited_for() -> None:
    """Trap 22: the batch has no reward, and the run is told so."""
    service = InProcessRewards(RewardFunction(DeadLabeler(), mode="plain"))
    ticket = service.submit([["edema", "effusion"]], ENDED, ["CXR1"], ["edema"])
    with pytest.raises(RewardError, match="CXR1.*device lost"):
        service.result(ticket)
    with pytest.raises(ValueError, match="CXR1"):
        service.result(ticket)


def test_a_batch_that_does_not_fit_together_is_refused_with_its_ticket() -> None:
    service = plain_rewards()
    ticket = service.submit([["edema"]], ENDED, ["CXR1"], ["edema"])
    with pytest.raises(ValueError, match="ended"):
        service.result(ticket)
