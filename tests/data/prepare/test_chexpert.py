"""`prepare chexpert` on generated tables of its layout: views are joined, labels read as they are meant, and every bad
row named while the good is kept.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.data.prepare import labelled
from mrg_r1.data.prepare.chexpert import prepare_chexpert
from mrg_r1.data.prepare.labelled import ImageChoices, Prepared
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.types import Study

# the published tables' own order
COLUMNS = (
    "No Finding",
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
)
Row = dict[str, str]


def row(name: str, split: str = "train", prefix: str = "CheXpert-v1.0-small/", **labels: str) -> Row:
    """A row of `patient00001/study1/view1_frontal.jpg`; labels by name, _ for a blank; empty where not given."""
    view = "Lateral" if "lateral" in name else "Frontal"
    path = f"{prefix}{split}/{name}.jpg"
    cells = {column: labels.get(column.replace(" ", "_"), "") for column in COLUMNS}
    return {"Path": path, "Sex": "Female", "Age": "68", "Frontal/Lateral": view, "AP/PA": "AP", **cells}


ONE = row("patient00001/study1/view1_frontal", No_Finding="1.0", Pneumothorax="0.0")
TWO = [
    row("patient00002/study2/view1_frontal", Edema="1.0", Pneumonia="-1.0", Fracture="0.0"),
    row("patient00002/study2/view2_lateral", Edema="1.0", Pneumonia="-1.0", Fracture="0.0"),
]
VALID = row(
    "patient64541/study1/view1_frontal", "valid", **dict.fromkeys((name.replace(" ", "_") for name in COLUMNS), "0.0")
)


def write(tmp_path: Path, train: Sequence[Row] = (), valid: Sequence[Row] = (), *, images: bool = True) -> Path:
    """Tables in a folder CheXpert-v1.0-small, and the images that they name beside them."""
    root = tmp_path / "CheXpert-v1.0-small"
    root.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("valid", valid)):
        if rows:
            with open(root / f"{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        for path in (row["Path"] for row in rows if images):
            image = root / path.removeprefix("CheXpert-v1.0-small/")
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((24, 24), 60).save(image)
    return root


def prepared(tmp_path: Path, *, output: str = "out", images: Path | None = None, **choices: Any) -> Prepared:
    root = tmp_path / "CheXpert-v1.0-small"
    return prepare_chexpert(root, tmp_path / output, images=images, choices=ImageChoices(**choices))


def kept(tmp_path: Path, output: str = "out") -> dict[str, Study]:
    return {study.id: study for study in read_manifest(tmp_path / output / "manifest.jsonl")}


def refused(tmp_path: Path, output: str = "out") -> list[tuple[str, str, str]]:
    """Id, reason and line."""
    rows = map(json.loads, (tmp_path / output / "refused.jsonl").read_text().splitlines())
    return [(row["id"], row["reason"], row["where"].rpartition("/")[2]) for row in rows]


def values(**labels: int) -> tuple[int | None, ...]:
    return tuple(labels.get(name.replace(" ", "_")) for name in OBSERVATIONS)


def test_rows_become_studies_with_labels_in_our_order_and_without_a_report(tmp_path: Path) -> None:
    root = write(tmp_path, [ONE, *TWO], [VALID])
    result = prepared(tmp_path)
    assert {split: count["kept"] for split, count in result.counts.items()} == {"val": 1, "train": 2}
    studies = kept(tmp_path)
    one, two = studies["patient00001_study1"], studies["patient00002_study2"]
    assert one.report is None and one.patient_id == "patient00001" and one.split == "train"
    assert one.said == values(No_Finding=1, Pneumothorax=0)
    assert two.said == values(Edema=1, Pneumonia=-1, Fracture=0)
    assert [image.path for image in two.images] == [root / "train/patient00002/study2/view1_frontal.jpg"]
    assert studies["patient64541_study1"].said == (0,) * 14 and studies["patient64541_study1"].split == "val"
    assert any("valid.csv has no empty label" in note for note in result.notes)
    check_images(list(studies.values()))


def test_the_views_of_a_study_are_one_study(tmp_path: Path) -> None:
    lateral = row("patient00003/study1/view1_lateral", Edema="1.0")
    write(tmp_path, [TWO[1], ONE, TWO[0], lateral])  # the rows of a study need not stand together
    prepared(tmp_path, views="all", output="all")
    studies = kept(tmp_path, "all")
    assert [image.view for image in studies["patient00002_study2"].images] == ["frontal", "lateral"]
    assert [image.view for image in studies["patient00003_study1"].images] == ["lateral"]
    prepared(tmp_path)
    assert [(name, reason) for name, reason, _ in refused(tmp_path)] == [
        ("patient00003_study1", "no frontal image among its views; --views all takes the others")
    ]
    prepared(tmp_path, views="all", max_images=1, output="single")
    assert [len(study.images) for study in kept(tmp_path, "single").values()] == [1, 1, 1]


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "", "./data/CheXpert-v1.0/"])
def test_the_folder_in_front_of_a_path_may_be_there_or_not(tmp_path: Path, prefix: str) -> None:
    root = write(tmp_path, [ONE])
    write(tmp_path, [row("patient00001/study1/view1_frontal", prefix=prefix, Edema="1.0")], images=False)
    for folder in (root, tmp_path):
        if folder == root or prefix == "CheXpert-v1.0-small/":
            prepared(tmp_path, images=folder, output=f"out_{folder.name}")
            (study,) = kept(tmp_path, f"out_{folder.name}").values()
            assert study.images[0].path == root / "train/patient00001/study1/view1_frontal.jpg"


def test_tables_may_be_packed_and_one_may_be_absent(tmp_path: Path) -> None:
    root = write(tmp_path, [ONE, *TWO])
    (root / "train.csv.gz").write_bytes(gzip.compress((root / "train.csv").read_bytes()))
    with pytest.raises(ValueError, match=r"both train\.csv and train\.csv\.gz"):
        prepared(tmp_path)
    (root / "train.csv").unlink()
    result = prepared(tmp_path)
    assert result.counts["train"]["kept"] == 2 and result.notes == [
        "no valid.csv: the manifest has no study of split val"
    ]
    (root / "train.csv.gz").write_bytes((root / "train.csv.gz").read_bytes()[:-20])
    with pytest.raises(ManifestError, match=r"train\.csv\.gz: damaged"):
        prepared(tmp_path, output="cut")
    (root / "train.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"neither train\.csv nor valid\.csv"):
        prepared(tmp_path)


BAD = {
    "u": ("column Edema: 'u'; a label is 1.0", {**ONE, "Edema": "u"}),
    "half": ("column Edema: '0.5'", {**ONE, "Edema": "0.5"}),
    "nan": ("column Edema: 'nan'", {**ONE, "Edema": "nan"}),
    "shifted": ("column Edema: 'Frontal'", {**ONE, "Edema": "Frontal"}),
    "no finding": ("column No Finding: label value -1", {**ONE, "No Finding": "-1.0"}),
    "nothing": ("no label: each of the 14 is empty", row("patient00001/study1/view1_frontal")),
    "view": (
        "column Frontal/Lateral: 'Lateral', and the file is view1_frontal.jpg",
        ONE | {"Frontal/Lateral": "Lateral"},
    ),
    "split": ("column Path: an image of valid/ in train.csv", ONE | {"Path": ONE["Path"].replace("/train", "/valid")}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_its_study_and_is_named(tmp_path: Path, name: str) -> None:
    reason, bad = BAD[name]
    write(tmp_path, [*TWO, bad])
    prepared(tmp_path)
    assert list(kept(tmp_path)) == ["patient00002_study2"]
    ((study, found, where),) = refused(tmp_path)
    assert study == "patient00001_study1" and reason in found and where == "train.csv, line 4"


def test_rows_that_contradict_each_other_or_cannot_be_placed_are_named(tmp_path: Path) -> None:
    twice = row("patient00004/study1/view1_frontal", Edema="1.0")
    paths = ("../train/patient00009/study1/view1_frontal.jpg", "patient9.jpg", "")
    odd = [ONE | {"Path": path} for path in paths]
    write(tmp_path, [ONE, TWO[0], TWO[1] | {"Edema": "0.0"}, twice, twice])
    write(tmp_path, [ONE, TWO[0], TWO[1] | {"Edema": "0.0"}, twice, twice, *odd], images=False)
    prepared(tmp_path)
    assert list(kept(tmp_path)) == ["patient00001_study1"]
    assert [(study, where) for study, _, where in refused(tmp_path)] == [
        ("patient00002_study2", "train.csv, line 4"),
        ("patient00004_study1", "train.csv, line 6"),
        *[("", f"train.csv, line {line}") for line in (7, 8, 9)],
    ]
    reasons = [reason for _, reason, _ in refused(tmp_path)]
    assert "column Edema: 0.0, and 1.0 in" in reasons[0] and "stands twice" in reasons[1]
    assert "'patient9.jpg'; expected train/patient00001" in reasons[3]


def test_a_patient_of_valid_is_not_learned_from(tmp_path: Path) -> None:
    same = row("patient64541/study1/view1_frontal", Edema="1.0")
    write(tmp_path, [ONE, same, row("patient64541/study2/view1_frontal", Edema="1.0")], [VALID])
    prepared(tmp_path)
    assert {study.id: study.split for study in kept(tmp_path).values()} == {
        "patient64541_study1": "val",
        "patient00001_study1": "train",
    }
    found = refused(tmp_path)
    assert [where for _, _, where in found] == ["train.csv, line 3", "train.csv, line 4"]
    assert all("patient patient64541 is in valid.csv too" in reason for _, reason, _ in found)


def test_images_that_are_not_there_or_empty_are_refused_where_they_are_looked_at(tmp_path: Path) -> None:
    root = write(tmp_path, [ONE, *TWO])
    (root / "train/patient00001/study1/view1_frontal.jpg").unlink()
    (root / "train/patient00002/study2/view1_frontal.jpg").write_text("no image")
    prepared(tmp_path)
    ((study, reason, where),) = refused(tmp_path)
    assert study == "patient00001_study1" and "No such file" in reason and where == "train.csv, line 2"
    with pytest.raises(ValueError, match="all 2 studies were refused"):
        prepared(tmp_path, check_images="open", output="open")
    assert "not an image" in refused(tmp_path, "open")[1][1]
    prepared(tmp_path, check_images="none", output="none")
    assert len(kept(tmp_path, "none")) == 2


def test_a_table_that_lacks_a_column_or_has_others_is_told_apart(tmp_path: Path) -> None:
    numbered = [{"": str(number), **cells} for number, cells in enumerate([ONE, *TWO])]
    write(tmp_path, numbered)
    assert prepared(tmp_path).counts["train"]["kept"] == 2
    write(tmp_path, [{name: cell for name, cell in ONE.items() if name != "Edema"}])
    with pytest.raises(ManifestError, match=r"train\.csv, line 1: no column `edema`"):
        prepared(tmp_path, output="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("numbers", ["01", "0123"])
def test_a_train_table_of_another_convention_is_refused(tmp_path: Path, numbers: str) -> None:
    rows = []
    for n in range(8):
        cells = {column: numbers[(place + n) % len(numbers)] + ".0" for place, column in enumerate(COLUMNS)}
        rows.append(row(f"patient{n:05}/study1/view1_frontal") | cells)
    write(tmp_path, rows, [VALID])
    with pytest.raises(ValueError, match=r"train\.csv: not one label of its rows is empty"):
        prepared(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"patient{n:05}/study1/view1_frontal", Edema="1.0" if n % 7 else "x") for n in range(40)]
    write(tmp_path, rows, [VALID])
    prepared(tmp_path, output="whole")
    keep = labelled.Conversion.keep

    def kill(self: Any, study: Study, where: str = "") -> bool:
        if study.id == "patient00020_study1":
            raise KeyboardInterrupt
        return keep(self, study, where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labelled.Conversion, "keep", kill)
        prepared(tmp_path)
    result = prepared(tmp_path)
    assert result.found == 21 and kept(tmp_path) == kept(tmp_path, "whole")
    assert refused(tmp_path) == refused(tmp_path, "whole")


def test_the_command_shows_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, [ONE, *TWO], [VALID])
    main(["prepare", "chexpert", str(root), "-o", str(tmp_path / "out"), "--views", "all"])
    shown = capsys.readouterr().out
    assert "CheXpert, studies" in shown and "note: valid.csv has no empty label" in shown


# Studies of a generated train.csv, 1.2 views each and 3 a patient as in the published one, and the peak of memory in
# KiB before and after.
MEASURED = """
import sys
from pathlib import Path
from mrg_r1.data.prepare.chexpert import prepare_chexpert
from mrg_r1.data.prepare.labelled import ImageChoices

folder, columns = Path(sys.argv[1]), sys.argv[3].split(",")
with open(folder / "train.csv", "w") as file:
    print("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *columns, sep=",", file=file)
    for n in range(int(sys.argv[2]) * 5 // 6):
        values = {n % 7: "1.0", n % 11: "0.0", n % 13: "-1.0"}
        labels = [values.get(k, "") for k in range(1, 14)]
        study = f"CheXpert-v1.0-small/train/patient{n // 3 + 1:05}/study{n % 3 + 1}"
        print(f"{study}/view1_frontal.jpg", "Female", 68, "Frontal", "AP", "1.0", *labels, sep=",", file=file)
        if n % 5 == 0:
            print(f"{study}/view2_lateral.jpg", "Female", 68, "Lateral", "", "1.0", *labels, sep=",", file=file)

def peak():  # not ru_maxrss, which begins with that of whoever started this process
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
counts = prepare_chexpert(folder, folder / "out", choices=ImageChoices(check_images=sys.argv[4])).counts
print(counts["train"]["kept"], before, peak())
"""


def test_memory_of_a_large_table_stays_within_what_the_documentation_says(tmp_path: Path) -> None:
    """docs/labelled-data.md: 224,316 rows within 1 GiB; here fewer of them, the growth scaled to as many."""
    rows, all_rows = 20_000, 224_316
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(rows), ",".join(COLUMNS), "none"],
        env=os.environ | {"PYTHONPATH": str(Path(labelled.__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    kept, before, peak = (int(word) for word in done.stdout.split())
    assert kept == rows * 5 // 6
    assert (before + (peak - before) / rows * all_rows) / 2**20 < 1, f"{before:,} KiB, then {peak:,}"
