"""Keeps the reward service of a node alive: starts its process, starts it again when it dies, and says so when it
cannot.

The first rank of a node has one `Supervisor`. Everything that the node's ranks must know stands in a folder that only
this user can read: the key of the socket, and `state.json`, replaced whole at every change.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import psutil

from mrg_r1.cores import visible_device
from mrg_r1.files import write_text_atomically
from mrg_r1.reward.service.server import RANK_DIED

RESTARTS = 3  # of one run; a service that dies again and again is not mended by a fifth start
START_SECONDS = 900  # in which a labeler must be loaded
_PREFIX = "mrg-r1-reward-"


@dataclass(frozen=True)
class ServiceSettings:
    """What a service is started with.

    Attributes:
        labeler: a directory of ours, or a checkpoint file.
        tokenizer: as in `Labeler.load`.
        device: physical: `cpu`, `cuda:N` in nvidia-smi's count, or a UUID.
        dtype: float32, bfloat16 or float16.
        reward_function: the keyword arguments of `RewardFunction`.
        threads: of the labeler on a CPU.
        name: what it is called in messages.
        device_field: the recipe's field that names the device.
    """

    labeler: str
    tokenizer: str | None
    device: str
    dtype: str
    reward_function: Mapping[str, Any]
    threads: int
    name: str = "reward service"
    device_field: str = "reward.device"


@dataclass(frozen=True)
class ServiceState:
    """state.json: `generation` counts the processes, `cause` says why the service failed for good."""

    generation: int
    status: Literal["starting", "ready", "failed"]
    pid: int
    cause: str | None = None
    labeler: Mapping[str, str] | None = None  # name and fingerprint, once it is loaded
    radeval: Mapping[str, Any] | None = None  # what RadEval's processes are, where terms are theirs

    @staticmethod
    def read(directory: Path) -> ServiceState:
        return ServiceState(**json.loads((directory / "state.json").read_text(encoding="utf-8")))


def socket_of(directory: Path, generation: int) -> str:
    """The address of one process of the service; each has its own, so that nobody speaks to a dead one's successor
    unawares.
    """
    return str(directory / f"{generation}.sock")


def _short_folder() -> tuple[Path, IO[bytes]]:
    """A fresh folder that this user alone can read, in TMPDIR unless that makes a socket's path too long for the system
    (108 bytes).

    Folders that other runs of this user have left because they and their service were killed are removed. A run that
    lives holds the lock in its folder, which the system gives back however the run ends.

    Returns:
        The folder, and its lock: open as long as the folder is in use.
    """
    temporary = tempfile.gettempdir()
    parent = Path(temporary if len(temporary.encode()) < 64 else "/tmp")
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            held = open(folder / "lock", "rb")
        except OSError:  # another user's, or one that is only just being made
            continue
        with held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # in use
                continue
            shutil.rmtree(folder, ignore_errors=True)  # two runs may remove it at once
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # locked under another name, so that no lock is ever seen that nobody holds yet
    lock = open(folder / ".lock", "wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / ".lock", folder / "lock")
    return folder, lock


def _cpu_seconds(pid: int) -> float:
    """Processor seconds of a process of ours, which may have ended but has not been reaped, and of its children, as
    RadEval's processes are.
    """
    process = psutil.Process(pid)
    times = process.cpu_times()
    seconds = float(times.user + times.system + times.children_user + times.children_system)
    for child in process.children():
        try:
            of_child = child.cpu_times()
        except psutil.NoSuchProcess:  # it ended just now
            continue
        seconds += float(of_child.user + of_child.system)
    return seconds


class Supervisor:
    """The reward service of this node, from its start to the end of the run.

    Args:
        settings: of the service.
        log: where its stderr goes, appended; it names studies and never quotes reports.

    Attributes:
        directory: for `reward.service.client.ServiceRewards`.
    """

    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "mrg_r1.reward.service.server")

    def __init__(self, settings: ServiceSettings, *, log: Path) -> None:
        self.settings, self.log = settings, log
        self.directory, self._folder_lock = _short_folder()
        self._key = secrets.token_hex(32)
        descriptor = os.open(self.directory / "key", os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._key)
        self._closing = False
        self._ended = False  # the process has ended, and its seconds are in `_spent`
        self._spent = 0.0
        self._generation = 0
        self._lock = threading.Lock()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name=f"{self.settings.name} watcher", daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Until the labeler is loaded.

        Raises:
            ValueError: it cannot be; the message is the service's own.
        """
        while True:
            state = ServiceState.read(self.directory)
            if state.status == "ready":
                return
            if state.status == "failed":
                raise ValueError(state.cause)
            time.sleep(0.02)

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds that the service has taken so far, all threads of all its processes, loading included."""
        with self._lock:
            return self._spent + (0.0 if self._ended else _cpu_seconds(self._process.pid))

    def close(self) -> None:
        """End the service and remove its folder."""
        with self._lock:
            self._closing = True
            if not self._ended:
                os.kill(self._process.pid, signal.SIGKILL)
        self._watcher.join()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._folder_lock.close()

    def _start(self) -> subprocess.Popen[str]:
        self._generation += 1
        with open(self.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # the ranks' own devices are taken away before the process exists, and so before any CUDA call
                env=os.environ | visible_device(self.settings.device),
                start_new_session=True,  # Ctrl-C on the terminal is for the ranks; the service leaves with them
            )
        self._ended = False
        self._write("starting", process.pid)
        assert process.stdin is not None
        started = {
            **asdict(self.settings),
            "address": socket_of(self.directory, self._generation),
            "key": self._key,
            "parent": os.getpid(),
        }
        try:
            process.stdin.write(json.dumps(started) + "\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, and the watcher sees it
        return process

    def _watch(self) -> None:
        """Wait for the process to be ready and to end; start it again or say why not."""
        while True:
            process = self._process
            late = threading.Timer(START_SECONDS, os.kill, (process.pid, signal.SIGKILL))
            late.start()
            assert process.stdout is not None
            line = process.stdout.readline()
            late.cancel()
            said = json.loads(line) if line else {}
            if "ready" in said:
                self._write("ready", process.pid, labeler=said["ready"], radeval=said["radeval"])
            # what it has taken can be read until it is reaped, which is done here and nowhere else
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._spent += _cpu_seconds(process.pid)
                code, self._ended = process.wait(), True
            process.stdout.close()
            with self._lock:
                if self._closing:
                    return
                cause = said["error"] if "error" in said else self._cause(code, ready="ready" in said)
                # a labeler that cannot be loaded at first is bad input; later it could be, so that another start may
                # help
                if ("ready" not in said and self._generation == 1) or code == RANK_DIED or self._generation > RESTARTS:
                    again = (
                        f"the {self.settings.name} has died {self._generation} times; the last time: "
                        if self._generation > 1
                        else ""
                    )
                    self._write("failed", process.pid, cause=again + cause)
                    return
                print(
                    f"the {self.settings.name} is started again ({self._generation} of {RESTARTS}): {cause}",
                    file=sys.stderr,
                    flush=True,
                )
                self._process = self._start()

    def _cause(self, code: int, *, ready: bool) -> str:
        reason = self.directory / f"{self._generation}.killed"
        if reason.is_file():
            return reason.read_text(encoding="utf-8")
        if code == RANK_DIED:
            return "a rank has died, and the service left"
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += (
                " (the kernel does that when memory runs out: `dmesg` says so)"
                if ready
                else f", or not ready in {START_SECONDS} s"
            )
        return f"its process {how}; see {self.log}"

    def _write(self, status: Literal["starting", "ready", "failed"], pid: int, **more: Any) -> None:
        state = ServiceState(generation=self._generation, status=status, pid=pid, **more)
        write_text_atomically(self.directory / "state.json", json.dumps(asdict(state)))
