"""A rank's side of the reward service: a `RewardService` over the node's socket.

Nothing is lost with the service: what is not answered is kept here and handed to the next process, and the same texts
earn the same rewards. A service that no longer answers is killed, for its supervisor to start another; when that gives
up, `RewardServiceError` says why.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.reward.compute import NotFiniteError, RewardContext, RewardError
from mrg_r1.reward.service import wire
from mrg_r1.reward.service.interface import Health, RewardServiceError, Ticket, unknown_ticket
from mrg_r1.reward.service.supervisor import ServiceState, socket_of
from mrg_r1.types import Rewards

OUTSTANDING = 8  # batches handed in and not answered; the next one waits for an answer first
TEXTS_AT_ONCE = 256  # of `label`, so that the ranks' batches get in between
_PING_EVERY = 2.0  # seconds of silence before the service is asked whether it knows of us
_SILENCE = 60.0  # seconds in which it must answer that: the thread that does has nothing else to do


class ServiceRewards:
    """A `RewardService` that hands everything to the process of `reward.service.supervisor`.

    Args:
        directory: the supervisor's.
        keeper: process id of the rank that has the supervisor.
        timeout: seconds after which a service that is still at work on one batch is taken for stuck.
        name: what it is called in messages.

    Raises:
        RewardServiceError: the service is gone for good.
    """

    def __init__(self, directory: Path, *, keeper: int, timeout: float, name: str = "reward service") -> None:
        self.directory, self.keeper, self.timeout, self.name = directory, keeper, timeout, name
        self._key = bytes.fromhex((directory / "key").read_text(encoding="utf-8"))
        self._state = ServiceState(generation=0, status="starting", pid=0)
        self._unanswered: dict[str, bytes] = {}  # id -> request, in order
        self._answers: dict[str, wire.Message] = {}
        self._asked_at: float | None = None  # when a ping went out that is not answered yet
        self._health = Health()
        self._labelled = 0
        self._connection = self._connect()

    @property
    def labeler(self) -> dict[str, str]:
        """Name and fingerprint."""
        assert self._state.labeler is not None  # it was ready when we connected
        return dict(self._state.labeler)

    @property
    def radeval(self) -> dict[str, Any] | None:
        """What RadEval's processes are, where terms are theirs."""
        return None if self._state.radeval is None else dict(self._state.radeval)

    def submit(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        study_ids: Sequence[str],
        references: Sequence[str | None],
        context: RewardContext = RewardContext(),  # noqa: B008 (frozen)
    ) -> Ticket:
        """Hand in a batch. Returns at once unless `OUTSTANDING` batches wait for their answers."""
        ticket = Ticket(study_ids=tuple(study_ids))
        self._ask(wire.score_request(ticket.id, texts, ended, study_ids, references, context))
        return ticket

    def hint(self, texts: Sequence[str]) -> None:
        """Hand in completions early; a service that is away misses them, and reads them with their batch."""
        if texts:
            try:
                self._connection.send_bytes(wire.pack({"kind": "hint", "texts": list(texts)}))
            except OSError:
                pass  # the next request finds out, and waits for the next process

    def result(self, ticket: Ticket) -> Rewards:
        """The rewards of a submitted batch.

        Raises:
            RewardError: it could not be scored, or the service is gone for good.
            ValueError: a ticket of another service, or one that was waited for before.
        """
        if ticket.id not in self._answers and ticket.id not in self._unanswered:
            raise unknown_ticket(ticket)
        return wire.rewards_of(self._answer(ticket.id)["rewards"])

    def label(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """[N, 14] int64 classes of N reports.

        Raises:
            RewardError: as `result`.
        """
        parts = [np.empty((0, len(OBSERVATIONS)), dtype=np.int64)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            self._labelled += 1
            id = f"label {self._labelled}"
            self._ask({"kind": "label", "id": id, "texts": list(texts[start : start + TEXTS_AT_ONCE])})
            parts.append(np.array(self._answer(id)["classes"], dtype=np.int64))
        return np.concatenate(parts)

    def health(self) -> Health:
        """What the service did for this rank since the last call."""
        health = replace(self._health, restarts=self._state.generation - 1)
        self._health = Health()
        return health

    def close(self) -> None:
        """Take leave, so that the service does not think that this rank has died."""
        try:
            self._connection.send_bytes(wire.pack({"kind": "bye"}))
        except OSError:
            pass
        self._connection.close()

    def _ask(self, request: wire.Message) -> None:
        while len(self._unanswered) >= OUTSTANDING:
            self._receive()
        data = wire.pack(request)
        self._unanswered[request["id"]] = data
        try:
            self._connection.send_bytes(data)
        except OSError:
            self._reconnect()

    def _answer(self, id: str) -> wire.Message:
        while id not in self._answers:
            self._receive()
        answer = self._answers.pop(id)
        if "error" in answer:
            raise NotFiniteError(answer["error"]) if answer["not_finite"] else RewardError(answer["error"])
        return answer

    def _receive(self) -> None:
        """Take one message, or ask the service whether it is still there."""
        try:
            if not self._connection.poll(_PING_EVERY):
                self._ping()
                return
            message = wire.unpack(self._connection.recv_bytes())
            self._asked_at = None  # it lives
            if "pong" in message:
                self._hear(message)
                return
        except (EOFError, OSError):
            self._reconnect()
            return
        if self._unanswered.pop(message["id"], None) is not None:  # else an answer that was thought to be lost
            self._answers[message["id"]] = message
            for note in message["notes"]:
                print(f"{self.name}: {note}", file=sys.stderr, flush=True)
            self._health = replace(
                self._health,
                busy=self._health.busy + message["busy"],
                asked=self._health.asked + message["asked"],
                computed=self._health.computed + message["computed"],
            )

    def _ping(self) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._connection.send_bytes(wire.pack({"kind": "ping"}))
        elif now - self._asked_at > min(_SILENCE, self.timeout):
            self._kill(f"it did not answer for {now - self._asked_at:.0f} s")

    def _hear(self, pong: wire.Message) -> None:
        """Hand in again what the service does not know: its answer would have come before this pong, so it was lost."""
        if pong["working"] > self.timeout:
            self._kill(
                f"it was at work on one batch for {pong['working']:.0f} s, reward.timeout is {self.timeout:.0f} s"
            )
            return
        for id, data in self._unanswered.items():
            if id not in pong["pong"]:
                self._connection.send_bytes(data)

    def _kill(self, reason: str) -> None:
        """End a process that is of no use any more, and leave word for the supervisor."""
        (self.directory / f"{self._state.generation}.killed").write_text(
            f"it was ended because {reason}", encoding="utf-8"
        )
        try:
            os.kill(self._state.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._reconnect()

    def _reconnect(self) -> None:
        """Find the next process and hand it everything that is not answered."""
        while True:
            self._connection.close()
            self._connection = self._connect()
            try:
                for data in self._unanswered.values():
                    self._connection.send_bytes(data)
                return
            except OSError:
                continue  # that one died too

    def _connect(self) -> Connection:
        """Wait for a process that we have not spoken to yet."""
        self._asked_at = None
        while True:
            if not (self.directory / "state.json").is_file() or not _alive(self.keeper):
                raise RewardServiceError(
                    f"the rank that keeps this node's {self.name} (process {self.keeper}) has ended"
                )
            state = ServiceState.read(self.directory)
            if state.status == "failed":
                raise RewardServiceError(str(state.cause))
            if state.status == "ready" and state.generation > self._state.generation:
                try:
                    connection = Client(socket_of(self.directory, state.generation), "AF_UNIX", authkey=self._key)
                except (OSError, EOFError, AuthenticationError):
                    pass  # it died before we came; its successor will be announced
                else:
                    before, self._state = self._state, state
                    if before.generation and state.radeval != before.radeval:
                        raise RewardServiceError(
                            f"RadEval was {before.radeval} and is {state.radeval} since the {self.name} was started "
                            "again: another reward than the run began with"
                        )
                    return connection
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
