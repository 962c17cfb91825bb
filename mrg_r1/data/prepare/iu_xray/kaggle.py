"""IU X-Ray as Kaggle gives it: indiana_reports.csv (texts) and indiana_projections.csv (images and their views)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mrg_r1.data.prepare.iu_xray.study import (
    OTHER_COLLECTION,
    IuCollection,
    IuImage,
    IuRefusal,
    IuStudy,
    image_key,
    image_of_another,
    study_number,
    without_repeats,
)
from mrg_r1.data.prepare.other_collections import field_of_another, names_another
from mrg_r1.data.prepare.rows import Row, csv_columns, read_csv
from mrg_r1.data.study import ManifestError
from mrg_r1.labels.missing import is_missing

REPORTS_COLUMNS = ("uid", "findings", "impression", "indication", "comparison")
PROJECTIONS_COLUMNS = ("uid", "filename", "projection")
PROJECTIONS_NAME = "indiana_projections.csv"
_VIEWS = {"frontal": "frontal", "lateral": "lateral"}


def read_kaggle(reports: Path, projections: Path) -> IuCollection:
    """Every row of both files, as a study or as a refusal.

    Args:
        reports: indiana_reports.csv.
        projections: indiana_projections.csv, one image a row.

    Returns:
        Studies with id `CXR<uid>`, texts verbatim (XXXX stands where a name was), images with their views. A study one
        of whose images is named wrongly is refused, and so are images without a report.

    Raises:
        ManifestError: a file as a whole: not UTF-8, broken quotes, a missing column, another collection in the same
            layout.
        OSError: a file cannot be read.
    """
    for path in (reports, projections):
        if field := field_of_another(csv_columns(path)):
            raise ManifestError([f"{path}, line 1: column `{field}`: Kaggle's layout, but {OTHER_COLLECTION}"])
    images, faults, refusals = _read_projections(projections)
    studies: list[IuStudy] = []
    named: set[str] = set()
    for row in read_csv(reports, REPORTS_COLUMNS):
        number = _number(row)
        if number is None:
            refusals.append(_unnamed(row))
            continue
        named.add(number)
        if number in faults:
            refusals.append(IuRefusal(f"CXR{number}", row.where, faults[number]))
            continue
        texts = {
            name: row.values[name] for name in REPORTS_COLUMNS[1:] if not is_missing(row.values[name], words=False)
        }
        studies.append(
            IuStudy(id=f"CXR{number}", where=row.where, images=tuple(images.get(number, {}).values()), **texts)
        )
    for number in (*images, *(number for number in faults if number not in images)):
        if number not in named:
            reason = faults.get(number, f"{projections} names its images, {reports} has no report of it")
            refusals.append(IuRefusal(f"CXR{number}", str(projections), reason))
    kept, repeats = without_repeats(studies)
    return IuCollection(
        reports, "kaggle", "Kaggle's reports and projections (CSV)", tuple(kept), (*refusals, *repeats), projections
    )


def read_views(projections: Path) -> dict[str, str]:
    """Image key (`iu_study.image_key`) -> "frontal" or "lateral".

    Raises:
        ManifestError: as `read_kaggle`, and any row that is wrong: beside another layout the file is there for its
            views alone.
        OSError: it cannot be read.
    """
    images, faults, refusals = _read_projections(projections)
    if faults or refusals:
        raise ManifestError([*faults.values(), *(f"{refusal.where}: {refusal.reason}" for refusal in refusals)])
    return {
        key: image.view for of_study in images.values() for key, image in of_study.items() if image.view is not None
    }


def _read_projections(path: Path) -> tuple[dict[str, dict[str, IuImage]], dict[str, str], list[IuRefusal]]:
    """Number -> image key -> image; number -> its first fault; rows that name no study."""
    images: dict[str, dict[str, IuImage]] = {}
    faults: dict[str, str] = {}
    refusals: list[IuRefusal] = []
    for row in read_csv(path, PROJECTIONS_COLUMNS):
        number = _number(row)
        if number is None:
            refusals.append(_unnamed(row))
            continue
        name = row.values["filename"].strip()
        if fault := _image_fault(row.values, number, images.get(number, {})):
            faults.setdefault(number, f"{row.where}, {fault}")
        else:
            images.setdefault(number, {})[image_key(name)] = IuImage(
                name, _VIEWS[row.values["projection"].strip().lower()]
            )
    return images, faults, refusals


def _image_fault(values: Mapping[str, str], number: str, images: Mapping[str, IuImage]) -> str | None:
    name, projection = values["filename"].strip(), values["projection"].strip()
    if not name:
        return "column `filename`: empty; name the image"
    if other := image_of_another(name, number):
        return (
            f"column `filename`: {name!r} is of study {other}, the row's uid is {number}; two ids for one study, "
            "mend one"
        )
    if image_key(name) in images:
        return f"column `filename`: {name!r} stands twice; keep one of the rows"
    if projection.lower() not in _VIEWS:
        return f"column `projection`: {projection!r}; write Frontal or Lateral"
    return None


def _number(row: Row) -> str | None:
    uid = row.values.get("uid", "").strip()
    if names_another(uid):
        raise ManifestError([f"{row.where}, column `uid`: {uid!r:.80}: Kaggle's layout, but {OTHER_COLLECTION}"])
    return study_number(uid) if uid.isascii() and uid.isdecimal() else None


def _unnamed(row: Row) -> IuRefusal:
    reason = row.fault or f"column `uid`: {row.values['uid']!r}; a uid is a number, such as 2384"
    return IuRefusal(row.where, row.where, reason)
