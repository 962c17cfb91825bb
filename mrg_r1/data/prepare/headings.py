"""Which known heading a misspelt one means, and which headings are not known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

_SHOWN = 20
_NOWHERE = "in the section before"


def nearest(heading: str, known: Iterable[str], *, twice: Iterable[str] = ()) -> str | None:
    """The known heading that differs by one letter too many, missing, wrong or changed with its neighbour; or by two,
    where the first letter is right.

    Short headings are no one's misspelling, and two faults make other words too easily (OCCLUSION, CONTUSION of
    CONCLUSION; MEDICATION of INDICATION).

    Args:
        heading: in capitals.
        known: headings, in capitals.
        twice: those of them that two faults may stand in.

    Returns:
        None where there is none, or `heading` is itself known.
    """
    long = [name for name in known if len(name) >= 6]
    if heading in long or not heading:
        return None
    once = [name for name in long if abs(len(name) - len(heading)) <= 1 and _faults(heading, name) == 1]
    allowed = [
        name for name in twice if len(name) >= 8 and name[0] == heading[0] and abs(len(name) - len(heading)) <= 2
    ]
    return next(iter(once), None) or next((name for name in allowed if _faults(heading, name) <= 2), None)


class Headings:
    """Headings that no list has: how many reports have each, and where their text went.

    Attributes:
        misspelt: heading and the section that it opened -> reports.
        unknown: heading -> reports, in which its text is a part of the section before.
    """

    def __init__(self) -> None:
        self.misspelt: Counter[tuple[str, str]] = Counter()
        self.unknown: Counter[str] = Counter()

    def count(self, misspelt: Iterable[tuple[str, str]], unknown: Iterable[str]) -> None:
        """Add those of one report."""
        self.misspelt.update(set(misspelt))
        self.unknown.update(set(unknown))

    def show(self) -> None:
        """Print them as a table, the most frequent first; nothing where there are none."""
        rows = [(name, section, count) for (name, section), count in self.misspelt.most_common()]
        rows += [(name, _NOWHERE, count) for name, count in self.unknown.most_common(_SHOWN)]
        if not rows:
            return
        table = Table("heading", "its text", title="headings that are not known")
        table.add_column("reports", justify="right")
        for name, section, count in rows:
            table.add_row(name[:40], section, f"{count:,}")
        if len(self.unknown) > _SHOWN:
            table.add_row(f"{len(self.unknown) - _SHOWN:,} others", _NOWHERE, "")
        Console(markup=False).print(table)


def _faults(one: str, other: str) -> int:
    """Letters to put in, take out, change or swap with their neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        last, row, older = row, [i], before
        for j, wanted in enumerate(other, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        before = last
    return row[-1]
