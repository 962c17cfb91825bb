"""`prepare mimic-cxr` on a tree with something wrong: the study is refused by file, line and column, or all is."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from mrg_r1.labels.reports import read_reports_csv
from tests.data.prepare.mimic_cxr.mimic_tree import (
    ONE,
    TWO,
    TreeStudy,
    change,
    kept,
    many,
    prepared,
    read_table,
    refused,
    table,
    write_table,
    write_tree,
)


@pytest.mark.parametrize(
    ("name", "column", "value", "expected"),
    [
        ("split", "split", "validation", "column split: 'validation'"),
        ("split", "subject_id", "p1", "column subject_id: 'p1'"),
        ("split", "dicom_id", "../../etc", "column dicom_id: '../../etc'"),
        ("split", "dicom_id", TWO.dicom(0), f"{TWO.dicom(0)}'"),
        ("split", "dicom_id", None, "mimic-cxr-2.0.0-split.csv.gz"),
        (
            "split",
            "subject_id",
            "10000999",
            "column subject_id: 10000999",
        ),
        ("metadata", "dicom_id", None, "mimic-cxr-2.0.0-metadata.csv.gz"),
        ("metadata", "dicom_id", TWO.dicom(0), f"{TWO.dicom(0)}'"),
        ("metadata", "study_id", "5", "column study_id: 50414267"),
        ("metadata", "StudyDate", "20180230", "column StudyDate: '20180230'"),
        ("metadata", "StudyDate", "", "column StudyDate: ''"),
        ("metadata", "StudyTime", "246000", "column StudyTime: '246000'"),
        ("metadata", "StudyTime", "nan", "column StudyTime: 'nan'"),
    ],
)
def test_a_wrong_row_refuses_its_study_naming_file_line_and_column(
    tmp_path: Path, name: str, column: str, value: str | None, expected: str
) -> None:
    good = TreeStudy(10000099, 99)
    write_tree(tmp_path / "mimic", [ONE, TWO, good])
    line = change(tmp_path, name, ONE, column, value)
    prepared(tmp_path)
    assert "s99" in kept(tmp_path) and ONE.name not in kept(tmp_path)
    reason, where = refused(tmp_path)[ONE.name]
    assert expected in reason
    assert re.fullmatch(r"mimic-cxr-2\.0\.0-(split|metadata)\.csv\.gz, line \d+", where)
    if value not in (None, TWO.dicom(0)) and column != "study_id":
        assert where == f"mimic-cxr-2.0.0-{name}.csv.gz, line {line}"
    if value == TWO.dicom(0):  # nobody knows whose image it is
        assert TWO.name in refused(tmp_path)


def test_a_study_of_two_patients_or_splits_is_refused(tmp_path: Path) -> None:
    three = TreeStudy(10000033, 60)
    write_tree(tmp_path / "mimic", [ONE, TWO, three])
    for name in ("split", "metadata"):
        change(tmp_path, name, ONE, "subject_id", "10000999", index=1)
    change(tmp_path, "split", TWO, "split", "test", index=1)
    prepared(tmp_path)
    reasons = refused(tmp_path)
    assert list(kept(tmp_path)) == ["s60"]
    assert "column subject_id" in reasons[ONE.name][0]
    assert "column split" in reasons[TWO.name][0]


def test_rows_of_unknown_studies_and_rows_cut_short_are_listed(tmp_path: Path) -> None:
    unknown = TreeStudy(10000099, 99)
    write_tree(tmp_path / "mimic", [ONE, unknown])
    for index in range(2):
        change(tmp_path, "split", unknown, "", None, index)
    path = table(tmp_path / "mimic", "split")
    write_table(path, [*read_table(path), ["only", "three", "fields"], [ONE.dicom(7), "x1", "10000032", "train"]])
    result = prepared(tmp_path)
    assert result.counts[""] == {"read": 3, "kept": 0, "rendered": 0, "refused": 3}
    rows = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {(row["id"], row["where"]) for row in rows} == {
        ("s99", "mimic-cxr-2.0.0-metadata.csv.gz, line 4"),
        ("", "mimic-cxr-2.0.0-split.csv.gz, line 4"),
        ("", "mimic-cxr-2.0.0-split.csv.gz, line 5"),
    }
    assert list(kept(tmp_path)) == [ONE.name]


@pytest.mark.parametrize("name", ["split", "metadata", "chexpert"])
def test_a_table_that_cannot_be_read_stops_before_anything_is_written(tmp_path: Path, name: str) -> None:
    root = write_tree(tmp_path / "mimic", many(200))
    path = table(root, name)
    whole, rows = path.read_bytes(), read_table(path)
    latin = gzip.compress(gzip.decompress(whole).replace(rows[5][0].encode(), b"\xff\xfe", 1))
    damaged = whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:]
    empty, short = gzip.compress(b""), gzip.compress(b"dicom_id,split\n")
    for content in (whole[: len(whole) // 2], b"not gzip at all", damaged, latin, empty, short):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            prepared(tmp_path, labels="chexpert")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(root))}: .*mimic-cxr-2.0.0-{name}\.csv\.gz"):
        prepared(tmp_path, labels="chexpert")
    assert not (tmp_path / "out").exists()
    path.with_suffix("").write_bytes(gzip.decompress(whole))  # unpacked by hand
    assert prepared(tmp_path, labels="chexpert").counts["train"]["kept"] > 100
    path.with_name(f"mimic-cxr-2.1.0-{name}.csv").touch()
    with pytest.raises(ValueError, match=f"2.1.0-{name}"):
        prepared(tmp_path, labels="chexpert")


@pytest.mark.parametrize(("name", "column"), [("split", "split"), ("metadata", "ViewPosition"), ("chexpert", "Edema")])
def test_a_column_that_stands_twice_is_named(tmp_path: Path, name: str, column: str) -> None:
    path = table(write_tree(tmp_path / "mimic", [ONE]), name)
    header, *rows = read_table(path)
    write_table(path, [[*header, column], *([*row, ""] for row in rows)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 1: .*'{column.lower()}'"):
        prepared(tmp_path, labels="chexpert")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mimic", [ONE])
    rows = [row[:4] + row[5:] for row in read_table(table(root, "metadata"))]
    write_table(table(root, "metadata"), rows)
    with pytest.raises(ValueError, match="ViewPosition"):
        prepared(tmp_path)


def test_folders_that_are_not_there_are_refused_at_once(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mimic", [ONE])
    with pytest.raises(OSError, match="nowhere.*--reports"):
        prepared(tmp_path, reports=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=re.escape(str(table(root, "split")))):
        prepared(tmp_path, reports=table(root, "split"))
    shutil.move(root / "files", tmp_path / "texts" / "files")
    with pytest.raises(OSError, match="images.*--check-images none"):
        prepared(tmp_path, reports=tmp_path / "texts")
    assert prepared(tmp_path, reports=tmp_path / "texts", check_images="none").counts["train"]["kept"] == 1


def test_images_are_looked_at_as_closely_as_asked(tmp_path: Path) -> None:
    studies = [TreeStudy(10000032, number, date=f"2180010{number}") for number in range(1, 6)]
    root = write_tree(tmp_path / "mimic", studies)
    missing, empty, cut, lateral, _ = studies
    missing.image(root, 0).unlink()
    empty.image(root, 0).write_bytes(b"")
    cut.image(root, 0).write_bytes(cut.image(root, 0).read_bytes()[:-60])
    lateral.image(root, 1).unlink()  # is not taken
    expected = {
        "none": {"s1": None, "s2": "s1", "s3": "s2", "s4": "s3", "s5": "s4"},
        "size": {"s3": None, "s4": "s3", "s5": "s4"},
        "open": {"s4": None, "s5": "s4"},
    }
    for check, priors in expected.items():
        prepared(tmp_path, output=check, check_images=check)
        assert {name: study.prior for name, study in kept(tmp_path, check).items()} == priors
    reasons = {name: reason for name, (reason, _) in refused(tmp_path, "open").items()}
    assert all(str(study.image(root, 0)) in reasons[study.name] for study in (missing, empty, cut))
    assert "s1" in read_reports_csv(tmp_path / "open" / "reports.csv")  # can be labelled though its image is missing
