"""The column names of a CSV: read without white space around them, found in any case, each of them once."""

from __future__ import annotations

from collections.abc import Sequence


def plain(column: str) -> str:
    """A column's name, without white space around it and in small letters."""
    return column.strip().lower()


def find_column(columns: Sequence[str], name: str) -> str | None:
    """The column of this name, as the file has it; None where there is none."""
    return next((column for column in columns if plain(column) == name), None)


def repeated_columns(columns: Sequence[str]) -> str | None:
    """What is wrong where a name stands twice in a header, of which a reader would take either, and the remedy; None
    where each stands once. Columns without a name are passed over.
    """
    names = [plain(column) for column in columns]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    return f"columns {twice} stand twice; keep one of each" if twice else None
