"""Rows of a CSV or JSONL as studies: every field of the manifest, and for every fault the line, the field, the value
and the remedy.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.data.prepare.tabular import RowError, read_records, study_of_row
from mrg_r1.data.study import ManifestError
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.types import Study

SPLITS = ("train", "val", "test")
FULL = {
    "id": "a",
    "patient_id": "p",
    "images": "1.png;2.png",
    "view": "frontal;lateral",
    "report": 'Heart, "normal".\nXXXX é. ',
    "findings": "Heart.",
    "impression": "",
    "indication": "Cough",
    "comparison": "",
    "prior": "b",
    "split": "train",
    "rendered": "False",
    "labels": json.dumps([1, 0, -1, None, *[None] * 10]),
}
PLAIN = {"id": "a", "images": "1.png", "report": "Clear.", "split": "train"}


def table(path: Path, *rows: dict[str, Any], bom: bool = False) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def study(path: Path) -> Study:
    (record,) = read_records(path)
    return study_of_row(record, Path("/images"), SPLITS)


def fault(path: Path) -> str:
    with pytest.raises(RowError) as error:
        study(path)
    return str(error.value)


@pytest.mark.parametrize("bom", [False, True])
def test_every_field_of_a_csv_is_taken_verbatim(tmp_path: Path, bom: bool) -> None:
    found = study(table(tmp_path / "s.csv", FULL, bom=bom))
    assert (found.id, found.patient_id, found.split, found.prior, found.rendered) == ("a", "p", "train", "b", False)
    assert found.report == 'Heart, "normal".\nXXXX é. '
    assert (found.findings, found.impression, found.indication, found.comparison) == ("Heart.", None, "Cough", None)
    assert [(str(image.path), image.view) for image in found.images] == [
        ("/images/1.png", "frontal"),
        ("/images/2.png", "lateral"),
    ]
    assert found.said == (1, 0, -1, *[None] * 11) and found.drawn is None


def test_what_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    for path in (table(tmp_path / "s.csv", PLAIN), lines(tmp_path / "s.jsonl", PLAIN)):
        found = study(path)
        assert (
            found.patient_id == "a"
            and found.prior is found.findings is found.said is found.drawn is found.images[0].view is None
        )


def test_a_jsonl_line_may_be_a_line_of_a_manifest(tmp_path: Path) -> None:
    labels = {"said": [1, *[None] * 13], "drawn": [0] * 13 + [None]}
    images = [{"path": "a;b.png", "view": "lateral"}, {"path": "/abs/c.png"}]
    found = study(
        lines(
            tmp_path / "s.jsonl",
            {**PLAIN, "images": images, "labels": labels, "rendered": True, "prior": None, "findings": None},
        )
    )
    assert [(str(image.path), image.view) for image in found.images] == [
        ("/images/a;b.png", "lateral"),
        ("/abs/c.png", None),
    ]
    assert found.rendered and found.said == (1, *[None] * 13) and found.drawn == (*[0] * 13, None)


@pytest.mark.parametrize(
    ("cell", "view", "expected"),
    [
        ("1.png", "", [("1.png", None)]),
        ("1.png", "Frontal", [("1.png", "frontal")]),
        (" 1.png | 2.png ", "", [("1.png", None), ("2.png", None)]),
        ("frontal:a/1.png;Lateral: 2.png;3.png", "", [("a/1.png", "frontal"), ("2.png", "lateral"), ("3.png", None)]),
        ("1.png;2.png", "|lateral", [("1.png", None), ("2.png", "lateral")]),
        ("frontal:1.png;2.png", "frontal;lateral", [("1.png", "frontal"), ("2.png", "lateral")]),
        ("pa:1.png", "", [("pa:1.png", None)]),
    ],
)
def test_images_of_a_cell(tmp_path: Path, cell: str, view: str, expected: list[tuple[str, str | None]]) -> None:
    for path in (
        table(tmp_path / "s.csv", {**PLAIN, "images": cell, "view": view}),
        lines(tmp_path / "s.jsonl", {**PLAIN, "images": cell, "view": view}),
    ):
        assert [(str(image.path.relative_to("/images")), image.view) for image in study(path).images] == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_that_were_written_as_floats_are_read_alike(tmp_path: Path, kind: str) -> None:
    values = [1.0, 0.0, -1.0, None, *[None] * 10]
    labels: Any = {"said": values, "drawn": values}
    if kind == "csv":
        found = study(table(tmp_path / "s.csv", {**PLAIN, "labels": json.dumps(labels)}))
    else:
        found = study(lines(tmp_path / "s.jsonl", {**PLAIN, "labels": labels}))
    assert found.said == found.drawn == (1, 0, -1, *[None] * 11)
    assert all(value is None or type(value) is int for value in found.said or ())
    for wrong in (0.5, True, float("nan")):
        assert "field `labels.said`" in fault(lines(tmp_path / "s.jsonl", {**PLAIN, "labels": [wrong, *[None] * 13]}))


def test_images_of_a_jsonl_list_may_have_any_name(tmp_path: Path) -> None:
    found = study(
        lines(tmp_path / "s.jsonl", {**PLAIN, "images": ["a;b|c.png", "lateral:2.png"], "view": ["frontal", None]})
    )
    assert [(image.path.name, image.view) for image in found.images] == [("a;b|c.png", "frontal"), ("2.png", "lateral")]


def test_a_column_for_each_observation(tmp_path: Path) -> None:
    values = ["1", "0", "-1", "", "1.0", "0.0", "-1.0", *[""] * 7]
    found = study(table(tmp_path / "s.csv", {**PLAIN, **dict(zip(OBSERVATIONS, values, strict=True))}))
    assert found.said == (1, 0, -1, None, 1, 0, -1, *[None] * 7)
    assert study(table(tmp_path / "s.csv", {**PLAIN, **dict.fromkeys(OBSERVATIONS, "")})).said is None
    wrong = {**PLAIN, **dict.fromkeys(OBSERVATIONS, ""), "Edema": "2"}
    assert "field `Edema`: '2'" in fault(table(tmp_path / "s.csv", wrong))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": ""}, "field `id`"),
        ({"id": " a"}, "field `id`: ' a'"),
        ({"report": " "}, "field `report`"),
        (
            {"split": "valid"},
            "field `split`: 'valid'",
        ),
        ({"split": ""}, "field `split`"),
        ({"images": ""}, "field `images`"),
        ({"images": "1.png;;2.png"}, "field `images`"),
        ({"images": "frontal:"}, 'field `images[0].path`: ""'),
        ({"view": "oblique"}, "field `view`: 'oblique'"),
        ({"view": "frontal;lateral"}, "field `view`: 2 "),
        (
            {"images": "lateral:1.png", "view": "frontal"},
            "field `view`: 'frontal'",
        ),
        ({"labels": "[1, 0]"}, "field `labels.said`: 2 "),
        ({"labels": "positive"}, 'field `labels`: "positive"'),
        (
            {"labels": json.dumps([2, *[0] * 13])},
            "label value 2",
        ),
        ({"labels": json.dumps({"said": None})}, 'field `labels`: {"said": null}'),
        ({"rendered": "perhaps"}, "field `rendered`: 'perhaps'"),
    ],
)
def test_a_bad_cell_names_field_value_and_remedy(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    assert expected in fault(table(tmp_path / "s.csv", {**PLAIN, **changes}))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**PLAIN, "id": 5}, "field `id`: 5"),
        ({**PLAIN, "report": None}, "field `report`: null"),
        ({**PLAIN, "images": []}, "field `images`: []"),
        ({**PLAIN, "images": None}, "field `images`: null"),
        ({**PLAIN, "images": [{"file": "1.png"}]}, "field `images[0]`"),
        ({**PLAIN, "images": [3]}, "field `images[0]`: 3"),
        ({**PLAIN, "view": 1}, "field `view`: 1"),
        ({**PLAIN, "rendered": 1}, "field `rendered`: 1"),
        ({**PLAIN, "labels": {"said": [True] * 14, "drawn": None}}, "field `labels.said`: true"),
        ({**PLAIN, "findings": 3}, "field `findings`: 3"),
        (
            {name: PLAIN[name] for name in ("id", "split")},
            "`images`, `report`",
        ),
        ([1], "[1]"),
    ],
)
def test_a_bad_value_of_jsonl_names_field_value_and_remedy(tmp_path: Path, row: Any, expected: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n{json.dumps(row)}\n")
    _, record = read_records(path)
    assert record.where == f"{path}, line 2"
    with pytest.raises(RowError) as error:
        study_of_row(record, tmp_path, SPLITS)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": "b", ', "JSON"),
        (b'{"id": "b", "id": "c"}', "field `id`"),
        (b'{"id": "b\xe9"}', "byte 0xe9 at column 10"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": ' + b"1" * 400 + b"}", "a whole number of 400 digits"),
    ],
)
def test_a_broken_line_costs_one_study(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b"\n\n" + line + b"\n" + json.dumps({**PLAIN, "id": "c"}).encode())
    first, broken, last = read_records(path)
    assert first.fault is last.fault is None and broken.where == f"{path}, line 3" and last.where.endswith("line 4")
    assert expected in (broken.fault or "")


def test_a_row_of_a_csv_that_is_short_costs_one_study(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        'id,images,report,split\na,1.png,"two\nlines",train\n\nb,1.png,a, comma,train\nc,1.png,Clear.,val\n'
    )
    first, bad, last = read_records(path)
    assert (first.where, bad.where, last.where) == (f"{path}, line 2", f"{path}, line 5", f"{path}, line 6")
    assert first.fault is last.fault is None and "5 fields" in str(bad.fault)
    assert first.values["report"] == "two\nlines" and last.values["id"] == "c"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,report,split\na,Clear.,train\n", "line 1: no column `images`"),
        (b"id;images;report;split\n", "';'"),
        (b"id,images,report,split,ID\n", "line 1: columns ['id']"),
        (b"id,images,report,split,Edema\n", "['Enlarged Cardiomediastinum'"),
        (
            ("id,images,report,split,labels," + ",".join(OBSERVATIONS)).encode(),
            "`labels`",
        ),
        (b"", "header"),
        (b"id,images,report,split\na,1.png,Herz gr\xf6\xdfer,train\n", "line 2: byte 0xf6 at column 16"),
        (b'id,images,report,split\na,1.png,"open,train\nb,1.png,x,train\n', "line 2"),
        (b"PK\3\4...", "CSV"),
        (b'[{"id": "a"}]', "JSONL"),
        *(
            (json.dumps({"train": [{"id": "a", "report": "x"}], "val": []}, indent=indent).encode(), "mimic-cxr")
            for indent in (None, 1)
        ),
        (b'\xef\xbb\xbf\n{\n"train": ["CXR1_IM-0001"]}', "iu-xray"),
        (json.dumps(PLAIN, indent=2).encode(), "one study a line"),
    ],
)
def test_a_bad_file_is_refused_as_a_whole(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as error:
        list(read_records(path))
    assert expected in str(error.value) and str(path) in str(error.value)


def test_columns_are_found_in_any_case_and_others_are_named(tmp_path: Path) -> None:
    rows = {
        "ID": "a",
        " Images": "1.png",
        "Report": "Clear.",
        "SPLIT": "val",
        "Age": "60",
        **dict.fromkeys(OBSERVATIONS, ""),
    }
    (record,) = read_records(table(tmp_path / "s.csv", rows))
    assert study_of_row(record, tmp_path, SPLITS).split == "val" and record.left_out() == ["age"]
    (record,) = read_records(lines(tmp_path / "s.jsonl", {**PLAIN, "age": 60, "view": "lateral"}))
    assert record.left_out() == ["age"]
