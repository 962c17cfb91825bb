"""The reward service with a labeler of key words and, where `FAULT` asks for it, a fault.

FAULT is JSON {"kind", "times", "counter"}: the fault happens `times` times in all, over restarts, counted by the size
of the file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
if FAULT.get("kind") != "memory":
    import tests.reward.service.without_labeler  # noqa: F401

import torch  # noqa: E402

from mrg_r1.reward.service import server  # noqa: E402
from tests.reward.keyword_labeler import KeywordLabeler  # noqa: E402


def strikes(kind: str) -> bool:
    if FAULT.get("kind") != kind:
        return False
    counter = Path(FAULT["counter"])
    done = counter.stat().st_size if counter.exists() else 0
    if done >= FAULT["times"]:
        return False
    with open(counter, "ab") as file:
        file.write(b"x")
    return True


class Labeler(KeywordLabeler):
    name, fingerprint = "keywords", "0123456789abcdef"

    def label(self, texts: list[str]) -> Any:
        if texts == ["No acute cardiopulmonary abnormality."]:  # the first one, before the service is ready
            return super().label(texts)
        if strikes("die"):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if strikes("raise"):
            raise RuntimeError("device lost")
        if strikes("hang"):
            time.sleep(1000)
        return super().label(texts)


def short_of_memory(path: str, **options: Any) -> Any:
    """The real labeler on a device on which `FAULT["tokens"]` fit."""
    from mrg_r1.labels import inference, labeler

    loaded, read = labeler.Labeler.load(Path(path)), inference.read

    def failing(model: Any, packed: Any) -> Any:
        if len(packed.ids) > FAULT["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return read(model, packed)

    inference.read = failing
    return loaded


answer = server.Server._answer


def losing(self: server.Server, request: dict[str, Any]) -> dict[str, Any]:
    """The work is done, the answer never arrives."""
    done = answer(self, request)
    return {"pong": [request["id"]], "working": 0.0} if strikes("lose") else done


def keywords(*arguments: Any, **options: Any) -> Labeler:
    if strikes("refuse"):
        raise ValueError("no labeler of this name")
    return Labeler()


if __name__ == "__main__":
    load = short_of_memory if FAULT.get("kind") == "memory" else keywords
    server.Labeler = SimpleNamespace(load=load)  # type: ignore[assignment, misc]
    server.Server._answer = losing  # type: ignore[method-assign]
    server.main()
