"""`prepare chexpert`: train.csv and valid.csv of CheXpert, labels without reports, become a manifest.

Nothing of it is part of the project; whoever has access brings it.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from mrg_r1.data.prepare.checking import refuse_changed_sources
from mrg_r1.data.prepare.conversion import Conversion
from mrg_r1.data.prepare.labelled import (
    Draft,
    ImageChoices,
    Nameless,
    Prepared,
    check_folders,
    refuse_other_convention,
    said_of_cells,
    settle,
    table_of,
)
from mrg_r1.data.prepare.rows import Row, read_csv
from mrg_r1.labels.observations import OBSERVATIONS

_TABLES = {"valid": "val", "train": "train"}  # theirs -> ours; first those that must not be learned from
_COLUMNS = tuple(name.lower() for name in OBSERVATIONS)
# CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
_PATH = re.compile(r"((?:[^/]+/)*?)([a-z]+)/(patient\d+)/(study\d+)/(view\d+_(frontal|lateral)\.\w+)")


def prepare_chexpert(
    root: Path, output: Path, *, images: Path | None = None, choices: ImageChoices | None = None
) -> Prepared:
    """Write `manifest.jsonl`, `refused.jsonl` and report CSVs without a report; interrupted, the same call goes on.

    The rows of a study's views are one study; train.csv is split train, valid.csv val.

    Args:
        root: the folder of train.csv and valid.csv, packed (.csv.gz) or not; one of them may be absent.
        output: folder to write.
        images: the folder that holds `CheXpert-v1.0-small/train` or `train`; None means `root`.
        choices: None takes the defaults.

    Raises:
        ManifestError: a table as a whole: damaged, not UTF-8, without a column.
        ValueError: neither table, a train.csv of another convention of labels, a folder made with other settings, a
            table that changed after an interrupted run, not one study that can be kept.
        OSError: a file cannot be read or written, a folder that is not there.
    """
    choices, images = choices or ImageChoices(), images or root
    check_folders(root, images, choices)
    found = {split: table_of(root, f"{split}.csv") for split in _TABLES}
    tables = {split: table for split, table in found.items() if table is not None}
    if not tables:
        raise ValueError(f"{root}: neither train.csv nor valid.csv; give the folder that CheXpert was unpacked into")
    settings = {
        "dataset": "chexpert",
        "root": str(root.absolute()),
        "images": str(images.absolute()),
        **asdict(choices),
    }
    refuse_changed_sources(output, list(tables.values()))
    reader = _Reader(images.absolute())
    for split, table in tables.items():
        reader.read(split, table)
    if "train" in tables and reader.drafts and not reader.silent["train"]:
        refuse_other_convention(tables["train"])
    with Conversion(output, settings) as conversion:
        settle(reader.drafts.values(), reader.nameless, conversion, choices)
        return Prepared(conversion.close(), conversion.found, _notes(reader, found))


class _Reader:
    """The rows of both tables, gathered into studies."""

    def __init__(self, images: Path) -> None:
        self.drafts: dict[tuple[str, str], Draft] = {}  # (split, id)
        self.nameless: list[Nameless] = []
        self.silent = dict.fromkeys(_TABLES, False)  # whether any label of the split is empty
        self._images = images
        self._folders: dict[tuple[str, str], str] = {}
        self._patients: dict[str, str] = {}  # -> the first table that has them

    def read(self, split: str, table: Path) -> None:
        for row in read_csv(table, ("path", "frontal/lateral", *_COLUMNS)):
            path = row.values.get("path", "").strip()
            parts = _PATH.fullmatch(path)
            if row.fault is not None or parts is None or ".." in path.split("/"):
                expected = "expected train/patient00001/study1/view1_frontal.jpg, perhaps after a folder's name"
                self.nameless.append(Nameless(row.fault or f"column Path: {path!r}; {expected}", row.where))
            else:
                self._add(split, row, parts)

    def _add(self, split: str, row: Row, parts: re.Match[str]) -> None:
        prefix, folder, patient, study, name, view = parts.groups()
        cells = [row.values[column].strip() for column in _COLUMNS]
        said, fault = said_of_cells(cells)
        key = (split, f"{patient}_{study}")
        draft = self.drafts.get(key)
        if draft is None:
            draft = self.drafts[key] = Draft(key[1], patient, _TABLES[split], row.where, None if fault else said)
        if fault is not None:
            draft.refuse(fault, row.where)
        elif draft.fault is None and draft.said != said:
            draft.refuse(f"{_difference(draft.said or (), said)} in {draft.where}, a view of the same study", row.where)
        self.silent[split] = self.silent[split] or not all(cells[:-1])

        if folder != split:
            draft.refuse(f"column Path: an image of {folder}/ in {split}.csv; take the row out", row.where)
        column = row.values["frontal/lateral"].strip()
        if column.lower() != view:
            draft.refuse(f"column Frontal/Lateral: {column!r}, and the file is {name}; correct one of them", row.where)
        first = self._patients.setdefault(patient, split)
        if first != split:
            reason = f"patient {patient} is in {first}.csv too, so a score would see what was learned"
            draft.refuse(f"column Path: {reason}; take the patient out of one of the tables", row.where)
        path = f"{folder}/{patient}/{study}/{name}"
        image = (f"{self._folder(prefix, folder)}/{path}", view)
        if image in draft.images:
            draft.refuse(f"column Path: {path} stands twice, first in or after {draft.where}; keep one row", row.where)
        draft.images.append(image)

    def _folder(self, prefix: str, folder: str) -> str:
        """Where `folder` lies: the tables name the folder of the collection, which may be the one that is given."""
        if (prefix, folder) not in self._folders:
            inside = self._images / prefix
            self._folders[prefix, folder] = str(inside if (inside / folder).is_dir() else self._images)
        return self._folders[prefix, folder]


def _difference(first: tuple[int | None, ...], second: tuple[int | None, ...]) -> str:
    name, one, other = next(
        (name, one, other) for name, one, other in zip(OBSERVATIONS, first, second, strict=True) if one != other
    )
    shown = {None: "empty", 1: "1.0", 0: "0.0", -1: "-1.0"}
    return f"column {name}: {shown[other]}, and {shown[one]}"


def _notes(reader: _Reader, found: dict[str, Path | None]) -> list[str]:
    notes = [
        f"no {split}.csv: the manifest has no study of split {_TABLES[split]}"
        for split, table in found.items()
        if table is None
    ]
    if found["valid"] is not None and not reader.silent["valid"]:
        notes.append(
            "valid.csv has no empty label: its 0 says that readers of the image did not see it, where train.csv is "
            "empty or 0. CCS and MCCS of split val count these as denials; F1 of findings does not read them"
        )
    return notes
