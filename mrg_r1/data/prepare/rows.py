"""Rows of somebody else's CSV, read so that a fault in it is named with its line and nothing is lost in silence."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, cast

from mrg_r1.data.study import ManifestError
from mrg_r1.labels.columns import plain, repeated_columns


@dataclass(frozen=True)
class Row:
    """One record of a table."""

    where: str  # "FILE, line N": the line on which the record begins
    # by column name, in lower case and without white space around it; empty where `fault` is given
    values: dict[str, str]
    fault: str | None = None  # what is wrong with the row as a whole, and the remedy


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its name ends in .gz."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast(IO[bytes], packed)
        else:
            with open(path, "rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ManifestError([f"{path}: damaged ({error}); fetch it again"]) from error


def check_utf8(path: Path) -> None:
    """Read a text file once and refuse it where it is not UTF-8; a byte order mark is allowed. `.gz` is unpacked.

    Raises:
        ManifestError: names the file, the line, the byte and the likely encoding; or an archive that is damaged.
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ManifestError([f"{path}: UTF-16 text; save the file as UTF-8"])
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"{path}, line {number}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8"
                raise ManifestError([f"{found}, perhaps the file is Windows-1252; save it as UTF-8"]) from error
            if "\0" in text:
                raise ManifestError(
                    [
                        f"{path}, line {number}: a NUL character; this is not a text file, or it is damaged: save "
                        "it again"
                    ]
                )


def csv_columns(path: Path) -> list[str]:
    """The column names of a CSV as `Row.values` has them.

    Raises:
        ManifestError: not UTF-8, no header, a column that stands twice.
        OSError: the file cannot be read.
    """
    check_utf8(path)
    with _opened(path) as raw:
        try:
            header = next(csv.reader(_text(raw), strict=True), [])
        except csv.Error as error:
            raise ManifestError(
                [f"{path}, line 1: {error}; the first line names the columns, separated by commas"]
            ) from error
    columns = [plain(name) for name in header]
    if not any(columns):
        raise ManifestError([f"{path}: no header; the first line names the columns, separated by commas"])
    if fault := repeated_columns(columns):
        raise ManifestError([f"{path}, line 1: {fault}"])
    return columns


def read_csv(path: Path, required: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV, streamed; lines without any field are passed over.

    Args:
        path: UTF-8 with or without a byte order mark, comma-separated, quoted by `"`; `.gz` is unpacked.
        required: columns that must be there, in lower case.

    Raises:
        ManifestError: as `csv_columns`; a required column that is missing, quotes that do not close.
        OSError: the file cannot be read.
    """
    columns = csv_columns(path)
    if missing := [name for name in required if name not in columns]:
        marks = (mark for mark in (";", "\t") if mark in columns[0])
        remedy = next(
            (f"separated by {mark!r}? Save it with commas" for mark in marks), "rename a column, or give the right file"
        )
        raise ManifestError(
            [f"{path}, line 1: no column {', '.join(f'`{name}`' for name in missing)}; it has {columns}; {remedy}"]
        )
    with _opened(path) as raw:
        # strict: an open quote would else swallow the rest of the file into one field
        reader = csv.reader(_text(raw), strict=True)
        next(reader)
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                remedy = "a quote is open or stands in the middle of a field: double the quotes inside a field"
                raise ManifestError([f"{where}: broken CSV ({error}); {remedy}"]) from error
            if not fields:
                continue
            if not columns[-1] and len(fields) == len(columns) - 1:
                fields.append("")  # a header that ends in a comma, over rows that do not
            if len(fields) != len(columns):
                remedy = "a text with a comma stands in quotes"
                yield Row(where, {}, f"{len(fields)} fields under {len(columns)} columns; {remedy}")
            else:
                yield Row(where, dict(zip(columns, fields, strict=True)))


def _text(raw: IO[bytes]) -> TextIOWrapper:
    return TextIOWrapper(raw, newline="", encoding="utf-8-sig")
