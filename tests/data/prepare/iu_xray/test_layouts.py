"""`prepare iu-xray` over Open-i's and Kaggle's layouts: recognised by content, images found, sections chosen, nothing
lost.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrg_r1.data.prepare.conversion import JOURNAL_FILE
from mrg_r1.data.prepare.iu_xray import convert as iu_xray
from mrg_r1.data.prepare.iu_xray.convert import read_iu_xray
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import read_labels_csv, write_labels_csv
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.types import Study
from tests.data.prepare.iu_xray.prepared import prepare_iu_xray
from tests.data.prepare.iu_xray.test_open_i import archive, report
from tests.shared_data import shared_data

HEART = "Heart normal."
NORMAL = [0] * 13 + [1]
PROJECTIONS = (
    "uid,filename,projection\n"
    "7,7_IM-0001-1001.dcm.png,Frontal\n"
    "7,7_IM-0001-2001.dcm.png,Lateral\n"
    "8,8_IM-0001-1001.dcm.png,Frontal\n"
)


def xmls(folder: Path) -> Path:
    """Studies 7 (two images), 8 (one image, no findings) and 9 (no image)."""
    members = [("7.xml", report(7, findings=HEART)), ("8.xml", report(8, findings="", images=("IM-0001-1001",)))]
    return archive(folder / "reports.tgz", *members, ("9.xml", report(9, findings=HEART, images=())))


def kaggle(folder: Path) -> Path:
    (folder / "kaggle").mkdir()
    rows = f"7,n,n,x,Cough,,{HEART},Clear.\n8,n,n,x,Cough,,,Clear.\n"
    (folder / "kaggle" / "indiana_reports.csv").write_text(
        "uid,MeSH,Problems,image,indication,comparison,findings,impression\n" + rows
    )
    (folder / "kaggle" / "indiana_projections.csv").write_text(PROJECTIONS)
    return folder / "kaggle" / "indiana_reports.csv"


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60).save(folder / name, format="PNG")
    return folder


def labels_csv(path: Path, *ids: str, classes: list[int] = NORMAL) -> Path:
    write_labels_csv(path, {study_id: classes for study_id in ids})
    return path


def studies(output: Path) -> dict[str, Study]:
    return {study.id: study for study in read_manifest(output / "manifest.jsonl")}


def refused(output: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in map(json.loads, (output / "refused.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("names", ["CXR7_IM-0001-{}001.png", "a/b/7_IM-0001-{}001.dcm.png", "7/CXR7_IM-0001-{}001.PNG"])
def test_images_are_found_under_every_name_that_they_have(tmp_path: Path, names: str) -> None:
    images = pictures(tmp_path / "images", names.format(1), names.format(2), "CXR8_IM-0001-1001.png")
    projections = tmp_path / "views.csv"
    projections.write_text(PROJECTIONS)
    prepare_iu_xray(xmls(tmp_path), images, tmp_path / "xml", projections=projections, report="both")
    prepare_iu_xray(kaggle(tmp_path), images, tmp_path / "csv", report="both")
    for output in (tmp_path / "xml", tmp_path / "csv"):
        kept = studies(output)
        assert set(kept) == {"CXR7", "CXR8"}
        expected = [(images / names.format(1), "frontal"), (images / names.format(2), "lateral")]
        assert [(image.path, image.view) for image in kept["CXR7"].images] == expected
        assert kept["CXR7"].report == f"{HEART}\nClear." and kept["CXR8"].report == "Clear."
        assert (kept["CXR7"].findings, kept["CXR7"].impression, kept["CXR7"].indication) == (HEART, "Clear.", "Cough")
        assert kept["CXR7"].patient_id == "CXR7" and kept["CXR7"].comparison is None and not kept["CXR7"].rendered
    assert refused(tmp_path / "xml") == {"CXR9": refused(tmp_path / "xml")["CXR9"]} and refused(tmp_path / "csv") == {}


def test_without_projections_the_views_of_xmls_are_not_guessed(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png")
    prepare_iu_xray(xmls(tmp_path), images, tmp_path / "out")
    assert [image.view for image in studies(tmp_path / "out")["CXR7"].images] == [None, None]


@pytest.mark.parametrize(
    ("section", "texts"),
    [("findings", {"CXR7": HEART}), ("impression", {"CXR7": "Clear.", "CXR8": "Clear."})],
    ids=["findings", "impression"],
)
def test_the_section_asked_for_is_learned_and_a_study_without_it_refused(
    tmp_path: Path, section: Any, texts: dict[str, str]
) -> None:
    images = pictures(tmp_path / "images", "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png", "CXR8_IM-0001-1001.png")
    counts = prepare_iu_xray(xmls(tmp_path), images, tmp_path / "out", report=section)
    assert {study.id: study.report for study in studies(tmp_path / "out").values()} == texts
    assert sum(count["read"] for count in counts.values()) == 3 and sum(
        count["kept"] for count in counts.values()
    ) == len(texts)
    reasons = refused(tmp_path / "out")
    assert set(reasons) == {"CXR7", "CXR8", "CXR9"} - set(texts)
    assert "image" in reasons["CXR9"]
    if section == "findings":
        assert "--report" in reasons["CXR8"]


def test_missing_ambiguous_and_damaged_images_are_refused_by_name(tmp_path: Path) -> None:
    members = [(f"{n}.xml", report(n, findings=HEART)) for n in (1, 2, 3, 4, 5)]
    source = archive(tmp_path / "reports.tgz", *members)
    both = [f"CXR{n}_IM-0001-{series}001.png" for n in (1, 4, 5) for series in (1, 2)]
    images = pictures(tmp_path / "images", *both, "CXR2_IM-0001-1001.png", "other/4_IM-0001-2001.dcm.png")
    (images / "CXR5_IM-0001-2001.png").write_bytes(b"<html>not found</html>")
    prepare_iu_xray(source, images, tmp_path / "out")
    assert set(studies(tmp_path / "out")) == {"CXR1"}
    reasons = refused(tmp_path / "out")
    named = {
        "CXR2": "'CXR2_IM-0001-2001'",
        "CXR3": "'CXR3_IM-0001-1001'",
        "CXR4": "4_IM-0001-2001.dcm.png",
        "CXR5": "CXR5_IM-0001-2001.png",
    }
    assert [study_id for study_id, image in named.items() if image not in reasons[study_id]] == []
    assert "'CXR4_IM-0001-2001'" in reasons["CXR4"]


def test_missing_images_of_any_layout_are_rendered_from_labels_of_either_naming(tmp_path: Path) -> None:
    labels = labels_csv(tmp_path / "labels.csv", "CXR7_IM-0001", "CXR9")
    counts = prepare_iu_xray(xmls(tmp_path), None, tmp_path / "xml", render_missing=[labels], side=32)
    assert sum(count["rendered"] for count in counts.values()) == 2
    kept = studies(tmp_path / "xml")
    assert set(kept) == {"CXR7", "CXR9"} and all(
        study.rendered and study.said == (*[None] * 13, 1) for study in kept.values()
    )
    check_images(list(kept.values()))
    prepare_iu_xray(kaggle(tmp_path), None, tmp_path / "csv", render_missing=[labels], side=32)
    again = studies(tmp_path / "csv")["CXR7"]
    assert (
        again.drawn == kept["CXR7"].drawn
        and again.images[0].path.read_bytes() == kept["CXR7"].images[0].path.read_bytes()
    )


def test_labels_of_the_findings_are_not_taken_for_those_of_another_section(tmp_path: Path) -> None:
    source = xmls(tmp_path)
    r2gens = labels_csv(tmp_path / "labels.csv", "CXR7_IM-0001")
    with pytest.raises(ValueError, match=r"labels\.csv, id 'CXR7_IM-0001'.*findings"):
        prepare_iu_xray(source, None, tmp_path / "out", report="impression", render_missing=[r2gens])
    own = labels_csv(tmp_path / "own.csv", "CXR7", "CXR8")
    counts = prepare_iu_xray(source, None, tmp_path / "out", report="impression", render_missing=[own], side=32)
    assert sum(count["rendered"] for count in counts.values()) == 2


def test_two_label_ids_of_one_study_must_agree(tmp_path: Path) -> None:
    paths = [
        labels_csv(tmp_path / "a.csv", "CXR7_IM-0001"),
        labels_csv(tmp_path / "b.csv", "CXR7_IM-0002", classes=[1] * 13 + [0]),
    ]
    with pytest.raises(ValueError, match=r"b\.csv, id 'CXR7_IM-0002'.*'CXR7'"):
        prepare_iu_xray(xmls(tmp_path), None, tmp_path / "out", render_missing=paths)


def test_a_published_split_can_be_given_to_xmls(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png")
    split = tmp_path / "ids.json"
    split.write_text('{"val": ["CXR7_IM-0001"], "test": ["CXR9", "CXR5_IM-0001"]}')
    counts = prepare_iu_xray(xmls(tmp_path), images, tmp_path / "out", split=str(split))
    assert set(counts) == {"val", "test", ""}
    assert counts["val"] == {"read": 1, "kept": 1, "rendered": 0, "refused": 0}
    assert counts["test"] == {"read": 2, "kept": 0, "rendered": 0, "refused": 2} and counts[""]["refused"] == 1
    assert studies(tmp_path / "out")["CXR7"].split == "val"
    assert set(refused(tmp_path / "out")) == {"CXR8", "CXR9", "CXR5_IM-0001"}


def test_r2gen_studies_can_be_split_anew(tmp_path: Path) -> None:
    entries = [{"id": f"CXR{n}_IM-1", "report": HEART, "image_path": [f"{n}.png"]} for n in range(20)]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": entries}))
    images = pictures(tmp_path / "images", *(f"{n}.png" for n in range(20)))
    counts = prepare_iu_xray(tmp_path / "annotation.json", images, tmp_path / "out", split="seeded")
    assert {split: count["kept"] for split, count in counts.items()} == {"train": 16, "val": 2, "test": 2}


def test_r2gen_has_one_section_no_views_and_no_way_out_of_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"train": [{"id": "CXR1_IM-1", "report": HEART, "image_path": ["0.png"]}]}))
    with pytest.raises(ValueError, match="findings"):
        prepare_iu_xray(path, None, tmp_path / "out", report="impression")
    with pytest.raises(ManifestError, match="annotation.json|projections.csv"):
        read_iu_xray(path, tmp_path / "projections.csv")
    for image in ("/etc/passwd", "../secret.png"):
        path.write_text(json.dumps({"train": [{"id": "CXR1_IM-1", "report": HEART, "image_path": [image]}]}))
        with pytest.raises(ManifestError, match=rf"field `image_path`: '{image}'"):
            read_iu_xray(path)
    assert not (tmp_path / "out").exists()


def test_the_layout_is_recognised_by_content(tmp_path: Path) -> None:
    archive_path, reports = xmls(tmp_path), kaggle(tmp_path)
    odd = shutil.copy(archive_path, tmp_path / "download.json")
    assert read_iu_xray(Path(odd)).layout == "open-i"
    assert read_iu_xray(reports).layout == read_iu_xray(reports.parent).layout == "kaggle"
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "files" / "deep" / "7.xml").write_bytes(report(7))
    assert read_iu_xray(tmp_path / "files").layout == "open-i"
    shutil.copy(archive_path, tmp_path / "files" / "NLMCXR_reports.tgz")
    with pytest.raises(ManifestError, match=r"NLMCXR_reports.tgz, \*\.xml"):
        read_iu_xray(tmp_path / "files")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("one.xml", report(7), "XML"),
        ("all.zip", b"PK\3\4rest", "zip"),
        ("indiana_projections.csv", PROJECTIONS.encode(), "indiana_reports.csv"),
        (
            "indiana_reports.csv",
            b"uid,findings,impression,indication,comparison\n",
            "indiana_projections.csv",
        ),
        ("other.csv", b"\x89PNG\r\n\x1a\n", "byte 0x89 at column 1"),
        ("empty.csv", b"", "header"),
    ],
)
def test_what_is_no_layout_is_refused_with_a_remedy(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError) as error:
        read_iu_xray(tmp_path / name)
    assert expected in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="empty.*annotation.json"):
        read_iu_xray(tmp_path / "empty")


def test_an_interrupted_run_goes_on_and_its_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = range(1, 201)
    members = [(f"{n}.xml", report(n, findings=f"Report {n}.", images=("IM-0001-1001",))) for n in numbers]
    source = archive(
        tmp_path / "reports.tgz", *members, ("again/1.xml", report(1, findings="Other.")), ("300.xml", b"<broken")
    )
    images = pictures(tmp_path / "images", *(f"CXR{n}_IM-0001-1001.png" for n in numbers))
    prepare_iu_xray(source, images, tmp_path / "whole")

    checked: list[str] = []
    settle = iu_xray.Conversion.keep

    def kill(self: Any, study: Study, where: str = "", **settings: Any) -> bool:
        if len(checked) == 90:
            raise KeyboardInterrupt
        checked.append(study.id)
        return settle(self, study, where, **settings)

    monkeypatch.setattr(iu_xray.Conversion, "keep", kill)
    with pytest.raises(KeyboardInterrupt):
        prepare_iu_xray(source, images, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()

    monkeypatch.setattr(iu_xray.Conversion, "keep", settle)
    later: list[str] = []
    problems = iu_xray.image_problems

    def counted(items: Any, study_of: Any) -> Any:
        later.extend(plan.entry.id for plan in items)
        return problems(items, study_of)

    monkeypatch.setattr(iu_xray, "image_problems", counted)
    prepare_iu_xray(source, images, tmp_path / "out")
    assert set(later) == {f"CXR{n}" for n in numbers} - set(checked) and len(later) == 110
    for name in ("manifest.jsonl", "refused.jsonl", "reports.csv", "reports_train.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert studies(tmp_path / "out")["CXR1"].report == "Report 1." and set(refused(tmp_path / "out")) == {
        "CXR1",
        "CXR300",
    }


def test_a_source_that_changed_after_an_interruption_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, reports = xmls(tmp_path), kaggle(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "7.xml").write_bytes(report(7, findings=HEART))
    images = pictures(tmp_path / "images", "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png")
    projections = reports.with_name("indiana_projections.csv")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    for number, (source, changed) in enumerate(
        [(packed, packed), (tmp_path / "files", tmp_path / "files" / "7.xml"), (reports, projections)]
    ):
        output = tmp_path / f"out{number}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(iu_xray.Conversion, "close", kill)
            prepare_iu_xray(source, images, output)
        journal = output / JOURNAL_FILE
        os.utime(changed, (journal.stat().st_mtime + 5,) * 2)
        with pytest.raises(ValueError, match=rf"{changed.name}: .*conversion\.part"):
            prepare_iu_xray(source, images, output)
        journal.unlink()
        prepare_iu_xray(source, images, output)


def test_studies_refused_for_want_of_images_are_looked_at_again_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, images = archive(tmp_path / "reports.tgz", ("7.xml", report(7))), tmp_path / "images"
    pictures(images, "CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png")
    (tmp_path / "wrong").mkdir()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(iu_xray.Conversion, "close", kill)
        prepare_iu_xray(source, tmp_path / "wrong", tmp_path / "out")
    prepare_iu_xray(source, images, tmp_path / "out")
    assert set(studies(tmp_path / "out")) == {"CXR7"} and refused(tmp_path / "out") == {}


def test_a_finished_folder_is_done_anew_when_images_have_come(tmp_path: Path) -> None:
    source = archive(tmp_path / "reports.tgz", ("7.xml", report(7)), ("8.xml", report(8)))
    names = [f"CXR{n}_IM-0001-{series}001.png" for n in (7, 8) for series in (1, 2)]
    images = pictures(tmp_path / "images", *names[:2])
    prepare_iu_xray(source, images, tmp_path / "out")
    assert set(studies(tmp_path / "out")) == {"CXR7"}
    pictures(images, *names[2:])
    prepare_iu_xray(source, images, tmp_path / "out")
    assert set(studies(tmp_path / "out")) == {"CXR7", "CXR8"} and refused(tmp_path / "out") == {}


def test_the_whole_real_collection_is_kept_or_refused_with_a_reason(tmp_path: Path) -> None:
    """Every report and every image id; the radiographs are one small picture under 7,470 names."""
    folder = shared_data() / "iu_xray"
    source = folder / "NLMCXR_reports.tgz"
    collection = read_iu_xray(source)
    one = pictures(tmp_path, "one.png") / "one.png"
    (tmp_path / "images").mkdir()
    for study in collection.studies:
        for image in study.images:
            os.link(one, tmp_path / "images" / f"{image.name}.png")
    counts = prepare_iu_xray(source, tmp_path / "images", tmp_path / "out")
    kept, reasons = studies(tmp_path / "out"), refused(tmp_path / "out")
    assert {study.id for study in collection.studies} == set(kept) | set(reasons) and not set(kept) & set(reasons)
    assert sum(count["read"] for count in counts.values()) == 3955 == len(kept) + len(reasons)
    assert {split: count["read"] for split, count in counts.items()} == {"train": 3164, "val": 396, "test": 395}
    # 3,425 have findings, 3,851 an image
    assert len(kept) == 3337 and sum("--report" in reason for reason in reasons.values()) == 530
    assert len(reasons) == 530 + 88
    for study in collection.studies:
        if study.id in kept:
            assert [image.path.stem for image in kept[study.id].images] == [image.name for image in study.images]
            assert kept[study.id].report == study.findings and kept[study.id].impression == study.impression
    reports = read_reports_csv(tmp_path / "out" / "reports.csv")
    assert len(reports) == 3425 and all(
        reports[study.id] == study.findings for study in collection.studies if study.findings
    )
    published = json.loads((folder / "annotation.json").read_text())
    for entry in (entry for entries in published.values() for entry in entries):
        assert kept[entry["id"].split("_")[0]].report == entry["report"]


def test_real_radiographs_and_real_labels_go_through(tmp_path: Path) -> None:
    folder = shared_data() / "iu_xray"
    prepare_iu_xray(
        folder / "indiana_reports.csv", folder / "images", tmp_path / "csv", split=str(folder / "r2gen_split_ids.json")
    )
    (study,) = studies(tmp_path / "csv").values()
    assert study.id == "CXR1000" and study.split == "train"
    views = {image.path.name: image.view for image in study.images}
    names = ("1000_IM-0003-1001.dcm.png", "1000_IM-0003-2001.dcm.png", "1000_IM-0003-3001.dcm.png")
    assert views == dict(zip(names, ("frontal", "lateral", "frontal"), strict=True))
    check_images([study])
    assert "CXR1001" in refused(tmp_path / "csv")

    few = tmp_path / "few"
    few.mkdir()
    labels = folder / "chexbert_labels_train_val.csv"
    numbers = [int(study_id.split("_")[0][3:]) for study_id in list(read_labels_csv(labels))[:12]]
    for number in numbers:
        (few / f"{number}.xml").write_bytes(report(number, findings=HEART))
    counts = prepare_iu_xray(few, None, tmp_path / "phantoms", render_missing=[labels], side=32)
    assert sum(count["rendered"] for count in counts.values()) == 12
