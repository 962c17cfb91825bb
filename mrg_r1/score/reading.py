"""The files that `mrg-r1 score` reads, ours and other people's: what each says of each study.

| file | a study is | its id |
|---|---|---|
| CSV, `id` and the 14 observations | its labels | `id` |
| CSV, the 14 observations without `id` (CheXbert's and CheXpert's own output) | its labels | the row's number |
| CSV, `id,report` | a report | `id` |
| CSV of one column without a header (the R2Gen family's res.csv and gts.csv) | a report | the row's number |
| .txt | a report a line | the line's number |
| .json, `{id: report}`, a list of objects, or `{split: [objects]}` (R2Gen's annotation.json) | a report | `id`,
`image_id`, `study_id` |
| .jsonl, an object a line: RUN/evaluation/SPLIT_predictions.jsonl, manifest.jsonl | a report, perhaps its labels | the
same |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mrg_r1.files import RepeatedField, parse_json, shown
from mrg_r1.labels.missing import is_missing, missing_written_out
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values, read_labels_csv
from mrg_r1.labels.reports import read_reports_csv

Role = Literal["predicted", "reference"]
SHOWN_IDS = 10
ID_FIELDS = ("id", "image_id", "study_id")
# in the order in which they are looked for
TEXT_FIELDS: dict[Role, tuple[str, ...]] = {
    "predicted": ("prediction", "predicted", "generated", "report"),
    "reference": ("reference", "ground_truth", "report"),
}
LABEL_FIELDS: dict[Role, str] = {"predicted": "labels", "reference": "reference_labels"}
REPORT_COLUMNS = ("Report Impression", "Reports")  # what CheXbert's and CheXpert's own outputs have beside the labels
_PREDICTIONS = "_predictions.jsonl"
# characters of a CSV's field: a report is longer than csv's 131,072 only where a quote is left open
_FIELD_LIMIT = 2**24

Content = TypeVar("Content")


@dataclass(frozen=True)
class Side:
    """What one file says: reports, labels, or both of the same studies."""

    path: Path
    texts: Mapping[str, str | None] | None  # by study id; None: labels alone
    classes: dict[str, list[int]] | None  # by study id: 14 classes; of some, where the others have texts to be read
    by_line: bool = False  # the file has no ids: they are the numbers of its rows, from 1
    labeler: dict[str, str | None] | None = None  # name and fingerprint of what read `classes`, where known
    has_splits: bool = False  # its objects name a split each

    @property
    def ids(self) -> Collection[str]:
        """The studies, in the order of the file."""
        known = self.classes if self.texts is None else self.texts
        assert known is not None
        return known.keys()


def read_side(path: Path, role: Role, *, split: str | None = None) -> Side:
    """Read one file of the table above; its kind is told by its name's ending, any other than .txt, .json and .jsonl is
    a CSV.

    Args:
        role: which of an object's fields is meant, where it has both sides' (`TEXT_FIELDS`).
        split: only the studies of this split, where objects of JSON or JSONL name one; other files are read whole.

    Raises:
        ValueError: a file that is none of these, is empty, or has a bad row; names file, row, field and remedy.
        OSError: the file cannot be read.
    """
    endings: dict[str, Callable[[], Side]] = {
        ".txt": lambda: Side(path, _numbered(path, _read_lines(path), role), None, by_line=True),
        ".json": lambda: _side_of_records(path, _json_records(path, split), role, split),
        ".jsonl": lambda: _side_of_records(path, _jsonl_records(path), role, split),
    }
    read = endings.get(path.suffix.lower(), lambda: _read_csv(path, role))
    with open(path, "rb") as file:
        if not file.read(4096).strip():
            raise ValueError(f"{path}: an empty file; give one report or one row of labels a study")
    side = _decoded(path, read)
    if not side.ids:
        raise ValueError(f"{path}: no studies in it; give one report or one row of labels a study")
    return side


def require_same_studies(predicted: Side, reference: Side) -> None:
    """Raise ValueError unless both sides have the same studies, naming those that stand in one alone, and the
    remedy.
    """
    if predicted.by_line != reference.by_line:
        without, other = (predicted, reference) if predicted.by_line else (reference, predicted)
        raise ValueError(
            f"{without.path}: has no ids, {other.path} has; add a column `id`, or give both files without, in the "
            "same order"
        )
    if predicted.by_line and len(predicted.ids) != len(reference.ids):
        raise ValueError(
            f"{predicted.path}: {len(predicted.ids):,} rows, {reference.path}: {len(reference.ids):,}; without ids "
            "they are aligned row by row: give both the same studies in the same order (an empty line is an empty "
            "report)"
        )
    problems = []
    for side, other in ((predicted, reference), (reference, predicted)):
        if missing := [study for study in other.ids if study not in side.ids]:
            more = f" and {len(missing) - SHOWN_IDS:,} more" if len(missing) > SHOWN_IDS else ""
            shown = ", ".join(missing[:SHOWN_IDS])
            problems.append(f"{side.path}: {len(missing):,} studies of the other file are missing: {shown}{more}")
    if problems:
        raise ValueError("\n".join([*problems, "scoring goes study by study: give both files the same ids"]))


def _decoded(path: Path, read: Callable[[], Content]) -> Content:
    try:
        return read()
    except UnicodeDecodeError:
        from mrg_r1.data.prepare.rows import check_utf8  # it brings torch, which a good file does not wait for

        check_utf8(path)
        raise


def _read_csv(path: Path, role: Role) -> Side:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next(csv.reader(file), [])
        columns = [name.strip() for name in first]
        has_id = "id" in (name.lower() for name in columns)
        if set(OBSERVATIONS) & set(columns):
            _require_known(path, columns)
            return Side(path, None, read_labels_csv(path, numbered=True), by_line=not has_id)
        if len(columns) == 1 and not has_id:
            return Side(path, _numbered(path, _read_column(path), role), None, by_line=True)

        return Side(path, read_reports_csv(path, words=role == "reference"), None)
    except csv.Error as error:
        raise ValueError(
            f"{path}: broken CSV ({error}); a quote is open, or stands undoubled inside a field"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _require_known(path: Path, columns: Sequence[str]) -> None:
    """A misspelt observation, and a study's name that would be passed over and rows be numbered, are refused."""
    unknown = [
        name for name in columns if name not in OBSERVATIONS and name not in REPORT_COLUMNS and name.lower() != "id"
    ]
    if unknown:
        raise ValueError(
            f"{path}, line 1: columns {unknown} are none of the observations {list(OBSERVATIONS)}; mend their "
            "names, call the study's name `id`, and take other columns out"
        )


def _read_column(path: Path) -> list[str]:
    texts = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        for row in reader:
            if len(row) > 1:
                remedy = (
                    "a report with a comma stands in quotes; with ids the first line names the columns, `id,report`"
                )
                raise ValueError(f"{path}, line {reader.line_num}: {len(row)} fields in a file of one column; {remedy}")
            texts.append(row[0] if row else "")
    if texts[0].strip().lower() in ("report", "reports", "findings"):
        raise ValueError(
            f"{path}, line 1: a column {texts[0].strip()!r} without ids; add a column `id`, or take the header away"
        )
    return texts


def _read_lines(path: Path) -> list[str]:
    # not splitlines: a form feed or a Unicode line separator inside a report would shift all that follow
    lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _numbered(path: Path, texts: Iterable[str], role: Role) -> dict[str, str]:
    numbered = {str(number): text for number, text in enumerate(texts, start=1)}
    for number, text in numbered.items():
        _refuse_missing(f"{path}, row {number}", text, role)
    return numbered


def _refuse_missing(where: str, text: str, role: Role) -> None:
    """A policy may write None; nan is what a program writes where there is nothing."""
    if missing_written_out(text, words=role == "reference"):
        remedy = "write the report, or nothing for none"
        raise ValueError(f"{where}: the {role} report {text!r} is a missing value written out; {remedy}")


def _json_records(path: Path, split: str | None) -> list[tuple[str, Any]]:
    """(where, object) of every study."""
    try:
        whole = parse_json(path.read_text(encoding="utf-8-sig"), unique=True)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); save it again"
        ) from error
    except RepeatedField as error:
        raise ValueError(f"{path}: {error}; keep one of the two") from error
    if isinstance(whole, dict) and whole and all(isinstance(part, list) and _objects(part) for part in whole.values()):
        filled = [name for name, part in whole.items() if part]
        if split is None and len(filled) > 1:
            raise ValueError(f"{path}: has the splits {', '.join(filled)}; name one with --split")
        name = filled[0] if split is None and filled else split
        if name is not None and name not in whole:
            raise ValueError(f"{path}: no split {name!r}; it has {', '.join(whole)}")
        part = whole[name] if name is not None else []
        return [(f"{path}, {name}[{number}]", {**record, "split": name}) for number, record in enumerate(part)]
    if isinstance(whole, dict):
        # {id: report}, also as the COCO captions have it, {id: [report]}
        single = {name: text[0] if isinstance(text, list) and len(text) == 1 else text for name, text in whole.items()}
        return [(f"{path}, key {name!r}", {"id": name, "report": text}) for name, text in single.items()]
    if isinstance(whole, list):
        return [(f"{path}, [{number}]", record) for number, record in enumerate(whole)]
    raise ValueError(
        f"{path}: {shown(whole)} is neither a list of objects nor an object; see `docs/scores.md` for what is read"
    )


def _jsonl_records(path: Path) -> list[tuple[str, Any]]:
    records = []
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            try:
                records.append((f"{path}, line {number}", parse_json(line, unique=True)))
            except json.JSONDecodeError as error:
                remedy = "mend or remove the line"
                raise ValueError(
                    f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}); {remedy}"
                ) from error
            except RepeatedField as error:
                raise ValueError(f"{path}, line {number}: {error}; keep one of the two") from error
    return records


def _side_of_records(path: Path, records: Sequence[tuple[str, Any]], role: Role, split: str | None) -> Side:
    texts: dict[str, str | None] = {}
    classes: dict[str, list[int]] = {}
    has_splits = any(isinstance(record, dict) and "split" in record for _, record in records)
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {shown(record)} is not an object; every study is one, with an id and a report")
        if has_splits and "split" not in record:
            raise ValueError(f"{where}: no field `split`, which others have; name it for all of them or for none")
        if split is not None and has_splits and record["split"] != split:
            continue
        study = _id(where, record)
        if study in texts:
            raise ValueError(f"{where}: id {study!r} stands twice; keep one of the two")
        field, values = _values(record, role)
        texts[study] = _text(where, study, record, role, labelled=values is not None)
        if values is not None:
            try:
                classes[study] = classes_of_values(values)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}, id {study!r}, field `{field}`: {error}") from error
    worded = [study for study, text in texts.items() if text is not None]
    without = next((study for study in worded if study not in classes), None)
    if without is not None and any(study in classes for study in worded):
        remedy = "give all of them labels, or none and --labeler"
        raise ValueError(f"{path}: no field `{LABEL_FIELDS[role]}` for id {without!r}, but for others; {remedy}")
    return Side(path, texts, classes or None, labeler=_neighbour(path) if classes else None, has_splits=has_splits)


def _id(where: str, record: Mapping[str, Any]) -> str:
    field = next((name for name in ID_FIELDS if name in record), None)
    if field is None:
        raise ValueError(f"{where}: no id; name the study in one of the fields {', '.join(ID_FIELDS)}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}, field `{field}`: {shown(value)} is no id; write a text or a whole number")
    if is_missing(str(value)):
        raise ValueError(f"{where}, field `{field}`: {shown(value)} is a missing value written out; name the study")
    return str(value).strip()


def _values(record: Mapping[str, Any], role: Role) -> tuple[str, list[Any] | None]:
    """The labels of an object and their field; of a manifest's study without a report, what it says in its place."""
    values = record.get(LABEL_FIELDS[role])
    if isinstance(values, list):
        return LABEL_FIELDS[role], values
    if role == "reference" and isinstance(said := record.get("labels"), dict) and record.get("report", "") is None:
        return "labels.said", said["said"] if isinstance(said.get("said"), list) else None
    return LABEL_FIELDS[role], None


def _text(where: str, study: str, record: Mapping[str, Any], role: Role, *, labelled: bool) -> str | None:
    field = next((name for name in TEXT_FIELDS[role] if name in record), None)
    if field is None:
        raise ValueError(
            f"{where}, id {study!r}: no {role} report; name it in one of the fields {', '.join(TEXT_FIELDS[role])}"
        )
    text = record[field]
    if text is None and field == "report" and role == "predicted":
        return ""  # a completion without a well-formed report says nothing
    if text is None and role == "reference" and labelled:
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"{where}, id {study!r}, field `{field}`: {shown(text)} is not a text; write the report, empty quotes "
            "for none"
        )
    if not where.partition(", line")[0].endswith(_PREDICTIONS):  # what a policy wrote is taken as it wrote it
        _refuse_missing(f"{where}, id {study!r}, field `{field}`", text, role)
    return text


def _neighbour(path: Path) -> dict[str, str | None] | None:
    """The labeler of a run's predictions: SPLIT.json, beside SPLIT_predictions.jsonl, names it."""
    result = path.with_name(path.name.removesuffix(_PREDICTIONS) + ".json")
    if not path.name.endswith(_PREDICTIONS) or not result.is_file():
        return None
    try:
        labeler = parse_json(result.read_text(encoding="utf-8")).get("labeler")
        return None if labeler is None else {"name": str(labeler["name"]), "fingerprint": str(labeler["fingerprint"])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{result}: names no labeler of {path.name} ({error}); evaluate the run again") from error


def _objects(part: Sequence[Any]) -> bool:
    return all(isinstance(record, dict) for record in part)
