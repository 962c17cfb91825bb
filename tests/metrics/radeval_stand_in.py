"""A package `radeval` that stands in for the real one: one file, no weights, and a fault where RADEVAL_FAULT names one.

Its metrics give the share of the reference's words that the report has; what it prints must not disturb anybody.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PYTHON = sys.executable
_MODULE = """
import fcntl, os, signal, socket, sys, time

OUTPUTS = {
    "radgraph": ["radgraph_simple", "radgraph_partial", "radgraph_complete"],
    "radcliq": ["radcliq_v1"],
    "rouge": ["rouge1", "rouge2", "rougeL"],
    "crimson": ["crimson"],
}
print("a banner on stdout")


class RadEval:
    def __init__(self, metrics, per_sample, show_progress):
        (self.name,) = metrics
        assert per_sample and not show_progress
        self.fault = os.environ.get("RADEVAL_FAULT", "").split(":")
        self.calls = 0
        if self.fault == ["weights", self.name]:
            raise OSError("not found in the local cache, HF_HUB_OFFLINE=" + os.environ["HF_HUB_OFFLINE"])
        if self.fault == ["network", self.name]:
            socket.create_connection(("192.0.2.1", 80), timeout=5)
        if self.fault == ["name", self.name]:
            socket.getaddrinfo("huggingface.co", 443)

    def __call__(self, refs, hyps):
        print("noise", flush=True)
        os.write(1, b"{\\"id\\": 1}\\n")
        self.calls += 1
        once = os.environ.get("RADEVAL_ONCE")
        if self.calls > 1 and self.fault[-1] == self.name and not (once and os.path.exists(once)):
            if once:
                open(once, "w").close()
            self.fail(self.fault[0])
        values = []
        for ref, hyp in zip(refs, hyps):
            words = set(ref.lower().split())
            values.append(len(words & set(hyp.lower().split())) / max(1, len(words)))
        if self.calls > 1 and self.fault == ["fewer", self.name]:
            values.pop()
        if self.calls > 1 and self.fault == ["nan", self.name]:
            values[min(1, len(values) - 1)] = float("nan")
        if self.calls > 1 and self.fault == ["none", self.name]:
            values[min(1, len(values) - 1)] = None
        time.sleep(float(os.environ.get("RADEVAL_SECONDS", "0")) * len(refs))
        return {output: list(values) for output in OUTPUTS.get(self.name, [self.name])}

    def fail(self, fault):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exit":
            print("CUDA out of memory", file=sys.stderr)
            os._exit(3)
        if fault == "raise":
            raise KeyError("Cardiomegaly")
        written = {"garbage": b"Cardiomegaly, said the C library\\n", "deep": b"[" * 60_000 + b"\\n"}
        if fault in written:
            for descriptor in range(3, 32):
                try:
                    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_WRONLY:
                        os.write(descriptor, written[fault])
                except OSError:
                    pass
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fault: str = "", version: str = "2.2.1") -> str:
    """Put the package where children find it, and break it. Returns an interpreter that has it.

    Args:
        fault: `KIND:METRIC`.
    """
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("RADEVAL_FAULT", fault)
    (folder / "radeval").mkdir(parents=True, exist_ok=True)
    (folder / "radeval/__init__.py").write_text(_MODULE, encoding="utf-8")
    change_version(folder, version)
    return PYTHON


def change_version(folder: Path, version: str) -> None:
    about = folder / "radeval.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: radeval\nVersion: {version}\n", encoding="utf-8")
