"""Files that are there whole or not at all, through a kill, a crash of the machine and a full disk; their digests; and
JSON that others wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# As libraries in Rust (safetensors, tokenizers) say it, whose errors are no OSError.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# 1e308 has one more, and what is much above it no float holds.
_MOST_DIGITS = 308
_SHOWN = 80  # characters of a value in a message


class RepeatedField(ValueError):
    """A field that stands twice in one object of JSON, where whichever is taken is a guess."""


@contextmanager
def atomically(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A name beside `path`, under which the block writes a file or a folder; it becomes `path` where the block ends
    well, and is removed where it does not. What stood at `path` before is replaced (a folder must have been empty). A
    device or a pipe, such as /dev/stdout, is written to as it is.

    Args:
        synced: brought to the disk first; False where what a crash of the machine damages is easily made again.

    Raises:
        OSError: it cannot be written or put in place, and names `path`; what was there before is untouched.
    """
    if _is_stream(path):
        with naming(path):
            yield path
        return
    if path.is_symlink():
        path = path.resolve()  # the file that it leads to is replaced, and not the link
    # the process's number: two runs may write the same file at once
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            if synced:
                sync(temporary)
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file as UTF-8, whole or not at all. Lone surrogates, which reports may hold, become JSON's escapes.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _is_stream(path: Path) -> bool:
    """Whether what stands there is to be written to and not replaced."""
    if path.parent in (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def folder_filled(folder: Path) -> Iterator[Path]:
    """A fresh folder to write files into, which become files of `folder` where the block ends well: each is then whole,
    has the umask's permissions, and replaces one of its name; others of `folder` stay.

    Raises:
        OSError: they cannot be written or put in place, and names `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.tmp"
    try:
        with naming(folder, temporary):
            temporary.mkdir()
            yield temporary
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in files:
                follow_umask(path)
                sync(path)
            for path in files:
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """What fails in writing names the file: a full disk is otherwise an error without one.

    Args:
        path: the name for the message.
        temporary: what stands for it, and is not to be named.

    Raises:
        OSError: in place of one without a file or with `temporary`, and of what libraries in Rust raise.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else str(os.fsdecode(error.filename))
        if error.errno is not None and (named is None or temporary is not None and named.startswith(str(temporary))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:  # safetensors raises its own kind, with the system's error as words
        if found := _RUST_ERROR.search(str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask; safetensors' own are for the owner alone.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from safetensors.torch import save_file  # it brings torch, which the rest of this module does not wait for

    with naming(path):
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
        follow_umask(path)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of one that is made anew."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.mode")
    fresh.touch()
    try:
        shutil.copymode(fresh, path)
    finally:
        fresh.unlink()


def sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes, *, unique: bool = False, finite: bool = False) -> Any:
    """JSON that another program or person wrote. All that is wrong with it is a ValueError, where `json.loads` has
    a RecursionError for what is nested too deeply, and whole numbers that fail only where a float is made of them.

    Args:
        text: bytes are UTF-8, or what a byte order mark says.
        unique: refuse a field that stands twice in one object; else the last one counts.
        finite: refuse NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        JSONDecodeError: broken, nested too deeply, or a number that no float holds; with its place.
        RepeatedField: where `unique`; names the field.
        UnicodeDecodeError: bytes that are no text.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")

    def whole(digits: str) -> int:
        if len(digits.lstrip("-")) > _MOST_DIGITS:
            raise json.JSONDecodeError(f"a whole number of {len(digits):,} digits", text, text.index(digits))
        return int(digits)

    def constant(name: str) -> float:
        if finite:
            raise json.JSONDecodeError(f"{name} is no number of JSON", text, text.index(name))
        return float(name)

    pairs = _without_repeats if unique else None
    try:
        return json.loads(text, parse_int=whole, parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def shown(value: Any) -> str:
    """A value of parsed JSON for a message, on one line of ASCII, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:  # its nesting could just be read
        text = "a value that is nested too deeply"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedField(f"field `{twice}` stands twice in one object")
    return record
