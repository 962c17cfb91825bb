"""`prepare nih`: Data_Entry_2017.csv of NIH's ChestX-ray14 and its split lists, labels without reports, become a
manifest.

Nothing of it is part of the project; whoever has it brings it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
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
    said_of_names,
    seeded_split,
    settle,
    table_of,
    unmapped_note,
)
from mrg_r1.data.prepare.rows import Row, check_utf8, read_csv
from mrg_r1.data.study import ManifestError

# Eight by name; four by the phrases that the CheXpert labeler counts under an observation (phrases/mention of
# stanfordmlgroup/chexpert-labeler). None: no observation is of it.
OBSERVATION_OF: dict[str, str | None] = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "No Finding": "No Finding",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
}
_NORMAL = "No Finding"
_TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
_LISTS = {"test": "test_list.txt", "train_val": "train_val_list.txt"}  # first what must not be learned from
_VAL = 0.1  # of the patients of train_val_list.txt
_IMAGE = re.compile(r"(\d{8})_\d{3}\.\w+")  # 00000001_000.png
_VIEWS = ("PA", "AP")


def prepare_nih(
    root: Path,
    output: Path,
    *,
    images: Path | None = None,
    seed: int = 0,
    choices: ImageChoices | None = None,
) -> Prepared:
    """Write `manifest.jsonl`, `refused.jsonl` and report CSVs without a report; interrupted, the same call goes on.

    Every image is a study. test_list.txt is split test; of the patients of train_val_list.txt a seeded tenth is val.

    Args:
        root: the folder of Data_Entry_2017.csv (or .csv.gz, or its edition _v2020), train_val_list.txt and
            test_list.txt.
        output: folder to write.
        images: the folder that holds the images, at any depth; None means `root`.
        seed: of the tenth.
        choices: None takes the defaults; `views` and `max_images` change nothing, as there is one frontal image each.

    Raises:
        ManifestError: a table or list as a whole: damaged, not UTF-8, without a column.
        ValueError: a file that is not there, a folder made with other settings, a table that changed after an
            interrupted run, not one study that can be kept.
        OSError: a file cannot be read or written, a folder that is not there.
    """
    choices, images = choices or ImageChoices(), images or root
    check_folders(root, images, choices)
    found = [table for name in _TABLES if (table := table_of(root, name)) is not None]
    if len(found) != 1:
        given = "neither" if not found else "both"
        raise ValueError(f"{root}: {given} {_TABLES[0]} and {_TABLES[1]}; have one of them there")
    table = found[0]
    lists = {split: root / name for split, name in _LISTS.items()}
    if missing := [path.name for path in lists.values() if not path.is_file()]:
        remedy = "fetch the published lists, so that scores can be compared, and put them beside the table"
        raise ValueError(f"{root}: no {' and no '.join(missing)}; {remedy}")
    settings = {
        "dataset": "nih",
        "root": str(root.absolute()),
        "images": str(images.absolute()),
        "seed": seed,
        "check_images": asdict(choices)["check_images"],
    }
    refuse_changed_sources(output, [table, *lists.values()])
    reader = _Reader(images.absolute(), seed)
    for split, path in lists.items():
        reader.read_list(split, path)
    for row in read_csv(table, ("image index", "finding labels", "patient id", "view position")):
        reader.add(row)
    reader.close()
    with Conversion(output, settings) as conversion:
        settle(reader.drafts.values(), reader.nameless, conversion, choices)
        return Prepared(conversion.close(), conversion.found, unmapped_note(reader.unmapped, len(reader.drafts)))


class _Reader:
    """The lists and the table, gathered into studies."""

    def __init__(self, images: Path, seed: int) -> None:
        self.drafts: dict[str, Draft] = {}
        self.nameless: list[Nameless] = []
        self.unmapped: Counter[str] = Counter()
        self._images, self._seed = images, seed
        self._listed: dict[str, tuple[str, str]] = {}  # image -> its list's split, and where it stands
        self._list_of: dict[str, str] = {}  # patient -> the first list that has an image of it
        self._folders: dict[str, list[str]] = {}  # image -> the folders that have a file of that name
        for folder, below, names in os.walk(images):
            below.sort()
            for name in names:
                if _IMAGE.fullmatch(name):
                    self._folders.setdefault(name, []).append(folder)

    def read_list(self, split: str, path: Path) -> None:
        check_utf8(path)
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            name, where = line.strip(), f"{path}, line {number}"
            if not name:
                continue
            match = _IMAGE.fullmatch(name)
            if match is None:
                raise ManifestError(
                    [f"{where}: {name[:60]!r} is no image's name such as 00000001_000.png; fetch it again"]
                )
            if self._listed.setdefault(name, (split, where))[1] != where:
                other = self._listed[name][1]
                self.nameless.append(
                    Nameless(f"{name} stands in {other} too, which counts; keep one of the two", where)
                )
            self._list_of.setdefault(match[1], split)

    def add(self, row: Row) -> None:
        """A row of the table."""
        name = row.values.get("image index", "").strip()
        match = _IMAGE.fullmatch(name)
        if row.fault is not None or match is None:
            reason = row.fault or f"column Image Index: {name!r}; expected a name such as 00000001_000.png"
            self.nameless.append(Nameless(reason, row.where))
            return
        patient, study_id = match[1], name.rpartition(".")[0]
        if study_id in self.drafts:
            first = self.drafts[study_id]
            first.refuse(f"column Image Index: {name!r} stands in {first.where} too; keep one of the rows", row.where)
            return
        labels = [label.strip() for label in row.values["finding labels"].split("|")]
        said, fault, unmapped = said_of_names(labels, OBSERVATION_OF, _NORMAL, "Finding Labels")
        self.unmapped.update(unmapped)
        listed, _ = self._listed.pop(name, ("", ""))
        draft = Draft(study_id, patient, self._split(listed, patient), row.where, said)
        self.drafts[study_id] = draft
        wrong = fault or self._wrong(row, name, patient, listed)
        if wrong is not None:
            draft.refuse(wrong, row.where)
        found = self._folders.get(name, [str(self._images)])
        if len(found) > 1:
            draft.refuse(f"column Image Index: {name} lies in {found[0]} and {found[1]}; keep one", row.where)
        draft.images.append((f"{found[0]}/{name}", "frontal"))

    def close(self) -> None:
        """After the last row: images of a list that no row has."""
        for name, (_, where) in self._listed.items():
            self.nameless.append(Nameless(f"{name}: no row of this image in the table; fetch the whole table", where))

    def _split(self, listed: str, patient: str) -> str:
        if listed != "train_val":
            return listed
        return seeded_split(patient, self._seed, (("val", _VAL), ("train", 1 - _VAL)))

    def _wrong(self, row: Row, name: str, patient: str, listed: str) -> str | None:
        number, view = row.values["patient id"].strip(), row.values["view position"].strip()
        if not number.isdecimal() or int(number) != int(patient):
            return f"column Patient ID: {number!r}, and the image is {name}; correct one of them"
        if view not in _VIEWS:
            return f"column View Position: {view!r}; it is PA or AP, correct it or take the image out"
        if not listed:
            return f"column Image Index: {name} is in neither {' nor '.join(_LISTS.values())}; add it to one of them"
        if self._list_of[patient] != listed:
            other = _LISTS[self._list_of[patient]]
            return (
                f"patient {patient} is in {other} too, so a score would see what was learned; take it out of one list"
            )
        return None
