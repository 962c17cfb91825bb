"""`prepare mimic-cxr` on a generated tree: official split, views, priors by time, and every bad input named while the
good is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.cli import main
from mrg_r1.data.prepare import conversion
from mrg_r1.data.study import check_images
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.reports import read_reports_csv
from tests.data.prepare.mimic_cxr.mimic_tree import (
    CHEXPERT_COLUMNS,
    ONE,
    TWO,
    TreeStudy,
    kept,
    many,
    prepared,
    read_table,
    refused,
    table,
    write_table,
    write_tree,
)


def test_a_study_is_read_from_the_tree_as_it_was_downloaded(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mimic", [ONE, TWO])
    result = prepared(tmp_path)
    assert result.counts == {
        "train": {"read": 1, "kept": 1, "rendered": 0, "refused": 0},
        "val": {"read": 1, "kept": 1, "rendered": 0, "refused": 0},
    }
    studies = kept(tmp_path)
    assert list(studies) == ["s50414267", "s57375967"]
    one = studies["s50414267"]
    assert one.patient_id == "p10000032" and (one.split, studies["s57375967"].split) == ("train", "val")
    assert one.report == one.findings == "The lungs are clear. The heart of s50414267 is normal."
    assert one.impression == "Nothing acute in s50414267."
    assert one.indication == "___ year old with cough." and one.comparison == "None."
    assert one.prior is None and one.said is None and one.drawn is None and not one.rendered
    assert [(image.path, image.view) for image in one.images] == [(ONE.image(root, 0), "frontal")]
    check_images(list(studies.values()))
    assert read_reports_csv(tmp_path / "out" / "reports_val.csv") == {
        "s57375967": "The lungs are clear. The heart of s57375967 is normal."
    }


def test_the_section_that_is_asked_for_is_learned_and_the_others_keep_their_fields(tmp_path: Path) -> None:
    write_tree(tmp_path / "mimic", [ONE])
    findings, impression = "The lungs are clear. The heart of s50414267 is normal.", "Nothing acute in s50414267."
    for text, expected in {"findings": findings, "impression": impression, "both": f"{findings} {impression}"}.items():
        prepared(tmp_path, output=text, report=text)
        study = kept(tmp_path, text)[ONE.name]
        assert (study.report, study.findings, study.impression) == (expected, findings, impression)


def test_reports_without_the_section_are_refused_and_say_what_would_take_them(tmp_path: Path) -> None:
    texts = {
        1: "FINDINGS: Clear.",
        2: "IMPRESSION: Normal.",
        3: "FINDINGS AND IMPRESSION: Clear and normal.",
        4: "CHEST\n\nThe lungs are clear and the heart is normal.",
        5: "COMPARISON: None.",
        6: "FINDINGS: Clear.\nIMPRESSION: Normal.",
    }
    write_tree(
        tmp_path / "mimic", [TreeStudy(10000000 + number, number, report=text) for number, text in texts.items()]
    )

    def outcome(output: str, **choices: Any) -> tuple[dict[str, str], dict[str, str]]:
        prepared(tmp_path, output=output, **choices)
        return (
            {name: study.report for name, study in kept(tmp_path, output).items()},
            {name: reason for name, (reason, _) in refused(tmp_path, output).items()},
        )

    told, why = outcome("findings")
    assert told == {"s1": "Clear.", "s3": "Clear and normal.", "s6": "Clear."}
    assert "--report impression" in why["s2"] and "--no-headings last-paragraph" in why["s4"] and "--" not in why["s5"]
    told, why = outcome("impression", report="impression")
    assert told == {"s2": "Normal.", "s6": "Normal."}
    assert "--report findings" in why["s1"] and "--report both" in why["s3"]
    told, why = outcome("both", report="both")
    assert told == {"s3": "Clear and normal.", "s6": "Clear. Normal."}
    assert "--report findings" in why["s1"] and "--report" in why["s2"]
    told, why = outcome("last", no_headings="last-paragraph")
    assert set(told) == {"s1", "s3", "s4", "s6"} and told["s4"] == "The lungs are clear and the heart is normal."
    assert kept(tmp_path, "last")["s4"].findings is None and set(why) == {"s2", "s5"}


@pytest.mark.parametrize(
    ("views", "choices", "expected"),
    [
        (("LATERAL", "AP", "PA"), {}, ["PA", "AP"]),
        (("LATERAL", "AP", "PA"), {"max_images": 1}, ["PA"]),
        (("LL", "", "AP"), {}, ["AP"]),
        (("AP", "PA", "LL"), {"views": "all"}, ["PA", "LL"]),
        (("AP", "PA", "LL", "LAO"), {"views": "all", "max_images": 9}, ["PA", "LL", "AP", "LAO"]),
        (("LATERAL", "LATERAL"), {"views": "all", "max_images": 1}, ["LATERAL"]),
        (("SWIMMERS",), {"views": "all"}, ["SWIMMERS"]),
        (("LATERAL",), {}, None),
        (("", "PA LLD"), {}, None),
    ],
)
def test_views_are_chosen_and_ordered(
    tmp_path: Path, views: tuple[str, ...], choices: dict[str, Any], expected: list[str] | None
) -> None:
    study = TreeStudy(10000032, 50414267, views=views)
    root = write_tree(tmp_path / "mimic", [study, TWO])
    prepared(tmp_path, **choices)
    if expected is None:
        assert "--views all" in refused(tmp_path)[study.name][0]
        return
    view_of = {study.image(root, index): view for index, view in enumerate(views)}
    images = kept(tmp_path)[study.name].images
    assert [view_of[image.path] for image in images] == expected
    named = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}
    assert [image.view for image in images] == [named.get(view) for view in expected]


def test_a_prior_is_the_patients_last_kept_study_before(tmp_path: Path) -> None:
    patient = 10000032
    studies = [
        TreeStudy(patient, 59, date="21800101", time="93000.5"),  # 09:30, before 21:30 though the digits are fewer
        TreeStudy(patient, 51, date="21800101", time="213000.0"),
        TreeStudy(patient, 52, date="21800301", report="no sections"),
        TreeStudy(patient, 53, date="21800401", time="0.0"),
        TreeStudy(patient, 54, date="21800401", time="0.0"),  # at once with 53: neither is the other's prior
        TreeStudy(patient, 50, date="21810101"),
        TreeStudy(10000033, 60, date="21820101"),
    ]
    write_tree(tmp_path / "mimic", studies[::-1])
    prepared(tmp_path)
    assert {name: study.prior for name, study in kept(tmp_path).items()} == {
        "s59": None,
        "s51": "s59",
        "s53": "s51",
        "s54": "s51",
        "s50": "s54",
        "s60": None,
    }
    assert list(refused(tmp_path)) == ["s52"]


def test_chexpert_labels_are_mapped_by_name(tmp_path: Path) -> None:
    cells = {name: ("1.0", "0.0", "-1.0", "")[place % 4] for place, name in enumerate(CHEXPERT_COLUMNS)}
    cells["No Finding"] = ""
    values = {"1.0": 1, "0.0": 0, "-1.0": -1, "": None}
    unlabelled = TreeStudy(10000033, 60, labels=None)
    wrong = TreeStudy(10000034, 70, labels={"Edema": "2.0"})
    twice = TreeStudy(10000035, 80)
    write_tree(tmp_path / "mimic", [TreeStudy(10000032, 50, labels=cells), unlabelled, wrong, twice])
    rows = read_table(table(tmp_path / "mimic", "chexpert"))
    write_table(table(tmp_path / "mimic", "chexpert"), [*rows, rows[3], ["10000036", "none", *[""] * 14]])
    prepared(tmp_path, labels="chexpert")
    studies = kept(tmp_path)
    assert studies["s50"].said == tuple(values[cells[name]] for name in OBSERVATIONS)
    assert studies["s60"].said is None
    reasons = refused(tmp_path)
    assert set(reasons) == {"s70", "s80", ""}
    assert "column Edema: '2.0'" in reasons["s70"][0] and reasons["s70"][1] == "mimic-cxr-2.0.0-chexpert.csv.gz, line 3"
    assert "line 4" in reasons["s80"][0] and reasons["s80"][1].endswith("line 5")
    assert "column study_id: 'none'" in reasons[""][0]
    prepared(tmp_path, output="without")
    assert (
        all(study.said is None for study in kept(tmp_path, "without").values()) and len(kept(tmp_path, "without")) == 4
    )


def test_chexbert_s_labels_come_from_their_own_table_and_the_others_are_not_read(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mimic", [ONE, TWO])
    with pytest.raises(
        ValueError, match=r"no mimic-cxr-2\.0\.0-chexbert\.csv\.gz; MIMIC-CXR-JPG has none, put your own"
    ):
        prepared(tmp_path, labels="chexbert")
    path = root / "mimic-cxr-2.0.0-chexbert.csv"
    header = ",".join(["Report Impression", *CHEXPERT_COLUMNS, "study_id"])
    cells = {"Edema": "-1.0", "Fracture": "0", "Pneumonia": "1"}
    row = ",".join(cells.get(name, "") for name in CHEXPERT_COLUMNS)
    path.write_text(f'{header}\n"Edema, perhaps.",{row},{ONE.name}\n,{row},{TWO.study}\n')
    prepared(tmp_path, labels="chexbert")
    expected = tuple({"Edema": -1, "Fracture": 0, "Pneumonia": 1}.get(name) for name in OBSERVATIONS)
    assert {name: study.said for name, study in kept(tmp_path).items()} == {ONE.name: expected, TWO.name: expected}
    with pytest.raises(ValueError, match="other"):
        prepared(tmp_path, labels="none")
    for numbers in (("0", "1"), ("0", "1", "2", "3")):  # 0 for what is not mentioned; classes of CheXbert's model
        rows = [
            ",".join(["", *(numbers * 14)[n : n + 14], str(study)]) for n, study in enumerate((ONE.study, TWO.study))
        ]
        path.write_text("\n".join([header, *rows]))
        with pytest.raises(ValueError, match=r"chexbert\.csv: not one label of its rows is empty"):
            prepared(tmp_path, labels="chexbert", output="numbers")
    assert not (tmp_path / "numbers").exists()


@pytest.mark.parametrize("name", ["reports", "archive", "mimic"])
def test_reports_are_read_from_a_folder_of_their_own_or_the_archive(tmp_path: Path, name: str) -> None:
    root = write_tree(tmp_path / "mimic", [ONE, TWO])
    where = tmp_path / name
    if name == "archive":
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(ONE.text(root), ONE.text(root).relative_to(root))
    elif name == "reports":
        ONE.text(where).parent.mkdir(parents=True)
        shutil.move(ONE.text(root), ONE.text(where))
    if name != "mimic":
        TWO.text(root).unlink()
    else:
        TWO.text(root).write_text(" \n")
    prepared(tmp_path, reports=where)
    assert list(kept(tmp_path)) == [ONE.name]
    reason, place = refused(tmp_path)[TWO.name]
    assert str(where) in reason
    assert place == "mimic-cxr-2.0.0-split.csv.gz, line 4"


def test_a_damaged_member_of_the_archive_is_one_refused_study(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mimic", [ONE, TWO])
    path = tmp_path / "reports.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for study in (ONE, TWO):
            archive.write(study.text(root), study.text(root).relative_to(root))
    path.write_bytes(path.read_bytes().replace(b"s57375967 is normal", b"s57375968 is normal"))
    prepared(tmp_path, reports=path)
    assert list(kept(tmp_path)) == [ONE.name] and str(path) in refused(tmp_path)[TWO.name][0]


def test_bytes_of_windows_are_read_and_told_and_what_is_no_text_is_refused(tmp_path: Path) -> None:
    studies = [
        TreeStudy(10000032, 1, report="FINDINGS: 30° rotated.".encode()),
        TreeStudy(10000032, 2, report=b"FINDINGS: 30\xb0 rotated, the patient\x92s."),
        TreeStudy(10000032, 3, report=b"FINDINGS: \x81"),
    ]
    write_tree(tmp_path / "mimic", studies)
    assert prepared(tmp_path).not_utf8 == ["files/p10/p10000032/s2.txt"]
    assert {name: study.report for name, study in kept(tmp_path).items()} == {
        "s1": "30° rotated.",
        "s2": "30° rotated, the patient’s.",
    }
    assert "byte 0x81 at 10" in refused(tmp_path)["s3"][0] and "s3.txt" in refused(tmp_path)["s3"][0]


KILLED = """
import os, signal, sys
from pathlib import Path
from mrg_r1.data.prepare import conversion
from mrg_r1.data.prepare.mimic_cxr.convert import Choices, prepare_mimic_cxr
settle = conversion.Conversion._append
def append(self, line, settled=[0]):
    settle(self, line)
    settled[0] += 1
    if settled[0] == 201:
        os.kill(os.getpid(), signal.SIGKILL)
conversion.Conversion._append = append
prepare_mimic_cxr(Path(sys.argv[1]) / "mimic", Path(sys.argv[1]) / "out")
"""


def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    write_tree(tmp_path / "mimic", many(600))
    project = str(Path(__file__).resolve().parents[4])
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert (
        subprocess.run(command, cwd=project, env={**os.environ, "PYTHONPATH": project}, timeout=120).returncode
        == -signal.SIGKILL
    )
    resumed, whole = prepared(tmp_path), prepared(tmp_path, output="whole")
    assert resumed.found == 200 and whole.found == 0
    assert resumed.counts == whole.counts and sum(count["read"] for count in whole.counts.values()) == 600
    for name in ("manifest.jsonl", "refused.jsonl", "reports.csv", "reports_train.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="`views`.*'frontal'.*'all'"):
        prepared(tmp_path, views="all")


def test_a_table_that_changed_after_an_interruption_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "mimic", [ONE, TWO])

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion.Conversion, "close", kill)
        prepared(tmp_path)
    journal, metadata = tmp_path / "out" / conversion.JOURNAL_FILE, table(tmp_path / "mimic", "metadata")
    os.utime(metadata, (journal.stat().st_mtime + 5,) * 2)
    with pytest.raises(ValueError, match=rf"{metadata.name}: .*conversion\.part"):
        prepared(tmp_path)
    journal.unlink()
    assert prepared(tmp_path).found == 0 and kept(tmp_path).keys() == {ONE.name, TWO.name}


def test_a_folder_of_many_studies_agrees_with_what_was_generated(tmp_path: Path) -> None:
    studies = {study.name: study for study in many(600, seed=3)}
    write_tree(tmp_path / "mimic", studies.values())
    prepared(tmp_path, check_images="none")
    found = kept(tmp_path)
    assert len(found) > 500 and found.keys() | refused(tmp_path).keys() == studies.keys()
    assert all("FINDINGS:" not in str(studies[name].report) for name in refused(tmp_path))
    for name, study in found.items():
        mine = studies[name]
        findings = str(mine.report).split("FINDINGS:")[1].split("IMPRESSION:")[0]
        assert study.report == " ".join(findings.split())
        assert (study.patient_id, study.split) == (f"p{mine.subject}", {"validate": "val"}.get(mine.split, mine.split))
        moment = (mine.date, float(mine.time))
        before = [
            ((other.date, float(other.time)), other.name)
            for other in studies.values()
            if other.subject == mine.subject and other.name in found
        ]
        before = [item for item in before if item[0] < moment]
        assert study.prior == (max(before)[1] if before else None)


def test_the_command_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "mimic", [ONE, TWO, TreeStudy(10000033, 60, report=b"IMPRESSION: Fever, 39 \xb0")])
    arguments = ["prepare", "mimic-cxr", str(tmp_path / "mimic"), "-o", str(tmp_path / "out")]
    chosen = ["--report", "impression", "--max-images", "1", "--labels", "chexpert", "--views", "all"]
    assert main([*arguments, "--check-images", *chosen]) == 0
    told = capsys.readouterr().out
    assert re.search(r"total\D+3\D+3\D+0", told) and "refused.jsonl" not in told
    assert "Windows-1252" in told and "s60.txt" in told
    settings = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert (
        settings["check_images"] == "open" and settings["report"] == "impression" and settings["labels"] == "chexpert"
    )
    assert main([*arguments[:-1], str(tmp_path / "other"), "--reports", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main([*arguments, "--max-images", "3"]) == 2
    assert "`max_images`" in capsys.readouterr().err
