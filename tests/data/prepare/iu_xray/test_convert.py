"""`prepare iu-xray`: reports verbatim, missing radiographs rendered from labels and marked, everything else refused
with a reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrg_r1.data.prepare.iu_xray import convert
from mrg_r1.data.study import ManifestError, check_images, read_manifest
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, POSITIVE, UNCERTAIN, read_labels_csv, write_labels_csv
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.types import Study
from tests.data.prepare.iu_xray.prepared import prepare_iu_xray
from tests.shared_data import shared_data

REPORT = "Heart size normal. XXXX opacity,  maybe\nedema. "
NORMAL = [0] * 13 + [1]


def entry(study_id: str, split: str = "train", **changes: Any) -> dict[str, Any]:
    paths = [f"{study_id}/0.png", f"{study_id}/1.png"]
    return {"id": study_id, "report": REPORT, "image_path": paths, "split": split, **changes}


def annotation(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "annotation.json"
    splits: dict[str, list[dict[str, Any]]] = {}
    for item in entries:
        splits.setdefault(item["split"], []).append(item)
    path.write_text(json.dumps(splits))
    return path


def labels_csv(path: Path, labels: dict[str, list[int]]) -> Path:
    write_labels_csv(path, labels)  # type: ignore[arg-type]
    return path


def write_images(folder: Path, study_id: str, names: tuple[str, ...] = ("0.png", "1.png")) -> None:
    (folder / study_id).mkdir(parents=True)
    for name in names:
        Image.effect_noise((40, 40), 60).save(folder / study_id / name)


def refused(output: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in map(json.loads, (output / "refused.jsonl").read_text().splitlines())}


def by_id(output: Path) -> dict[str, Study]:
    return {study.id: study for study in read_manifest(output / "manifest.jsonl")}


def test_real_images_are_kept_and_the_text_is_verbatim(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "CXR1_IM-2")
    counts = prepare_iu_xray(annotation(tmp_path, entry("CXR1_IM-2")), tmp_path / "images", tmp_path / "out", side=32)
    assert counts == {"train": {"read": 1, "kept": 1, "rendered": 0, "refused": 0}}
    study = by_id(tmp_path / "out")["CXR1_IM-2"]
    assert study.report == study.findings == REPORT
    assert study.patient_id == "CXR1" and not study.rendered and study.drawn is None and study.said is None
    assert [image.path for image in study.images] == [
        tmp_path / "images" / "CXR1_IM-2" / name for name in ("0.png", "1.png")
    ]
    assert [image.view for image in study.images] == [None, None]


def test_a_missing_radiograph_is_rendered_from_its_labels_and_marked(tmp_path: Path) -> None:
    classes = [0, 1, 2, 3, *[0] * 10]
    paths = [
        labels_csv(tmp_path / "one.csv", {"a": classes}),
        labels_csv(tmp_path / "two.csv", {"b": NORMAL, "a": classes}),
    ]
    counts = prepare_iu_xray(
        annotation(tmp_path, entry("a"), entry("b", "val")), None, tmp_path / "out", render_missing=paths, side=32
    )
    assert counts["train"]["rendered"] == counts["val"]["rendered"] == 1
    studies = by_id(tmp_path / "out")
    a, b = studies["a"], studies["b"]
    assert a.said == (None, 1, 0, -1, *[None] * 10) and b.said == (*[None] * 13, 1)
    assert a.drawn is not None and a.drawn[:3] == (0, 1, 0) and a.drawn[3] in (0, 1) and a.drawn[4:] == (*[0] * 9, None)
    assert b.drawn == (*[0] * 13, 1)
    for study in (a, b):
        assert study.rendered and [image.view for image in study.images] == ["frontal"]
    check_images([a, b])
    with Image.open(a.images[0].path) as image:
        assert image.size == (32, 32)


def test_an_uncertain_finding_is_drawn_for_about_half_of_the_studies_by_seed_and_id_alone(tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(60)]
    path = labels_csv(tmp_path / "labels.csv", {study_id: [UNCERTAIN] * 13 + [0] for study_id in ids})

    def coins(name: str, order: list[str], seed: int) -> dict[str, tuple[int | None, ...]]:
        prepare_iu_xray(
            annotation(tmp_path, *map(entry, order)), None, tmp_path / name, render_missing=[path], side=32, seed=seed
        )
        return {study_id: study.drawn or () for study_id, study in by_id(tmp_path / name).items()}

    drawn = coins("one", ids, 0)
    assert 0.4 < np.mean([values[:13] for values in drawn.values()]) < 0.6  # 780 coins: 5.6 standard deviations
    assert coins("turned", ids[::-1], 0) == drawn
    assert coins("seed", ids, 1) != drawn


def test_films_of_a_train_report_are_studies_of_other_chests_with_its_text_told_once(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "real")
    path = labels_csv(tmp_path / "labels.csv", {"CXR1_a": [1] * 13 + [0], "CXR2_b": NORMAL, "real": NORMAL})
    counts = prepare_iu_xray(
        annotation(tmp_path, entry("CXR1_a"), entry("real"), entry("CXR2_b", "val"), entry("c")),
        tmp_path / "images",
        tmp_path / "out",
        render_missing=[path],
        side=32,
        films=3,
    )
    assert counts["train"] == {"read": 5, "kept": 4, "rendered": 3, "refused": 1} and counts["val"]["kept"] == 1
    studies = by_id(tmp_path / "out")
    assert set(studies) == {"CXR1_a", "CXR1_a-film2", "CXR1_a-film3", "real", "CXR2_b"}
    films = [studies[name] for name in ("CXR1_a", "CXR1_a-film2", "CXR1_a-film3")]
    assert {(film.patient_id, film.report, film.said, film.split) for film in films} == {
        ("CXR1", REPORT, (1,) * 13 + (None,), "train")
    }
    assert len({film.images[0].path.read_bytes() for film in films}) == 3
    assert set(read_reports_csv(tmp_path / "out" / "reports.csv")) == {"CXR1_a", "real", "CXR2_b", "c"}
    check_images(list(studies.values()))


def test_films_go_on_after_a_kill_and_want_labels_to_be_rendered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = labels_csv(tmp_path / "labels.csv", {"a": NORMAL, "b": NORMAL})
    given = annotation(tmp_path, entry("a"), entry("b"))
    prepare_iu_xray(given, None, tmp_path / "whole", render_missing=[path], side=32, films=2)
    settle, kept = convert.Conversion.keep, list[str]()

    def kill(self: Any, study: Study, where: str = "", **settings: Any) -> bool:
        if len(kept) == 1:
            raise KeyboardInterrupt
        kept.append(study.id)
        return settle(self, study, where, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert.Conversion, "keep", kill)
        prepare_iu_xray(given, None, tmp_path / "out", render_missing=[path], side=32, films=2)
    prepare_iu_xray(given, None, tmp_path / "out", render_missing=[path], side=32, films=2)
    assert list(by_id(tmp_path / "out")) == list(by_id(tmp_path / "whole")) == ["a", "a-film2", "b", "b-film2"]
    assert (tmp_path / "out" / "reports.csv").read_bytes() == (tmp_path / "whole" / "reports.csv").read_bytes()
    with pytest.raises(ValueError, match=r"made with other settings.*films"):
        prepare_iu_xray(given, None, tmp_path / "out", render_missing=[path], side=32, films=3)
    with pytest.raises(ValueError, match=r"films 2: .*--render-missing"):
        prepare_iu_xray(given, None, tmp_path / "none", films=2)


def test_a_real_image_goes_before_a_rendered_one(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "a")
    path = labels_csv(tmp_path / "labels.csv", {"a": NORMAL, "b": NORMAL})
    prepare_iu_xray(
        annotation(tmp_path, entry("a"), entry("b")),
        tmp_path / "images",
        tmp_path / "out",
        render_missing=[path],
        side=32,
    )
    studies = by_id(tmp_path / "out")
    assert not studies["a"].rendered and studies["a"].said is not None and studies["a"].drawn is None
    assert studies["b"].rendered


def test_every_refused_study_stands_in_the_list_with_its_reason(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for study_id in ("good", "empty", "cut"):
        write_images(images, study_id)
    write_images(images, "half", ("0.png",))
    (images / "cut" / "1.png").write_bytes((images / "cut" / "1.png").read_bytes()[:100])
    entries = [entry("good"), entry("empty", report=" "), entry("cut"), entry("half"), entry("none", "test")]
    path = labels_csv(tmp_path / "labels.csv", {study_id: NORMAL for study_id in ("good", "empty", "cut", "half")})
    counts = prepare_iu_xray(annotation(tmp_path, *entries), images, tmp_path / "out", render_missing=[path], side=32)
    assert counts == {
        "train": {"read": 4, "kept": 1, "rendered": 0, "refused": 3},
        "test": {"read": 1, "kept": 0, "rendered": 0, "refused": 1},
    }
    reasons = refused(tmp_path / "out")
    assert list(reasons) == ["empty", "cut", "half", "none"]
    assert "empty" in reasons["empty"]
    assert "cut/1.png" in reasons["cut"]
    assert "half/1.png" in reasons["half"]
    assert "none/0.png" in reasons["none"] and "mrg-r1 label" in reasons["none"]


def test_without_images_or_labels_all_are_refused_but_the_reports_can_be_labelled(tmp_path: Path) -> None:
    path = annotation(tmp_path, entry("a"), entry("b", "test"), entry("c", report=""))
    with pytest.raises(ValueError, match=r"all 3 .*--render-missing"):
        prepare_iu_xray(path, None, tmp_path / "out", side=32)
    assert read_reports_csv(tmp_path / "out" / "reports.csv") == {"a": REPORT, "b": REPORT}
    assert read_reports_csv(tmp_path / "out" / "reports_test.csv") == {"b": REPORT}
    assert set(refused(tmp_path / "out")) == {"a", "b", "c"}
    # labelled since, the same folder is taken up
    labels = labels_csv(tmp_path / "labels.csv", {"a": NORMAL, "b": NORMAL})
    assert prepare_iu_xray(path, None, tmp_path / "out", render_missing=[labels], side=32)["test"]["kept"] == 1


def test_other_labels_are_not_mixed_into_a_folder(tmp_path: Path) -> None:
    path = annotation(tmp_path, entry("a"))
    prepare_iu_xray(
        path, None, tmp_path / "out", render_missing=[labels_csv(tmp_path / "one.csv", {"a": NORMAL})], side=32
    )
    with pytest.raises(ValueError, match="other settings"):
        prepare_iu_xray(
            path,
            None,
            tmp_path / "out",
            render_missing=[labels_csv(tmp_path / "two.csv", {"a": [1] * 13 + [0]})],
            side=32,
        )


def test_label_files_that_disagree_are_refused(tmp_path: Path) -> None:
    paths = [labels_csv(tmp_path / "one.csv", {"a": NORMAL}), labels_csv(tmp_path / "two.csv", {"a": [1] * 13 + [0]})]
    with pytest.raises(ValueError, match=r"two\.csv, id 'a'"):
        prepare_iu_xray(annotation(tmp_path, entry("a")), None, tmp_path / "out", render_missing=paths, side=32)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"train": [', "JSON"),
        ("[]", "R2Gen"),
        ('{"train": {}}', "R2Gen"),
        ('{"train": []}', "studies"),
        ('{"train": [3]}', "train[0]: 3"),
        (json.dumps({"train": [entry("../../x")]}), "field `id`: '../../x'"),
        (json.dumps({"train": [entry("a", report=None)]}), "study 'a', field `report`: None"),
        (json.dumps({"train": [entry("a", image_path=[])]}), "study 'a', field `image_path`: []"),
        (json.dumps({"train": [entry("a", split="test")]}), "study 'a', field `split`: 'test'"),
        (
            json.dumps({"train": [entry("a")], "test": [entry("a", "test")]}),
            "test[0]: id 'a'",
        ),
    ],
)
def test_what_is_not_an_annotation_is_refused_before_anything_is_written(
    tmp_path: Path, content: str, expected: str
) -> None:
    path = tmp_path / "annotation.json"
    path.write_text(content)
    with pytest.raises(ManifestError) as error:
        prepare_iu_xray(path, None, tmp_path / "out")
    assert expected in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="imgaes"):
        prepare_iu_xray(annotation(tmp_path, entry("a")), tmp_path / "imgaes", tmp_path / "out")


def test_the_real_reports_come_through_verbatim_with_the_published_split(tmp_path: Path) -> None:
    folder = shared_data() / "iu_xray"
    published = json.loads((folder / "annotation.json").read_text())
    few = {split: studies[:8] for split, studies in published.items()}
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(few))
    csv = folder / "chexbert_labels_train_val.csv"
    counts = prepare_iu_xray(path, None, tmp_path / "out", render_missing=[csv], side=32)
    assert {split: count["kept"] for split, count in counts.items()} == {"train": 8, "val": 8, "test": 0}
    studies, labels = by_id(tmp_path / "out"), read_labels_csv(csv)
    for split in ("train", "val"):
        for item in few[split]:
            study = studies[item["id"]]
            assert study.report == item["report"] and study.split == split and study.rendered
            assert study.said is not None and study.drawn is not None and len(study.said) == len(OBSERVATIONS)
            for observation in range(NO_FINDING):
                if labels[study.id][observation] != UNCERTAIN:
                    assert study.drawn[observation] == (labels[study.id][observation] == POSITIVE)
    whole = tmp_path / "whole"
    with pytest.raises(ValueError, match="all 2,955 "):
        prepare_iu_xray(folder / "annotation.json", None, whole)
    ids = json.loads((folder / "r2gen_split_ids.json").read_text())
    for split, count in (("train", 2069), ("val", 296), ("test", 590)):
        reports = read_reports_csv(whole / f"reports_{split}.csv")
        assert len(reports) == count and set(reports) == set(ids[split])
