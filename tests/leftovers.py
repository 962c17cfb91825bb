"""A test run leaves no process behind, however it ends.

Everything that a test run starts inherits a mark in its environment. A guard, a process of its own session, waits for
the run to end, by itself, Ctrl-C or SIGKILL, and kills whoever still carries the mark: launchers, ranks, services and
what those have started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
MARK = "MRG_R1_TESTS_OF_{}"  # one a run, so that a run inside a run carries both


def end_with_parent() -> None:
    """A worker of pytest-xdist is killed with the run that has it: nobody else would tell it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def guard() -> None:
    """Mark what this process starts from here on, and see to it that none of it is left when this process has ended."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(MARK.format(""))}
    subprocess.Popen(
        [sys.executable, "-S", str(Path(__file__)), str(os.getpid())],
        env=plain,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[MARK.format(os.getpid())] = "1"


def marked(run: int) -> list[int]:
    """Process ids of what the test run of this process id has started and what lives."""
    mark, found = MARK.format(run).encode() + b"=", []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has ended, or is another user's
                continue
    return found


def main() -> None:
    run = int(sys.argv[1])
    while os.getppid() == run:
        time.sleep(0.2)
    while processes := marked(run):  # again, until none of them has started another in the meantime
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


if __name__ == "__main__":
    main()
