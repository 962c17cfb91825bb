"""`write_phantoms`: drawn truth and said labels kept apart, splits that never overlap, the same seed the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrg_r1.data.prepare import phantoms
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import check_images, read_manifest
from mrg_r1.labels.observations import UNCERTAIN, classes_of_values, read_labels_csv
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.sampler import sample_balanced, sample_study
from mrg_r1.phantom.views import render_view
from mrg_r1.types import Study
from tests.world import few_texts

SPLITS = {"train": 12, "val": 3, "test": 4}
SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    with few_texts():
        yield


def write(output: Path, **changes: object) -> Path:
    keywords: dict[str, object] = {"preset": "five", "seed": 3, "side": SIDE, "splits": SPLITS, "workers": 1, **changes}
    return write_phantoms(output, **keywords)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("phantoms") / "five"
    assert write(output) == output / "manifest.jsonl"
    return output


@pytest.fixture(scope="module")
def studies(dataset: Path) -> list[Study]:
    return read_manifest(dataset / "manifest.jsonl")


def test_every_split_has_its_studies_and_no_two_share_one(studies: list[Study]) -> None:
    assert {split: sum(study.split == split for study in studies) for split in SPLITS} == SPLITS
    for values in (
        [study.id for study in studies],
        [study.patient_id for study in studies],
        [study.images for study in studies],
    ):
        assert len(set(values)) == len(studies)


def test_splits_may_have_labels_and_no_reports(dataset: Path, studies: list[Study], tmp_path: Path) -> None:
    manifest = write(tmp_path / "labels", without_reports=["train"])
    for with_reports, study in zip(studies, read_manifest(manifest), strict=True):
        assert (study.said, study.drawn) == (with_reports.said, with_reports.drawn)
        assert study.report == (None if study.split == "train" else with_reports.report)
    assert tree(tmp_path / "labels" / "images") == tree(dataset / "images")
    assert tree(tmp_path / "labels")["reports.csv"] == tree(dataset)["reports.csv"]
    with pytest.raises(ValueError, match="without reports: no split 'trian'; the splits are train, val, test"):
        write(tmp_path / "typo", without_reports=["trian"])
    with pytest.raises(ValueError, match="settings"):
        write(tmp_path / "labels")
    for changes in ({"faint": 0.5}, {"without_reports": ["val"]}):  # a folder at the default, asked for otherwise
        with pytest.raises(ValueError, match=next(iter(changes))):
            write(dataset, **changes)


def test_the_image_shows_the_drawn_truth(dataset: Path, studies: list[Study]) -> None:
    check_images(studies)
    for index, study in enumerate(studies):
        (image,) = study.images
        assert study.rendered and study.drawn is not None and image.view == "frontal"
        assert image.path == dataset / "images" / study.split / f"{study.id}.png"
        with Image.open(image.path) as opened:
            assert np.array_equal(np.asarray(opened), render(study.drawn, seed=3, index=index, side=SIDE))


def test_drawn_and_said_are_both_kept_and_differ_where_a_report_is_silent(studies: list[Study]) -> None:
    drawn = {value for study in studies for value in study.drawn or ()}
    said = [value for study in studies for value in (study.said or ())[:13]]
    assert drawn <= {0, 1, None} and None in said and 0 in said
    assert any(study.drawn != study.said for study in studies)


def test_the_csvs_for_the_labeler_belong_to_no_split_and_hold_enough_uncertain_statements(
    dataset: Path, studies: list[Study]
) -> None:
    reports, labels = read_reports_csv(dataset / "reports.csv"), read_labels_csv(dataset / "labels.csv")
    assert reports.keys() == labels.keys() and len(reports) == phantoms.LABELER_TEXTS
    assert not reports.keys() & {study.id for study in studies}
    for study_id in list(reports)[:40]:
        index = int(study_id.removeprefix("phantom-"))
        phantom = (sample_balanced if index % 2 else sample_study)("five", 3, index)
        assert reports[study_id] == phantom.report and labels[study_id] == classes_of_values(phantom.said)
    uncertain = sum(value == UNCERTAIN for classes in labels.values() for value in classes)
    assert 0.10 < uncertain / (5 * len(labels)) < 0.16  # a quarter in every other report


def test_the_held_out_texts_are_held_out_in_wording_and_belong_to_no_split(dataset: Path, studies: list[Study]) -> None:
    reports, labels = read_reports_csv(dataset / "heldout_reports.csv"), read_labels_csv(dataset / "heldout_labels.csv")
    assert reports.keys() == labels.keys() and len(reports) == phantoms.HELD_OUT_TEXTS
    assert not reports.keys() & {study.id for study in studies}
    for study_id, report in reports.items():
        assert report == sample_study("five", 3, int(study_id.removeprefix("phantom-")), wording="heldout").report
    assert not set(reports.values()) & {study.report for study in studies}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(dataset: Path, tmp_path: Path) -> None:
    write(tmp_path / "same")
    assert tree(tmp_path / "same") == tree(dataset)
    write(tmp_path / "other", seed=4)
    other = tree(tmp_path / "other")
    assert all(other[name] != content for name, content in tree(dataset).items() if name.startswith("images"))


def test_a_finished_dataset_is_not_made_again(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    for name in ("sample_study", "render_files", "contact_sheet", "write_manifest"):
        monkeypatch.setattr(phantoms, name, never)
    before = tree(dataset)
    assert write(dataset) == dataset / "manifest.jsonl"
    assert tree(dataset) == before


def test_an_interrupted_dataset_is_completed_to_the_same_bytes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Path] = []
    whole = phantoms.render_files

    def interrupted(renderings, **keywords):  # type: ignore[no-untyped-def]
        whole(renderings[:5], **keywords)
        done.extend(rendering.path for rendering in renderings[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phantoms, "render_files", interrupted)
        write(tmp_path)
    assert not (tmp_path / "manifest.jsonl").exists()
    stamps = [path.stat().st_mtime_ns for path in done]
    write(tmp_path)
    assert tree(tmp_path) == tree(dataset)
    assert [path.stat().st_mtime_ns for path in done] == stamps  # taken up, not done again


def test_an_image_that_was_deleted_comes_back(dataset: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "images" / "val" / "phantom-000013.png").unlink()
    write(tmp_path)
    assert tree(tmp_path) == tree(dataset)


def test_a_folder_made_with_other_settings_is_refused(dataset: Path) -> None:
    for change in ({"seed": 4}, {"side": 64}, {"splits": {"train": 13}}):
        with pytest.raises(ValueError, match=f"`{next(iter(change))}`"):
            write(dataset, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "fvie"}, "'fvie'.*five, full"),
        ({"splits": {}}, "splits"),
        ({"splits": {"train": 0}}, "'train': 0 "),
        ({"splits": {"../train": 1}}, "'../train'"),
        ({"side": 8}, "side"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": 31, "val": 9, "test": 10}
    return write(tmp_path_factory.mktemp("phantoms") / "full", preset="full", splits=splits).parent


def test_full_shows_both_views_of_what_the_manifest_says(full: Path) -> None:
    studies = read_manifest(full / "manifest.jsonl")
    check_images(studies)
    assert {len(study.images) for study in studies} == {1, 2}
    for study in studies:
        index = int(study.id.removeprefix("phantom-"))
        phantom = sample_study("full", 3, index)
        assert (study.said, study.drawn, study.report) == (phantom.said, phantom.drawn, phantom.report)
        assert (study.indication, study.comparison) == (phantom.indication, phantom.comparison)
        assert tuple(image.view for image in study.images) == phantom.views
        for image, view in zip(study.images, phantom.views, strict=True):
            expected = render_view(phantom.shown, view, seed=3, index=index, patient=phantom.patient, side=SIDE)
            with Image.open(image.path) as opened:
                assert np.array_equal(np.asarray(opened), expected)


def test_a_patient_of_full_stays_in_one_split_and_priors_are_there(full: Path) -> None:
    studies = {study.id: study for study in read_manifest(full / "manifest.jsonl")}
    counts = {split: sum(study.split == split for study in studies.values()) for split in ("train", "val", "test")}
    assert counts == {"train": 31, "val": 9, "test": 10}
    later = [study for study in studies.values() if study.prior is not None]
    assert later
    for study in later:
        assert study.prior is not None
        first = studies[study.prior]
        assert (first.patient_id, first.split) == (study.patient_id, study.split)
    for one in studies.values():
        assert {other.split for other in studies.values() if other.patient_id == one.patient_id} == {one.split}
    texts = {name for file in ("reports.csv", "heldout_reports.csv") for name in read_reports_csv(full / file)}
    patients = {sample_study("full", 3, int(name.removeprefix("phantom-"))).patient_id for name in texts}
    assert not texts & studies.keys() and not patients & {study.patient_id for study in studies.values()}


def test_a_lost_view_of_full_comes_back(full: Path) -> None:
    before = tree(full)
    lost = next(study.images[1].path for study in read_manifest(full / "manifest.jsonl") if len(study.images) == 2)
    lost.unlink()
    write(full, preset="full", splits={"train": 31, "val": 9, "test": 10})
    assert tree(full) == before
    with pytest.raises(ValueError, match="`preset`.*'full'"):
        write(full, splits={"train": 31, "val": 9, "test": 10})
