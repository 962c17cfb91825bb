"""`prepare padchest` on generated tables of its layout: images are joined into studies, labels mapped or named, Spanish
reports kept or left out, and every bad row named while the good is kept.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.data.prepare.labelled import ImageChoices, Prepared
from mrg_r1.data.prepare.padchest import prepare_padchest
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.types import Study

Row = dict[str, str]
TEXT = "pinzamient de sen costofren izquierd , compatibl con pequeñ derram ."


def row(study: str, image: str = "", patient: str = "", **changes: str) -> Row:
    """A row as the table has it, with its column of row numbers and a few of the DICOM columns."""
    return {
        "": "7",
        "ImageID": f"{image or study}.png",
        "ImageDir": "0",
        "StudyDate_DICOM": "20140915",
        "StudyID": study,
        "PatientID": patient or f"P{study}",
        "Projection": "PA",
        "WindowCenter_DICOM": "[2047.0, 2048.0]",
        "Report": TEXT,
        "MethodLabel": "RNN_model",
        "Labels": "['pleural effusion', 'costophrenic angle blunting']",
        **changes,
    }


def write(tmp_path: Path, rows: Sequence[Row]) -> Path:
    folder = tmp_path / "padchest"
    (folder / "0").mkdir(parents=True, exist_ok=True)
    path = folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name in {row["ImageID"] for row in rows}:
        if name and "/" not in name:
            Image.effect_noise((24, 24), 60).save(folder / "0" / name)
    return path


def prepared(tmp_path: Path, rows: Sequence[Row], output: str = "out", **choices: Any) -> Prepared:
    report, seed = choices.pop("report", "spanish"), choices.pop("seed", 0)
    path = write(tmp_path, rows)
    return prepare_padchest(path, tmp_path / output, report=report, seed=seed, choices=ImageChoices(**choices))


def kept(tmp_path: Path, output: str = "out") -> dict[str, Study]:
    return {study.id: study for study in read_manifest(tmp_path / output / "manifest.jsonl")}


def refused(tmp_path: Path, output: str = "out") -> list[tuple[str, str, str]]:
    """Id, reason and line."""
    rows = map(json.loads, (tmp_path / output / "refused.jsonl").read_text().splitlines())
    return [(row["id"], row["reason"], row["where"].rpartition(", ")[2]) for row in rows]


def said(*names: str) -> tuple[int | None, ...]:
    return tuple(1 if name in names else None for name in OBSERVATIONS)


def test_a_study_has_its_labels_its_text_and_its_images_the_better_ones_first(tmp_path: Path) -> None:
    views = [("c", "L"), ("b", "AP_horizontal"), ("d", "EXCLUDE"), ("a", "PA"), ("e", "COSTAL")]
    rows = [row("1", image, Projection=view) for image, view in views]
    result = prepared(tmp_path, [*rows[:2], row("2"), *rows[2:]], views="all", max_images=5)
    one = kept(tmp_path)["1"]
    assert one.report == TEXT and one.said == said("Pleural Effusion") and one.patient_id == "P1"
    assert [(image.path.name, image.view) for image in one.images] == [
        ("a.png", "frontal"),
        ("c.png", "lateral"),
        ("b.png", "frontal"),
        ("e.png", None),
    ]
    assert result.notes == [
        "left out, as none of the 14 observations is of them (of 2 studies): costophrenic angle blunting (2)"
    ]
    assert read_reports_csv(tmp_path / "out" / "reports.csv") == {"1": TEXT, "2": TEXT}
    check_images(list(kept(tmp_path).values()))
    prepared(tmp_path, [row("1", Projection="L"), row("2")], "frontal")
    assert list(kept(tmp_path, "frontal")) == ["2"] and "no frontal image" in refused(tmp_path, "frontal")[0][1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("['normal']", said("No Finding")),
        ("['Hydropneumothorax ', 'NSG tube', '']", said("Pneumothorax", "Pleural Effusion", "Support Devices")),
        ("['laminar  atelectasis', 'callus rib fracture']", said("Atelectasis", "Fracture")),
        ("['reticular interstitial pattern', 'consolidation']", said("Lung Opacity", "Consolidation")),
        ("['multiple nodules', 'breast mass']", said("Lung Lesion")),
        (
            "['apical pleural thickening', 'mediastinal enlargement']",
            said("Pleural Other", "Enlarged Cardiomediastinum"),
        ),
        ("['pulmonary edema', 'atypical pneumonia', 'cardiomegaly']", said("Edema", "Pneumonia", "Cardiomegaly")),
        ("['unchanged', 'breast mass']", None),
        ("", None),
        ("[]", None),
    ],
)
def test_labels_are_those_of_the_observations_that_they_are_of(tmp_path: Path, labels: str, expected: Any) -> None:
    prepared(tmp_path, [row("1", Labels=labels), row("2")])
    assert kept(tmp_path)["1"].said == expected
    prepared(tmp_path, [row("1", Labels=labels), row("2")], "labels", report="none")
    assert kept(tmp_path, "labels")["2"].report is None
    if expected is None:  # and nothing to read either
        ((study, reason, where),) = refused(tmp_path, "labels")
        assert (study, where) == ("1", "line 2") and "no label of an observation, and no report" in reason
    else:
        assert kept(tmp_path, "labels")["1"].said == expected


@pytest.mark.parametrize("text", ["", " . ", "nan"])
def test_a_text_without_a_word_leaves_the_labels_alone(tmp_path: Path, text: str) -> None:
    prepared(tmp_path, [row("1", Report=text), row("2"), row("3", Report=text, Labels="[]")])
    assert kept(tmp_path)["1"].report is None and kept(tmp_path)["1"].said == said("Pleural Effusion")
    assert [study for study, _, _ in refused(tmp_path)] == ["3"]


BAD = {
    "no list": ("column Labels: 'pleural effusion'; expected a list", {"Labels": "pleural effusion"}),
    "numbers": ("column Labels: '[1, 0]'; expected a list", {"Labels": "[1, 0]"}),
    "code": ("column Labels: \"__import__('os').getcwd()\"; expected a list", {"Labels": "__import__('os').getcwd()"}),
    "contradiction": ("column Labels: 'normal' beside 'nodule'", {"Labels": "['normal', 'nodule']"}),
    "exclude": ("column Labels: 'exclude'", {"Labels": "['exclude']"}),
    "study": ("column StudyID: '' is no id", {"StudyID": ""}),
    "patient": ("column PatientID: '' is no id", {"PatientID": ""}),
    "study NaN": ("column StudyID: 'NaN' is no id", {"StudyID": "NaN"}),
    "patient nan": ("column PatientID: 'nan' is no id", {"PatientID": "nan"}),
    "image": ("column ImageID: '../x.png' is no id", {"ImageID": "../x.png"}),
    "missing": ("y.png: No such file", {"ImageID": "y.png", "ImageDir": "1"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_its_study_and_is_named(tmp_path: Path, name: str) -> None:
    reason, changes = BAD[name]
    path = write(tmp_path, [row("1"), row("2", **changes)])
    (tmp_path / "padchest/0/y.png").unlink(missing_ok=True)
    prepare_padchest(path, tmp_path / "out")
    assert list(kept(tmp_path)) == ["1"]
    ((_, found, where),) = refused(tmp_path)
    assert reason in found and where == "line 3"


def test_rows_of_a_study_that_contradict_each_other_refuse_it(tmp_path: Path) -> None:
    changes = [{"PatientID": "other"}, {"Report": "otro text ."}, {"Labels": "['nodule']"}, {"ImageID": "3.png"}]
    rows = []
    for study, change in zip("0123", changes, strict=True):
        rows += [row(study), row(study, f"{study}b") | change]
    prepared(tmp_path, [*rows, row("good")])
    assert list(kept(tmp_path)) == ["good"]
    assert [(study, where) for study, _, where in refused(tmp_path)] == [
        ("0", "line 3"),
        ("1", "line 5"),
        ("2", "line 7"),
        ("3", "line 9"),
    ]
    for (_, reason, _), column in zip(refused(tmp_path), ("PatientID", "Report", "Labels", "ImageID"), strict=True):
        assert f"column {column}" in reason


def test_patients_are_split_and_stay_where_they_are(tmp_path: Path) -> None:
    rows = [row(f"{patient}-{n}", "one", f"p{patient}") for patient in range(200) for n in range(2)]
    prepared(tmp_path, rows)
    everyone = kept(tmp_path)
    split_of: dict[str, set[str]] = {}
    for study in everyone.values():
        split_of.setdefault(study.patient_id, set()).add(study.split)
    counts = [sum(found == {split} for found in split_of.values()) for split in ("train", "val", "test")]
    assert sum(counts) == 200 and 140 <= counts[0] <= 180 and min(counts[1:]) >= 8
    prepared(tmp_path, rows[100:], "fewer")
    assert all(everyone[name].split == study.split for name, study in kept(tmp_path, "fewer").items())


def test_the_table_may_be_packed_and_images_may_lie_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [row("1"), row("2")])
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    output = tmp_path / "out"
    main(
        ["prepare", "padchest", str(packed), "--images", str(path.parent / "0"), "-o", str(output), "--report", "none"]
    )
    assert "PadChest, studies" in capsys.readouterr().out
    assert kept(tmp_path)["1"].images[0].path == path.parent / "0" / "1.png"
    with pytest.raises(ValueError, match="other"):
        prepare_padchest(packed, output, images=path.parent / "0")
    packed.write_bytes(gzip.compress(path.read_bytes().replace(b"PatientID", b"Patient")))
    with pytest.raises(ManifestError, match=r"line 1: no column `patientid`"):
        prepare_padchest(packed, tmp_path / "columns")
    with pytest.raises(IsADirectoryError, match="give the table"):
        prepare_padchest(path.parent, tmp_path / "columns")
    assert not (tmp_path / "columns").exists()
