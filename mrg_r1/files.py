"""Files that are there whole or not at all, through a kill, a crash of the machine and a full disk; their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomically(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A name beside `path`, under which the block writes a file or a folder; it becomes `path` where the block ends
    well, and is removed where it does not. What stood at `path` before is replaced (a folder must have been empty).

    Args:
        synced: brought to the disk first; False where what a crash of the machine damages is easily made again.

    Raises:
        OSError: it cannot be put in place; what was there before is untouched.
    """
    # the process's number: two runs may write the same file at once
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
