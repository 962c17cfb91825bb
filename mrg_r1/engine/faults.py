"""What a run does when something goes wrong around it: signals, a rank that fails, a rank that hangs.

Ranks share a small store beside their collectives (torch's, which the process group was made with), so that they can speak to one
another while a collective waits for ever: the rank that fails says so there, is the last to speak, and all leave with one exit code;
and each says there how far it has come, so that the one that hangs can be named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

REQUEUE = 75  # exit code after a signal (sysexits.h: try again later)
HUNG = 4  # exit code after a hanging rank was named
_LOOK_EVERY = 0.25  # seconds
_HEARD_WITHIN = 1.0  # seconds in which every rank has looked at the store


class Requeue(Exception):
    """A signal asked this run to stop; its state is on the disk, and the same command goes on."""


class NotFinite(RuntimeError):
    """Step after step had a loss, gradient or reward that is not finite; every rank raises this together."""


class Signals:
    """SIGTERM and SIGUSR1 (SLURM's warning) as a wish to stop at the end of the step.

    Attributes:
        received: the signal's name, once there was one.
        deferring: inside the training loop, where a step is finished first. Outside of it there is nothing to finish, and the process
            ends at once with `REQUEUE`.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferring = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self.deferring:
            os._exit(REQUEUE)


class Watch:
    """A thread on every rank that knows when another rank has failed or hangs.

    Args:
        rank, world_size: of this process.
        timeout: seconds without a `beat` of any rank after which the one that has come the least far is taken to hang.
    """

    def __init__(self, *, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.fallen = False  # another rank has failed, and this one must not speak
        self._store = dist.PrefixStore("faults", dist.distributed_c10d._get_default_store())
        self._beats, self._doing = 0, "start"
        self._seen: dict[int, tuple[int, str]] = {}  # how far each rank had come when this one last looked
        self._pulses: dict[int, str] = {}  # and how often its watch had looked
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """This rank goes on; `doing` says where it is now."""
        self._beats, self._doing, self._since = self._beats + 1, doing, time.monotonic()

    def stop(self) -> None:
        """The run has ended well: look no more. The store must still be there."""
        self._stopped.set()
        self._thread.join()

    def fail(self, text: str, *, code: int) -> None:
        """End every rank with `code`; `text` is printed by the first rank that fails, after everything else. Does not return."""
        mine = json.dumps([self.rank, code])
        first = json.loads(self._store.compare_set("failed", "", mine))
        if self.fallen or first[0] != self.rank:
            time.sleep(60)  # the watching thread ends this process
        time.sleep(_HEARD_WITHIN)
        print(text, file=sys.stderr, flush=True)
        self._store.set("said", "1")
        self._end(code)

    def _end(self, code: int) -> None:
        """Leave; rank 0, which keeps the store, when the others have had time to leave before it."""
        time.sleep(2 * _HEARD_WITHIN if self.rank == 0 else 0.0)
        os._exit(code)

    def _look(self) -> None:
        told, looks = -1, 0
        while not self._stopped.wait(_LOOK_EVERY):
            try:
                if self._beats != told:
                    told = self._beats
                    self._store.set(f"beat {self.rank}", json.dumps([told, self._doing]))
                looks += 1
                self._store.set(f"pulse {self.rank}", str(looks))
                if self._store.check(["failed"]):
                    self._leave()
                # at the start rank 0 alone may read images and references for hours, while the others wait
                if self._doing != "start" and time.monotonic() - self._since > self.timeout:
                    self._look_around()
            except RuntimeError:  # the store has gone with rank 0, which was killed
                os._exit(1)

    def _leave(self) -> None:
        """Another rank has failed: stay quiet until it has spoken, then end with its code."""
        rank, code = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return
        self.fallen = True
        if self._store.check([f"stack {self.rank}"]):
            faulthandler.dump_traceback(all_threads=True)
        deadline = time.monotonic() + 10 * _HEARD_WITHIN
        while not self._store.check(["said"]) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
        self._end(code)

    def _look_around(self) -> None:
        """This rank has waited long enough. If the others have stood still as long, those that have come the least far are waited for."""
        places: dict[int, tuple[int, str]] = {
            rank: tuple(json.loads(self._store.get(f"beat {rank}"))) if self._store.check([f"beat {rank}"]) else (-1, "start")
            for rank in range(self.world_size)
        }
        pulses = {rank: self._store.get(f"pulse {rank}").decode() for rank in places}
        if places != self._seen:  # somebody goes on
            self._seen, self._pulses, self._since = places, pulses, time.monotonic() - 0.5 * self.timeout
            return
        least = min(beats for beats, _ in places.values())
        frozen = [rank for rank in places if pulses[rank] == self._pulses[rank]]  # stopped, swapped out, or on a node that is gone
        behind = frozen or [rank for rank, (beats, _) in places.items() if beats == least]
        where = "; ".join(f"rank {rank} in {places[rank][1]!r}{' (its process is frozen)' if frozen else ''}" for rank in behind)
        waiting = [rank for rank in places if rank not in behind]
        others = f"; waiting: ranks {', '.join(map(str, waiting))}" if waiting else " (all ranks; none is behind another)"
        for rank in behind:
            self._store.set(f"stack {rank}", "1")
        self.fail(f"error: nothing has moved for {self.timeout:.0f} s (engine.hang_timeout). Hanging: {where}{others}", code=HUNG)


def describe(error: BaseException, trace: str, *, rank: int) -> str:
    """A failing rank's last words."""
    return f"{trace.rstrip()}\nerror on rank {rank}: {type(error).__name__}: {error}"


def any_signal(gathered: list[Any]) -> str | None:
    """What the ranks' `received` come to, in words, or None."""
    named = [f"{name} on rank {rank}" for rank, name in enumerate(gathered) if name is not None]
    return ", ".join(named) if named else None
