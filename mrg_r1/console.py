"""What is shown on a terminal: how wide, and progress bars on stderr with the one rule for when there is none.

A bar is silent where nobody watches (stderr is no terminal, or the environment variable CI is set), and where the
caller asks for it: a rank that is not the first, work of a moment. A bar that has come to its end is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn, track

PIPE_WIDTH = 100  # columns of what has no width of its own: a pipe, a file, a CI's log
Item = TypeVar("Item")


def wide_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console as wide as its terminal; of `PIPE_WIDTH` columns where it is none, or the width that COLUMNS asks."""
    console = Console(stderr=stderr, quiet=quiet)
    return (
        console
        if console.is_terminal or "COLUMNS" in os.environ
        else Console(stderr=stderr, quiet=quiet, width=PIPE_WIDTH)
    )


def watched() -> bool:
    """Whether somebody looks at stderr."""
    return sys.stderr.isatty() and not os.environ.get("CI")


def progress(
    items: Iterable[Item], description: str, *, total: int | None = None, quiet: bool = False
) -> Iterable[Item]:
    """`items` behind a bar.

    Args:
        total: how many there are, where `items` has no length.
        quiet: no bar, whoever watches.
    """
    disable = quiet or not watched()
    return track(items, description, total=total, console=Console(stderr=True), disable=disable, transient=True)


def progress_bar(*columns: str | ProgressColumn, console: Console | None = None, quiet: bool = False) -> Progress:
    """A bar that the caller moves, in rich's columns where none are given.

    Args:
        console: of other lines that are written while the bar stands.
        quiet: no bar, whoever watches.
    """
    console = Console(stderr=True) if console is None else console
    return Progress(*columns, console=console, disable=quiet or not watched(), transient=True)
