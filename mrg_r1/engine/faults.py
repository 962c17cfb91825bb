"""What a run does when something goes wrong around it: signals, a rank that fails, a rank that hangs, a node that is
gone.

Ranks share a small store beside their collectives (torch's, which the process group was made with), so that they can
speak to one another while a collective waits for ever: the rank that fails says so there, is the last to speak, and all
leave with one exit code; each says there how far it has come, so that the one that hangs can be named; and that its
process runs at all, so that those which a dead node took with it are missed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

from mrg_r1.engine.ranks import Ranks

REQUEUE = 75  # exit code after a signal, or when ranks are gone (sysexits.h: try again later)
HUNG = 4  # exit code after a hanging rank was named
LOST_AFTER = 60.0  # seconds in which a rank's process must have run at all
_LOOK_EVERY = 0.25  # seconds
_PULSES_EVERY = 20  # looks, between two at the others' pulses
_HEARD_WITHIN = 1.0  # seconds in which every rank has looked at the store
_LEFT_WITHIN = 5.0  # seconds in which they have left, where they can
_BROKEN_FOR = 10.0  # seconds in which a live rank looks at least `_LIVES` times; a broken connection says the rest
_LIVES = 4  # looks: the last one of a rank that was killed may still be on its way to the store

# this process ends with an exit code of its own; the launcher's SIGTERM must not make it another
_leaving = threading.Event()


class Requeue(Exception):
    """A signal asked this run to stop; its state is on the disk, and the same command goes on."""


class NotFinite(RuntimeError):
    """Step after step had a loss, gradient or reward that is not finite; every rank raises this together."""


class Signals:
    """SIGTERM and SIGUSR1 (SLURM's warning) as a wish to stop at the end of the step.

    Attributes:
        received: the signal's name, once there was one.
        deferring: inside the training loop, where a step is finished first. Outside of it there is nothing to finish,
            and the process ends at once with `REQUEUE`.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferring = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self.deferring and not _leaving.is_set():
            os._exit(REQUEUE)


class Watch:
    """Two threads on every rank that know when another rank has failed, hangs, or is gone with its node.

    Args:
        ranks: who this process is.
        store: what all ranks can write to and read; rank 0's node keeps it. `shared_store` of a running process group.
        timeout: seconds without a `beat` of any rank after which the one that has come the least far is taken to hang.
        lost_after: seconds without a look of a rank's watch, or an answer of the store, after which it is taken to be
            gone. A rank looks whatever it is at, so this can be much shorter than `timeout`; it is not shorter than a
            machine may swap.
    """

    def __init__(self, ranks: Ranks, *, store: dist.Store, timeout: float, lost_after: float = LOST_AFTER) -> None:
        self.ranks, self.rank, self.timeout = ranks, ranks.rank, timeout
        self.fallen: int | None = None  # the code to end with, once another rank has failed, or this one and has spoken
        self._store = dist.PrefixStore("faults", store)
        self._beats, self._doing = 0, "start"
        self._seen: dict[int, tuple[int, str]] = {}  # how far each rank had come when this one last looked
        self._pulses: dict[int, str] = {}  # and how often its watch had looked
        # time is counted in looks of this rank, so that a run that is suspended as a whole loses nobody
        self._patience = int(lost_after / _LOOK_EVERY)
        self._looks = 0
        self._moved: dict[int, tuple[int, int]] = {}  # each rank's pulse, and the look at which it last was another
        self._since = time.monotonic()
        self._speaking = threading.Lock()  # of the threads of this process only one says why it ends
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._guardian = threading.Thread(target=self._guard, name="watch of the store", daemon=True)
        self._thread.start()
        self._guardian.start()

    def beat(self, doing: str) -> None:
        """This rank goes on; `doing` says where it is now."""
        self._beats, self._doing, self._since = self._beats + 1, doing, time.monotonic()

    def stop(self) -> None:
        """The run has ended well: look no more. The store must still be there, and no rank may have work left."""
        self._stopped.set()
        self._thread.join()
        self._ended.set()
        self._guardian.join()

    def fail(self, text: str, *, code: int) -> None:
        """End every rank with `code`; `text` is printed by the first rank that fails, after everything else. Does not
        return.
        """
        _leaving.set()
        try:
            first = json.loads(self._store.compare_set("failed", "", json.dumps([self.rank, code])))
            if first[0] != self.rank:
                self._leave()
            if not self._speaking.acquire(blocking=False):
                threading.Event().wait()  # another thread of this process has begun to speak, and ends it
            time.sleep(_HEARD_WITHIN)
            print(text, file=sys.stderr, flush=True)
            self.fallen = code
            self._store.set("said", text[text.rfind("\nerror") + 1 :])
            self._end(code)
        except RuntimeError as error:
            self._store_gone(_first_line(error))

    def fail_unexpectedly(self, error: Exception, trace: str) -> None:
        """End every rank because of an error that nobody foresaw; where it is a connection that broke because ranks are
        gone, with their names and `REQUEUE`, else with its traceback and 1. Does not return.
        """
        if is_broken_connection(error):
            try:
                gone = self._gone_now()
            except RuntimeError as lost:
                self._store_gone(_first_line(lost))
            if gone:
                self.fail(
                    self._obituary(gone, f"{_first_line(error)}, then nothing for {_BROKEN_FOR:.0f} s"), code=REQUEUE
                )
        self.fail(describe(error, trace, who=self.ranks.name([self.rank])), code=1)

    def _end(self, code: int) -> None:
        """Leave; rank 0, whose process or node keeps the store, when the others have left before it."""
        self._store.set(f"left {self.rank}", "1")
        deadline = time.monotonic() + _LEFT_WITHIN
        others = [f"left {rank}" for rank in range(1, self.ranks.world_size)]
        while self.rank == 0 and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
        os._exit(code)

    def _look(self) -> None:
        told = -1
        while not self._stopped.wait(_LOOK_EVERY):
            try:
                if self._beats != told:
                    told = self._beats
                    self._store.set(f"beat {self.rank}", json.dumps([told, self._doing]))
                self._looks += 1
                self._store.set(f"pulse {self.rank}", str(self._looks))
                if self._store.check(["failed"]):
                    self._leave()
                if self._looks % _PULSES_EVERY == 0:
                    self._look_at_pulses()
                # at the start rank 0 alone may read images and references for hours, while the others wait
                if self._doing != "start" and time.monotonic() - self._since > self.timeout:
                    self._look_around()
            except RuntimeError as error:
                self._store_gone(_first_line(error))

    def _guard(self) -> None:
        """The watch itself may wait for ever for a store whose node has lost its power: nobody closes such a
        connection.
        """
        seen, still = -1, 0
        while not self._ended.wait(4 * _LOOK_EVERY):
            looks = self._looks
            seen, still = looks, 0 if looks != seen else still + 4
            if still > self._patience:
                self._store_gone(f"no answer for {still * _LOOK_EVERY:.0f} s")

    def _leave(self) -> None:
        """Another rank has failed: stay quiet until it has spoken, then end with its code."""
        rank, code = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return
        _leaving.set()
        self.fallen = code
        if self._store.check([f"stack {self.rank}"]):
            faulthandler.dump_traceback(all_threads=True)
        deadline = time.monotonic() + 10 * _HEARD_WITHIN
        while not self._store.check(["said"]) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
        elsewhere = self.ranks.leads_node and rank not in self.ranks.node.ranks
        if elsewhere and self._speaking.acquire(blocking=False):  # nodes may have terminals or logs of their own
            said = (
                self._store.get("said").decode() if self._store.check(["said"]) else f"it failed with exit code {code}"
            )
            print(f"{self.ranks.node} ends with {self.ranks.name([rank])}: {said}", file=sys.stderr, flush=True)
        self._end(code)

    def _pulse(self, rank: int) -> int:
        """How often a rank has looked; 0 where it has not begun."""
        key = f"pulse {rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks.world_size) if rank != self.rank]

    def _look_at_pulses(self) -> None:
        """A process that has ended, or whose node has, looks no more, whatever the others wait for."""
        for rank in self._others():
            pulse = self._pulse(rank)
            if rank not in self._moved or self._moved[rank][0] != pulse:
                self._moved[rank] = (pulse, self._looks)
        still = {rank: self._looks - look for rank, (_, look) in self._moved.items()}
        if any(looks > self._patience for looks in still.values()):
            # those of one node stop within seconds
            gone = [rank for rank, looks in still.items() if 2 * looks > self._patience]
            self.fail(
                self._obituary(gone, f"nothing was heard for {max(still.values()) * _LOOK_EVERY:.0f} s"), code=REQUEUE
            )

    def _gone_now(self) -> list[int]:
        """The ranks that do not look `_LIVES` times in `_BROKEN_FOR` seconds."""
        before = {rank: self._pulse(rank) for rank in self._others()}
        for _ in range(int(_BROKEN_FOR / _LOOK_EVERY)):
            time.sleep(_LOOK_EVERY)
            before = {rank: looks for rank, looks in before.items() if self._pulse(rank) < looks + _LIVES}
            if not before or self.fallen is not None:
                return []
        return list(before)

    def _obituary(self, gone: list[int], why: str) -> str:
        are = "is" if len(gone) == 1 else "are"
        return (
            f"error: {self.ranks.name(gone)} {are} gone ({why}): killed, out of memory, or the node is down or out "
            f"of reach; exit code {REQUEUE}: the same command goes on from the last checkpoint"
        )

    def _store_gone(self, why: str) -> None:
        """The store does not answer: rank 0's node is gone, or this one is cut off, and there is no way left to ask the
        others.
        """
        if self.fallen is not None:
            os._exit(self.fallen)  # rank 0 did not wait long enough for this rank to leave
        _leaving.set()
        if not self._speaking.acquire(blocking=False):
            # another thread of this process has begun to speak, and ends it if the store lets it
            time.sleep(10 * _HEARD_WITHIN)
        elif self.rank == max(self.ranks.node.first, 1):
            print(self._obituary([0], f"or at least the store beside it; {why}"), file=sys.stderr, flush=True)
        else:
            time.sleep(3 * _HEARD_WITHIN)  # the first one of this node speaks; when one ends, the launcher ends all
        os._exit(REQUEUE)

    def _look_around(self) -> None:
        """This rank has waited long enough. If the others have stood still as long, those that have come the least far
        are waited for.
        """
        places: dict[int, tuple[int, str]] = {
            rank: tuple(json.loads(self._store.get(f"beat {rank}")))
            if self._store.check([f"beat {rank}"])
            else (-1, "start")
            for rank in range(self.ranks.world_size)
        }
        pulses = {rank: self._store.get(f"pulse {rank}").decode() for rank in places}
        if places != self._seen:  # somebody goes on
            self._seen, self._pulses, self._since = places, pulses, time.monotonic() - 0.5 * self.timeout
            return
        least = min(beats for beats, _ in places.values())
        # stopped, swapped out, or on a node that is gone
        frozen = [rank for rank in places if pulses[rank] == self._pulses[rank]]
        behind = frozen or [rank for rank, (beats, _) in places.items() if beats == least]
        where = "; ".join(
            f"{self.ranks.name([rank])} in {places[rank][1]!r}{' (its process is frozen)' if frozen else ''}"
            for rank in behind
        )
        waiting = [rank for rank in places if rank not in behind]
        others = (
            f"; waiting: ranks {', '.join(map(str, waiting))}" if waiting else " (all ranks; none is behind another)"
        )
        for rank in behind:
            self._store.set(f"stack {rank}", "1")
        self.fail(
            f"error: nothing has moved for {self.timeout:.0f} s (engine.hang_timeout). Hanging: {where}{others}",
            code=HUNG,
        )


def shared_store() -> dist.Store:
    """The store that the process group was made with."""
    return dist.distributed_c10d._get_default_store()


def is_broken_connection(error: Exception) -> bool:
    """Whether a collective failed because of its connections; gloo raises a bare RuntimeError that names its source
    file.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def describe(error: BaseException, trace: str, *, who: str) -> str:
    """The last words of a failing rank (`who`)."""
    return f"{trace.rstrip()}\nerror on {who}: {type(error).__name__}: {error}"


def _first_line(error: Exception) -> str:
    """Torch's own words, without its source file in front and the C++ frames and the advice behind them."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).split("\n")[0].split(". This is typically")[0])


def any_signal(gathered: list[Any]) -> str | None:
    """What the ranks' `received` come to, in words, or None."""
    named = [f"{name} on rank {rank}" for rank, name in enumerate(gathered) if name is not None]
    return ", ".join(named) if named else None
