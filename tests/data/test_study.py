"""The manifest reader refuses bad data before training, and says which study, which field and what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mrg_r1.data.study import ManifestError, check_images, manifest_line, read_manifest, write_manifest
from mrg_r1.labels.missing import is_missing, missing_written_out, report_fault, visible
from mrg_r1.types import Study, StudyImage

BLANK: list[int | None] = [None] * 14


def record(study_id: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "id": study_id,
        "patient_id": "p",
        "images": [{"path": f"images/{study_id}.png", "view": "frontal"}],
        "findings": "Clear lungs.",
        "impression": None,
        "indication": None,
        "comparison": None,
        "report": "Clear lungs.",
        "split": "train",
        "labels": {"said": None, "drawn": None},
        "rendered": False,
        "prior": None,
        **changes,
    }


def manifest(folder: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    path = folder / "manifest.jsonl"
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def refusal(path: Path, **keywords: Any) -> str:
    with pytest.raises(ManifestError) as error:
        read_manifest(path, **keywords)
    return str(error.value)


def test_a_study_is_read_with_every_field(tmp_path: Path) -> None:
    said = [1, 0, -1, *BLANK[3:]]
    line = record(
        images=[{"path": "one.png", "view": "frontal"}, {"path": "../two.png", "view": None}],
        indication="Cough.",
        labels={"said": said, "drawn": BLANK},
        rendered=True,
        prior="b",
    )
    study = read_manifest(manifest(tmp_path, line, record("b")))[0]
    assert study == Study(
        id="a",
        patient_id="p",
        images=(StudyImage(tmp_path / "one.png", "frontal"), StudyImage(tmp_path.parent / "two.png", None)),
        report="Clear lungs.",
        split="train",
        findings="Clear lungs.",
        indication="Cough.",
        said=tuple(said),
        drawn=tuple(BLANK),
        rendered=True,
        prior="b",
    )


def test_only_the_split_asked_for_is_kept_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    path = manifest(tmp_path, record("a"), record("b", split="test"))
    assert [study.id for study in read_manifest(path, split="test")] == ["b"]
    path = manifest(tmp_path, record("a", report=" "), record("b", split="test"))
    assert "study 'a', field `report`" in refusal(path, split="test")


def test_a_split_without_studies_is_refused_and_the_splits_are_named(tmp_path: Path) -> None:
    message = refusal(manifest(tmp_path, record("a"), record("b")), split="val")
    assert "'val'" in message and "train (2)" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[" * 100_000, "broken JSON (nested too deeply"),
        (json.dumps(record()).replace("false", "9" * 400), "broken JSON (a whole number of 400 digits"),
        (json.dumps(record()).replace("{", '{"report": "Effusion.", ', 1), "field `report` stands twice"),
    ],
)
def test_a_line_that_json_reads_by_guessing_or_not_at_all_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    path = manifest(tmp_path, record("b"), line)
    assert f"{path}, line 2: {expected}" in refusal(path)


def test_a_file_without_studies_is_refused(tmp_path: Path) -> None:
    assert "no study" in refusal(manifest(tmp_path, "", ""))


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"report": " \n"}, "`report`", "empty"),
        ({"report": 3}, "`report`", "3 is not a string"),
        ({"report": None}, "`report`", "null, and so is `labels.said`"),
        ({"id": ""}, "`id`", "empty"),
        ({"id": "a "}, "`id`", "white space"),
        ({"split": ""}, "`split`", "empty"),
        ({"findings": ["x"]}, "`findings`", '["x"]'),
        ({"impression": "\ud800"}, "`impression`", "surrogate"),
        ({"rendered": 1}, "`rendered`", "1"),
        ({"rendered": None}, "`rendered`", "null"),
        ({"images": []}, "`images`", "[]"),
        ({"images": "x.png"}, "`images`", '"x.png"'),
        ({"images": [{"path": "x.png"}]}, "`images[0]`", "x.png"),
        ({"images": [{"path": "", "view": None}]}, "`images[0].path`", '""'),
        ({"images": [{"path": "x.png", "view": None}, {"path": "y.png", "view": "PA"}]}, "`images[1].view`", '"PA"'),
        ({"labels": None}, "`labels`", "null"),
        ({"labels": {"said": None}}, "`labels`", "said"),
        ({"labels": {"said": BLANK[:13], "drawn": None}}, "`labels.said`", "13 values"),
        ({"labels": {"said": None, "drawn": {}}}, "`labels.drawn`", "{}"),
        (
            {"labels": {"said": [2, *BLANK[1:]], "drawn": None}},
            "`labels.said`",
            "Enlarged Cardiomediastinum: label value 2",
        ),
        ({"labels": {"said": [True, *BLANK[1:]], "drawn": None}}, "`labels.said`", "true"),
        ({"labels": {"said": [1.0, *BLANK[1:]], "drawn": None}}, "`labels.said`", "1.0"),
        ({"labels": {"said": [*BLANK[:13], -1], "drawn": None}}, "`labels.said`", "No Finding"),
        ({"prior": "z"}, "`prior`", "'z'"),
        ({"prior": "a"}, "`prior`", "its own prior"),
        ({"prior": "other"}, "`prior`", "'q'"),
    ],
)
def test_a_bad_value_is_refused_with_line_study_field_and_value(
    tmp_path: Path, change: dict[str, Any], field: str, value: str
) -> None:
    path = manifest(tmp_path, record("other", patient_id="q"), record(**change))
    message = refusal(path)
    assert len(message.splitlines()) == 1
    assert f"{path}, line 2, study " in message and f"field {field}" in message and value in message
    assert ";" in message or "give it a value" in message  # the remedy


def test_labels_alone_are_a_study_and_nothing_at_all_is_one_for_an_evaluation(tmp_path: Path) -> None:
    said = {"said": [1, *BLANK[1:]], "drawn": None}
    path = manifest(tmp_path, record("a", report=None, labels=said), record("b"))
    (study, other) = read_manifest(path)
    assert study.report is None and study.said == (1, *BLANK[1:]) and study.has_reference and other.report is not None
    drawn = {"said": None, "drawn": [1, *BLANK[1:]]}  # what a phantom shows is not what somebody says of it
    path = manifest(tmp_path, record("a", report=None, labels=drawn))
    assert "line 1, study 'a', field `report`: null, and so is `labels.said`" in refusal(path)
    (bare,) = read_manifest(path, references=False)
    assert bare.report is None and not bare.has_reference


def test_unknown_and_missing_keys_are_named(tmp_path: Path) -> None:
    line = record("a", veiw="frontal")
    del line["prior"], line["labels"]
    message = refusal(manifest(tmp_path, line))
    assert (
        "line 1, study 'a'" in message
        and "unknown keys ['veiw']" in message
        and "missing keys ['labels', 'prior']" in message
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "b", ', "broken JSON"),
        ("[1, 2]", "not a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str | bytes, expected: str) -> None:
    message = refusal(manifest(tmp_path, record("a"), "", line, record("c")))
    assert "line 3" in message and expected in message and len(message.splitlines()) == 1


def test_a_file_cut_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = manifest(tmp_path, record("a"), record("b"))
    path.write_bytes(path.read_bytes()[:-40])
    assert "line 2: broken JSON" in refusal(path)


def test_an_id_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    message = refusal(manifest(tmp_path, record("a"), record("b"), record("a", split="test")))
    assert "line 3, study 'a', field `id`" in message and "line 1" in message


def test_a_refused_study_does_not_make_its_id_unknown(tmp_path: Path) -> None:
    message = refusal(manifest(tmp_path, record("a", report=""), record("b", prior="a")))
    assert len(message.splitlines()) == 1 and "field `report`" in message


def test_about_ten_problems_are_collected_and_no_more(tmp_path: Path) -> None:
    message = refusal(manifest(tmp_path, *(record(str(i), report="") for i in range(50)))).splitlines()
    assert len(message) == 11 and "line 10, study '9'" in message[9] and "only the first 10" in message[10]


def test_a_missing_manifest_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_manifest(tmp_path / "none.jsonl")


values = st.lists(st.sampled_from([1, 0, -1, None]), min_size=13, max_size=13)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: report_fault(text) is None)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(
    lambda name: visible(name) == name and not is_missing(name)
)
contexts = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not missing_written_out(text, words=False)
)
studies = st.builds(
    Study,
    id=names,
    patient_id=names,
    images=st.lists(
        st.builds(
            StudyImage,
            st.from_regex(r"\A[a-z]{1,8}(/[a-z]{1,8}){0,2}\.png\Z").map(lambda path: Path("/studies") / path),
            st.sampled_from(["frontal", "lateral", None]),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    report=words,
    split=names,
    findings=st.none() | contexts,
    said=st.none() | values.map(lambda thirteen: (*thirteen, None)),
    drawn=st.none() | values.map(lambda thirteen: (*thirteen, 1)),
    rendered=st.booleans(),
).flatmap(lambda study: st.sampled_from([study] if study.said is None else [study, replace(study, report=None)]))


@settings(deadline=None, max_examples=50)
@given(st.lists(studies, min_size=1, max_size=4, unique_by=lambda study: study.id))
def test_writing_and_reading_gives_the_same_studies(
    tmp_path_factory: pytest.TempPathFactory, written: list[Study]
) -> None:
    path = tmp_path_factory.mktemp("round") / "manifest.jsonl"
    write_manifest(path, written)
    assert read_manifest(path) == written


def test_a_dataset_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    image = tmp_path / "here" / "images" / "a.png"
    write_manifest(tmp_path / "here" / "manifest.jsonl", [Study("a", "p", (StudyImage(image),), "Clear.", "train")])
    (tmp_path / "here").rename(tmp_path / "there")
    assert (
        read_manifest(tmp_path / "there" / "manifest.jsonl")[0].images[0].path
        == tmp_path / "there" / "images" / "a.png"
    )


def test_a_write_that_fails_leaves_the_old_manifest_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, [Study("a", "p", (StudyImage(tmp_path / "a.png"),), "Clear.", "train")])
    before = path.read_bytes()

    def interrupted():  # type: ignore[no-untyped-def]
        yield Study("b", "p", (StudyImage(tmp_path / "b.png"),), "Clear.", "train")
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, interrupted())
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(path, [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def with_images(folder: Path, count: int) -> list[Study]:
    studies = []
    for i in range(count):
        Image.effect_noise((64, 64), 50).save(folder / f"{i}.png")
        studies.append(Study(f"study-{i}", "p", (StudyImage(folder / f"{i}.png"),), "Clear.", "train"))
    return studies


def test_whole_images_pass(tmp_path: Path) -> None:
    check_images(with_images(tmp_path, 5))


def test_every_bad_image_is_named_with_its_study(tmp_path: Path) -> None:
    studies = with_images(tmp_path, 6)
    (tmp_path / "1.png").unlink()
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:-200])
    (tmp_path / "4.png").write_text("not found")
    with pytest.raises(ManifestError) as error:
        check_images(studies)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, study, what in zip(lines, (1, 3, 4), ("no such file", "truncated", "not an image"), strict=True):
        assert f"study 'study-{study}'" in line and f"{study}.png" in line and what in line


def test_a_manifest_of_version_0_1_0_is_read() -> None:
    """Written by `mrg-r1 prepare phantom --preset full` of that version; every key and kind of value is in it."""
    path = Path(__file__).parent / "version_0_1_0" / "manifest.jsonl"
    studies = read_manifest(path)
    assert [study.split for study in studies] == ["train", "train", "train", "val"]
    assert all(study.rendered and study.said and study.drawn and len(study.images) == 2 for study in studies)
    assert [manifest_line(study, path.parent) for study in studies] == path.read_text(encoding="utf-8").splitlines()
