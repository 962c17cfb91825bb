"""The reward service's process: `python -m mrg_r1.reward.service.server`, one a node.

`supervisor` starts it. It loads the labeler on its own device, then serves the node's ranks. A thread a connection
reads requests, another writes answers, and the main thread works: it takes whatever has come in from all ranks, labels
the texts of it in one batch, and answers in order. It ends with its parent, and when a rank dies.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch

from mrg_r1.labels.labeler import Labeler
from mrg_r1.reward.compute import NotFiniteError, RewardError, RewardFunction
from mrg_r1.reward.reading import LabelError
from mrg_r1.reward.service import wire

RANK_DIED = 17  # exit code: a connection ended without a farewell
HINTS_AT_ONCE = 32  # texts: a batch that comes in meanwhile waits for no more than these
HINTS_KEPT = 4096  # texts: what a slow labeler cannot get to is dropped, the oldest first
_PARENT_CHECKED_EVERY = 0.5  # seconds
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Peer:
    """One rank's connection."""

    connection: Connection
    answers: queue.SimpleQueue[wire.Message] = field(default_factory=queue.SimpleQueue)
    hint_seconds: float = 0.0  # worked on its hints, to be reported with its next answer


@dataclass
class Job:
    """A request that is answered."""

    peer: Peer
    request: wire.Message


class Server:
    """Serves a `RewardFunction` to the ranks of a node.

    Args:
        function: what scores a batch.
        listener: where the ranks connect.
    """

    def __init__(self, function: RewardFunction, listener: Listener) -> None:
        self.function, self.listener = function, listener
        self.jobs: list[Job] = []
        self.hints: deque[tuple[Peer, str]] = deque(maxlen=HINTS_KEPT)
        self.working: list[Job] = []
        self.working_since: float | None = None
        self.changed = threading.Condition()  # guards the four above
        self.computed = 0  # texts read by the labeler that an answer has told of
        self.notes: list[str] = []  # warnings, such as of little memory, for the rank that is answered next to print
        warnings.showwarning = self._note

    def serve(self) -> None:
        """Work until the process is ended."""
        threading.Thread(target=self._accept, daemon=True).start()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.hints)
                self.working, self.jobs = self.jobs, []
                hinted = (
                    [] if self.working else [self.hints.popleft() for _ in range(min(HINTS_AT_ONCE, len(self.hints)))]
                )
                self.working_since = time.monotonic()
            if hinted:
                self._read_ahead(hinted)
            self._work(list(self.working))
            with self.changed:
                self.working_since = None

    def _work(self, jobs: list[Job]) -> None:
        """Label the texts of all jobs in one batch, then answer each job."""
        began = time.perf_counter()
        texts = [self._texts(job.request) for job in jobs]
        if len(jobs) > 1:
            try:
                self.function.reader.label([text for part in texts for text in part])
            except LabelError:
                pass  # one by one below: the job that it comes from gets it, with the names of its studies
        share = (time.perf_counter() - began) / max(len(jobs), 1)
        for job, asked in zip(jobs, texts, strict=True):
            began = time.perf_counter()
            answer = self._answer(job.request)
            answer["busy"] = share + time.perf_counter() - began + job.peer.hint_seconds
            answer["asked"] = len(asked)
            answer["computed"] = self.function.reader.computed - self.computed
            answer["notes"] = self.notes
            job.peer.hint_seconds, self.computed, self.notes = 0.0, self.function.reader.computed, []
            # the answer is queued before the job is forgotten: whoever hears that it is unknown has been sent the
            # answer before
            with self.changed:
                job.peer.answers.put(answer)
                self.working.remove(job)

    def _texts(self, request: wire.Message) -> list[str]:
        """The texts whose labels a request needs."""
        if request["kind"] == "label":
            return list(request["texts"])
        context = wire.context_of(request)
        reports = self.function.reports_of([text for group in request["texts"] for text in group], context)
        constant = [] if context.constant is None else [context.constant]
        unknown = request["references"] if context.reference_labels is None else []
        return reports + [text for text in unknown if text is not None] + constant

    def _answer(self, request: wire.Message) -> wire.Message:
        try:
            if request["kind"] == "label":
                return {"id": request["id"], "classes": self.function.reader.label(request["texts"]).tolist()}
            rewards = self.function.score(
                request["texts"],
                torch.tensor(request["ended"]),
                request["references"],
                wire.context_of(request),
                study_ids=request["study_ids"],
            )
            return {"id": request["id"], "rewards": wire.rewards_message(rewards)}
        except Exception as error:  # whatever it is belongs to the rank that asked: it raises there and stops the run
            traceback.print_exc()
            named = isinstance(error, (RewardError, LabelError, ValueError))
            text = str(error) if named else f"{type(error).__name__}: {error}"
            return {"id": request["id"], "error": text, "not_finite": isinstance(error, NotFiniteError)}

    def _read_ahead(self, hinted: list[tuple[Peer, str]]) -> None:
        began = time.perf_counter()
        try:
            self.function.reader.label(self.function.reports_of([text for _, text in hinted]))
        except LabelError as error:
            print(f"read ahead: {error}; it will be raised where the batch is scored", file=sys.stderr, flush=True)
        seconds = (time.perf_counter() - began) / len(hinted)
        for peer, _ in hinted:
            peer.hint_seconds += seconds

    def _note(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):  # not what libraries say of their own old names
            self.notes.append(str(message))
        print(f"{category.__name__}: {message}", file=sys.stderr, flush=True)

    # Threads

    def _accept(self) -> None:
        while True:
            try:
                peer = Peer(self.listener.accept())
            except Exception as error:  # a stranger without the key, or one that hung up
                print(f"a connection was not accepted: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
            threading.Thread(target=self._write, args=(peer,), daemon=True).start()

    def _read(self, peer: Peer) -> None:
        while True:
            try:
                request = wire.unpack(peer.connection.recv_bytes())
            except (EOFError, OSError):
                print("a rank has died: leaving", file=sys.stderr, flush=True)
                os._exit(RANK_DIED)
            with self.changed:
                match request["kind"]:
                    case "ping":
                        known = [job.request["id"] for job in [*self.working, *self.jobs] if job.peer is peer]
                        seconds = 0.0 if self.working_since is None else time.monotonic() - self.working_since
                        peer.answers.put({"pong": known, "working": seconds})
                    case "hint":
                        self.hints.extend((peer, text) for text in request["texts"])
                    case "bye":
                        return
                    case _:
                        self.jobs.append(Job(peer, request))
                self.changed.notify()

    def _write(self, peer: Peer) -> None:
        while True:
            try:
                peer.connection.send_bytes(wire.pack(peer.answers.get()))
            except OSError:
                return  # the reading thread sees the same, and decides


def main() -> None:
    """Read the settings from the first line of stdin, say on stdout that the labeler is ready (or why not), and
    serve.
    """
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(
        target=_leave_with, args=(settings["parent"], Path(settings["address"]).parent), daemon=True
    ).start()
    # for the ranks, which finish a step that needs rewards; this process leaves with them
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a user's own term prints goes to the log
    torch.set_num_threads(settings["threads"])
    try:
        labeler, function = _load(settings)
        listener = Listener(settings["address"], "AF_UNIX", backlog=64, authkey=bytes.fromhex(settings["key"]))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        traceback.print_exc()
        print(json.dumps({"error": str(error)}), file=said, flush=True)
        sys.exit(2)
    ready = {"name": labeler.name, "fingerprint": labeler.fingerprint}
    radeval = None if function.workers is None else function.workers.about
    print(json.dumps({"ready": ready, "radeval": radeval}), file=said, flush=True)
    Server(function, listener).serve()


def _load(settings: dict[str, Any]) -> tuple[Labeler, RewardFunction]:
    """The labeler on its device, having read one text, and the reward function around it.

    Raises:
        ValueError, OSError, RuntimeError: a labeler or a term that cannot be loaded, or a GPU that is not there; never
            the CPU instead.
    """
    device = "cpu"
    if settings["device"] != "cpu":
        device = "cuda:0"  # the only one that this process sees
        if not torch.cuda.is_available() or torch.cuda.device_count() != 1:
            raise ValueError(
                f"{settings['device_field']} {settings['device']}: this node has no such GPU "
                f"(CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} shows {torch.cuda.device_count()}); "
                f"`nvidia-smi -L` lists numbers and UUIDs, {settings['device_field']}=cpu needs none"
            )
    labeler = Labeler.load(
        settings["labeler"], tokenizer=settings["tokenizer"], device=device, dtype=_DTYPES[settings["dtype"]]
    )
    labeler.label(["No acute cardiopulmonary abnormality."])  # kernels and memory, before a run depends on them
    return labeler, RewardFunction(labeler, **settings["reward_function"])


def _leave_with(parent: int, directory: Path) -> None:
    """End this process when the one that started it has ended, however it ended, and remove what it can no longer
    remove.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECKED_EVERY)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
