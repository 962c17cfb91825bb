"""Score cards: every kind of file, what a card says, what is refused, and when two cards may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrg_r1 import cli
from mrg_r1.labels.observations import OBSERVATIONS, write_labels_csv
from mrg_r1.score.card import score_files, write_card
from mrg_r1.score.compare import compare_cards
from mrg_r1.score.reading import read_side, require_same_studies
from mrg_r1.score.tables import print_card, print_comparison


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # METEOR takes seconds


class Reader:
    """A labeler that finds an effusion where the word stands, and counts as fingerprint f."""

    name, fingerprint = "reader", "f"

    def label(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        return np.array([[int(j == 9 and "effusion" in text) for j in range(14)] for text in texts])


def labels(path: Path, ids: Sequence[str], seed: int) -> Path:
    classes = np.random.default_rng(seed).integers(0, 4, (len(ids), 14))
    classes[:, 13] %= 2
    write_labels_csv(path, dict(zip(ids, classes.tolist(), strict=True)))
    return path


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


IDS = [f"s{number}" for number in range(30)]
REPORTS = {"a": "An effusion.", "b": "Clear."}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.csv", "id,report\na,An effusion.\nb,Clear.\n"),
        ("r.json", REPORTS),
        ("r.json", {"a": ["An effusion."], "b": ["Clear."]}),
        (
            "r.json",
            [{"image_id": "a", "ground_truth": "x", "prediction": "An effusion."}, {"id": "b", "report": "Clear."}],
        ),
        (
            "r.json",
            {
                "train": [{"id": "c", "report": "x"}],
                "test": [{"id": "a", "report": "An effusion."}, {"id": "b", "report": "Clear."}],
            },
        ),
        ("r.jsonl", '{"id": "a", "report": "An effusion.", "reference": "x"}\n\n{"id": "b", "report": "Clear."}\n'),
    ],
)
def test_other_peoples_files_are_read(tmp_path: Path, name: str, content: Any) -> None:
    assert read_side(write(tmp_path / name, content), "predicted", split="test").texts == REPORTS


@pytest.mark.parametrize(
    ("name", "content"),
    [("r.txt", "An effusion.\r\n\nClear, \x0c too.\n"), ("r.csv", 'An effusion.\n""\n"Clear, \x0c too."\n')],
)
def test_files_without_ids_are_numbered(tmp_path: Path, name: str, content: str) -> None:
    side = read_side(write(tmp_path / name, content), "predicted")
    assert side.by_line and side.texts == {"1": "An effusion.", "2": "", "3": "Clear, \x0c too."}


def test_a_runs_predictions_score_alone_with_the_labeler_that_is_named_beside_them(tmp_path: Path) -> None:
    row = {"labels": [1, *[None] * 13], "reference_labels": [1, *[None] * 13], "reference": "An effusion."}
    path = write(
        tmp_path / "test_predictions.jsonl", "\n".join(json.dumps({"id": i, "report": None, **row}) for i in "ab")
    )
    write(tmp_path / "test.json", {"labeler": {"name": "theirs", "fingerprint": "g"}})
    card = score_files(path, samples=5)
    for damaged in ("[" * 100_000, "[]", '{"labeler": 3}'):
        write(tmp_path / "test.json", damaged)
        with pytest.raises(ValueError, match="test.json: names no labeler"):
            read_side(path, "predicted")
    assert (
        card["predicted"]["labeler"]
        == card["reference"]["labeler"]
        == card["labeler"]
        == {"name": "theirs", "fingerprint": "g"}
    )
    assert card["definitions"]["r2gen_micro14"]["f1"] == 1 and card["lexical"]["empty_predictions"] == 2


def test_a_card_says_what_was_scored_and_holds_no_report(tmp_path: Path) -> None:
    predicted = write(tmp_path / "p.json", {"b": "The small effusion.", "a": "An effusion."})
    reference = write(tmp_path / "r.json", REPORTS)
    card = score_files(predicted, reference, load_labeler=Reader, cleaning="r2gen-iu", samples=7, seed=3)
    write_card(tmp_path / "card.json", card)
    text = (tmp_path / "card.json").read_text()
    assert (
        json.loads(text) == json.loads(json.dumps(card))
        and "An effusion" not in text
        and "clear" not in text.lower().split()
    )
    assert card["studies"] == {"ids_sha256": hashlib.sha256(b"a\nb\n").hexdigest(), "identified_by": "id"}
    assert card["reference"]["labels_sha256"] == hashlib.sha256(b"a 00000000010000\nb 00000000000000\n").hexdigest()
    assert card["predictions"] == {
        "ids": ["a", "b"],
        "predicted": "00000000010000 00000000010000",
        "reference": "00000000010000 00000000000000",
    }
    assert (
        card["labeler"] == {"name": "reader", "fingerprint": "f"}
        and card["bootstrap"]["samples"] == 7
        and card["bootstrap"]["seed"] == 3
    )
    assert (
        card["lexical"]["cleaning"] == "r2gen-iu"
        and card["lexical"]["left_out"]["meteor"] == "METEOR left out: no java on PATH"
    )
    assert card["observations"]["Pleural Effusion"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3})
    assert card["definitions_are"]["chexbert_micro5"]["uncertain"] == "positive"


HEADER = ",".join(["id", *OBSERVATIONS])
ROW = "," * 13


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "", "p.csv: an empty file"),
        ("p.csv", f"{HEADER}\n", "p.csv: no studies in it"),
        ("p.csv", f"{HEADER}\na,,nan{ROW[1:]}\n", "line 2, id 'a': Cardiomegaly: label value 'nan'"),
        ("p.csv", f"{HEADER}\na,,,,2{ROW[3:]}\n", "line 2, id 'a': Lung Lesion: label value 2; allowed are"),
        ("p.csv", f"{HEADER}\na,{ROW}\na,{ROW}\n", "line 3: id 'a' stands twice"),
        ("p.csv", f"{HEADER},Mass\na,{ROW},\n", "columns ['Mass'] are none of the observations"),
        ("p.csv", "study_id" + HEADER[2:] + f"\na,{ROW}\n", "columns ['study_id'] are none of the observations"),
        ("p.csv", "report\nClear.\n", "line 1: a column 'report' without ids"),
        ("p.txt", "Clear.\xff\n".encode("latin-1"), "line 1: byte 0xff at column 7 is not UTF-8"),
        ("p.csv", f"{HEADER},Edema\na,{ROW},0\n", "line 1: columns ['edema'] stand twice"),
        ("p.json", '{"a": "x", "a": "y"}', "field `a` stands twice in one object"),
        ("p.jsonl", '{"id": "a", "report": "x", "report": "y"}', "line 1: field `report` stands twice"),
        ("p.json", "[" * 100_000, "line 1, column 1: broken JSON (nested too deeply)"),
        ("p.jsonl", "[" * 100_000, "line 1: broken JSON (nested too deeply"),
        (
            "p.jsonl",
            '{"id": "a", "report": "", "labels": [' + "1" * 400 + "]}",
            "line 1: broken JSON (a whole number of",
        ),
        (
            "p.jsonl",
            json.dumps({"id": "a", "report": "", "labels": [True, *[None] * 13]}),
            "field `labels`: Enlarged Cardiomediastinum: label value True",
        ),
        ("p.json", '{"a": NaN}', "key 'a', id 'a', field `report`: NaN is not a text"),
        ("p.json", '[{"report": "x"}]', "[0]: no id"),
        ("p.json", '[{"id": "a", "text": "x"}]', "id 'a': no predicted report"),
        ("p.json", "[{", "line 1, column 3: broken JSON"),
        ("p.json", "3", "3 is neither a list"),
        (
            "p.json",
            {"val": [{"id": "a", "report": ""}], "test": [{"id": "b", "report": ""}]},
            "has the splits val, test",
        ),
        ("p.jsonl", '{"id": "a", "report": "", "labels": [1]}', "field `labels`: expected 14 label values"),
        ("p.jsonl", '{"id": "a", "report": ""}\n{"id": "a", "report": ""}', "line 2: id 'a' stands twice"),
    ],
)
def test_bad_files_are_refused_with_the_place_and_the_remedy(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(ValueError) as caught:
        read_side(path, "predicted")
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_files_that_do_not_align_are_refused(tmp_path: Path) -> None:
    two, three = write(tmp_path / "two.txt", "x\ny\n"), write(tmp_path / "three.txt", "x\ny\nz\n")
    sides = read_side(two, "predicted"), read_side(three, "reference")
    with pytest.raises(ValueError, match=r"two.txt: 2 .*three.txt: 3"):
        require_same_studies(*sides)
    with pytest.raises(ValueError, match="two.txt: .*ids"):
        require_same_studies(sides[0], read_side(write(tmp_path / "r.json", REPORTS), "reference"))
    with pytest.raises(ValueError, match="two.txt.*split"):
        score_files(two, two, split="test", load_labeler=Reader)


def cards(folder: Path, **second: Any) -> tuple[Path, Path]:
    reference = labels(folder / "r.csv", IDS, 0)
    for number in (1, 2):
        card = score_files(labels(folder / f"p{number}.csv", IDS, number), reference, labels_by="CheXbert", samples=5)
        if number == 2:
            card |= second
        write_card(folder / f"{number}.json", card)
    return folder / "1.json", folder / "2.json"


def test_two_cards_alone_give_every_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = cards(tmp_path)
    out = tmp_path / "new" / "c.json"
    assert cli.main(["score", "--compare", str(first), str(second), "-o", str(out), "--samples", "50"]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    a, b = (json.loads(path.read_text())["definitions"] for path in (first, second))
    for name, found in written["definitions"].items():
        assert name in printed
        assert found["difference"] == pytest.approx(b[name]["f1"] - a[name]["f1"]) and found["ci"][0] <= found["ci"][1]
    assert (
        set(written["definitions"]) == set(a) and written["bootstrap"]["samples"] == 50 and written["lexical"] is None
    )


def test_what_is_not_comparable_is_refused_with_both_values(tmp_path: Path) -> None:
    first, _ = cards(tmp_path)
    other = labels(tmp_path / "other.csv", [f"t{number}" for number in range(30)], 0)
    references = labels(tmp_path / "r2.csv", IDS, 9)
    for name, arguments, message in (
        (
            "ids",
            (other, other, "CheXbert"),
            r"studies: .*1.json .*30 ",
        ),
        (
            "references",
            (references, references, "CheXbert"),
            r"reference labels: .*1.json .*\w{64}, .*references.json .*\w{64}",
        ),
        (
            "labeler",
            (tmp_path / "p2.csv", tmp_path / "r.csv", "CheXpert"),
            "predicted labels: .* CheXbert, .* CheXpert",
        ),
        (
            "nobody",
            (tmp_path / "p2.csv", tmp_path / "r.csv", None),
            "reference labels: .* none",
        ),
    ):
        write_card(tmp_path / f"{name}.json", score_files(*arguments[:2], labels_by=arguments[2], samples=2))
        with pytest.raises(ValueError, match=message):
            compare_cards(first, tmp_path / f"{name}.json", samples=2)


def test_lexical_metrics_of_two_cleanings_are_not_compared(tmp_path: Path) -> None:
    for cleaning in ("raw", "r2gen-iu"):
        write(tmp_path / "r.json", REPORTS)
        card = score_files(tmp_path / "r.json", tmp_path / "r.json", load_labeler=Reader, cleaning=cleaning, samples=2)
        write_card(tmp_path / f"{cleaning}.json", card)
    with pytest.raises(
        ValueError,
        match="cleaning .* raw, .* r2gen-iu.*--cleaning",
    ):
        compare_cards(tmp_path / "raw.json", tmp_path / "r2gen-iu.json")
    assert (
        compare_cards(tmp_path / "raw.json", tmp_path / "raw.json", samples=2)["lexical"]["scores"]["bleu_1"][
            "difference"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mrg-r1 score card 0"}, "field `format`: 'mrg-r1 score card 0'"),
        ({"n": 29}, "field `predictions.ids`: 30 in the card, which says 29"),
        ({"definitions_are": {}}, "field `definitions_are.chexbert_macro14`"),
        ({"predictions": None}, "not a score card .field `predictions`"),
        ({"predicted": {"labeler": None, "labels_sha256": "0"}}, "field `predictions.predicted`: its hash is"),
    ],
)
def test_a_card_that_was_changed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    first, second = cards(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        compare_cards(first, second, samples=2)


def test_a_reference_of_labels_alone_counts_in_clinical_scores_and_not_in_lexical_ones(tmp_path: Path) -> None:
    said = [*[None] * 9, 1, *[None] * 4]
    rows = [
        {"id": "a", "report": "An effusion.", "reference": "An effusion.", "labels": said, "reference_labels": said},
        {"id": "b", "report": "Clear.", "reference": None, "labels": [None] * 14, "reference_labels": said},
    ]
    path = write(tmp_path / "test_predictions.jsonl", "\n".join(map(json.dumps, rows)))
    for load in (None, Reader):  # with a labeler what has words is read anew, labels alone are as they are
        card = score_files(path, samples=5, load_labeler=load)
        assert card["n"] == 2 and card["observations"]["Pleural Effusion"]["recall"] == 0.5
        assert card["lexical"]["studies"] == 1 and card["lexical"]["scores"]["rouge_l"] == 1
    bare = write(tmp_path / "bare_predictions.jsonl", json.dumps(rows[1]))
    assert score_files(bare, samples=5)["lexical_reason"] == "no reference has a report, only labels"


def test_a_manifest_is_a_reference_with_its_said_labels_where_there_is_no_report(tmp_path: Path) -> None:
    said = {"said": [*[None] * 9, 1, *[None] * 4], "drawn": None}
    lines = [
        {"id": "a", "report": "An effusion.", "labels": {"said": None, "drawn": None}},
        {"id": "b", "report": None, "labels": said},
    ]
    path = write(tmp_path / "manifest.jsonl", "\n".join(map(json.dumps, lines)))
    predicted = write(tmp_path / "p.json", {"a": "Clear.", "b": "An effusion."})
    card = score_files(predicted, path, samples=5, load_labeler=Reader)
    assert card["support"]["Pleural Effusion"] == 2 and card["observations"]["Pleural Effusion"]["recall"] == 0.5
    with pytest.raises(ValueError, match="holds reports, not labels; give a labeler"):
        score_files(write(tmp_path / "p2.json", {"a": "Clear.", "b": "x"}), path, samples=5)
    lines[1]["labels"] = {"said": None, "drawn": None}
    with pytest.raises(ValueError, match="id 'b', field `report`: null is not a text"):
        write(path, "\n".join(map(json.dumps, lines)))
        score_files(predicted, path, samples=5, load_labeler=Reader)


class Denying(Reader):
    """Also reads that there is none."""

    def label(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        classes = super().label(texts)
        classes[:, 9] *= [2 if "no effusion" in text else 1 for text in texts]
        return classes


def test_a_card_says_what_no_clinical_score_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.json", {"a": "An effusion. Clear lungs.", "b": "There is no effusion.", "c": ""})
    bad = write(
        tmp_path / "bad.json", {"a": "An effusion. An effusion.", "b": "An effusion. There is no effusion.", "c": ""}
    )
    wording = score_files(bad, good, load_labeler=Denying, samples=2)["wording"]
    assert wording["predicted"] == {"repeated_sentence": 0.5, "repetition": 0.25, "contradiction": 0.5}
    assert wording["reference"] == {"repeated_sentence": 0.0, "repetition": 0.0, "contradiction": 0.0}
    labels(tmp_path / "l.csv", ["a", "b", "c"], 0)
    of_labels = score_files(tmp_path / "l.csv", tmp_path / "l.csv", samples=2)["wording"]
    assert of_labels["predicted"] is None and of_labels["reference"] is None
    for name, path in (("first", good), ("second", bad)):
        card = score_files(path, good, load_labeler=Denying, samples=2)
        write_card(tmp_path / f"{name}.card", card)
        print_card(card)
    shown = capsys.readouterr().out
    assert "Wording: what no clinical score sees" in shown and "0.250" in shown
    compared = compare_cards(tmp_path / "first.card", tmp_path / "second.card", samples=2)
    assert compared["wording"]["contradiction"] == {"first": 0.0, "second": 0.5, "difference": 0.5}
    print_comparison(compared)
    assert "Wording of the predicted reports" in capsys.readouterr().out


def test_contradictions_of_a_runs_predictions_need_a_labeler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "a", "report": "Clear. Clear.", "reference": "Clear."}
    row |= {"labels": [None] * 14, "reference_labels": [None] * 14}
    card = score_files(write(tmp_path / "test_predictions.jsonl", json.dumps(row) + "\n"), samples=2)
    assert card["wording"]["predicted"] == {"repeated_sentence": 1.0, "repetition": 0.5, "contradiction": None}
    print_card(card)
    assert "contradictions are missing: sentences are read with --labeler" in capsys.readouterr().out
