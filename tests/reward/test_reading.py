"""Every text is read once, as long as it is remembered; and what the references say is kept on the disk."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mrg_r1.labels.observations import read_labels_csv
from mrg_r1.reward import reading, references
from mrg_r1.reward.reading import LabelError, Reader
from mrg_r1.reward.references import FOLDER, reference_labels
from mrg_r1.types import Study
from tests.reward.keyword_labeler import KeywordLabeler

LABELER = {"name": "keywords", "fingerprint": "00ff", "dtype": "float32"}


def test_a_text_is_read_once_and_keeps_its_place() -> None:
    labeler = KeywordLabeler()
    reader = Reader(labeler)
    first = reader.label(["edema", "effusion", "edema"])
    again = reader.label(["effusion", "no edema", "edema"])
    assert labeler.calls == [["edema", "effusion"], ["no edema"]]
    assert first[:, 4].tolist() == [1, 0, 1] and again[:, 4].tolist() == [0, 2, 1] and again[:, 9].tolist() == [1, 0, 0]
    assert (reader.asked, reader.computed) == (6, 3) and reader.label([]).shape == (0, 14)


def test_the_text_asked_for_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "REMEMBERED", 2)
    labeler = KeywordLabeler()
    reader = Reader(labeler)
    reader.label(["a", "b"])
    reader.label(["a"])  # a is fresh again
    reader.label(["c"])
    reader.label(["a", "c"])
    reader.label(["b"])
    assert labeler.calls == [["a", "b"], ["c"], ["b"]]
    assert reader.label(["d", "e", "f", "d"]).shape == (4, 14)  # more than it remembers, in one call


def test_nothing_of_a_call_that_failed_is_remembered() -> None:
    class Once(KeywordLabeler):
        def label(self, texts: list[str]) -> NDArray[np.int64]:
            rows = super().label(texts)
            return rows[:-1] if len(self.calls) == 1 else rows

    reader = Reader(Once())
    with pytest.raises(LabelError, match=r"\(1, 14\).*\(2, 14\)"):
        reader.label(["edema", "effusion"])
    assert reader.label(["effusion", "edema"])[:, 9].tolist() == [1, 0] and reader.computed == 2


def studies(*reports: str) -> list[Study]:
    return [
        Study(id=f"s{n}", patient_id="p", images=(), report=report, split="train") for n, report in enumerate(reports)
    ]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text("one manifest")
    return path


def read(manifest: Path, wanted: list[Study], labeler: KeywordLabeler, **described: str) -> dict[str, list[int]]:
    def label(texts: Sequence[str]) -> NDArray[np.int64]:
        return labeler.label(list(texts))

    return reference_labels(
        wanted, manifest=manifest, labeler=LABELER | described, label=label, fallback=manifest.parent / "x"
    )


def test_references_are_read_once_for_a_manifest_and_a_labeler(manifest: Path) -> None:
    labeler, wanted = KeywordLabeler(), studies("edema", "no effusion")
    first = read(manifest, wanted[:1], labeler)
    assert read(manifest, wanted, labeler) == read(manifest, wanted, labeler)
    assert labeler.calls == [["edema"], ["no effusion"]] and first["s0"][4] == 1
    (kept,) = (manifest.parent / FOLDER).glob("keywords-*.csv")
    assert read_labels_csv(kept)["s1"][9] == 2
    for change in ({"fingerprint": "0000"}, {"dtype": "bfloat16"}):
        read(manifest, wanted[:1], labeler, **change)
    manifest.write_text("another manifest")
    read(manifest, wanted[:1], labeler)
    assert labeler.calls[2:] == [["edema"]] * 3


def test_an_interrupted_reading_goes_on(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_AT_ONCE", 2)
    monkeypatch.setattr(references, "_SAVED_EVERY", 0.0)

    class Dying(KeywordLabeler):
        def label(self, texts: list[str]) -> NDArray[np.int64]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().label(texts)

    wanted = studies("edema", "effusion", "a", "b", "c")
    with pytest.raises(KeyboardInterrupt):
        read(manifest, wanted, Dying())
    labeler = KeywordLabeler()
    assert read(manifest, wanted, labeler)["s1"][9] == 1 and labeler.calls == [["c"]]


def test_a_folder_that_cannot_be_written_to_is_left_alone(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr(references.os, "access", lambda path, mode: False)  # root may write anywhere
    fallback = manifest.parent.parent / "run"
    arguments = {"manifest": manifest, "labeler": LABELER, "label": lambda texts: KeywordLabeler().label(list(texts))}
    assert reference_labels(studies("edema"), fallback=fallback, **arguments)["s0"][4] == 1  # type: ignore[arg-type]
    assert len(list(fallback.glob("*.csv"))) == 1 and not (manifest.parent / FOLDER).exists()
    manifest.parent.chmod(stat.S_IRWXU)


def test_a_study_without_a_report_has_what_the_manifest_says_and_no_labeler_is_asked(manifest: Path) -> None:
    labeler, (worded, bare) = KeywordLabeler(), studies("edema", "effusion")
    bare = replace(bare, report=None, said=(None, 1, 0, -1, *[None] * 9, 0))
    assert read(manifest, [bare], labeler) == {"s1": [0, 1, 2, 3, *[0] * 10]} and not labeler.calls
    assert not (manifest.parent / FOLDER).exists()
    found = read(manifest, [bare, worded], labeler)
    assert labeler.calls == [["edema"]] and found["s0"][4] == 1 and found["s1"][1] == 1
    (kept,) = (manifest.parent / FOLDER).glob("*.csv")
    assert read_labels_csv(kept).keys() == {"s0"}


def test_what_the_manifest_says_of_a_report_spares_its_reading_where_it_is_asked_to_count(manifest: Path) -> None:
    labeler, (labelled, worded) = KeywordLabeler(), studies("edema", "effusion")
    labelled = replace(labelled, said=(*[None] * 9, 1, *[None] * 4))
    described = {"manifest": manifest, "labeler": LABELER, "fallback": manifest.parent / "x"}
    found = reference_labels(
        [labelled, worded],
        label=lambda texts: labeler.label(list(texts)),
        said_first=True,
        **described,  # type: ignore[arg-type]
    )
    assert labeler.calls == [["effusion"]] and found["s0"] == [0] * 9 + [1] + [0] * 4 and found["s1"][9] == 1
    assert read(manifest, [labelled, worded], labeler)["s0"][4] == 1 and labeler.calls[1:] == [["edema"]]
