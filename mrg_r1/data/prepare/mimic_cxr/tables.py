"""MIMIC-CXR-JPG's tables enter (split, metadata, a labeler's labels), studies in the order of patient and time leave.

The tables have 377,110 rows of images: they are held as arrays, about 70 bytes an image, and never as objects.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.data.prepare.labelled import refuse_other_convention, said_of_cells
from mrg_r1.labels.columns import repeated_columns
from mrg_r1.labels.observations import OBSERVATIONS

SPLITS = {"train": "train", "validate": "val", "test": "test"}  # theirs -> ours
PA, AP, LATERAL, OTHER = range(4)  # views, in the order in which images are preferred
_VIEWS = {"PA": PA, "AP": AP, "LATERAL": LATERAL, "LL": LATERAL}
_SPLIT_COLUMNS = ("dicom_id", "study_id", "subject_id", "split")
_METADATA_COLUMNS = ("dicom_id", "study_id", "subject_id", "ViewPosition", "StudyDate", "StudyTime")
_DICOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")
_DICOM_LETTERS = 44
_NO_VALUE = -128
_AGAIN = "fetch it again and compare it with SHA256SUMS.txt"


@dataclass(frozen=True)
class Refusal:
    """Why a study is refused before anything of it is read."""

    reason: str
    where: str


@dataclass(frozen=True)
class Studies:
    """All studies of the split table by patient, time and id (N of them), and their images (I)."""

    subjects: NDArray[np.int64]  # [N], 10000032
    ids: NDArray[np.int64]  # [N], 50414267
    splits: NDArray[np.int8]  # [N], index into SPLITS
    times: NDArray[np.int64]  # [N], YYYYMMDDHHMMSSmmm of the first image; only its order means anything
    rows: NDArray[np.int64]  # [N], line of the split table that names it first
    first: NDArray[np.int64]  # [N + 1], images first[i] to first[i + 1] are study i's
    dicoms: NDArray[np.bytes_]  # [I]
    views: NDArray[np.int8]  # [I], PA, AP, LATERAL or OTHER, ascending within a study
    refused: dict[int, Refusal]  # study id -> what is wrong; also of studies that only the metadata know
    nameless: list[Refusal]  # rows whose study cannot be told
    path: Path  # the split table

    def __len__(self) -> int:
        return len(self.ids)


def find_table(root: Path, name: str) -> Path:
    """The table `mimic-cxr-2.*-NAME.csv.gz` of a folder, or the same unpacked.

    Raises:
        ValueError: none, or several versions of it.
    """
    for suffix in (".csv.gz", ".csv"):
        found = sorted(root.glob(f"mimic-cxr-2.*-{name}{suffix}"))
        if len(found) > 1:
            raise ValueError(
                f"{root}: {', '.join(path.name for path in found)}: several versions; leave one of them there"
            )
        if found:
            return found[0]
    remedy = "give the folder that MIMIC-CXR-JPG was downloaded into, with its tables"
    if name == "chexbert":
        remedy = "MIMIC-CXR-JPG has none, put your own there: study_id and the 14 observations, or leave --labels out"
    raise ValueError(f"{root}: no mimic-cxr-2.0.0-{name}.csv.gz; {remedy}")


def read_studies(split_table: Path, metadata: Path) -> Studies:
    """Read and join the split and the metadata.

    A study is refused where a row of it is wrong: ids that are none, an image that stands twice, that only one of the
    tables has or that is said to be of two studies, two patients or splits of a study, a date or time that is none.

    Raises:
        ValueError: a table that cannot be read, lacks a column or has no rows.
        OSError: likewise.
    """
    refused: dict[int, Refusal] = {}
    nameless: list[Refusal] = []
    split = _Table(split_table, refused, nameless)
    names = list(SPLITS)
    for line, (dicom, study, subject, name) in _rows(split_table, _SPLIT_COLUMNS, nameless):
        if name not in SPLITS:
            split.refuse(study, line, f"column split: {name!r}; it is one of {', '.join(SPLITS)}")
        split.add(line, dicom, study, subject, names.index(name) if name in SPLITS else 0, 0)
    known = _Table(metadata, refused, nameless)
    for line, (dicom, study, subject, view, day, time) in _rows(metadata, _METADATA_COLUMNS, nameless):
        moment = _moment(day, time)
        if moment is None:
            column, value = ("StudyDate", day) if _moment(day, "0") is None else ("StudyTime", time)
            what = "YYYYMMDD" if column == "StudyDate" else "HHMMSS.fff"
            known.refuse(study, line, f"column {column}: {value!r}; expected {what}, {_AGAIN}")
        known.add(line, dicom, study, subject, _VIEWS.get(view, OTHER), moment or 0)
    for table in (split, known):
        if not table.ids:
            raise ValueError(f"{table.path}: no row that can be read; {_AGAIN}")
    return _joined(split, known, refused, nameless)


class Labels:
    """A labeler's labels of the reports by study, CheXpert's or CheXbert's: an int8 row of 14 a study."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: a table that cannot be read, lacks one of the 14 columns or is of another convention.
            OSError: likewise.
        """
        silent = False
        self.refused: dict[int, Refusal] = {}
        self.nameless: list[Refusal] = []  # rows whose study cannot be told
        ids, lines, values = array("q"), array("q"), array("b")
        for line, (study, *cells) in _rows(path, ("study_id", *OBSERVATIONS), self.nameless):
            where = f"{path.name}, line {line}"
            silent = silent or not all(cells[:-1])
            study = study.removeprefix("s")
            if not _is_number(study):
                self.nameless.append(Refusal(f"column study_id: {study!r} is no number; {_AGAIN}", where))
                continue
            row, problem = _label_values(cells)
            if problem is not None:
                self.refused[int(study)] = Refusal(f"{problem}; {_AGAIN}", where)
            ids.append(int(study))
            lines.append(line)
            values.extend(row)
        if ids and not silent:
            refuse_other_convention(path)
        found = np.array(ids, np.int64)
        order = np.argsort(found, kind="stable")
        self._ids = found[order]
        self._values = np.array(values, np.int8).reshape(-1, len(OBSERVATIONS))[order]
        for first, second in _repeated(self._ids, order):
            reason = f"column study_id: {ids[second]} stands on line {lines[first]} too; keep one of the rows"
            self.refused.setdefault(ids[second], Refusal(reason, f"{path.name}, line {lines[second]}"))

    def of(self, study: int) -> tuple[int | None, ...] | None:
        """14 file values in CheXbert's order, or None where the table has no such study."""
        at = int(np.searchsorted(self._ids, study))
        if at == len(self._ids) or self._ids[at] != study:
            return None
        return tuple(None if value == _NO_VALUE else int(value) for value in self._values[at])


class _Table:
    """The columns of one table while it is read."""

    def __init__(self, path: Path, refused: dict[int, Refusal], nameless: list[Refusal]) -> None:
        self.path = path
        self._refused, self._nameless = refused, nameless
        self.lines, self.ids, self.subjects, self.times = array("q"), array("q"), array("q"), array("q")
        self.codes = array("b")
        self.dicoms = bytearray()

    def add(self, line: int, dicom: str, study: str, subject: str, code: int, time: int) -> None:
        """A row; what is wrong with its ids refuses its study, or is kept as nameless where that cannot be told."""
        if not _is_number(study):
            self._nameless.append(
                Refusal(f"column study_id: {study!r} is no number; {_AGAIN}", f"{self.path.name}, line {line}")
            )
            return
        if not _is_number(subject) or len(subject) != 8:
            self.refuse(study, line, f"column subject_id: {subject!r} is no number of eight digits; {_AGAIN}")
            return
        if not _DICOM_ID.fullmatch(dicom):
            self.refuse(
                study, line, f"column dicom_id: {dicom!r}; expected five groups of eight hexadecimal digits, {_AGAIN}"
            )
            return
        self.lines.append(line)
        self.ids.append(int(study))
        self.subjects.append(int(subject))
        self.codes.append(code)
        self.times.append(time)
        self.dicoms += dicom.encode()

    def refuse(self, study: str | int, line: int, reason: str) -> None:
        """The first reason of a study stands."""
        if isinstance(study, int) or _is_number(study):
            self._refused.setdefault(int(study), Refusal(reason, f"{self.path.name}, line {line}"))

    def names(self) -> NDArray[np.bytes_]:
        return np.frombuffer(bytes(self.dicoms), dtype=f"S{_DICOM_LETTERS}")


def _joined(split: _Table, known: _Table, refused: dict[int, Refusal], nameless: list[Refusal]) -> Studies:
    split_names, known_names = split.names(), known.names()
    split_order, known_order = np.argsort(split_names, kind="stable"), np.argsort(known_names, kind="stable")
    for table, names, order in ((split, split_names, split_order), (known, known_names, known_order)):
        for earlier, later in _repeated(names[order], order):
            reason = (
                f"column dicom_id: {names[later].decode()!r} stands on line {table.lines[earlier]} too; keep one "
                "of the rows"
            )
            table.refuse(table.ids[later], table.lines[later], reason)
            table.refuse(table.ids[earlier], table.lines[later], reason)

    sorted_known = known_names[known_order]
    at = np.minimum(np.searchsorted(sorted_known, split_names), len(known_order) - 1)
    partner = known_order[at]  # [rows of split], the metadata's row
    there = sorted_known[at] == split_names
    for row in np.flatnonzero(~there):
        split.refuse(
            split.ids[row], split.lines[row], f"column dicom_id: no row of this image in {known.path.name}; {_AGAIN}"
        )
    for column, ours, theirs in (("study_id", split.ids, known.ids), ("subject_id", split.subjects, known.subjects)):
        mine, other = np.frombuffer(ours, np.int64), np.frombuffer(theirs, np.int64)[partner]
        for row in np.flatnonzero(there & (mine != other)):
            where = f"{known.path.name}, line {known.lines[partner[row]]}"
            split.refuse(
                split.ids[row], split.lines[row], f"column {column}: {mine[row]}, but {other[row]} in {where}; {_AGAIN}"
            )
    met = np.zeros(len(known_order), dtype=bool)
    met[partner[there]] = True
    for row in np.flatnonzero(~met):
        known.refuse(
            known.ids[row],
            known.lines[row],
            f"column dicom_id: no row of this image in {split.path.name}, so no split; {_AGAIN}",
        )

    ids, subjects = np.frombuffer(split.ids, np.int64), np.frombuffer(split.subjects, np.int64)
    codes, lines = np.frombuffer(split.codes, np.int8), np.frombuffer(split.lines, np.int64)
    views = np.where(there, np.frombuffer(known.codes, np.int8)[partner], OTHER).astype(np.int8)
    times = np.where(there, np.frombuffer(known.times, np.int64)[partner], 0)
    order = np.lexsort((split_names, views, ids))
    first = np.flatnonzero(np.r_[True, np.diff(ids[order]) != 0])  # each study's first image
    length = np.diff(np.r_[first, len(order)])
    for column, values in (("subject_id", subjects), ("split", codes)):
        differs = values[order] != np.repeat(values[order][first], length)
        for row in order[differs]:
            reason = f"column {column}: the rows of this study differ; {_AGAIN}"
            split.refuse(split.ids[row], split.lines[row], reason)

    moments = np.minimum.reduceat(times[order], first)
    by_patient = np.lexsort((ids[order][first], moments, subjects[order][first]))
    ends = np.cumsum(length[by_patient])
    images = np.arange(ends[-1]) + np.repeat(first[by_patient] - (ends - length[by_patient]), length[by_patient])
    chosen = order[first][by_patient]
    return Studies(
        subjects=subjects[chosen],
        ids=ids[chosen],
        splits=codes[chosen],
        times=moments[by_patient],
        rows=np.minimum.reduceat(lines[order], first)[by_patient],
        first=np.r_[0, ends],
        dicoms=split_names[order][images],
        views=views[order][images],
        refused=refused,
        nameless=nameless,
        path=split.path,
    )


def _repeated(names: NDArray[Any], order: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Rows of equal names, as (the one before, the one after); `names` sorted, `order` their rows."""
    for at in np.flatnonzero(names[1:] == names[:-1]):
        yield int(order[at]), int(order[at + 1])


def _rows(path: Path, columns: Sequence[str], nameless: list[Refusal]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the values of some columns, stripped."""
    try:
        with _opened(path) as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if fault := repeated_columns(header):
                raise ValueError(f"{path}, line 1: {fault}, or fetch it again")
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(
                    f"{path}: no column {', '.join(missing)}; the columns are {', '.join(header) or 'none'}; {_AGAIN}"
                )
            places = [header.index(name) for name in columns]
            for row in reader:
                if len(row) == len(header):
                    yield reader.line_num, [row[place].strip() for place in places]
                elif row:
                    reason = f"{len(row)} fields where the header has {len(header)} columns; {_AGAIN}"
                    nameless.append(Refusal(reason, f"{path.name}, line {reader.line_num}"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: broken CSV ({error}); {_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a block); {_AGAIN}") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19  # fits int64


def _moment(day: str, time: str) -> int | None:
    """20180506 and 93843.718 -> 20180506093843718; None for what is no date or time of day. Their dates are shifted to
    2100 and later.
    """
    try:
        seconds = float(time)
        date(int(day[:4]), int(day[4:6]), int(day[6:]))
    except ValueError:
        return None
    if (
        len(day) != 8
        or not _is_number(day)
        or not 0 <= seconds < 240000
        or seconds % 100 >= 61
        or seconds // 100 % 100 >= 60
    ):
        return None
    return int(day) * 10**9 + round(seconds * 1000)


def _label_values(cells: Sequence[str]) -> tuple[list[int], str | None]:
    """14 cells as int8 values, and which is wrong."""
    values, problem = said_of_cells(cells)
    return [_NO_VALUE if value is None else value for value in values] or [_NO_VALUE] * len(OBSERVATIONS), problem
