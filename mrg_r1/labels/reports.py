"""Report texts by id, as CSV: `id,report`, alone or joined with the table of their labels.

Paths enter, texts (and [N, 14] classes) leave.
"""

from __future__ import annotations

import csv
import re
import string
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mrg_r1.files import atomically
from mrg_r1.labels.observations import read_labels_csv

# What stands where something was taken out: XXXX in IU X-Ray, ___ in MIMIC-CXR.
_TAKEN_OUT = re.compile(r"[Xx]{3,}|_+")
_HEADINGS = re.compile(r"\b(?:findings?|impressions?|conclusions?|report)\s*:", re.IGNORECASE)
# Letters to Unicode, and nothing to the eye.
_BLANK_LETTERS = "\u115f\u1160\u3164\uffa0"
# What programs write for a value that is not there; without blanks, in small letters: as it is, and between marks.
_AS_IT_IS = frozenset(r"#name? #ref! #value! #div/0! #num! #null! #spill! #calc! \n".split())
_NOT_A_NUMBER = frozenset("nan null nat 1.#ind 1.#qnan nan(ind undefined inf infinity pd.na".split())
_MISSING = _NOT_A_NUMBER | frozenset(
    "none n/a n/an/a na n.a nil missing notavailable nodata noreport unknown blank tbd".split()
)
_LONG = 60  # characters; what is longer and has a word is not one of these


def visible(text: str) -> str:
    """A text without white space and without what cannot be seen: control and format characters, blanks."""
    if text.isascii() and text.isprintable():  # nearly all ids: seen without a look at every letter
        return text.replace(" ", "")
    return "".join(
        letter for letter in text if unicodedata.category(letter)[0] not in "CZ" and letter not in _BLANK_LETTERS
    )


def is_missing(text: str, *, words: bool = True) -> bool:
    """Whether a text is empty to the eye, or a missing value written out, such as NaN.

    Args:
        words: None, N/A and the like too, which are answers to some questions.
    """
    if len(text) > _LONG and re.search(r"[A-Za-z]{3}", text):
        return False
    seen = unicodedata.normalize("NFKC", visible(text)).casefold()
    known = _MISSING if words else _NOT_A_NUMBER
    if not seen or seen in _AS_IT_IS or seen.strip(string.punctuation) in known:
        return True
    several = [part for part in re.split(r"[\s,;|]+", text) if part.strip(string.punctuation)]  # joined from columns
    return len(several) > 1 and all(is_missing(part, words=words) for part in several)


def report_fault(text: str) -> str | None:
    """What keeps a text from being a report, or None: it has not one word, or is a missing value written out."""
    told = _HEADINGS.sub("", _TAKEN_OUT.sub("", text))
    if len(told) > _LONG and re.search(r"[A-Za-z]{3}", told):  # nearly all: seen without a look at every letter
        return None
    left = visible(told)
    if not any(unicodedata.category(letter).startswith("L") for letter in left):
        return "empty" if not visible(text) else "without a word"
    return "a missing value written out" if is_missing(told) else None


def missing_written_out(text: str, *, words: bool = True) -> bool:
    """Whether a text stands for a missing value, and is not empty.

    Args:
        words: as `is_missing`.
    """
    return bool(visible(text)) and is_missing(text, words=words)


def read_reports_csv(path: Path, *, words: bool = True) -> dict[str, str]:
    """Read `id,report` (any other columns are passed over) into reports by id. A report may be empty.

    Args:
        words: refuse None, N/A and the like as reports, and not alone nan and null: False where a policy wrote them.

    Raises:
        ValueError: a missing column, an empty or repeated id, a row cut short, an id or a report that is a missing
            value written out; names file and line.
    """
    reports: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        id_column = next((name for name in columns if name.strip().lower() == "id"), None)
        report_column = next((name for name in columns if name.strip().lower() == "report"), None)
        if id_column is None or report_column is None:
            raise ValueError(f"{path}: the columns are {columns}; `id` and `report` are needed")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            study_id = (row[id_column] or "").strip()
            if not study_id:
                raise ValueError(f"{where}: empty id")
            if is_missing(study_id):
                raise ValueError(f"{where}, field `id`: {study_id!r} is a missing value written out; name the study")
            if study_id in reports:
                raise ValueError(f"{where}: id {study_id!r} stands twice; keep one of the rows")
            if None in row.values():
                raise ValueError(f"{where}, id {study_id!r}: the row ends before its last column")
            if None in row:
                raise ValueError(
                    f"{where}, id {study_id!r}: more fields than columns; a report with a comma stands in quotes"
                )
            if missing_written_out(row[report_column], words=words):
                raise ValueError(
                    f"{where}, id {study_id!r}, field `report`: {row[report_column]!r} is a missing value written out; "
                    "write the report, leave the field empty where there is none, or take the row out"
                )
            reports[study_id] = row[report_column]
    return reports


def write_reports_csv(path: Path, reports: Mapping[str, str]) -> None:
    """Write reports by id as `id,report`."""
    with atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "report"])
        writer.writerows(reports.items())


def read_labelled_reports(reports: Path, labels: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and [N, 14] classes in the order of `reports`; every id must stand in both files."""
    texts, classes = read_reports_csv(reports), read_labels_csv(labels)
    for ids, path, others, other_path in ((texts, reports, classes, labels), (classes, labels, texts, reports)):
        lonely = [study_id for study_id in ids if study_id not in others]
        if lonely:
            raise ValueError(
                f"{path}, line {_line_of(path, lonely[0])}: id {lonely[0]!r} is not in {other_path} ({len(lonely)} "
                "such ids); every report needs its labels and every row of labels its report"
            )
    for study_id, text in texts.items():
        if fault := report_fault(text):
            raise ValueError(
                f"{reports}, line {_line_of(reports, study_id)}: the report of id {study_id!r} is {fault} "
                f"({text[:40]!r}); leave the study out"
            )
    return list(texts.values()), np.array([classes[study_id] for study_id in texts], dtype=np.int64)


def _line_of(path: Path, study_id: str) -> int:
    """The line on which the row of `study_id` ends, for an error message."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        column = next(name for name in reader.fieldnames or [] if name.strip().lower() == "id")
        return next(reader.line_num for row in reader if row[column].strip() == study_id)
