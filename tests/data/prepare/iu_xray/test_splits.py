"""The published split finds its studies in every layout and loses none; the seeded one is 8:1:1 and moves nobody."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.data.prepare.iu_xray.kaggle import read_kaggle
from mrg_r1.data.prepare.iu_xray.open_i import read_open_i
from mrg_r1.data.prepare.iu_xray.r2gen import read_r2gen, read_split_ids
from mrg_r1.data.prepare.iu_xray.splits import published_split, seeded_split
from mrg_r1.data.prepare.iu_xray.study import IuCollection, IuImage, IuRefusal, IuStudy
from mrg_r1.data.study import ManifestError
from tests.shared_data import shared_data


def collection(*numbers: int, layout: str = "open-i", refusals: tuple[IuRefusal, ...] = ()) -> IuCollection:
    studies = tuple(
        IuStudy(f"CXR{n}", f"{n}.xml", (IuImage(f"CXR{n}_IM-000{n % 10}-1001"),), findings="Clear.") for n in numbers
    )
    return IuCollection(Path("reports.tgz"), layout, "reports", studies, refusals)


def split_file(folder: Path, content: Any) -> Path:
    path = folder / "split.json"
    path.write_text(json.dumps(content))
    return path


def published(source: IuCollection, path: Path) -> IuCollection:
    return published_split(source, read_split_ids(path), path)


def test_published_ids_find_their_studies_and_everything_else_is_refused_by_name(tmp_path: Path) -> None:
    path = split_file(
        tmp_path,
        {
            "train": ["CXR1_IM-0001", "CXR4_IM-0009"],
            "val": [{"id": "CXR2_IM-0002", "report": "x"}],
            "test": ["CXR9_IM-0009"],
        },
    )
    result = published(collection(1, 2, 3, 4, 11), path)
    assert {study.id: study.split for study in result.studies} == {"CXR1": "train", "CXR2": "val"}
    refused = {refusal.id: refusal for refusal in result.refusals}
    assert set(refused) == {"CXR3", "CXR4", "CXR11", "CXR9_IM-0009"}
    assert refused["CXR3"].split is None
    assert all(name in refused["CXR4"].reason for name in ("'CXR4_IM-0009'", "4_IM-0009", "CXR4_IM-0004-1001"))
    assert refused["CXR9_IM-0009"].split == "test"


def test_a_report_that_could_not_be_read_keeps_its_reason_and_gets_its_split(tmp_path: Path) -> None:
    bad = IuRefusal("CXR5", "5.xml", "broken XML")
    result = published(
        collection(1, refusals=(bad,)), split_file(tmp_path, {"train": ["CXR1_IM-0001"], "test": ["CXR5_IM-0005"]})
    )
    assert [(refusal.id, refusal.reason, refusal.split) for refusal in result.refusals] == [
        ("CXR5", "broken XML", "test")
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train": ["CXR1_IM-0001"], "test": ["CXR1_IM-0001"]}, "test[0]: id 'CXR1_IM-0001'"),
        (
            {"train": ["CXR1_IM-0001"], "test": ["CXR1_IM-0002"]},
            "'CXR1_IM-0001' and 'CXR1_IM-0002'",
        ),
        ({"train": [3]}, "train[0]: 3"),
        ({"train": [{"report": "x"}]}, "`id`"),
        ({"train": []}, "ids"),
        (["CXR1"], "R2Gen"),
        ({" ": ["CXR1"]}, "' '"),
    ],
)
def test_a_split_file_that_is_none_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    path = split_file(tmp_path, content)
    with pytest.raises(ManifestError) as error:
        published(collection(1), path)
    assert expected in str(error.value) and str(path) in str(error.value)


def test_the_seeded_split_is_eight_one_one_by_patient_whatever_the_order() -> None:
    numbers = list(range(1, 201))
    first = {study.id: study.split for study in seeded_split(collection(*numbers), 0).studies}
    assert Counter(first.values()) == {"train": 160, "val": 20, "test": 20}
    assert {study.id: study.split for study in seeded_split(collection(*reversed(numbers)), 0).studies} == first
    other = {study.id: study.split for study in seeded_split(collection(*numbers), 1).studies}
    assert Counter(other.values()) == Counter(first.values()) and other != first
    # half of the patients gone: the others stay, but for the few at a border
    fewer = seeded_split(collection(*numbers[::2]), 0).studies
    assert sum(first[study.id] != study.split for study in fewer) <= 10


def test_studies_of_one_patient_stay_together() -> None:
    studies = tuple(IuStudy(f"CXR{n // 3}_IM-{n}", "x", (), findings="x") for n in range(300))
    split_of: dict[str, set[str | None]] = {}
    for study in seeded_split(IuCollection(Path("x"), "r2gen", "x", studies, ()), 3).studies:
        split_of.setdefault(study.patient_id, set()).add(study.split)
    assert len(split_of) == 100 and all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize("name", ["annotation.json", "r2gen_split_ids.json"])
def test_every_published_id_is_found_in_every_real_layout(name: str) -> None:
    folder = shared_data() / "iu_xray"
    ids = json.loads((folder / "r2gen_split_ids.json").read_text())
    layouts = [
        (read_open_i(folder / "NLMCXR_reports.tgz"), 1000),
        (read_kaggle(folder / "indiana_reports.csv", folder / "indiana_projections.csv"), 896),
        (read_r2gen(folder / "annotation.json"), 0),
    ]
    for source, others in layouts:
        result = published(source, folder / name)
        assert Counter(study.split for study in result.studies) == {"train": 2069, "val": 296, "test": 590}
        assert len(result.refusals) == others and all(refusal.split is None for refusal in result.refusals)
        for split, members in ids.items():
            numbers = {f"CXR{member.split('_')[0][3:]}" for member in members}
            assert {study.patient_id for study in result.studies if study.split == split} == numbers
