"""The manifest: one study a line of JSON (docs/method.md §7), read strictly so that bad data is refused before
training.

A file enters, `Study` objects leave; `write_manifest` is the way back. Nothing here opens an image except
`check_images`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mrg_r1.console import progress
from mrg_r1.data.images import image_problem
from mrg_r1.files import RepeatedField, atomically, parse_json, shown
from mrg_r1.labels.missing import is_missing, missing_written_out, report_fault, visible
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.types import Study, StudyImage

SHOWN_PROBLEMS = 10
VIEWS = ("frontal", "lateral", None)
_TEXT_KEYS = ("id", "patient_id", "report", "split")
_OPTIONAL_TEXT_KEYS = ("findings", "impression", "indication", "comparison", "prior")
# What names a study or a patient, and what to write where a program wrote NaN: all of these would be one.
_NAMES = {
    "id": "write the study's own",
    "patient_id": "write the patient's, or the study's id where each has one of its own",
    "prior": "write null, or an earlier study's id",
}
KEYS = frozenset((*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS, "images", "labels", "rendered"))

Refuse = Callable[[str, str], None]  # field, what is wrong with it and the remedy


class ManifestError(ValueError):
    """What is wrong with a manifest or its images: one problem a line, the first `SHOWN_PROBLEMS` of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = self.problems[:SHOWN_PROBLEMS]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and more; only the first {SHOWN_PROBLEMS} are shown")
        super().__init__("\n".join(lines))


def read_manifest(path: Path, *, split: str | None = None, references: bool = True) -> list[Study]:
    """Read and check a manifest. The whole file is checked, whichever split is asked for.

    Args:
        path: JSONL; image paths in it are relative to its folder. Blank lines are passed over.
        split: keep only the studies of this split; None keeps all.
        references: every study needs a report or `labels.said`; False: it may have neither.

    Returns:
        The studies in file order, at least one, image paths absolute.

    Raises:
        ManifestError: a line that is not a JSON object, unknown, missing or repeated keys, values of the wrong type, a
            missing value written out (NaN) as a name or in a text, an empty report, neither report nor said labels, a
            study without images, labels that are not 14 of 1, 0, -1 and null, an id that stands twice, a `prior` that
            is missing or another patient's, no study in the file or the split. Names file, line, study, field, value
            and remedy.
        OSError: the file cannot be read.
    """
    folder = path.absolute().parent
    problems: list[str] = []
    studies: list[Study] = []
    line_of: dict[str, int] = {}  # every id met, also of studies that were refused
    patient_of: dict[str, str] = {}
    priors: list[tuple[int, Study]] = []
    splits: dict[str, int] = {}

    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if len(problems) > SHOWN_PROBLEMS:
                raise ManifestError(problems)
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            record = _record(line, where, problems)
            if record is None:
                continue
            study_id = record.get("id")
            if isinstance(study_id, str):
                where += f", study {study_id!r}"
                if study_id in line_of:
                    problems.append(
                        f"{where}, field `id`: stands on line {line_of[study_id]} too; give every study its own id"
                    )
                    continue
                line_of[study_id] = number
            if fault := _wrong_keys(record):
                problems.append(f"{where}: {fault}")
                continue
            study, faults = study_of_record(record, folder, references=references)
            problems += [f"{where}, field `{field}`: {fault}" for field, fault in faults]
            if study is None:
                continue
            patient_of[study.id] = study.patient_id
            splits[study.split] = splits.get(study.split, 0) + 1
            if study.prior is not None:
                priors.append((number, study))
            if split is None or study.split == split:
                studies.append(study)

    for number, study in priors:
        where = f"{path}, line {number}, study {study.id!r}, field `prior`"
        if study.prior == study.id:
            problems.append(f"{where}: a study cannot be its own prior; write null or an earlier study's id")
        elif study.prior not in line_of:
            problems.append(f"{where}: no study {study.prior!r} in this file; add it or write null")
        elif study.prior in patient_of and patient_of[study.prior] != study.patient_id:
            other = patient_of[study.prior]
            problems.append(
                f"{where}: {study.prior!r} is of patient {other!r}, not {study.patient_id!r}; write null or the "
                "right id"
            )
    if problems:
        raise ManifestError(problems)
    if not studies:
        if split is None or not splits:
            raise ManifestError([f"{path}: no study in the file; write it again with `mrg-r1 prepare`"])
        found = ", ".join(f"{name} ({count:,})" for name, count in splits.items())
        raise ManifestError([f"{path}: no study of split {split!r}; the file has {found}"])
    return studies


def write_manifest(path: Path, studies: Iterable[Study]) -> None:
    """Write studies as a manifest, whole or not at all; image paths are written relative to its folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = path.absolute().parent
    with atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for study in studies:
            file.write(json.dumps(_record_of(study, folder), ensure_ascii=False) + "\n")


def manifest_line(study: Study, folder: Path) -> str:
    """One study as the line, without its end, of a manifest in `folder`: image paths relative to it.

    Raises:
        ManifestError: what `read_manifest` would not read back, such as an empty report; one line a fault, naming the
            field.
    """
    record = _record_of(study, folder)
    line = json.dumps(record, ensure_ascii=False)
    _, faults = study_of_record(json.loads(line), folder)
    if faults:
        raise ManifestError([f"field `{field}`: {fault}" for field, fault in faults])
    return line


def check_images(studies: Sequence[Study]) -> None:
    """Read every image of the studies once: there, an image, whole.

    Raises:
        ManifestError: one line a bad image, with the study's id, the file and the remedy.
    """
    images = [(image.path, study.id) for study in studies for image in study.images]
    problems: list[str] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        found = pool.map(lambda image: image_problem(*image), images)
        for problem in progress(found, "checking images", total=len(images)):
            if problem is not None:
                problems.append(problem)
                if len(problems) > SHOWN_PROBLEMS:
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
    if problems:
        raise ManifestError(problems)


def _record(line: bytes, where: str, problems: list[str]) -> dict[str, Any] | None:
    """One line as a JSON object, or None and a problem."""
    try:
        record = parse_json(line.decode("utf-8-sig"), unique=True)
    except UnicodeDecodeError as error:
        problems.append(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
        return None
    except json.JSONDecodeError as error:
        problems.append(f"{where}: broken JSON ({error.msg} at column {error.colno}); mend or remove the line")
        return None
    except RepeatedField as error:
        problems.append(f"{where}: {error}; keep one of the two")
        return None
    if not isinstance(record, dict):
        problems.append(f"{where}: {shown(record)} is not a JSON object; every line is one study")
        return None
    return record


def _wrong_keys(record: dict[str, Any]) -> str | None:
    unknown, missing = sorted(record.keys() - KEYS), sorted(KEYS - record.keys())
    if not unknown and not missing:
        return None
    parts = [f"unknown keys {unknown}"] * bool(unknown) + [f"missing keys {missing} (null where not known)"] * bool(
        missing
    )
    return f"{', '.join(parts)}; a study has exactly the keys {sorted(KEYS)}"


def study_of_record(
    record: dict[str, Any], folder: Path, *, references: bool = True
) -> tuple[Study | None, list[tuple[str, str]]]:
    """A record with exactly the keys `KEYS` as a Study, image paths relative to `folder`; or None, with its faults as
    field and message.

    Args:
        references: as in `read_manifest`.
    """
    faults: list[tuple[str, str]] = []

    def refuse(field: str, message: str) -> None:
        faults.append((field, message))

    for key in (*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS):
        value = record[key]
        if value is None and key in ("report", *_OPTIONAL_TEXT_KEYS):
            continue
        if not isinstance(value, str):
            refuse(
                key,
                f"{shown(value)} is not a string; write it in "
                f"quotes{' or null' if key in ('report', *_OPTIONAL_TEXT_KEYS) else ''}",
            )
        elif key == "report" and (fault := report_fault(value)):
            refuse(
                key,
                f"{fault} ({shown(value)}); write the text to learn, null where there are labels alone, or take the "
                "study out",
            )
        elif key in _TEXT_KEYS and not visible(value):
            refuse(key, f"empty ({value!a}); give it a value")
        elif key in _NAMES and is_missing(value):
            refuse(key, f"{value!a} is a missing value written out; {_NAMES[key]}")
        elif key in _OPTIONAL_TEXT_KEYS and missing_written_out(value, words=False):
            refuse(key, f"{shown(value)} is a missing value written out; write null where there is none")
        elif key in ("id", "prior") and value != value.strip():
            refuse(key, f"{value!r} begins or ends with white space; take it out, label CSVs are joined on the id")
        elif key in ("id", "patient_id", "split", "prior") and visible(value) != "".join(value.split()):
            refuse(key, f"{value!a} has a character that cannot be seen; take it out, others will not write it")
        elif any("\ud800" <= letter <= "\udfff" for letter in value):
            refuse(key, f"{shown(value)} has half a surrogate pair; write the text as UTF-8")
    if not isinstance(record["rendered"], bool):
        refuse("rendered", f"{shown(record['rendered'])}; write true for a phantom and false for a radiograph")
    images = _images(record["images"], folder, refuse)
    said, drawn = _labels(record["labels"], refuse)
    if references and not faults and record["report"] is None and said is None:
        refuse(
            "report",
            "null, and so is `labels.said`: there is nothing to learn from or to compare with; write the text, or the "
            "14 labels, or take the study out (only `launch/evaluate.py` takes studies with neither)",
        )
    if faults:
        return None, faults
    texts = {key: record[key] for key in (*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS)}
    return Study(**texts, images=images, said=said, drawn=drawn, rendered=record["rendered"]), faults


def _images(value: Any, folder: Path, refuse: Refuse) -> tuple[StudyImage, ...]:
    if not isinstance(value, list) or not value:
        refuse("images", f'{shown(value)}; a study needs a list of at least one {{"path": ..., "view": ...}}')
        return ()
    images = []
    for index, image in enumerate(value):
        field = f"images[{index}]"
        if not isinstance(image, dict) or image.keys() != {"path", "view"}:
            refuse(field, f'{shown(image)}; write {{"path": ..., "view": "frontal", "lateral" or null}}')
        elif not isinstance(image["path"], str) or not image["path"] or "\0" in image["path"]:
            refuse(f"{field}.path", f"{shown(image['path'])}; write the file's path relative to the manifest")
        elif image["view"] not in VIEWS:
            refuse(f"{field}.view", f'{shown(image["view"])}; write "frontal", "lateral" or null')
        else:
            images.append(StudyImage(Path(os.path.normpath(folder / image["path"])), image["view"]))
    return tuple(images)


def _labels(value: Any, refuse: Refuse) -> tuple[tuple[int | None, ...] | None, tuple[int | None, ...] | None]:
    if not isinstance(value, dict) or value.keys() != {"said", "drawn"}:
        refuse("labels", f'{shown(value)}; write {{"said": ..., "drawn": ...}}, each 14 values or null')
        return None, None
    return _fourteen(value["said"], "labels.said", refuse), _fourteen(value["drawn"], "labels.drawn", refuse)


def _fourteen(value: Any, field: str, refuse: Refuse) -> tuple[int | None, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != len(OBSERVATIONS):
        length = f"{len(value)} values" if isinstance(value, list) else shown(value)
        refuse(field, f"{length}; write {len(OBSERVATIONS)}, one an observation in CheXbert's order, or null")
        return None
    # bool is an int in Python, and true == 1
    wrong = [item for item in value if item is not None and (not isinstance(item, int) or isinstance(item, bool))]
    if wrong:
        refuse(field, f"{shown(wrong[0])} is no label value; write 1 (positive), 0 (negative), -1 (uncertain) or null")
        return None
    try:
        classes_of_values(value)
    except ValueError as error:
        refuse(field, str(error))
        return None
    return tuple(value)


def _record_of(study: Study, folder: Path) -> dict[str, Any]:
    return {
        "id": study.id,
        "patient_id": study.patient_id,
        "images": [
            {"path": Path(os.path.relpath(image.path, folder)).as_posix(), "view": image.view} for image in study.images
        ],
        "findings": study.findings,
        "impression": study.impression,
        "indication": study.indication,
        "comparison": study.comparison,
        "report": study.report,
        "split": study.split,
        "labels": {"said": study.said, "drawn": study.drawn},
        "rendered": study.rendered,
        "prior": study.prior,
    }
