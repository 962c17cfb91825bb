"""Reports put together from real sentences say what is drawn, and deny nothing that is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mrg_r1.cli import main
from mrg_r1.cli.prepare import phantom as command
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.observations import BLANK, NEGATIVE, NO_FINDING, OBSERVATIONS, POSITIVE, UNCERTAIN
from mrg_r1.labels.reports import write_reports_csv
from mrg_r1.labels.sentences import sentences as split
from mrg_r1.phantom.recombined import Sentences, recombine, sort_sentences, unsaid
from mrg_r1.phantom.sampler import sample_study
from tests.world import few_texts

HEART, OPACITY, EFFUSION = (OBSERVATIONS.index(name) for name in ("Cardiomegaly", "Lung Opacity", "Pleural Effusion"))


def row(**classes: int) -> list[int]:
    values = [BLANK] * 14
    for name, value in classes.items():
        values[{"heart": HEART, "opacity": OPACITY, "effusion": EFFUSION}[name]] = value
    return values


READ = {
    "The heart is enlarged.": row(heart=POSITIVE),
    "Heart size is increased.": row(heart=POSITIVE),
    "There is an opacity.": row(opacity=POSITIVE),
    "Possibly an opacity there.": row(opacity=UNCERTAIN),
    "Large heart and an opacity.": row(heart=POSITIVE, opacity=POSITIVE),
    "Large heart, no effusion seen.": row(heart=POSITIVE, effusion=NEGATIVE),
    "No effusion is seen.": row(effusion=NEGATIVE),
    "Heart normal, no effusion seen.": row(heart=NEGATIVE, effusion=NEGATIVE),
    "No opacity is seen.": row(opacity=NEGATIVE),
    "Bones are intact today.": row(),
    "Large heart.": row(heart=POSITIVE),  # two words
}


def bank() -> Sentences:
    return sort_sentences(list(READ), list(READ.values()))


def test_a_sentence_is_taken_that_affirms_one_finding_or_only_denies() -> None:
    found = bank()
    assert found.affirming[HEART] == ("The heart is enlarged.", "Heart size is increased.")
    assert found.affirming[OPACITY] == ("There is an opacity.",) and found.affirming[EFFUSION] == ()
    assert dict((text, denied) for denied, text in found.denying) == {
        "No effusion is seen.": {EFFUSION},
        "Heart normal, no effusion seen.": {HEART, EFFUSION},
        "No opacity is seen.": {OPACITY},
    }
    assert set(unsaid(found)) == set(OBSERVATIONS[:NO_FINDING]) - {"Cardiomegaly", "Lung Opacity"}


@pytest.mark.parametrize(("left_out", "what"), [(POSITIVE, "affirms a finding"), (NEGATIVE, "denies a finding")])
def test_reports_that_give_no_sentence_are_refused(left_out: int, what: str) -> None:
    kept = {text: values for text, values in READ.items() if left_out not in values}
    with pytest.raises(ValueError, match=rf"none of 3 to 25 words {what}"):
        sort_sentences(list(kept), list(kept.values()))


def test_a_report_affirms_what_is_there_once_and_denies_only_what_is_not() -> None:
    texts, denied_ever = set(), set()
    for index in range(300):
        drawn = sample_study("balanced", 3, index).drawn
        report, said = recombine(bank(), drawn, 3, index)
        assert (report, said) == recombine(bank(), drawn, 3, index)
        there = {observation for observation in range(NO_FINDING) if drawn[observation] == 1}
        affirmed = {observation for observation in range(NO_FINDING) if said[observation] == 1}
        denied = {observation for observation in range(NO_FINDING) if said[observation] == 0}
        assert affirmed == there & {HEART, OPACITY} and not denied & there
        read = [READ[sentence] for sentence in split(report)]  # every sentence is one of the bank
        assert sum(POSITIVE in values for values in read) == len(affirmed)
        assert {o for values in read for o in range(NO_FINDING) if values[o] == NEGATIVE} == denied
        assert said[NO_FINDING] == (None if affirmed else 1)
        texts.add(report)
        denied_ever |= denied
    assert len(texts) > 10 and denied_ever == {HEART, OPACITY, EFFUSION}


def test_a_dataset_in_real_words_is_marked_by_them_and_is_of_balanced_alone(tmp_path: Path) -> None:
    def write(output: Path, **changes: object) -> Path:
        settings = {"preset": "balanced", "seed": 3, "side": 32, "splits": {"train": 20}, "workers": 1, **changes}
        with few_texts():
            return write_phantoms(output, **settings)  # type: ignore[arg-type]

    studies = read_manifest(write(tmp_path / "real", sentences=bank()))
    plain = read_manifest(write(tmp_path / "plain"))
    assert [study.drawn for study in studies] == [study.drawn for study in plain]
    for index, study in enumerate(studies):
        assert (study.report, study.said) == recombine(bank(), study.drawn or (), 3, index) and study.rendered
    assert "sentences" in json.loads((tmp_path / "real" / "prepare.json").read_text())
    with pytest.raises(ValueError, match=r"made with other settings.*sentences"):
        write(tmp_path / "real", sentences=sort_sentences(list(READ)[:8], list(READ.values())[:8]))
    with pytest.raises(ValueError, match="sentences with preset 'five'"):
        write(tmp_path / "five", preset="five", sentences=bank())


def test_the_command_reads_each_sentence_once_with_the_labeler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def label(self, texts: list[str], progress: bool) -> np.ndarray:
            assert sorted(texts) == sorted(READ)
            return np.array([READ[text] for text in texts])

    monkeypatch.setattr(command, "load_labeler", lambda arguments: Reader())
    write_reports_csv(tmp_path / "reports.csv", {"a": " ".join(READ), "b": " ".join(reversed(READ))})
    given = ["prepare", "phantom", "-o", str(tmp_path / "out"), "--side", "32", "--splits", "train=20"]
    given += ["--sentences", str(tmp_path / "reports.csv")]
    assert main([*given, "--preset", "balanced"]) != 0 and "--labeler PATH go together" in capsys.readouterr().err
    given += ["--labeler", "somewhere"]
    assert main([*given, "--preset", "five"]) != 0 and "it is for --preset balanced" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with few_texts():
        assert main([*given, "--preset", "balanced"]) in (0, None)
    said = capsys.readouterr().out
    assert "3 sentences that affirm one finding, 3 that deny some" in said and "passed over" in said
    reports = [study.report for study in read_manifest(tmp_path / "out" / "manifest.jsonl")]
    assert all(set(split(report or "")) <= set(READ) for report in reports)
