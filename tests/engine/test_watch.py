"""Which ranks are missed when they or their node are gone, who speaks, and with which code all leave. Ranks are threads
here. Most of the seconds of these tests are waited: less would take a busy machine for a rank that is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mrg_r1.engine import faults
from mrg_r1.engine.faults import REQUEUE, Signals, Watch
from mrg_r1.engine.ranks import Node, Ranks

# threads leave by SystemExit here
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
CPU = torch.device("cpu")
TWO = (Node(0, "a", 0, 2), Node(1, "b", 2, 2))

WATCHES: list[Watch] = []


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Exit codes of ranks that are threads here, with a watch that looks five times as often."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit  # ends the thread and says nothing

    monkeypatch.setattr(faults.os, "_exit", leave)
    monkeypatch.setattr(faults, "_leaving", threading.Event())
    for name, value in {
        "_LOOK_EVERY": 0.05,
        "_PULSES_EVERY": 4,
        "_HEARD_WITHIN": 0.3,
        "_LEFT_WITHIN": 0.5,
        "_BROKEN_FOR": 3.0,
    }.items():
        monkeypatch.setattr(faults, name, value)
    yield codes
    for watch in WATCHES:
        watch._stopped.set()
        watch._ended.set()
    for watch in WATCHES:
        watch._thread.join(timeout=5)  # one may wait for ever for its store
        watch._guardian.join(timeout=5)
    WATCHES.clear()


def watches(store: dist.Store, *, lost_after: float = 600, only: range = range(4)) -> list[Watch]:
    """The watches of some of four ranks on two nodes."""
    started = [Watch(Ranks(rank, 4, CPU, TWO), store=store, timeout=600, lost_after=lost_after) for rank in only]
    WATCHES.extend(started)
    return started


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_thread(work: Callable[[], Any]) -> None:
    """As the main thread of a rank."""
    threading.Thread(target=work, daemon=True).start()


def test_a_node_whose_ranks_look_no_more_is_gone_and_the_others_ask_for_a_requeue(left, capfd):
    everyone = watches(dist.HashStore(), lost_after=3)
    wait(lambda: all(watch._moved.get(rank, (0,))[0] > 0 for watch in everyone[:2] for rank in (2, 3)))  # seen alive
    for watch in everyone[2:]:
        watch.stop()
    wait(lambda: len(left) == 2)
    assert left == [REQUEUE, REQUEUE]
    said = capfd.readouterr().err
    assert (
        said.count("error: ranks 2, 3 (all of node 1 (b)) are gone (nothing was heard for ") == 1
        and said.count("error:") == 1
    )


@pytest.mark.slow
def test_ranks_that_wait_for_one_another_for_long_are_not_gone(left, capfd):
    everyone = watches(dist.HashStore(), lost_after=3)
    time.sleep(5)
    for watch in everyone:
        watch.stop()
    assert not left and not capfd.readouterr().err


def test_a_broken_connection_names_the_rank_that_is_gone(left, capfd):
    everyone = watches(dist.HashStore())
    wait(lambda: all(watch._looks for watch in everyone))
    everyone[3].stop()
    # what it wrote last was on its way to the store when the connection broke
    threading.Timer(0.5, lambda: everyone[1]._store.set("pulse 3", str(everyone[3]._looks + 1))).start()
    broken = RuntimeError(
        "[/x/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:1: Connection reset by peer. This is typically "
        "caused"
    )
    in_thread(lambda: everyone[1].fail_unexpectedly(broken, "Traceback of rank 1"))
    wait(lambda: len(left) >= 3)
    said = capfd.readouterr().err
    assert set(left) == {REQUEUE} and "Traceback" not in said
    assert (
        "error: rank 3 (node 1 (b)) is gone (Read error [10.0.0.1]:1: Connection reset by peer, then nothing for 3 s)"
        in said
    )


@pytest.mark.parametrize("text", ["[/x/gloo/transport/tcp/pair.cc:537] Connection closed by peer", "shapes differ"])
def test_an_error_while_all_ranks_live_keeps_its_traceback(left, capfd, text):
    everyone = watches(dist.HashStore())
    in_thread(lambda: everyone[2].fail_unexpectedly(RuntimeError(text), "Traceback of rank 2"))
    wait(lambda: len(left) == 4)
    said = capfd.readouterr().err
    assert left == [1] * 4 and f"Traceback of rank 2\nerror on rank 2 (node 1 (b)): RuntimeError: {text}\n" in said
    assert said.endswith(
        f"node 0 (a) ends with rank 2 (node 1 (b)): error on rank 2 (node 1 (b)): RuntimeError: {text}\n"
    )


def test_the_first_rank_that_fails_speaks_and_all_leave_with_its_code(left, capfd):
    """Rank 0, which keeps the store, last; a second fault that follows from the first stays quiet."""
    everyone = watches(dist.HashStore())
    in_thread(lambda: everyone[1].fail("error: the first", code=3))
    wait(lambda: everyone[1]._store.check(["failed"]))
    in_thread(lambda: everyone[2].fail("error: the second", code=2))
    wait(lambda: len(left) >= 4)
    assert set(left) == {3}
    assert capfd.readouterr().err == "error: the first\nnode 1 (b) ends with rank 1 (node 0 (a)): error: the first\n"
    before = Signals()
    try:
        # the launcher's, because a rank of its node has left: no other exit code for that
        before._receive(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


KEEPER = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_store_that_is_gone_or_does_not_answer_takes_rank_0_with_it(left, capfd, number):
    """SIGSTOP is a node without power to those who have a connection to it: nothing is closed, and nothing comes."""
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, text=True)
    try:
        assert keeper.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False, wait_for_workers=False)
        watches(store, lost_after=3, only=range(2, 4))
        time.sleep(0.5)
        assert not left
        os.kill(keeper.pid, number)
        wait(lambda: len(left) >= 2)
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
        assert set(left) == {REQUEUE} and len(said) == 1
        assert said[0].startswith("error: rank 0 (node 0 (a)) is gone (or at least the store beside it; ")
    finally:
        keeper.kill()
        keeper.wait()
