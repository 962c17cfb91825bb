"""Radiographs through the image processor, here or in processes of their own that work ahead of the device.

Decoding and resizing take the interpreter lock from the thread that drives the device; in other processes they do not.
What comes back is the same to the last bit, in the same order, however many there are: nothing here is random.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as mp

from mrg_r1.data.images import ImageError, load_image
from mrg_r1.types import Study

# Studies a worker has been given and not handed back: the one at hand and the next. Each answer waits in shared memory.
_IN_FLIGHT = 2
_CLOSING_SECONDS = 5.0

Processed = dict[str, Tensor]  # what the image processor says of a study's images, by its own names


class WorkerError(RuntimeError):
    """A process that reads images has died or failed; the message names it, the study and its files."""


def process_study(study_id: str, paths: Sequence[Path], image_processor: Any) -> Processed:
    """One study's images through the image processor: the only place that calls it.

    Raises:
        ImageError: an image that cannot be used; names the study, the file and the remedy.
    """
    images = [load_image(path, study_id) for path in paths]
    return dict(image_processor(images=images, return_tensors="pt"))


class ImageReader:
    """Studies -> what the image processor says of their images, in their order. Threads may share it; one batch is read
    at a time.

    Args:
        image_processor: PIL images -> named tensors.
        workers: processes that read; 0 reads in the calling thread. They start with the first batch, know nothing of
            CUDA, and end with this process however it ends.
    """

    def __init__(self, image_processor: Any, *, workers: int = 0) -> None:
        self.image_processor = image_processor
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def read(self, studies: Sequence[Study]) -> list[Processed]:
        """
        Raises:
            ImageError: an image that cannot be used.
            WorkerError: a worker was killed (by the kernel, where memory ran out), or failed otherwise.
        """
        tasks = [(study.id, [image.path for image in study.images]) for study in studies]
        if not self._wanted:
            return [process_study(study_id, paths, self.image_processor) for study_id, paths in tasks]
        with self._lock:
            if not self._workers:
                self._workers = [_Worker.start(self.image_processor, number) for number in range(self._wanted)]
                atexit.register(self.close)  # before multiprocessing's own, which would wait for them
            try:
                answers = self._spread(tasks)
            except (
                BaseException
            ):  # answers to this batch may still be under way: the next batch must not take them for its own
                self.close()
                raise
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if not isinstance(answer, Exception)]

    def _spread(self, tasks: Sequence[tuple[str, list[Path]]]) -> list[Processed | Exception]:
        """Task k is worker k's modulo their number, so that answers come in order without being sorted."""
        count = len(self._workers)
        for number, task in enumerate(tasks[: _IN_FLIGHT * count]):
            self._workers[number % count].give(task)
        answers: list[Processed | Exception] = []
        for number in range(len(tasks)):
            answers.append(self._workers[number % count].answer())
            if (following := number + _IN_FLIGHT * count) < len(tasks):
                self._workers[number % count].give(tasks[following])
        return answers

    def close(self) -> None:
        """End the workers; a later batch starts new ones."""
        for worker in self._workers:
            worker.connection.close()  # the end of its tasks
        for worker in self._workers:
            worker.process.join(_CLOSING_SECONDS)
            worker.process.kill()
            worker.process.join()
        self._workers = []
        atexit.unregister(self.close)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    number: int
    begun: Tensor  # [1] int64 in shared memory: tasks that the worker has begun
    answered: int = 0
    given: list[tuple[str, list[Path]]] = field(default_factory=list)  # without an answer yet, oldest first

    @classmethod
    def start(cls, image_processor: Any, number: int) -> _Worker:
        """A fresh interpreter: a fork would inherit this process's threads' locks and its CUDA context."""
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        begun = torch.zeros(1, dtype=torch.int64).share_memory_()
        process = context.Process(
            target=_work, args=(theirs, begun, image_processor), name=f"images-{number}", daemon=True
        )
        process.start()
        theirs.close()  # the worker's end is its own alone, so that either side sees the other go
        return cls(process, ours, number, begun)

    def give(self, task: tuple[str, list[Path]]) -> None:
        self.given.append(task)
        try:
            self.connection.send(task)
        except OSError:
            raise self._death() from None

    def answer(self) -> Processed | Exception:
        """Its answer to the oldest task: tensors, or why there are none.

        Raises:
            WorkerError: it is dead.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        study_id, paths = self.given.pop(0)
        self.answered += 1
        if isinstance(answer, ImageError):
            return answer
        if isinstance(answer, str):
            files = ", ".join(map(str, paths))
            return WorkerError(
                f"study {study_id!r}: image worker {self.number} (process {self.process.pid}) failed on "
                f"{files}\n{answer}"
            )
        return {name: tensor.clone() for name, tensor in answer.items()}  # shared memory is given back at once

    def _death(self) -> WorkerError:
        self.process.join(_CLOSING_SECONDS)
        code = self.process.exitcode
        how, remedy = f"ended with exit code {code}", "its own messages stand above"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            remedy = {
                signal.SIGKILL: "the kernel kills so where memory runs out: lower data.workers or data.max_pixels, "
                "or ask for more memory",
                signal.SIGBUS: "shared memory is full: give /dev/shm more room (docker: --shm-size), or set "
                "data.workers=0",
            }.get(signal.Signals(-code), "set data.workers=0 to read in the rank itself")
        # an answer can be lost with its sender, so the oldest task is not always the one that it was at
        study_id, paths = self.given[max(int(self.begun) - self.answered - 1, 0)]
        files = ", ".join(map(str, paths))
        return WorkerError(
            f"study {study_id!r}: image worker {self.number} (process {self.process.pid}) {how} at {files}; {remedy}"
        )


def _work(connection: Connection, begun: Tensor, image_processor: Any) -> None:
    """A worker's life: a study in, its tensors out, until the rank's end of the pipe closes, as it does however the
    rank ends.
    """
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # signals to a whole job: the rank finishes its step and needs images
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            study_id, paths = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # nothing is left to be done, and torch takes its time to leave
        begun += 1
        answer: Processed | ImageError | str
        try:
            answer = process_study(study_id, paths, image_processor)
        except ImageError as error:
            answer = error
        except Exception:  # whatever it is, it is the rank that must stop for it
            answer = traceback.format_exc()
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
