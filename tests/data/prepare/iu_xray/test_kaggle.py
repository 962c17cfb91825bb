"""Kaggle's two CSVs: every row is a study or a refusal, views by image, and both layouts agree where they overlap."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mrg_r1.data.prepare.iu_xray.kaggle import read_kaggle, read_views
from mrg_r1.data.prepare.iu_xray.open_i import read_open_i
from mrg_r1.data.prepare.iu_xray.study import image_key, study_number, with_views
from mrg_r1.data.study import ManifestError
from tests.shared_data import shared_data

REPORTS = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
PROJECTIONS = "uid,filename,projection\n"
GOOD = '7,normal,normal,Xray,Cough,,"Heart, ""normal"".\nXXXX opacity. ",Clear.\n'


def files(folder: Path, reports: str = REPORTS + GOOD, projections: str = PROJECTIONS) -> tuple[Path, Path]:
    (folder / "indiana_reports.csv").write_bytes(reports.encode())
    (folder / "indiana_projections.csv").write_bytes(projections.encode())
    return folder / "indiana_reports.csv", folder / "indiana_projections.csv"


def test_texts_are_verbatim_and_images_have_their_views(tmp_path: Path) -> None:
    images = "7,7_IM-1-1001.dcm.png,Frontal\n8,8_IM-2-1001.dcm.png,lateral\n7,7_IM-1-2001.dcm.png,Lateral\n"
    collection = read_kaggle(*files(tmp_path, "\ufeff" + REPORTS + GOOD + "8,,,,,,Clear.,\n", PROJECTIONS + images))
    seven, eight = collection.studies
    assert (seven.id, seven.findings, seven.impression) == ("CXR7", 'Heart, "normal".\nXXXX opacity. ', "Clear.")
    assert (seven.indication, seven.comparison, eight.impression) == ("Cough", None, None)
    assert [(image.name, image.view) for image in seven.images] == [
        ("7_IM-1-1001.dcm.png", "frontal"),
        ("7_IM-1-2001.dcm.png", "lateral"),
    ]
    assert [image.view for image in eight.images] == ["lateral"]
    assert (
        collection.refusals == ()
        and seven.where == f"{tmp_path / 'indiana_reports.csv'}, line 2"
        and eight.where.endswith("line 4")
    )


@pytest.mark.parametrize(
    ("reports", "projections", "study", "expected"),
    [
        ("7,,,,,,Again.,\n", "", "CXR7", "id 'CXR7' stands in {reports}, line 2 already"),
        ("9,,,,,,Short.\n", "", "{reports}, line 4", "7 fields under 8 columns"),
        ("x9,,,,,,Text.,\n", "", "{reports}, line 4", "column `uid`: 'x9'; a uid is a number"),
        ("", "11,11_IM-1-1.png,Frontal\n", "CXR11", "names its images, {reports} has no report of it"),
        (
            "9,,,,,,Text.,\n",
            "9,9_IM-1-1.png,Oblique\n",
            "CXR9",
            "{projections}, line 2, column `projection`: 'Oblique'; write Frontal or",
        ),
        (
            "9,,,,,,Text.,\n",
            "9,10_IM-1-1.png,Frontal\n",
            "CXR9",
            "line 2, column `filename`: '10_IM-1-1.png' is of study 10",
        ),
        ("9,,,,,,Text.,\n", "9,,Frontal\n", "CXR9", "line 2, column `filename`: empty"),
        (
            "9,,,,,,Text.,\n",
            "9,9_IM-1.png,Frontal\n9,9_IM-1.png,Lateral\n",
            "CXR9",
            "line 3, column `filename`: '9_IM-1.png' stands twice",
        ),
        ("", "9_IM-1.png,Frontal\n", "{projections}, line 2", "2 fields under 3 columns"),
    ],
)
def test_a_bad_row_costs_one_study_and_says_where(
    tmp_path: Path, reports: str, projections: str, study: str, expected: str
) -> None:
    paths = dict(
        zip(
            ("reports", "projections"),
            files(tmp_path, REPORTS + GOOD + reports, PROJECTIONS + projections),
            strict=True,
        )
    )
    collection = read_kaggle(paths["reports"], paths["projections"])
    assert collection.studies[0].id == "CXR7" and collection.studies[0].impression == "Clear."
    (refusal,) = collection.refusals
    assert refusal.id == study.format(**paths) and expected.format(**paths) in refusal.reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (REPORTS.replace("findings,", "").encode(), "line 1: no column `findings`"),
        (REPORTS.replace(",", ";").encode(), "';'"),
        (b"", "header"),
        (REPORTS.replace("MeSH", "uid").encode(), "columns ['uid']"),
        (
            (REPORTS + GOOD).encode() + b"8,,,,,,don\x92t,\n",
            "line 4: byte 0x92 at column 11",
        ),
        ((REPORTS + GOOD).encode("utf-16"), "UTF-16"),
        ((REPORTS + GOOD + '8,,,,,,"open quote,\n9,,,,,,x,\n').encode(), "line 4"),
        ((REPORTS + GOOD + "8,,,,,,a\0b,\n").encode(), "line 4: "),
    ],
)
def test_a_bad_file_is_refused_as_a_whole(tmp_path: Path, content: bytes, expected: str) -> None:
    reports, projections = files(tmp_path)
    reports.write_bytes(content)
    with pytest.raises(ManifestError) as error:
        read_kaggle(reports, projections)
    assert expected in str(error.value) and str(reports) in str(error.value)


def test_views_from_a_bad_file_are_refused(tmp_path: Path) -> None:
    _, projections = files(tmp_path, projections=PROJECTIONS + "7,7_IM-1.png,Frontal\n7,7_IM-2.png,Oblique\n")
    with pytest.raises(ManifestError, match="line 3, column `projection`: 'Oblique'"):
        read_views(projections)


def test_one_study_has_one_number_in_every_layout() -> None:
    assert [study_number(name) for name in ("CXR2384", "2384", "CXR2384_IM-0942", "cxr02384", "CXR1_1_IM-0001")] == [
        "2384"
    ] * 4 + ["1"]
    assert study_number("mine") is None and study_number("IM-0942") is None
    assert {
        image_key(name) for name in ("CXR1_1_IM-0001-3001", "1_IM-0001-3001.dcm.png", "a/b/CXR1_IM-0001-3001.PNG")
    } == {"1_IM-0001-3001"}
    assert image_key("CXR11_IM-0001-3001") != image_key("CXR1_1_IM-0001-3001")


def test_the_real_files_agree_with_the_xmls() -> None:
    folder = shared_data() / "iu_xray"
    reports, projections = folder / "indiana_reports.csv", folder / "indiana_projections.csv"
    collection = read_kaggle(reports, projections)
    assert len(collection.studies) == 3851 and collection.refusals == ()
    with open(projections, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    given = {(f"CXR{row['uid']}", row["filename"], row["projection"].lower()) for row in rows}
    assert {
        (study.id, image.name, image.view) for study in collection.studies for image in study.images
    } == given and len(rows) == 7466

    xml = with_views(read_open_i(folder / "NLMCXR_reports.tgz"), read_views(projections), projections)
    views = [image.view for study in xml.studies for image in study.images]
    # the collection's 7,470 images are four more than Kaggle's, of studies that Kaggle has
    assert (views.count("frontal"), views.count("lateral"), views.count(None)) == (3818, 3648, 4)
    by_id = {study.id: study for study in xml.studies}
    for study in collection.studies:
        assert (study.findings, study.impression) == (by_id[study.id].findings, by_id[study.id].impression)
    mangled = [study.id for study in collection.studies if study.indication != by_id[study.id].indication]
    assert mangled == ["CXR1555", "CXR3477", "CXR3784"]  # a spreadsheet has made #NAME? of "+PPD" there

    published = json.loads((folder / "annotation.json").read_text())
    for entry in (entry for entries in published.values() for entry in entries):
        assert by_id[f"CXR{study_number(entry['id'])}"].findings == entry["report"]
