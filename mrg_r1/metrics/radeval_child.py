"""RadEval's metrics, in the interpreter of an environment that has the package: `PYTHON radeval_child.py`.

`mrg_r1.metrics.radeval` starts it and is the other side. It imports the standard library and the package `radeval`,
nothing of mrg_r1, and runs under Python 3.9 and newer. Both sides write JSON, an object a line:

    <- {"metrics": [NAME], "network": false}
    -> {"package": "radeval", "version": "2.2.1", "python": "3.11.7",
        "metrics": {NAME: {"outputs": [OUTPUT], "weights_sha256": HEX or null}}}
    <- {"id": 1, "metric": NAME, "predicted": [TEXT], "references": [TEXT]}
    -> {"id": 1, "values": {OUTPUT: [NUMBER or null]}}

or {"error": TEXT} in place of an answer. The end of stdin ends the process, whatever it does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import sys
import threading
import traceback
import types
from typing import Any

PACKAGE = "radeval"
# Invented; what a metric says of them is thrown away, the weights that it has then loaded are hashed.
TRIAL = {
    "predicted": ["No acute cardiopulmonary abnormality.", "There is a small left pleural effusion."],
    "references": ["No acute cardiopulmonary process.", "Small pleural effusion on the left."],
}
_HERE = ("", "localhost", "127.0.0.1", "::1")


class NoNetwork(ConnectionError):
    """Nobody allowed a connection."""


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook under which Python's sockets reach this machine alone. It cannot be taken away again."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]  # a string, or bytes, of a Unix socket
        host = address[0] if isinstance(address, tuple) else ""
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0] or ""
    else:
        return
    host = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    if host not in _HERE and not host.startswith("127."):
        raise NoNetwork(f"a connection to {host} was refused: nobody allowed the network")


def weights_sha256(root: Any) -> str | None:
    """A hash of all parameters and buffers of torch that can be reached from an object; None where there are none.

    It is of what scores, wherever the file came from: names inside the object, types, shapes, bytes.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    tensors, seen, stack = {}, set(), [("", root)]
    while stack:
        path, one = stack.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type(None), type, types.ModuleType)):
            continue
        seen.add(id(one))
        if isinstance(one, torch.nn.Module):
            passing = one._non_persistent_buffers_set
            own = dict(one._parameters, **{k: v for k, v in one._buffers.items() if k not in passing})
            tensors.update({path + "." + name: tensor for name, tensor in own.items() if tensor is not None})
        if isinstance(one, (list, tuple)):
            parts = dict(enumerate(one))
        else:
            parts = one if isinstance(one, dict) else getattr(one, "__dict__", {})
        stack += [(path + "." + str(name), part) for name, part in parts.items()]
    if not tensors:
        return None
    digest = hashlib.sha256()
    for path in sorted(tensors):
        tensor = tensors[path].detach().cpu().contiguous()
        digest.update(f"{path} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def scored(evaluator: Any, predicted: list[str], references: list[str]) -> dict[str, list[float | None]]:
    """OUTPUT -> one number a report, or null."""
    answer = evaluator(refs=references, hyps=predicted)
    values = {}
    for name, column in answer.items():
        column = column.tolist() if hasattr(column, "tolist") else column  # NumPy's or torch's; neither is imported
        if not isinstance(column, (list, tuple)):
            raise TypeError(f"{name} is a {type(column).__name__} and not one number a report")
        values[str(name)] = [None if value is None else float(value) for value in column]
    return values


def load(names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """NAME -> the package's object for each metric, and the handshake."""
    import radeval

    sys.modules.setdefault("RadEval", radeval)  # 2.2.1 imports parts of itself by the name that it had before
    evaluators, metrics = {}, {}
    for name in names:
        try:
            evaluators[name] = radeval.RadEval(metrics=[name], per_sample=True, show_progress=False)
            outputs = scored(evaluators[name], **TRIAL)
            metrics[name] = {"outputs": list(outputs), "weights_sha256": weights_sha256(evaluators[name])}
        except Exception as error:  # whatever a package raises: the other side hears which metric it was
            raise RuntimeError(f"metric {name}: {type(error).__name__}: {error}") from error
    version = importlib.metadata.version(PACKAGE)
    return evaluators, {
        "package": PACKAGE,
        "version": version,
        "python": platform.python_version(),
        "metrics": metrics,
    }


def main() -> None:
    sys.path.pop(0)  # this file's folder, whose names would stand before the package's own
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)  # what the package prints is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    settings = json.loads(requests.readline())
    if not settings["network"]:
        sys.addaudithook(refuse_network)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        os._exit(0)  # who asks has ended

    threading.Thread(target=read, daemon=True).start()
    try:
        evaluators, about = load(settings["metrics"])
    except ModuleNotFoundError as error:
        traceback.print_exc()
        say({"error": str(error), "missing": error.name})
        sys.exit(2)
    except Exception as error:  # the other side has no traceback but this one
        traceback.print_exc()
        say({"error": str(error) if isinstance(error, RuntimeError) else type(error).__name__ + ": " + str(error)})
        sys.exit(2)
    say(about)
    while True:
        # RadCliQ's object keeps what it made of a list of references under the list's id(): the last request, and with
        # it that list, lives until the next one is there, so that two never have one id
        request = json.loads(lines.get())
        try:
            values = scored(evaluators[request["metric"]], request["predicted"], request["references"])
            say({"id": request["id"], "values": values})
        except Exception as error:  # of one metric: it is named, and the next request is answered all the same
            traceback.print_exc()
            say({"id": request["id"], "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
