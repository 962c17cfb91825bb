"""What libraries say during a run goes to RUN/launch.log, so that the terminal keeps to the run.

Warnings and log lines of DeepSpeed, transformers, torch and others are for whoever looks for a cause. Their errors stay
on the terminal too, and so does every warning of this project.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

from mrg_r1.files import naming

_OURS = Path(__file__).resolve().parents[1]


class LibraryLog(logging.Handler):
    """The one handler of every logger and of Python's warnings, from `take_over` on.

    Lines are kept until RUN is there, since what is said first is said before the recipe is read. Every rank appends
    whole lines, each with its rank.

    Args:
        who: begins every line, as in `rank 0`.
    """

    def __init__(self, who: str) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter(f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s"))
        self.path: Path | None = None
        self._who = who
        self._waiting: list[str] = []

    def take_over(self) -> None:
        """Silence what prints by itself; again after an import, since libraries make their loggers then."""
        logging.captureWarnings(False)
        warnings.showwarning = self._warned
        root = logging.getLogger()
        for logger in [root, *map(logging.getLogger, list(root.manager.loggerDict))]:
            printing = [handler for handler in logger.handlers if _prints(handler)]
            for handler in printing:
                logger.removeHandler(handler)
            if printing:
                logger.propagate = True
        if self not in root.handlers:
            root.addHandler(self)

    def write_to(self, path: Path) -> None:
        """From here on lines go to `path`, as soon as its folder is there."""
        self.path = path
        self._write_waiting()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; one of an error is printed too."""
        line = self.format(record)
        if record.levelno >= logging.ERROR:
            print(line, file=sys.stderr, flush=True)
        self.write(line)

    def write(self, text: str) -> None:
        """Text of any number of lines, such as why this rank ends."""
        self._waiting.append(text.rstrip("\n") + "\n")
        self._write_waiting()

    def mention(self) -> str:
        """A line that names the file, where there is one; else what would have stood in it. For a rank that fails,
        before its own words.
        """
        if self.path is not None and self.path.is_file():
            return f"what libraries said: {self.path}\n"
        waiting, self._waiting = self._waiting, []
        return "".join(waiting)

    def _write_waiting(self) -> None:
        if self.path is not None and self.path.parent.is_dir():
            waiting, self._waiting = self._waiting, []
            if waiting:
                with naming(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write("".join(waiting))

    def _warned(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).resolve().is_relative_to(_OURS):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            where = f"{filename}:{lineno}: {message}"
            self.handle(logging.LogRecord(category.__name__, logging.WARNING, filename, lineno, where, None, None))


def _prints(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams
