"""Contenders as step servers: each is a process that does one unit of work whenever it is told to.

One process measured after another would meet different neighbours on the machine. Here the parent lets the contenders
take turns, one unit each, so that whatever disturbs one disturbs the other too. They speak JSON lines: the worker says
once that it is ready, then answers each line of the parent with one of its own; an end of file ends it. This module
imports nothing but the standard library and `benchmarks.memory`, because workers live in two virtual environments.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.memory import peak_mb, reset_peak, resident_mb

Phases = dict[str, float]

# what every process of a bench runs under: one thread, no card, no hub
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerError(Exception):
    """A worker that ended or went silent; the message is what its log says last."""


class Channel:
    """The worker's end. Takes the standard output for itself: what libraries print goes to the log instead."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._resident = 0.0
        self._began = self._began_cpu = 0.0

    def ready(self, settings: Mapping[str, Any]) -> None:
        """Say that the first unit can begin, and under which settings and versions."""
        self._resident = resident_mb()  # before the first step: what only holding the model costs
        self._send({"ready": True, "resident_mb": self._resident, "settings": dict(settings)})

    def wait(self) -> bool:
        """Block until the parent wants a unit, then start its clock; False when there will be no more."""
        if not sys.stdin.readline():
            return False
        reset_peak()
        self._began, self._began_cpu = time.perf_counter(), time.process_time()
        return True

    def answer(self, phases: Phases) -> None:
        """Stop the clock of the unit and report it."""
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._began_cpu
        self._send(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "phases": phases,
                "resident_mb": self._resident,
                "peak_mb": peak_mb(),
            },
        )

    def _send(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def serve(channel: Channel, unit: Callable[[], Phases], settings: Mapping[str, Any]) -> None:
    """Answer with one `unit` a line until the parent closes the pipe."""
    channel.ready(settings)
    while channel.wait():
        channel.answer(unit())


class Worker:
    """The parent's end: a process, its log, and one answer for each unit asked for.

    Args:
        command: what to run; it must make a `Channel`.
        log: file that takes everything the process prints.
        environment: variables set beside the parent's own.

    Raises:
        WorkerError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with open(log, "wb") as file:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    env={**os.environ, **environment},
                )
            except OSError as error:
                raise WorkerError(f"{command[0]}: cannot be started ({error.strerror})") from None
        self._pending = b""

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """The worker's settings.

        Raises:
            WorkerError: it ended or was not ready within `seconds`.
        """
        return self._receive(seconds)

    def run(self, seconds: float) -> dict[str, Any]:
        """One unit of work: `seconds`, `cpu_seconds`, `phases`, `resident_mb` and `peak_mb`.

        Raises:
            WorkerError: it ended, or did not answer within `seconds`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b'{"do": "unit"}\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._reason()) from None
        return self._receive(seconds)

    def close(self) -> None:
        """End the process: politely by an end of file, else by a signal."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before reading what was last written
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self._process.kill()
                raise WorkerError(f"no answer within {seconds:.0f} s; its log ends: {self._last_lines()}")
            piece = os.read(pipe, 65536)
            if not piece:
                raise WorkerError(self._reason())
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        status = self._process.wait()
        return f"ended with status {status}; its log ends: {self._last_lines()}"

    def _last_lines(self, count: int = 3) -> str:
        lines = [
            line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return " / ".join(lines[-count:]) or "(empty)"
