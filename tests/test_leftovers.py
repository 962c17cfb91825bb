"""A test run that is killed leaves none of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.leftovers import marked

ROOT = Path(__file__).parents[1]
# A test that starts what a launcher starts: a child in a session of its own, and a grandchild.
STARTS = """
import signal, subprocess, sys, time
from pathlib import Path
from tests.leftovers import guard

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without one

def test_that_never_ends():
    guard()
    grandchild = "import time; time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    Path(__file__).with_name("started").touch()
    time.sleep(600)
"""


def until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_process(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "test_starts.py").write_text(STARTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    run = subprocess.Popen(
        [*command, str(tmp_path / "test_starts.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    until((tmp_path / "started").exists)
    until(lambda: len(marked(run.pid)) == 2)
    run.send_signal(end)
    run.wait(timeout=30)
    until(lambda: not marked(run.pid))
