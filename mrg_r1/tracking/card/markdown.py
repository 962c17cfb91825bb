"""Values of a run as Markdown and YAML that stay what they are, whatever names a recipe holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#!|~$<>&@]|(?<=:)//|(?<=www)\.)")


def text(value: object) -> str:
    """A value as one line of prose, in which nothing is markup, HTML, a link or a cell's end."""
    return _PUNCTUATION.sub(r"\\\1", one_line(value))


def code(value: object) -> str:
    """A value as a code span, which may stand in a table.

    >>> code("a`b|c")
    '``a`b\\\\|c``'
    """
    line = one_line(value).replace("|", "\\|") or " "
    ticks = "`" * (_longest_run(line) + 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fence(content: str, language: str) -> str:
    """A block of code, under marks that the content does not have."""
    ticks = "`" * max(3, _longest_run(content) + 1)
    return f"{ticks}{language}\n{content.rstrip()}\n{ticks}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells that are Markdown already; the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_matter(metadata: Mapping[str, Any], comments: Sequence[str]) -> str:
    """The hub's metadata between its two marks; comments are for who reads the file, one line each."""
    dumped = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=4096)
    return "\n".join(["---", *(f"# {one_line(comment)}" for comment in comments), dumped.rstrip(), "---"])


def one_line(value: object) -> str:
    """A value without line breaks, other control characters and lone halves of characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split(" ")).strip()


def _longest_run(content: str) -> int:
    return max((len(run) for run in re.findall("`+", content)), default=0)
