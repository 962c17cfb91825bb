"""A tree in the layout of MIMIC-CXR-JPG and MIMIC-CXR, with patients, texts, labels and images of our own."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mrg_r1.data.prepare.mimic_cxr.convert import Choices, Prepared, prepare_mimic_cxr
from mrg_r1.data.study import read_manifest
from mrg_r1.types import Study

# the order of the published file is alphabetical
CHEXPERT_COLUMNS = (
    *(
        "Atelectasis",
        "Cardiomegaly",
        "Consolidation",
        "Edema",
        "Enlarged Cardiomediastinum",
        "Fracture",
        "Lung Lesion",
        "Lung Opacity",
    ),
    *("No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
)
METADATA_COLUMNS = (
    *(
        "dicom_id",
        "subject_id",
        "study_id",
        "PerformedProcedureStepDescription",
        "ViewPosition",
        "Rows",
        "Columns",
        "StudyDate",
    ),
    *(
        "StudyTime",
        "ProcedureCodeSequence_CodeMeaning",
        "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ),
)
REPORT = """
                                 FINAL REPORT
 INDICATION:  ___ year old with cough.

 COMPARISON:  None.

 FINDINGS:

 The lungs are clear. The heart of
 {name} is normal.

 IMPRESSION:

 Nothing acute in {name}.
"""


@dataclass
class TreeStudy:
    """One study to write; whatever is changed of it after `write_tree` is changed in the files."""

    subject: int
    study: int
    split: str = "train"
    date: str = "21800506"
    time: str = "213014.531"
    views: Sequence[str] = ("PA", "LATERAL")
    report: str | bytes | None = None  # None: REPORT with the study's name
    labels: dict[str, str] | None = field(default_factory=dict)  # observation -> cell; None: no row

    @property
    def name(self) -> str:
        return f"s{self.study}"

    def dicom(self, index: int) -> str:
        """The id of an image; they are not in the order of the views."""
        digits = hashlib.sha256(f"{self.study} {index}".encode()).hexdigest()[:40]
        return "-".join(digits[start : start + 8] for start in range(0, 40, 8))

    def image(self, root: Path, index: int) -> Path:
        return self.folder(root) / f"{self.dicom(index)}.jpg"

    def text(self, root: Path) -> Path:
        return self.folder(root).with_suffix(".txt")

    def folder(self, root: Path) -> Path:
        return root / "files" / f"p{str(self.subject)[:2]}" / f"p{self.subject}" / self.name


def write_tree(root: Path, studies: Iterable[TreeStudy]) -> Path:
    """Tables, images and reports below one folder."""
    split, metadata, labels = [], [], []
    pixels = BytesIO()
    Image.effect_noise((24, 24), 60).save(pixels, format="JPEG")
    for study in studies:
        study.folder(root).mkdir(parents=True, exist_ok=True)
        text = REPORT.format(name=study.name) if study.report is None else study.report
        study.text(root).write_bytes(text if isinstance(text, bytes) else text.encode())
        for index, view in enumerate(study.views):
            study.image(root, index).write_bytes(pixels.getvalue())
            subject, number, dicom = str(study.subject), str(study.study), study.dicom(index)
            split.append([dicom, number, subject, study.split])
            metadata.append(
                [dicom, subject, number, "CHEST (PA AND LAT)", view, "24", "24", study.date, study.time, "", "", ""]
            )
        if study.labels is not None:
            labels.append(
                [str(study.subject), str(study.study), *(study.labels.get(name, "") for name in CHEXPERT_COLUMNS)]
            )
    write_table(table(root, "split"), [["dicom_id", "study_id", "subject_id", "split"], *split])
    write_table(table(root, "metadata"), [list(METADATA_COLUMNS), *metadata])
    write_table(table(root, "chexpert"), [["subject_id", "study_id", *CHEXPERT_COLUMNS], *labels])
    return root


def table(root: Path, name: str) -> Path:
    return root / f"mimic-cxr-2.0.0-{name}.csv.gz"


def read_table(path: Path) -> list[list[str]]:
    """Rows, the header first."""
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.reader(file))


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


_SENTENCES = (
    "The lungs are well expanded and clear.",
    "There is a small left pleural effusion with adjacent atelectasis.",
    "The cardiomediastinal silhouette is mildly enlarged, though stable since ___.",
    "No pneumothorax is seen on either side.",
    "A right-sided line ends in the mid superior vena cava.",
    "There is mild interstitial edema, more on the right than on the left.",
    "The bones are unremarkable but for degenerative changes of the spine.",
    "An opacity at the right base could be pneumonia in the right setting.",
)


def many(count: int, seed: int = 0) -> Iterable[TreeStudy]:
    """Studies of patients with one to six each, reports of several sections, about one in twenty with no FINDINGS."""
    draw = random.Random(seed)
    subject, left = 10_000_000, 0
    for index in range(count):
        if left == 0:
            subject, left = subject + draw.randint(1, 40), draw.randint(1, 6)
            split = draw.choices(("train", "validate", "test"), (96, 2, 2))[0]
        left -= 1
        findings = " \n ".join(draw.choices(_SENTENCES, k=draw.randint(3, 8)))
        heading = "FINDINGS" if draw.random() > 0.05 else "PROSE"
        report = (
            "                                 FINAL REPORT\n EXAMINATION:  CHEST (PORTABLE AP)\n \n INDICATION:  "
            f"___ year old with fever  // eval\n \n TECHNIQUE:  Portable\n \n COMPARISON:  ___.\n \n {heading}: \n "
            f"\n {findings}\n \n IMPRESSION: \n \n 1.  {draw.choice(_SENTENCES)}\n 2.  {draw.choice(_SENTENCES)}\n"
        )
        day = f"21{draw.randint(10, 99)}{draw.randint(1, 12):02}{draw.randint(1, 28):02}"
        time = f"{draw.randint(0, 23) * 10000 + draw.randint(0, 59) * 100 + draw.randint(0, 59)}.{draw.randint(0, 999)}"
        views = draw.choice(
            (("AP",), ("PA", "LATERAL"), ("AP", "LATERAL"), ("PA", "LL"), ("AP", "AP"), ("LATERAL", "PA", ""))
        )
        yield TreeStudy(subject, 50_000_000 + index, split, day, time, views, report)


ONE = TreeStudy(10000032, 50414267)
TWO = TreeStudy(10000764, 57375967, split="validate")


def prepared(tmp_path: Path, *, reports: Path | None = None, output: str = "out", **choices: Any) -> Prepared:
    return prepare_mimic_cxr(tmp_path / "mimic", tmp_path / output, reports=reports, choices=Choices(**choices))


def kept(tmp_path: Path, output: str = "out") -> dict[str, Study]:
    return {study.id: study for study in read_manifest(tmp_path / output / "manifest.jsonl")}


def refused(tmp_path: Path, output: str = "out") -> dict[str, tuple[str, str]]:
    """Id -> reason and place."""
    rows = [json.loads(line) for line in (tmp_path / output / "refused.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: (row["reason"], row["where"]) for row in rows}


def change(tmp_path: Path, name: str, study: TreeStudy, column: str, value: str | None, index: int = 0) -> int:
    """Set a cell of one image's row, or remove the row where the value is None; the line that it stands on."""
    path = table(tmp_path / "mimic", name)
    rows = read_table(path)
    key = rows[0].index("study_id") if name == "chexpert" else rows[0].index("dicom_id")
    wanted = str(study.study) if name == "chexpert" else study.dicom(index)
    at = next(number for number, row in enumerate(rows) if row[key] == wanted)
    if value is None:
        del rows[at]
    else:
        rows[at][rows[0].index(column)] = value
    write_table(path, rows)
    return at + 1
