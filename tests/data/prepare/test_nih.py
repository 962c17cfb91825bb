"""`prepare nih` on generated tables of its layout: labels are mapped or named, splits hold by patient, and every bad
row is named while the good is kept.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.data.prepare.labelled import ImageChoices, Prepared
from mrg_r1.data.prepare.nih import prepare_nih
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.types import Study

# the published header ends in a comma
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def line(image: str, labels: str, patient: str | None = None, view: str = "PA", end: str = ",") -> str:
    number = str(int(image[:8])) if patient is None else patient
    return f"{image},{labels},{int(image[9:12])},{number},58,M,{view},2682,2749,0.143,0.143{end}"


ONE, TWO, THREE = "00000001_000.png", "00000002_000.png", "00000003_000.png"
LINES = [line(ONE, "Cardiomegaly|Effusion"), line(TWO, "No Finding"), line(THREE, "Mass|Hernia", view="AP")]


def write(tmp_path: Path, lines: Sequence[str] = LINES, train_val: str = f"{ONE}\n{TWO}\n", test: str = THREE) -> Path:
    """Table, lists and images in the folders of their archives."""
    root = tmp_path / "nih"
    root.mkdir(exist_ok=True)
    (root / "Data_Entry_2017.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    (root / "train_val_list.txt").write_text(train_val)
    (root / "test_list.txt").write_text(test)
    for number, name in enumerate(line.split(",")[0] for line in lines):
        folder = root / f"images_{number % 2 + 1:03}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        if len(name) == len(ONE) and not list(root.rglob(name)):
            Image.effect_noise((24, 24), 60).save(folder / name)
    return root


def prepared(tmp_path: Path, output: str = "out", seed: int = 0, images: Path | None = None) -> Prepared:
    return prepare_nih(tmp_path / "nih", tmp_path / output, images=images, seed=seed)


def kept(tmp_path: Path, output: str = "out") -> dict[str, Study]:
    return {study.id: study for study in read_manifest(tmp_path / output / "manifest.jsonl")}


def refused(tmp_path: Path, output: str = "out") -> list[tuple[str, str, str]]:
    """Id, reason and line."""
    rows = map(json.loads, (tmp_path / output / "refused.jsonl").read_text().splitlines())
    return [(row["id"], row["reason"], row["where"].rpartition("/")[2]) for row in rows]


def said(*names: str) -> tuple[int | None, ...]:
    return tuple(1 if name in names else None for name in OBSERVATIONS)


def test_every_image_is_a_study_whose_labels_are_said_and_the_others_not_denied(tmp_path: Path) -> None:
    root = write(tmp_path)
    result = prepared(tmp_path)
    studies = kept(tmp_path)
    assert {name: study.said for name, study in studies.items()} == {
        "00000001_000": said("Cardiomegaly", "Pleural Effusion"),
        "00000002_000": said("No Finding"),
        "00000003_000": said("Lung Lesion"),
    }
    one = studies["00000001_000"]
    assert one.report is None and one.patient_id == "00000001" and studies["00000003_000"].split == "test"
    assert [(image.path, image.view) for image in one.images] == [(root / "images_001/images" / ONE, "frontal")]
    assert result.notes == ["left out, as none of the 14 observations is of them (of 3 studies): Hernia (1)"]
    check_images(list(studies.values()))


def test_every_label_of_theirs_is_one_of_ours_or_named(tmp_path: Path) -> None:
    names = {
        "Infiltration": "Lung Opacity",
        "Nodule": "Lung Lesion",
        "Pleural_Thickening": "Pleural Other",
        "Edema": "Edema",
        "Consolidation": "Consolidation",
        "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax",
        "Atelectasis": "Atelectasis",
        "Emphysema": None,
        "Fibrosis": None,
        "Emphysema|Hernia": None,
    }
    images = [f"{number:08}_000.png" for number in range(1, len(names) + 1)]
    write(tmp_path, [line(image, name) for image, name in zip(images, names, strict=True)], "", "\n".join(images))
    result = prepared(tmp_path)
    studies = kept(tmp_path)
    for image, ours in zip(images, names.values(), strict=True):
        assert (image[:-4] in studies) == (ours is not None)
        if ours is not None:
            assert studies[image[:-4]].said == said(ours)
    assert [reason for _, reason, _ in refused(tmp_path)][-1] == (
        "column Finding Labels: none of the 14 observations is of Emphysema, Hernia, so there is nothing to "
        "compare with"
    )
    assert result.notes[0].endswith("Emphysema (2), Fibrosis (1), Hernia (1)")


def test_val_is_a_tenth_of_the_patients_and_a_patient_is_in_one_split(tmp_path: Path) -> None:
    images = [f"{patient:08}_{follow:03}.png" for patient in range(1, 301) for follow in range(2)]
    write(tmp_path, [line(image, "Edema") for image in images], "\n".join(images[:-20]), "\r\n".join(images[-20:]))
    prepared(tmp_path)
    splits: dict[str, set[str]] = {}
    for study in kept(tmp_path).values():
        splits.setdefault(study.patient_id, set()).add(study.split)
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 300
    count = [sum(found == {split} for found in splits.values()) for split in ("train", "val", "test")]
    assert count[2] == 10 and 15 <= count[1] <= 45
    prepared(tmp_path, "other", seed=1)
    assert kept(tmp_path, "other") != kept(tmp_path)


BAD = {
    "other name": ("column Finding Labels: 'Cardiomegalia'; the labels are Atelectasis", line(TWO, "Cardiomegalia")),
    "no label": ("column Finding Labels: ''", line(TWO, "")),
    "contradiction": ("column Finding Labels: 'No Finding' beside Mass", line(TWO, "No Finding|Mass")),
    "patient": ("column Patient ID: '7', and the image is", line(TWO, "Edema", patient="7")),
    "patient no number": ("column Patient ID: 'x'", line(TWO, "Edema", patient="x")),
    "view": ("column View Position: 'LL'", line(TWO, "Edema", view="LL")),
    "not listed": ("is in neither test_list.txt nor train_val_list.txt", line("00000009_000.png", "Edema")),
    "cut short": ("7 fields under 12 columns", f"{TWO},Edema,0,2,58,M,PA"),
    "no image": ("column Image Index: 'x.png'; expected a name such as", "x.png,Edema,0,2,58,M,PA,1,1,1,1,"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_its_study_and_is_named(tmp_path: Path, name: str) -> None:
    reason, bad = BAD[name]
    write(tmp_path, [LINES[0], bad, LINES[2]])
    prepared(tmp_path)
    assert list(kept(tmp_path)) == ["00000001_000", "00000003_000"]
    found = [(reason, where) for _, reason, where in refused(tmp_path) if where == "Data_Entry_2017.csv, line 3"]
    assert len(found) == 1 and reason in found[0][0]


def test_lists_that_disagree_are_named_and_no_patient_of_test_is_learned_from(tmp_path: Path) -> None:
    again = "00000003_001.png"
    lines = [*LINES, line(again, "Edema"), line(ONE, "Edema")]
    write(tmp_path, lines, f"{ONE}\n{TWO}\n{again}\n{THREE}\n00000044_000.png\n")
    prepared(tmp_path)
    assert set(kept(tmp_path)) == {"00000002_000", "00000003_000"}
    assert kept(tmp_path)["00000003_000"].split == "test"
    assert [(study, where) for study, _, where in refused(tmp_path)] == [
        ("00000001_000", "Data_Entry_2017.csv, line 6"),
        ("00000003_001", "Data_Entry_2017.csv, line 5"),
        ("", "train_val_list.txt, line 4"),
        ("", "train_val_list.txt, line 5"),
    ]
    reasons = [reason for _, reason, _ in refused(tmp_path)]
    assert "stands in" in reasons[0] and "patient 00000003 is in test_list.txt too" in reasons[1]
    assert "00000003_000.png stands in" in reasons[2] and "no row of this image in the table" in reasons[3]


def test_images_that_are_missing_or_there_twice_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "images_001/images" / ONE).unlink()
    (root / "more").mkdir()
    Image.effect_noise((24, 24), 60).save(root / "more" / TWO)
    prepared(tmp_path)
    assert list(kept(tmp_path)) == ["00000003_000"]
    (missing, twice) = refused(tmp_path)
    assert f"{ONE}: No such file" in missing[1] and f"{TWO} lies in" in twice[1]
    nothing = ImageChoices(check_images="none")
    prepare_nih(root, tmp_path / "none", images=root / "images_002", choices=nothing)
    assert len(kept(tmp_path, "none")) == 3


def test_the_files_may_be_packed_and_those_that_are_not_there_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, [line[:-1] for line in LINES])  # rows without the header's last comma
    table = root / "Data_Entry_2017.csv"
    (root / "Data_Entry_2017_v2020.csv").write_text(table.read_text())
    with pytest.raises(ValueError, match=r"both Data_Entry_2017\.csv and Data_Entry_2017_v2020\.csv"):
        prepared(tmp_path)
    (root / "Data_Entry_2017_v2020.csv").unlink()
    (root / "Data_Entry_2017.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    prepared(tmp_path)
    assert len(kept(tmp_path)) == 3
    (root / "test_list.txt").write_text("Image Index\n")
    with pytest.raises(ManifestError, match=r"test_list\.txt, line 1: 'Image Index' is no image's name"):
        prepared(tmp_path, "list")
    (root / "test_list.txt").unlink()
    with pytest.raises(ValueError, match=r"no test_list\.txt; fetch the published lists"):
        prepared(tmp_path, "list")
    assert not (tmp_path / "list").exists()


def test_the_command_names_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path)
    main(["prepare", "nih", str(root), "-o", str(tmp_path / "out"), "--seed", "3", "--check-images"])
    shown = capsys.readouterr().out
    assert "NIH ChestX-ray14, studies" in shown and "Hernia (1)" in shown
