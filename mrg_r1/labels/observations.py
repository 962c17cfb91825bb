"""The 14 observations, their classes, and the signed vector that the reward compares (docs/method.md §1).

Source: CheXbert (arXiv 2004.09167), label order of its published code; the signed vector is arXiv 2512.16145's.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mrg_r1.files import atomically
from mrg_r1.labels.columns import find_column, repeated_columns
from mrg_r1.labels.missing import is_missing

OBSERVATIONS: tuple[str, ...] = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
NO_FINDING = 13
FIVE: tuple[int, ...] = (1, 4, 5, 7, 9)  # CheXpert's competition tasks
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3
CLASSES_PER_OBSERVATION: tuple[int, ...] = (4,) * 13 + (2,)

# class -> sign; uncertain counts as positive (docs/method.md §1)
_SIGN = np.array([0, 1, -1, 1], dtype=np.int8)
# file value -> class
_CLASS_OF_VALUE: dict[int | None, int] = {None: BLANK, 1: POSITIVE, 0: NEGATIVE, -1: UNCERTAIN}
_VALUE_OF_CLASS: dict[int, int | None] = {label: value for value, label in _CLASS_OF_VALUE.items()}


def signed_vector(classes: NDArray[np.int64]) -> NDArray[np.int8]:
    """Signed vector over the first 13 observations.

    Args:
        classes: [..., 14] integer classes (0 blank, 1 positive, 2 negative, 3 uncertain).

    Returns:
        [..., 13] int8: positive and uncertain +1, negative -1, blank 0. No Finding is left out.
    """
    return _SIGN[classes[..., :NO_FINDING]]


def classes_of_values(values: Sequence[int | None]) -> list[int]:
    """14 file values (1, 0, -1, None) -> 14 classes. A 0 under No Finding is a blank: it has no negative class.

    Raises:
        ValueError: not 14 values, or a value other than 1, 0, -1, None; true and false, which are 1 and 0 to Python,
            among them.
    """
    if len(values) != len(OBSERVATIONS):
        raise ValueError(f"expected {len(OBSERVATIONS)} label values, one an observation, got {len(values)}")
    classes = []
    for observation, value in zip(OBSERVATIONS, values, strict=True):
        if isinstance(value, bool) or value not in _CLASS_OF_VALUE:
            raise ValueError(
                f"{observation}: label value {value!r}; allowed are 1 (positive), 0 (negative), -1 (uncertain) and "
                "empty"
            )
        classes.append(_CLASS_OF_VALUE[value])
    if classes[NO_FINDING] == NEGATIVE:
        classes[NO_FINDING] = BLANK
    elif classes[NO_FINDING] == UNCERTAIN:
        raise ValueError("No Finding: label value -1; it is either positive (1) or blank")
    return classes


def values_of_classes(classes: Iterable[int]) -> list[int | None]:
    """14 classes -> 14 file values (1, 0, -1, None)."""
    return [_VALUE_OF_CLASS[int(label)] for label in classes]


def read_labels_csv(path: Path, *, numbered: bool = False) -> dict[str, list[int]]:
    """Read `id` and the 14 observation columns (any order, any case of `id`) into classes by id.

    Args:
        numbered: without a column `id` the ids are the rows' numbers, from 1.

    Raises:
        ValueError: a column that is missing or stands twice, an id that stands twice or is a missing value written out,
            a value outside 1, 0, -1 and empty; names file, line and field.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        if fault := repeated_columns(columns):
            raise ValueError(f"{path}, line 1: {fault}")
        id_column = find_column(columns, "id")
        if id_column is None and not numbered:
            raise ValueError(f"{path}: no column `id`; the columns are {columns}")
        missing = [name for name in OBSERVATIONS if name not in columns]
        if missing:
            raise ValueError(f"{path}: missing observation columns {missing}; all 14 are needed: {list(OBSERVATIONS)}")
        labels: dict[str, list[int]] = {}
        for row in reader:
            study_id = str(len(labels) + 1) if id_column is None else (row[id_column] or "").strip()
            where = f"{path}, line {reader.line_num}"
            if not study_id:
                raise ValueError(f"{where}: empty id")
            if is_missing(study_id):
                raise ValueError(f"{where}, field `id`: {study_id!r} is a missing value written out; name the study")
            if study_id in labels:
                raise ValueError(f"{where}: id {study_id!r} stands twice; keep one of the rows")
            if None in row or None in row.values():  # a shifted or cut row would else be read as blanks
                raise ValueError(
                    f"{where}, id {study_id!r}: the row has more or fewer fields than the {len(columns)} columns"
                )
            try:
                labels[study_id] = classes_of_values([_parse_value(name, row[name]) for name in OBSERVATIONS])
            except ValueError as error:
                raise ValueError(f"{where}, id {study_id!r}: {error}") from error
    return labels


def write_labels_csv(path: Path, labels: dict[str, Sequence[int]]) -> None:
    """Write classes by id as `id` and the 14 observation columns, values 1, 0, -1 and empty."""
    with atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *OBSERVATIONS])
        for study_id, classes in labels.items():
            writer.writerow([study_id, *("" if value is None else value for value in values_of_classes(classes))])


def _parse_value(observation: str, text: str | None) -> int | None:
    text = (text or "").strip()
    if text == "":
        return None
    try:
        number = float(text)
    except ValueError:
        raise ValueError(
            f"{observation}: label value {text!r} is not a number; allowed are 1, 0, -1 and empty"
        ) from None
    if not number.is_integer():
        raise ValueError(f"{observation}: label value {text!r}; allowed are 1, 0, -1 and empty")
    return int(number)
