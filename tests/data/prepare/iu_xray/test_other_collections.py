"""R2Gen's layout of another collection is not taken for IU X-Ray, whose ids are patients too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.cli import main
from mrg_r1.data.prepare.iu_xray.r2gen import read_r2gen, read_split_ids
from mrg_r1.data.study import ManifestError

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
