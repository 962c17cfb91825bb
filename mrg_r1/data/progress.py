"""One progress bar for everything in this room that takes more than a few seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """`items` behind a bar on stderr; no bar where the environment variable CI is set or stderr is not a terminal."""
    quiet = bool(os.environ.get("CI")) or not sys.stderr.isatty()
    return track(items, description, total=total, console=Console(stderr=True), disable=quiet)
