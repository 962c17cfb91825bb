"""A run's files as they may be while it runs: not there yet, or with half a last line; what else is wrong is named by
file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.metrics.renamed import todays_names

# file value of a label -> its letter on the page
_LETTERS = {1: "+", 0: "-", -1: "?", None: "."}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file yet.

    Raises:
        ValueError: not UTF-8, broken JSON, or not an object; names the file and the line.
    """
    if not path.is_file():
        return None
    text = _decoded(path.read_bytes(), str(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise ValueError(
            f"{where}: broken JSON ({error.msg} at column {error.colno}); mend the file or remove it"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line 1: {str(content)[:60]!r} is not a JSON object; mend the file or remove it")
    renamed: dict[str, Any] = todays_names(content)
    return renamed


def read_lines(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a JSONL file, each with "FILE, line N" before it; what follows the last line break is still
    being written.

    Args:
        path: a file that need not be there yet.
        needed: keys that every line must have.

    Raises:
        ValueError: a whole line that is not UTF-8, not JSON, not an object, or without a key; names the file and the
            line.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: broken JSON ({error.msg} at column {error.colno}); mend or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {str(row)[:60]!r} is not a JSON object; mend or remove the line")
            row = todays_names(row)
            for key in needed:
                if key not in row:
                    raise ValueError(f"{where}: no field `{key}`; mend or remove the line")
            yield where, row


def letters(values: Sequence[int | None], where: str) -> str:
    """14 label values as 14 letters: + positive, - negative, ? uncertain, . not mentioned.

    Raises:
        ValueError: not 14 of 1, 0, -1 and null.
    """
    if len(values) != len(OBSERVATIONS) or any(value not in _LETTERS for value in values):
        raise ValueError(
            f"{where}: labels {values!r} are not {len(OBSERVATIONS)} of 1, 0, -1 and null; mend or remove the line"
        )
    return "".join(_LETTERS[value] for value in values)


def number(value: Any, where: str, field: str) -> float:
    """A field that has to be a finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: field `{field}` is {str(value)[:60]!r} and not a number; mend or remove the line")
    return float(value)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); mend or remove it") from error
