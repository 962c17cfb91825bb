"""The C of `source/`, compiled for this machine at first use and kept in the user's cache.

Nothing depends on it: without a compiler torch's own kernels compute the same, slower. That it was compiled or why it
was not is said by `state`, which a run prints and `mrg-r1 doctor` shows.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SWITCH = "MRG_R1_KERNELS"  # 0 in the environment: torch's own kernels only
_SOURCE = Path(__file__).parent / "source"
# -fopenmp without linking its runtime: a second one beside torch's would be a second pool of threads
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-fPIC", "-fopenmp")
_PATIENCE = 120  # seconds for a file; it takes one
_RUNTIMES = ("libgomp", "libiomp5")  # that know what GCC's OpenMP calls


@dataclass(frozen=True)
class State:
    """Whether the kernels are in use.

    Attributes:
        library: None where they are not.
        text: a line for a person: by what they were compiled, or why they were not.
        missing: whether installing or mending something would bring them.
    """

    library: ctypes.CDLL | None
    text: str
    missing: bool = False


@cache
def state() -> State:
    """Compile and load the kernels, once in a process."""
    if os.environ.get(SWITCH) == "0":
        return State(None, f"torch's own: {SWITCH}=0")
    if platform.system() != "Linux":
        return State(None, "torch's own: ours are for Linux")
    try:
        command = _compiler()
        if command is None:
            return State(None, "torch's own: no C compiler was found; with gcc a rollout on a CPU is much faster", True)
        version = _version(command)
        return State(_load(_compiled(command, version)), f"compiled by {version}")
    # a compiler that fails; CC that is no command; a user without a home; a cache that cannot be written
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines() or [type(error).__name__]
        return State(None, f"torch's own: the C compiler gave no library: {said[-1]}", True)


def _compiler() -> list[str] | None:
    """The command that compiles C: the one named by CC, or GCC."""
    for name in (os.environ.get("CC"), "gcc", "cc"):
        words = shlex.split(name) if name else []
        if words and shutil.which(words[0]):
            return words
    return None


def _version(command: list[str]) -> str:
    """The first line that the compiler says of itself."""
    done = _run([*command, "--version"])
    return ((done.stdout + done.stderr).strip().splitlines() or ["a compiler that does not say which"])[0]


def _compiled(command: list[str], version: str) -> Path:
    """The library of these sources by this compiler for this processor; made where it is not there yet."""
    sources = sorted(path for path in _SOURCE.iterdir() if path.suffix in (".c", ".h"))
    known = hashlib.sha256("\n".join([version, *command, *_FLAGS, _processor()]).encode())
    for source in sources:
        known.update(source.name.encode() + source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrg-r1"
    name = f"kernels-{known.hexdigest()[:16]}"
    for library in folder.glob(f"{name}-*.so"):
        # a file that a power cut has damaged would end the process without a word
        if library.name == _named(name, library.read_bytes()):
            return library
        library.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    # several ranks may compile at once: each makes its own and the last one's stays
    with tempfile.TemporaryDirectory(dir=folder) as made:
        objects = []
        for source in sources:
            if source.suffix == ".c":
                objects.append(str(Path(made, source.stem + ".o")))
                _run([*command, *_FLAGS, "-c", str(source), "-o", objects[-1]])
        shared = Path(made, name)
        _run([*command, "-shared", *objects, "-o", str(shared), "-lm"])
        library = folder / _named(name, shared.read_bytes())
        shared.replace(library)
    return library


def _named(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=_PATIENCE)


def _processor() -> str:
    """What this processor can do: a folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kinds = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return platform.machine() + "".join(sorted(set(kinds)))


def _load(path: Path) -> ctypes.CDLL:
    runtime = _runtime()
    if runtime is not None:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)  # the same one: its names become known to what is loaded next
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)  # now: a name that is missing is an error here and not in a call


def _runtime() -> str | None:
    """The file of the OpenMP runtime that torch has loaded; other packages may have brought their own."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    files = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
    found = sorted(file for file in files if file.startswith("/") and Path(file).name.startswith(_RUNTIMES))
    of_torch = str(Path(torch.__file__).parent)
    return next((file for file in found if file.startswith(of_torch)), found[0] if found else None)
