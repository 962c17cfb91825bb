"""IU X-Ray as R2Gen gives it: annotation.json (arXiv 2010.16056), the findings of 2,955 studies with their split."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mrg_r1.data.prepare.iu_xray.study import OTHER_COLLECTION, IuCollection, IuImage, IuStudy
from mrg_r1.data.prepare.other_collections import field_of_another, names_another
from mrg_r1.data.study import SHOWN_PROBLEMS, ManifestError
from mrg_r1.files import parse_json


def read_r2gen(path: Path) -> IuCollection:
    """Every study of an annotation.json.

    Args:
        path: split -> list of `{id, report, image_path: [...], split}`.

    Returns:
        Studies with R2Gen's ids and split; the report, which is the XML's FINDINGS, stands in `findings`. Images are
        named as `image_path` has them; which is frontal is not said. The file was made by a program: there are no
        refusals.

    Raises:
        ManifestError: broken JSON, missing keys, wrong types, an id that stands twice, another collection in the same
            layout (R2Gen's annotation.json of MIMIC-CXR).
        OSError: the file cannot be read.
    """
    problems: list[str] = []
    studies: dict[str, IuStudy] = {}
    for split, records in _splits(path).items():
        for position, record in enumerate(records):
            if len(problems) > SHOWN_PROBLEMS:
                raise ManifestError(problems)
            where = f"{path}, {split}[{position}]"
            problem = _record_problem(record, split)
            if problem is None and record["id"] in studies:
                problem = (
                    f"id {record['id']!r} stands in {studies[record['id']].split!r} already; give every study its "
                    "own id"
                )
            if problem is not None:
                problems.append(f"{where}: {problem}")
                continue
            images = tuple(map(IuImage, record["image_path"]))
            studies[record["id"]] = IuStudy(
                id=record["id"], where=where, images=images, findings=record["report"], split=split
            )
    if problems:
        raise ManifestError(problems)
    if not studies:
        raise ManifestError([f"{path}: no studies in it; fetch R2Gen's annotation.json again"])
    return IuCollection(path, "r2gen", "R2Gen's annotation.json", tuple(studies.values()), ())


def read_split_ids(path: Path) -> dict[str, str]:
    """Study id -> split, from an annotation.json or from a file of ids alone.

    Args:
        path: JSON, split -> list of studies with an `id`, or of ids.

    Raises:
        ManifestError: broken JSON, another layout or collection, an id that stands twice.
        OSError: the file cannot be read.
    """
    split_of: dict[str, str] = {}
    problems: list[str] = []
    for split, records in _splits(path).items():
        for position, record in enumerate(records):
            study_id = record.get("id") if isinstance(record, dict) else record
            where = f"{path}, {split}[{position}]"
            if not isinstance(study_id, str) or not study_id.strip():
                problems.append(f"{where}: {record!r:.80} is no id; write ids, or studies with an `id`")
            elif study_id in split_of:
                problems.append(
                    f"{where}: id {study_id!r} stands in {split_of[study_id]!r} already; a study is in one split"
                )
            else:
                split_of[study_id] = split
    if problems:
        raise ManifestError(problems)
    if not split_of:
        raise ManifestError([f"{path}: no ids in it; fetch R2Gen's annotation.json again"])
    return split_of


def _splits(path: Path) -> dict[str, list[Any]]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ManifestError([f"{path}: broken JSON ({error}); fetch R2Gen's annotation.json again"]) from error
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(studies, list) for studies in content.values())
    ):
        raise ManifestError([f"{path}: not R2Gen's layout; expected an object of splits, each a list of studies"])
    if empty := [split for split in content if not split.strip()]:
        raise ManifestError([f"{path}: a split is named {empty[0]!r}; name it train, val or test"])
    for split, records in content.items():
        for position, record in enumerate(records):
            if sign := _sign_of_another(record):
                raise ManifestError([f"{path}, {split}[{position}]: {sign}: R2Gen's layout, but {OTHER_COLLECTION}"])
    return content


def _sign_of_another(record: Any) -> str | None:
    """What tells a study, or an id, of another collection from one of IU X-Ray."""
    study_id = record.get("id") if isinstance(record, dict) else record
    if isinstance(study_id, str | int) and names_another(str(study_id)):
        return f"id {study_id!r}"
    if not isinstance(record, dict):
        return None
    if field := field_of_another(record):
        return f"field `{field}`"
    paths = record.get("image_path")
    for item in paths if isinstance(paths, list) else [paths]:
        if isinstance(item, str) and names_another(item):
            return f"field `image_path`: {item!r:.80}"
    return None


def _record_problem(record: Any, split: str) -> str | None:
    if not isinstance(record, dict):
        return f"{record!r} is not a study; expected an object with id, report and image_path"
    study_id = record.get("id")
    # the id becomes a file's name
    if not isinstance(study_id, str) or not re.fullmatch(r"\w[\w.-]*", study_id):
        return f"field `id`: {study_id!r}; an id is letters, digits, _, - and dots"
    where = f"study {study_id!r}, field"
    if not isinstance(record.get("report"), str):
        return f"{where} `report`: {record.get('report')!r}; expected a string"
    paths = record.get("image_path")
    if not isinstance(paths, list) or not paths or not all(isinstance(item, str) and item for item in paths):
        return f"{where} `image_path`: {paths!r}; expected a list of at least one file"
    for item in paths:
        if PurePosixPath(item).is_absolute() or ".." in PurePosixPath(item).parts or "\0" in item:
            return f"{where} `image_path`: {item!r} points outside of the images' folder; name a file in it"
    if record.get("split", split) != split:
        return (
            f"{where} `split`: {record['split']!r}, but the study stands in the list of {split!r}; move it or mend "
            "the field"
        )
    return None
