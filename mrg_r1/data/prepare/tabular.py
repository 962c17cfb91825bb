"""Studies of one's own, a row each of a CSV or JSONL file, as `Study` objects (docs/method.md §7); one bad row costs
one study.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrg_r1.data.prepare.other_collections import patient_field, patient_in
from mrg_r1.data.prepare.rows import csv_columns, read_csv
from mrg_r1.data.study import KEYS, VIEWS, ManifestError, study_of_record
from mrg_r1.files import RepeatedField, parse_json, shown
from mrg_r1.labels.missing import is_missing
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.types import Study

REQUIRED = ("id", "images", "report", "split")  # `report` is not where there are labels
_TEXTS = ("findings", "impression", "indication", "comparison", "prior")
_OBSERVATION_COLUMNS = tuple(name.lower() for name in OBSERVATIONS)
_KNOWN = frozenset((*KEYS, "view"))
_LABEL_VALUES = {"": None, "1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
_TRUTH = {"": False, "false": False, "true": True}


class RowError(ValueError):
    """Why a row cannot become a study: the field, its value and the remedy."""


@dataclass(frozen=True)
class Record:
    """One row of either kind of file."""

    where: str  # "FILE, line N"
    values: dict[str, Any]  # the row's fields as they stand in the file
    fault: str | None = None  # the row cannot be read at all

    def named(self, field: str) -> str:
        """The text of a field, empty where there is none."""
        value = self.values.get(field)
        return value if isinstance(value, str) else ""

    def left_out(self) -> list[str]:
        """Fields that a study has no place for."""
        observations = _OBSERVATION_COLUMNS if _OBSERVATION_COLUMNS[0] in self.values else ()
        return [name for name in self.values if name not in _KNOWN and name not in observations]


def read_records(path: Path) -> Iterator[Record]:
    """Every row of a CSV or JSONL file, streamed; which of the two it is, is seen from the content.

    Raises:
        ManifestError: the file as a whole: a JSON array or object, a spreadsheet, and in a CSV text that is not UTF-8,
            broken quotes, missing columns, some but not all of the observations' columns.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"PK"):
        raise ManifestError([f"{path}: a spreadsheet or a zip archive; save the table as CSV, UTF-8"])
    if start.startswith(b"["):
        raise ManifestError([f"{path}: a JSON array; write JSONL, one study a line"])
    if start.startswith(b"{"):
        _refuse_whole_json(path)
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_record(f"{path}, line {number}", line)
        return
    columns = csv_columns(path)
    observations = [name for name in OBSERVATIONS if name.lower() in columns]
    if observations and len(observations) < len(OBSERVATIONS):
        missing = [name for name in OBSERVATIONS if name not in observations]
        raise ManifestError(
            [f"{path}, line 1: missing observation columns {missing}; all {len(OBSERVATIONS)} are needed, or none"]
        )
    if observations and "labels" in columns:
        raise ManifestError([f"{path}, line 1: a column `labels` and the observations' columns; keep one of the two"])
    labelled = observations or "labels" in columns
    for row in read_csv(path, [name for name in REQUIRED if name != "report" or not labelled]):
        yield Record(row.where, dict(row.values), row.fault)


def _refuse_whole_json(path: Path) -> None:
    """One object of JSON instead of a line a study, such as R2Gen's annotation.json, indented or not.

    Raises:
        ManifestError: it is, and names the command that reads R2Gen's layout.
    """
    with open(path, "rb") as file:
        first = next(line for line in file if line.strip(b" \t\r\n\xef\xbb\xbf"))
        rest = file.read() if first.rstrip().endswith((b"{", b"[", b",")) else b""  # a study's line ends in }
    try:
        content = parse_json((first + rest).decode("utf-8-sig"))
    except ValueError:
        return  # lines, of which each is judged by itself
    if isinstance(content, dict) and content and all(isinstance(part, list) for part in content.values()):
        remedy = "give it to `mrg-r1 prepare iu-xray` or, of MIMIC-CXR, its collection to `mrg-r1 prepare mimic-cxr`"
        raise ManifestError([f"{path}: R2Gen's layout, an object of splits ({', '.join(content)}); {remedy}"])
    if rest:
        raise ManifestError([f"{path}: one JSON object over several lines; write JSONL, one study a line"])


def study_of_row(record: Record, folder: Path, splits: Sequence[str]) -> Study:
    """A row as a study.

    Args:
        record: of `read_records`.
        folder: what image paths are relative to, absolute.
        splits: names that a split may have.

    Raises:
        RowError: every fault of the row, with field, value and remedy.
    """
    if record.fault is not None:
        raise RowError(record.fault)
    values = record.values
    labels = _labels(values)
    report = values.get("report")
    if isinstance(labels, dict) and labels.get("said") is not None:
        values = {"report": None} | values
        report = None if report == "" else report  # a CSV's null
    if missing := [name for name in REQUIRED if name not in values]:
        raise RowError(f"no field {', '.join(f'`{name}`' for name in missing)}; a study needs {', '.join(REQUIRED)}")
    images = _images(values["images"], values.get("view"))
    if fault := _patient_elsewhere(values, images):
        raise RowError(fault)
    whole = {
        **{name: values[name] for name in ("id", "split")},
        "report": report,
        "patient_id": values.get("patient_id") or values["id"],
        **{name: _null_if_missing(name, values.get(name)) for name in _TEXTS},
        "images": images,
        "labels": labels,
        "rendered": _rendered(values.get("rendered", False)),
    }
    study, faults = study_of_record(whole, folder)
    if study is not None and study.split not in splits:
        remedy = f"rename it, or allow it with --splits {','.join((*splits, study.split))}"
        faults.append(("split", f"{study.split!r}; the splits are {', '.join(splits)}: {remedy}"))
    if study is None or faults:
        raise RowError("; ".join(f"field `{name}`: {fault}" for name, fault in faults))
    return study


def _patient_elsewhere(values: dict[str, Any], images: Any) -> str | None:
    """That a row without `patient_id`, which would be a patient of its own, names its patient in another place."""
    if values.get("patient_id"):
        return None
    if field := patient_field(name for name, value in values.items() if value not in (None, "")):
        remedy = "call the field `patient_id`, or another name where it names no patient"
        return f"field `{field}`: {shown(values[field])}, and no `patient_id`; {remedy}"
    paths = [image.get("path") for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    for name, text in (("id", values["id"]), *(("images", path) for path in paths)):
        if isinstance(text, str) and (patient := patient_in(text)):
            return f"field `{name}`: {text!r} is of patient {patient}, and there is no `patient_id`; add that field"
    return None


def _null_if_missing(name: str, value: Any) -> Any:
    """An empty cell is what a CSV has for null, and nan is what programs write for one."""
    if isinstance(value, str) and (value == "" or is_missing(value, words=name == "prior")):
        return None
    return value


def _json_record(where: str, line: bytes) -> Record:
    try:
        values = parse_json(line.decode("utf-8-sig"), unique=True)
    except UnicodeDecodeError as error:
        return Record(
            where, {}, f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return Record(where, {}, f"broken JSON ({error.msg} at column {error.colno}); mend or remove the line")
    except RepeatedField as error:
        return Record(where, {}, f"{error}; keep one of the two")
    if not isinstance(values, dict):
        return Record(where, {}, f"{shown(values)} is not a JSON object; every line is one study")
    return Record(where, values)


def _images(cell: Any, views: Any) -> Any:
    """The field `images` as a manifest has it. A cell: paths separated by `;` or `|`, each perhaps after `frontal:` or
    `lateral:`.
    """
    if isinstance(cell, str):
        cell = [part.strip() for part in cell.replace("|", ";").split(";")]
        if cell == [""]:
            raise RowError("field `images`: empty; name the study's radiographs")
        if "" in cell:
            raise RowError(
                "field `images`: a `;` or `|` with nothing beside it; name a file there or take the mark out"
            )
    if not isinstance(cell, list):
        return cell  # refused by `study_of_record`, which names the value
    images = [_image(item) for item in cell]
    given = _views(views, len(images))
    for number, (image, view) in enumerate(zip(images, given, strict=True)):
        if isinstance(image, dict) and view is not None and image.get("view") not in (None, view):
            raise RowError(
                f"field `view`: {view!r} for image {number + 1}, whose field `images` says {image['view']!r}; keep one"
            )
        if isinstance(image, dict) and view is not None:
            image["view"] = view
    return images


def _image(item: Any) -> Any:
    if isinstance(item, str):
        view, colon, path = item.partition(":")
        if colon and view.strip().lower() in VIEWS:
            return {"path": path.strip(), "view": view.strip().lower()}
        return {"path": item, "view": None}
    if isinstance(item, dict):
        return {"view": None, **item}
    return item


def _views(views: Any, count: int) -> Sequence[str | None]:
    """The field `view`: one an image, separated as the images are; empty where it is not known."""
    if views is None or views == "":
        return [None] * count
    parts = views.replace("|", ";").split(";") if isinstance(views, str) else views
    if not isinstance(parts, list) or not all(part is None or isinstance(part, str) for part in parts):
        raise RowError(
            f"field `view`: {shown(views)}; write frontal, lateral or nothing, one an image, separated by `;`"
        )
    names = [(part or "").strip().lower() or None for part in parts]
    if wrong := [name for name in names if name not in VIEWS]:
        raise RowError(f"field `view`: {wrong[0]!r}; write frontal, lateral or nothing, one an image, separated by `;`")
    if len(names) != count:
        raise RowError(f"field `view`: {len(names)} views for {count} images; write one an image, separated by `;`")
    return names


def _labels(values: dict[str, Any]) -> Any:
    """`{said, drawn}`. A row whose observation columns are all empty has no labels."""
    if OBSERVATIONS[0].lower() in values:
        cells = [values[name].strip() for name in _OBSERVATION_COLUMNS]
        if wrong := [(name, cell) for name, cell in zip(OBSERVATIONS, cells, strict=True) if cell not in _LABEL_VALUES]:
            raise RowError(
                f"field `{wrong[0][0]}`: {wrong[0][1]!r}; write 1 (positive), 0 (negative), -1 (uncertain) or nothing"
            )
        return {"said": [_LABEL_VALUES[cell] for cell in cells] if any(cells) else None, "drawn": None}
    labels = values.get("labels")
    if isinstance(labels, str) and labels.strip():
        try:
            labels = parse_json(labels, unique=True)
        except ValueError as error:
            raise RowError(
                f"field `labels`: {shown(labels)} is not JSON ({error}); write 14 values as a list"
            ) from error
    if labels is None or labels == "":
        return {"said": None, "drawn": None}
    if isinstance(labels, list):
        labels = {"said": labels, "drawn": None}
    return {name: _whole(part) for name, part in labels.items()} if isinstance(labels, dict) else labels


def _whole(values: Any) -> Any:
    """1.0, as pandas writes a column with blanks, is 1 here as in a CSV."""
    if not isinstance(values, list):
        return values
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]


def _rendered(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip().lower() not in _TRUTH:
        raise RowError(f"field `rendered`: {value!r}; write true for a phantom and false for a radiograph")
    return _TRUTH[value.strip().lower()]
