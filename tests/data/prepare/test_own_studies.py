"""`prepare manifest`: every row is kept or refused with its reason, priors hold, and an interrupted run goes on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.data.prepare import own_studies
from mrg_r1.data.prepare.own_studies import prepare_manifest
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.types import Study
from tests.shared_data import shared_data


def row(study_id: str, split: str = "train", **changes: str) -> dict[str, str]:
    return {
        "id": study_id,
        "patient_id": "",
        "images": "one.png",
        "report": f"Report {study_id}.",
        "prior": "",
        "split": split,
        "rendered": "",
        **changes,
    }


def table(folder: Path, *rows: dict[str, str]) -> Path:
    Image.effect_noise((40, 40), 60).save(folder / "one.png")
    path = folder / "studies.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def studies(output: Path) -> dict[str, Study]:
    return {study.id: study for study in read_manifest(output / "manifest.jsonl")}


def refused(output: Path) -> list[tuple[str, str, str]]:
    """Id, where and reason of every refusal."""
    rows = map(json.loads, (output / "refused.jsonl").read_text().splitlines())
    return [(row["id"], row["where"], row["reason"]) for row in rows]


def test_every_row_is_kept_or_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    bad = [
        row("b", images="gone.png", rendered="true"),
        row("c", images="text.png"),
        row("d", "training"),
        row(""),
        row("a", report="Again."),
    ]
    path = table(tmp_path, row("a"), *bad, row("e", "test"))
    prepared = prepare_manifest(path, None, tmp_path / "out")
    assert prepared.counts == {
        "train": {"read": 5, "kept": 1, "rendered": 0, "refused": 4},
        "": {"read": 1, "kept": 0, "rendered": 0, "refused": 1},
        "test": {"read": 1, "kept": 1, "rendered": 0, "refused": 0},
    }
    kept = studies(tmp_path / "out")
    assert {study.id: study.report for study in kept.values()} == {"a": "Report a.", "e": "Report e."}
    assert kept["a"].images[0].path == tmp_path / "one.png"
    found = {
        (study_id, where.removeprefix(f"{path}, ")): reason for study_id, where, reason in refused(tmp_path / "out")
    }
    assert set(found) == {("b", "line 3"), ("c", "line 4"), ("d", "line 5"), ("", "line 6"), ("a", "line 7")}
    assert "gone.png: no such file" in found["b", "line 3"] and "text.png: not an image" in found["c", "line 4"]
    assert (
        "'training'; the splits are train, val, test" in found["d", "line 5"]
        and "field `id`: empty" in found["", "line 6"]
    )
    assert f"field `id`: 'a' stands in {path}, line 2 already" in found["a", "line 7"]
    reports = read_reports_csv(tmp_path / "out" / "reports.csv")
    assert reports["a"] == "Report a." and reports["b"] == "Report b."


def test_images_are_relative_to_the_table_or_to_the_folder_given(tmp_path: Path) -> None:
    path = table(tmp_path, row("a"))
    (tmp_path / "images").mkdir()
    shutil.copy(tmp_path / "one.png", tmp_path / "images" / "one.png")
    prepare_manifest(path, tmp_path / "images", tmp_path / "out")
    assert studies(tmp_path / "out")["a"].images[0].path == tmp_path / "images" / "one.png"
    with pytest.raises(OSError, match="imgaes"):
        prepare_manifest(path, tmp_path / "imgaes", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_prior_is_found_wherever_it_stands_and_one_that_was_not_kept_takes_the_study_along(tmp_path: Path) -> None:
    rows = [
        row("late", prior="early", patient_id="p"),  # its prior stands behind it
        row("early", patient_id="p"),
        row("third", prior="late", patient_id="p"),
        row("orphan", prior="bad", patient_id="q"),
        row("child", prior="orphan", patient_id="q"),
        row("bad", images="gone.png", patient_id="q"),
        row("after", prior="bad", patient_id="q"),
        row("stray", prior="nobody"),
        row("other", prior="early", patient_id="r"),
        row("self", prior="self"),
        row("x", prior="y", patient_id="s"),
        row("y", prior="x", patient_id="s"),
    ]
    prepare_manifest(table(tmp_path, *rows), None, tmp_path / "out")
    assert {study.id: study.prior for study in studies(tmp_path / "out").values()} == {
        "late": "early",
        "early": None,
        "third": "late",
    }
    found = {study_id: reason for study_id, _, reason in refused(tmp_path / "out")}
    assert set(found) == {"orphan", "child", "bad", "after", "stray", "other", "self", "x", "y"}
    assert (
        all("field `prior`: 'bad' was refused" in found[name] for name in ("orphan", "after"))
        and "'orphan' was refused" in found["child"]
    )
    assert "no study 'nobody' in this file" in found["stray"] and "'early' is of patient 'p', not 'r'" in found["other"]
    assert (
        "its own prior" in found["self"]
        and "'y' leads in a circle" in found["x"]
        and "'x' leads in a circle" in found["y"]
    )


def test_other_split_names_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    path = table(tmp_path, row("a"), row("b", "external"))
    assert set(prepare_manifest(path, None, tmp_path / "out", splits=("train", "external")).counts) == {
        "train",
        "external",
    }


def test_columns_without_a_place_and_patients_in_two_splits_are_told(tmp_path: Path) -> None:
    rows = [
        row("a", patient_id="p", age="60"),
        row("b", "test", patient_id="p", age="61"),
        row("c", patient_id="q", age=""),
    ]
    prepared = prepare_manifest(table(tmp_path, *rows), None, tmp_path / "out")
    assert prepared.left_out == ["age"] and prepared.shared_patients == {"p": ["train", "test"]}


def test_a_manifest_comes_through_unchanged(tmp_path: Path) -> None:
    prepare_manifest(
        table(tmp_path, row("a", patient_id="p"), row("b", "val", patient_id="p", prior="a")), None, tmp_path / "out"
    )
    prepare_manifest(tmp_path / "out" / "manifest.jsonl", None, tmp_path / "again")
    assert studies(tmp_path / "again") == studies(tmp_path / "out")


def test_a_bad_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = table(tmp_path, row("a"))
    path.write_bytes(path.read_bytes() + b'b,,one.png,"open\n')
    with pytest.raises(ManifestError, match="line 3"):
        prepare_manifest(path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_one_good_study_the_first_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 2 .*'a' \(.*line 2\).*gone\.png"):
        prepare_manifest(table(tmp_path, row("a", images="gone.png"), row("b", "x")), None, tmp_path / "out")


def test_a_mended_table_can_be_prepared_into_the_same_folder(tmp_path: Path) -> None:
    prepare_manifest(table(tmp_path, row("a"), row("b", "valid")), None, tmp_path / "out")
    prepare_manifest(table(tmp_path, row("a"), row("b", "val")), None, tmp_path / "out")
    assert set(studies(tmp_path / "out")) == {"a", "b"} and refused(tmp_path / "out") == []


@pytest.mark.parametrize("killed_at", [0, 1, 30, 63, 90, 149])
def test_an_interrupted_run_goes_on_and_its_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    rows = []
    for n in range(150):
        changes = {"images": "gone.png"} if n % 11 == 5 else {}
        prior = (
            f"s{n + 7}"
            if n % 5 == 1 and n < 140
            else f"s{n - 2}"
            if n % 5 == 3
            else f"s{n - 64}"
            if n % 5 == 4 and n >= 64
            else ""
        )
        rows.append(row(f"s{n}", prior=prior, patient_id="p", **changes))
    rows.insert(1, row("s0", report="Second row."))
    rows.append(row("s0", report="Third row."))
    path = table(tmp_path, *rows)
    whole = prepare_manifest(path, None, tmp_path / "whole")
    settled: list[str] = []
    checked: list[str] = []
    real, keep, refuse = own_studies.image_problems, own_studies.Conversion.keep, own_studies.Conversion.refuse

    def kill(self: Any, study: Study, where: str = "") -> bool:
        if len(settled) == killed_at:
            raise KeyboardInterrupt
        settled.append(study.id)
        return keep(self, study, where)

    def kill_refusal(self: Any, study_id: str, *rest: Any) -> None:
        if len(settled) == killed_at:
            raise KeyboardInterrupt
        settled.append(study_id)
        refuse(self, study_id, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(own_studies.Conversion, "keep", kill)
        patch.setattr(own_studies.Conversion, "refuse", kill_refusal)
        prepare_manifest(path, None, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()

    def counted(items: Any, study_of: Any) -> Any:
        for item, problem in real(items, study_of):
            checked.append(item.study.id)
            yield item, problem

    monkeypatch.setattr(own_studies, "image_problems", counted)
    assert {**prepare_manifest(path, None, tmp_path / "out").counts} == whole.counts
    assert not set(checked) & set(settled), "what was settled was looked at again"
    assert studies(tmp_path / "out") == studies(tmp_path / "whole")
    assert sorted(refused(tmp_path / "out")) == sorted(refused(tmp_path / "whole"))


def test_studies_that_wait_for_a_prior_far_behind_them_are_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*(row(f"late{n}", prior="early", patient_id="p") for n in range(100)), row("early", patient_id="p")]
    path = table(tmp_path, *rows)
    keep = own_studies.Conversion.keep

    def kill(self: Any, study: Study, where: str = "") -> bool:
        if study.id != "early":
            raise KeyboardInterrupt
        return keep(self, study, where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(own_studies.Conversion, "keep", kill)
        prepare_manifest(path, None, tmp_path / "out")
    prepare_manifest(path, None, tmp_path / "out")
    assert len(studies(tmp_path / "out")) == 101 and studies(tmp_path / "out")["late0"].prior == "early"


def test_real_radiographs_as_people_have_them_go_through(tmp_path: Path) -> None:
    folder = shared_data() / "radiographs"
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".csv")
    assert len(names) > 60
    rows = [row(f"s{n}", images=name) for n, name in enumerate(names)] + [row("table", images="metadata.csv")]
    (tmp_path / "mine").mkdir()
    prepared = prepare_manifest(table(tmp_path / "mine", *rows), folder, tmp_path / "out")
    assert prepared.counts["train"] == {"read": len(names) + 1, "kept": len(names), "rendered": 0, "refused": 1}
    assert refused(tmp_path / "out")[0][0] == "table"
    check_images(list(studies(tmp_path / "out").values())[::16])


def test_a_row_with_labels_and_no_report_is_kept(tmp_path: Path) -> None:
    cells = dict.fromkeys(OBSERVATIONS, "")
    rows = [
        row("a", **cells | {"Edema": "1"}, report=""),
        row("b", **cells | {"Edema": "0"}),
        row("c", **cells, report=""),
        row("d", **cells | {"Edema": "1"}, report="nan"),
    ]
    prepared = prepare_manifest(table(tmp_path, *rows), None, tmp_path / "out")
    assert prepared.counts["train"] == {"read": 4, "kept": 2, "rendered": 0, "refused": 2}
    kept = studies(tmp_path / "out")
    assert kept["a"].report is None and kept["a"].said is not None and kept["a"].said[4] == 1
    assert kept["b"].report == "Report b."
    reasons = {study_id: reason for study_id, _, reason in refused(tmp_path / "out")}
    assert "field `report`: empty" in reasons["c"] and "a missing value written out" in reasons["d"]
    with open(tmp_path / "out" / "reports.csv", newline="", encoding="utf-8") as file:
        assert [line["id"] for line in csv.DictReader(file)] == ["b"]


def test_a_table_of_labels_needs_no_column_of_reports(tmp_path: Path) -> None:
    cells = dict.fromkeys(OBSERVATIONS, "") | {"Edema": "1"}
    lines = [{name: value for name, value in row(study, **cells).items() if name != "report"} for study in "ab"]
    prepare_manifest(table(tmp_path, *lines), None, tmp_path / "out")
    assert [study.report for study in studies(tmp_path / "out").values()] == [None, None]
    bare = [{name: value for name, value in row("a").items() if name != "report"}]
    with pytest.raises(ValueError, match="no column `report`"):
        prepare_manifest(table(tmp_path, *bare), None, tmp_path / "other")
    path = tmp_path / "studies.jsonl"
    rest = {"images": "one.png", "split": "train"}
    path.write_text(
        "".join(
            json.dumps({"id": name, **rest, **more}) + "\n"
            for name, more in (
                ("a", {"labels": [1, *[None] * 13]}),
                ("b", {"report": None, "labels": [1, *[None] * 13]}),
                ("c", {}),
                ("d", {"report": None}),
            )
        )
    )
    prepare_manifest(path, None, tmp_path / "lines")
    assert [study.id for study in studies(tmp_path / "lines").values() if study.report is None] == ["a", "b"]
    reasons = {study_id: reason for study_id, _, reason in refused(tmp_path / "lines")}
    assert "no field `report`" in reasons["c"] and "null, and so is `labels.said`" in reasons["d"]


def test_splits_whose_labels_are_never_empty_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = dict.fromkeys(OBSERVATIONS, "0") | {"No Finding": "1"}
    rows = [
        *(row(name, "test", **stated) for name in "ab"),
        row("c", **stated, report=""),
        row("d", **(stated | {"Edema": ""})),
        row("e", "val", **dict.fromkeys(OBSERVATIONS, "")),
    ]
    path = table(tmp_path, *rows)
    assert prepare_manifest(path, None, tmp_path / "out").never_silent == ["test"]
    assert main(["prepare", "manifest", str(path), "-o", str(tmp_path / "out")]) == 0
    assert "note: not one label of test is empty" in capsys.readouterr().out
    assert studies(tmp_path / "out")["c"].said == (*[0] * 13, 1)
    fully = [row("a", **stated), row("b", **(stated | {"No Finding": ""}))]
    assert prepare_manifest(table(tmp_path, *fully), None, tmp_path / "two").never_silent == ["train"]
