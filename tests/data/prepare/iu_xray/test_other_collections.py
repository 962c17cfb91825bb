"""R2Gen's layout of another collection is not taken for IU X-Ray, whose ids are patients too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.cli import main
from mrg_r1.data.prepare.iu_xray.convert import read_iu_xray
from mrg_r1.data.prepare.iu_xray.r2gen import read_r2gen, read_split_ids
from mrg_r1.data.prepare.tabular import Record, RowError, study_of_row
from mrg_r1.data.study import ManifestError
from mrg_r1.types import Study

OURS = {"id": "CXR7_IM-0001", "report": "Clear.", "image_path": ["CXR7_IM-0001/0.png"], "split": "train"}
DICOM = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014"
PATH = f"p10/p10000032/s50414267/{DICOM}.jpg"
OTHERS: dict[str, dict[str, Any]] = {
    "as it is published": {
        "id": DICOM,
        "study_id": 50414267,
        "subject_id": 10000032,
        "report": "Clear.",
        "image_path": [PATH],
        "split": "train",
    },
    "subject_id": {**OURS, "subject_id": 10000032},
    "study_id": {**OURS, "study_id": "50414267"},
    "patient_id": {**OURS, "patient_id": "p1"},
    "a dicom id": {**OURS, "id": DICOM.upper()},
    "a study's number": {**OURS, "id": "50414267"},
    "a study's name": {**OURS, "id": "s50414267"},
    "its paths": {**OURS, "image_path": [f"files/{PATH}"]},
    "a path alone": {**OURS, "image_path": PATH},
    "an image with its split": {**OURS, "id": "mimic_p10000032_s50414267"},
    "NIH's id": {**OURS, "id": "00000013_005"},
    "VinDr's id": {**OURS, "id": "50a418190bc3fb1ef1633bf9678929b3"},
    "CheXpert's id": {**OURS, "id": "7", "image_path": ["patient00001/study1/view1_frontal.jpg"]},
    "a DICOM UID": {**OURS, "image_path": ["1.2.840.113654.2.55.98.dcm"]},
    "a folder of MIMIC-CXR's images": {**OURS, "image_path": [f"{DICOM}.jpg"]},
    "a number": {**OURS, "id": 50414267},
    "dicom_id": {**OURS, "dicom_id": "x"},
    "PatientID": {**OURS, "PatientID": "x"},
    "CheXpert's paths": {**OURS, "image_path": ["train/patient00001/study1/view1_frontal.jpg"]},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("before", [0, 3])
def test_another_collection_is_refused_and_pointed_elsewhere(tmp_path: Path, other: str, before: int) -> None:
    path = tmp_path / "annotation.json"
    mine = [{**OURS, "id": f"CXR{number}_IM-0001"} for number in range(1, before + 1)]
    path.write_text(json.dumps({"train": [*mine, OTHERS[other]], "test": []}))
    for read in (read_r2gen, read_split_ids):
        with pytest.raises(ManifestError, match=rf"train\[{before}\].*mimic-cxr"):
            read(path)


def test_the_command_refuses_it_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"train": [OTHERS["as it is published"]]}))
    assert main(["prepare", "iu-xray", str(path), "--images", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "prepare mimic-cxr" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_ids_alone_are_looked_at_too(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"train": ["CXR7_IM-0001", DICOM]}))
    with pytest.raises(ManifestError, match="mimic-cxr"):
        read_split_ids(path)
    path.write_text(json.dumps({"train": ["CXR7_IM-0001", "CXR2384_IM-0942", "8"]}))
    assert set(read_split_ids(path)) == {"CXR7_IM-0001", "CXR2384_IM-0942", "8"}


KAGGLE = "uid,findings,impression,indication,comparison{}\n{},Clear.,Normal.,,{}\n"
PROJECTIONS = "uid,filename,projection\n{0},{0}_IM-0001-1001.dcm.png,Frontal\n"


@pytest.mark.parametrize(("uid", "column"), [("50414267", ""), ("7", ",subject_id"), ("7", ",Patient ID")])
def test_kaggles_layout_of_another_collection_is_refused(tmp_path: Path, uid: str, column: str) -> None:
    reports = tmp_path / "indiana_reports.csv"
    reports.write_text(KAGGLE.format(column, uid, ",x" if column else ""))
    (tmp_path / "indiana_projections.csv").write_text(PROJECTIONS.format(uid))
    with pytest.raises(ManifestError, match=r"line.*mimic-cxr"):
        read_iu_xray(reports)
    reports.write_text(KAGGLE.format("", 3999, ""))
    (tmp_path / "indiana_projections.csv").write_text(PROJECTIONS.format(3999))
    assert [study.id for study in read_iu_xray(reports).studies] == ["CXR3999"]


def test_open_is_layout_of_another_collection_is_refused(tmp_path: Path) -> None:
    for number in ("50414267", "3999"):
        (tmp_path / f"{number}.xml").write_text(f'<eCitation><uId id="CXR{number}"/></eCitation>')
    collection = read_iu_xray(tmp_path)
    assert [study.id for study in collection.studies] == ["CXR3999"]
    (refusal,) = collection.refusals
    assert "<uId>" in refusal.reason and "mimic-cxr" in refusal.reason


OWN = {"id": "a", "images": "1.png", "report": "Clear.", "split": "train"}


NAMES = ["subject_id", "PatientID", "patient", "Subject", "MRN", "PatientName", "patient_no", "pid", "Patient_Number"]


@pytest.mark.parametrize("field", [*NAMES, "medical record number", "anon_patient_id", "person", "subject"])
def test_a_table_that_names_its_patients_in_another_field_is_refused(tmp_path: Path, field: str) -> None:
    def study(**values: Any) -> Study:
        return study_of_row(Record("x", {**OWN, **values}), tmp_path, ("train",))

    with pytest.raises(RowError, match=rf"`{field}`.*`patient_id`"):
        study(**{field: "p1"})
    assert study(**{field: "p1"}, patient_id="p2").patient_id == "p2" and study(**{field: ""}).patient_id == "a"


@pytest.mark.parametrize(
    "field", ["patient_age", "PatientSex", "Patient Gender", "PatientBirthDate", "inpatient", "outpatient_clinic"]
)
def test_what_a_patient_is_names_none(tmp_path: Path, field: str) -> None:
    assert study_of_row(Record("x", {**OWN, field: "60"}), tmp_path, ("train",)).patient_id == "a"


@pytest.mark.parametrize(
    "study_id", ["patient00001_study1", "00000001_000", "mimic_p10000032_s50414267", "sub-012_ses-1"]
)
def test_an_id_that_names_a_patient_is_refused_without_patient_id(tmp_path: Path, study_id: str) -> None:
    with pytest.raises(RowError, match=r"`id`.*`patient_id`"):
        study_of_row(Record("x", {**OWN, "id": study_id}), tmp_path, ("train",))


@pytest.mark.parametrize(
    "path",
    ["1.png", "20240131_001.png", "216840111366964012283393834152009033102258826_00-059-087.png", "patient/1.png"],
)
def test_a_path_that_names_no_patient_is_kept(tmp_path: Path, path: str) -> None:
    assert study_of_row(Record("x", {**OWN, "images": path}), tmp_path, ("train",)).patient_id == "a"


@pytest.mark.parametrize(
    "path",
    [
        *(PATH, f"files/{PATH}", "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"),
        *("00000001_000.png", "images_001/images/00030805_012.png", "Patient-12/1.png", "sub-S03044/ses-1/x.png"),
        *("patient12_2.png", "subject 7\\1.png"),
    ],
)
def test_a_table_whose_paths_name_patients_is_refused_without_patient_id(tmp_path: Path, path: str) -> None:
    with pytest.raises(RowError, match=r"`images`.*`patient_id`"):
        study_of_row(Record("x", {**OWN, "images": path}), tmp_path, ("train",))
    assert study_of_row(Record("x", {**OWN, "images": path, "patient_id": "p"}), tmp_path, ("train",)).patient_id == "p"
