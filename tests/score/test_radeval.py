"""Score cards with RadEval's metrics: what a card says of them, when two may be compared, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.labels.observations import write_labels_csv
from mrg_r1.score.compare import compare_cards
from tests.cli.command import refused, run, usage_error
from tests.metrics.radeval_stand_in import install

LABELS = {study: [0] * 9 + [1] + [0] * 4 for study in "abc"}
TRUE = {"a": "left effusion", "b": "clear lungs today there", "c": "edema"}
SAID = {"a": "left effusion", "b": "clear lungs", "c": ""}


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # METEOR takes seconds


def side(path: Path, texts: dict[str, str], key: str) -> Path:
    """Reports with their labels, so that no labeler is needed."""
    rows = [
        {"id": study, key: text, "labels": [None] * 14, "reference_labels": [None] * 14}
        for study, text in texts.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(out: str) -> dict[str, list[str]]:
    """The lines of tables: what stands first -> the rest."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}


def command(folder: Path, python: str, card: str, texts: dict[str, str] = SAID, metrics: str = "radeval") -> list[Any]:
    said = side(folder / f"{card}.jsonl", texts, "prediction")
    true = side(folder / "reference.jsonl", TRUE, "reference")
    return ["score", said, true, "--with", metrics, "--python", python, "--samples", "50", "-o", folder / card]


def test_a_card_takes_the_metrics_in_and_two_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = install(tmp_path / "env", monkeypatch)
    code, out, _ = run(capsys, *command(tmp_path, python, "one.json"))
    assert (
        code == 0
        and "radeval 2.2.1, Python" in out
        and words(out)["radgraph_partial"][:2] == ["0.5000", "0.0375-1.0000"]
    )
    assert "ReXrank's does not" in out  # the variant
    card = json.loads((tmp_path / "one.json").read_text())
    assert card["predictions"]["radeval"]["radcliq_v1"] == [1.0, 0.5, 0.0]
    assert card["radeval"]["scores"]["ratescore"]["mean"] == 0.5 and len(card["radeval"]["scores"]) == 6
    better = dict(reversed([*{**SAID, "c": "edema"}.items()]))  # in another order
    assert run(capsys, *command(tmp_path, python, "two.json", better, "radeval:radgraph,bleu"))[0] == 0
    found = compare_cards(tmp_path / "one.json", tmp_path / "two.json", samples=50)["radeval"]
    assert list(found["scores"]) == ["radgraph_simple", "radgraph_partial", "radgraph_complete"]
    assert found["scores"]["radgraph_partial"]["difference"] == pytest.approx(1 / 3)
    assert found["metrics"]["radgraph"]["variant"].startswith("F1 of RadGraph-XL")
    code, out, _ = run(capsys, "score", "--compare", tmp_path / "one.json", tmp_path / "two.json", "--samples", "50")
    assert code == 0 and words(out)["radgraph_partial"][:3] == ["0.5000", "0.8333", "+0.3333"]


def test_a_card_without_them_is_compared_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = install(tmp_path / "env", monkeypatch)
    assert run(capsys, *command(tmp_path, python, "one.json"))[0] == 0
    plain = command(tmp_path, python, "two.json")
    assert run(capsys, *plain[:3], "-o", tmp_path / "two.json", "--samples", "50")[0] == 0
    assert compare_cards(tmp_path / "one.json", tmp_path / "two.json", samples=50)["radeval"] is None


def test_cards_of_other_versions_weights_or_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = install(tmp_path / "env", monkeypatch)
    assert run(capsys, *command(tmp_path, python, "one.json"))[0] == 0
    install(tmp_path / "env", monkeypatch, version="2.3.0")
    _, out, _ = run(capsys, *command(tmp_path, python, "two.json"))
    assert "warning: said of radeval 2.2.1, and this is radeval 2.3.0" in out
    with pytest.raises(ValueError, match="package of RadEval's metrics: .* has radeval 2.2.1, .* has radeval 2.3.0"):
        compare_cards(tmp_path / "one.json", tmp_path / "two.json")
    card = json.loads((tmp_path / "one.json").read_text())
    other = json.loads(json.dumps(card))
    other["radeval"]["metrics"]["radcliq"] |= {"weights_sha256": "f" * 64, "variant": "without IDF"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError) as caught:
        compare_cards(tmp_path / "one.json", tmp_path / "other.json")
    assert "weights of RadEval's radcliq" in str(caught.value) and "variant of RadEval's radcliq" in str(caught.value)
    card["predictions"]["radeval"]["radcliq_v1"][0] = 0.0
    (tmp_path / "changed.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="`predictions.radeval.radcliq_v1`: a mean of 0.1666.* it was changed"):
        compare_cards(tmp_path / "one.json", tmp_path / "changed.json")


def test_a_metric_that_fails_costs_nothing_but_itself_and_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = install(tmp_path / "env", monkeypatch, fault="kill:radgraph")
    code, _, said = run(capsys, *command(tmp_path, python, "one.json"))
    assert code == 2 and "metrics that were asked for are not in the card:\nradgraph left out:" in said
    card = json.loads((tmp_path / "one.json").read_text())
    assert "killed by SIGKILL" in card["radeval"]["left_out"]["radgraph"] and "ratescore" in card["radeval"]["scores"]


def test_what_cannot_be_asked_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = install(tmp_path / "env", monkeypatch)
    said = refused(capsys, *command(tmp_path, python, "one.json", metrics="radeval:crimson"))
    assert "crimson sends the reports to an API" in said and "`--send-text-to NAME` allows it" in said
    assert (
        run(capsys, *command(tmp_path, python, "a.json", metrics="radeval:crimson"), "--send-text-to", "crimson")[0]
        == 0
    )
    assert "'radeval:x' is not radeval" in usage_error(
        capsys, *command(tmp_path, python, "o.json", metrics="radeval:x")
    )
    arguments = command(tmp_path, python, "one.json")
    assert "go together" in refused(capsys, *arguments[:5], "-o", tmp_path / "one.json")
    for name in ("p.csv", "r.csv"):
        write_labels_csv(tmp_path / name, LABELS)
    labels = ["score", tmp_path / "p.csv", tmp_path / "r.csv", *arguments[3:]]
    assert "--with radeval: the predicted file has labels and no reports" in refused(capsys, *labels)
    assert not (tmp_path / "one.json").exists()
