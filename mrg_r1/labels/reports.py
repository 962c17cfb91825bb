"""Report texts by id, as CSV: `id,report`, alone or joined with the table of their labels.

Paths enter, texts (and [N, 14] classes) leave.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mrg_r1.files import atomically
from mrg_r1.labels.columns import find_column, repeated_columns
from mrg_r1.labels.missing import is_missing, missing_written_out, report_fault
from mrg_r1.labels.observations import read_labels_csv


def read_reports_csv(path: Path, *, words: bool = True) -> dict[str, str]:
    """Read `id,report` (any other columns are passed over) into reports by id. A report may be empty.

    Args:
        words: refuse None, N/A and the like as reports, and not alone nan and null: False where a policy wrote them.

    Raises:
        ValueError: a column that is missing or stands twice, an empty or repeated id, a row cut short, an id or a
            report that is a missing value written out; names file and line.
    """
    reports: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        if fault := repeated_columns(columns):
            raise ValueError(f"{path}, line 1: {fault}")
        id_column, report_column = find_column(columns, "id"), find_column(columns, "report")
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
        column = find_column(reader.fieldnames or [], "id")
        return next(reader.line_num for row in reader if row[column].strip() == study_id)
