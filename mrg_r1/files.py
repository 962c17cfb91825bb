"""Files that are there whole or not at all, through a kill, a crash of the machine and a full disk."""

from __future__ import annotations

import os
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file under another name, bring it to the disk, then give it its own.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    # lone surrogates in reports, as JSON escapes them
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
