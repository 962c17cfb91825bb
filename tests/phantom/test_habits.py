"""Radiologists' habits and faint findings: the shares come out as asked, and nothing else of a study changes."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import pytest

from mrg_r1.phantom.habits import USUAL, Habits, writer_of
from mrg_r1.phantom.sampler import FIVE_FINDINGS, sample_study
from mrg_r1.phantom.traits import FAINT

STUDIES = range(1500)
SILENT = Habits(writers=4, negatives_stated=0.7, passed_over=0.4, normal_alike=0.9)


@pytest.fixture(scope="module")
def studies():
    return [sample_study("five", 3, index, faint=0.3, habits=SILENT) for index in STUDIES]


def test_what_is_there_does_not_depend_on_who_writes(studies) -> None:
    for study in studies[:300]:
        usual = sample_study("five", 3, study.index)
        assert study.drawn == usual.drawn and study.patient_id == usual.patient_id


def test_findings_are_passed_over_and_negatives_stated_as_often_as_asked(studies) -> None:
    said = {1: [], 0: []}
    for study in studies:
        for observation in FIVE_FINDINGS:
            said[study.drawn[observation]].append(study.said[observation])
    passed = np.mean([value is None for value in said[1]])
    stated = np.mean([value == 0 for value in said[0]])
    assert passed == pytest.approx(0.4, abs=0.03) and stated == pytest.approx(0.7, abs=0.03)
    assert 1 not in said[0] and 0 not in said[1]


def test_faint_findings_are_as_many_and_of_every_strength(studies) -> None:
    strengths = [study.strengths[o] for study in studies for o in FIVE_FINDINGS if study.drawn[o] == 1]
    faint = [strength for strength in strengths if strength < 1]
    assert len(faint) / len(strengths) == pytest.approx(0.3, abs=0.03)
    assert max(faint) <= FAINT and np.mean(faint) == pytest.approx(FAINT / 2, abs=0.02)
    assert all(study.strengths[o] == 0 for study in studies for o in FIVE_FINDINGS if study.drawn[o] == 0)


def test_denials_are_worded_alike(studies) -> None:
    stock = sum(
        sentence in ("No cardiomegaly", "No nodule", "No pneumothorax", "No pleural effusion", "No support device")
        for study in studies
        for sentence in study.report.removesuffix(".").split(". ")
    )
    denied = sum(value == 0 for study in studies for value in study.said[:13])
    assert stock / denied > 0.8
    usual = [sample_study("five", 3, index) for index in range(300)]
    few = sum(len(re.findall(r"No (?:cardiomegaly|nodule|pneumothorax)\.", study.report)) for study in usual)
    assert few / sum(value == 0 for study in usual for value in study.said[:13]) < 0.2


def test_writers_differ_in_wording_and_in_silence() -> None:
    by_writer = defaultdict(list)
    for index in STUDIES:
        by_writer[id(writer_of(SILENT, 3, index))].append(index)
    assert len(by_writer) == 4 and min(map(len, by_writer.values())) > len(STUDIES) / 8
    writers = [writer_of(SILENT, 3, indices[0]) for indices in by_writer.values()]
    assert sorted(round(writer.passed_over, 3) for writer in writers) == [0.2, 0.333, 0.467, 0.6]
    assert np.mean([writer.negatives_stated for writer in writers]) == pytest.approx(0.7)
    assert len({str(writer.lexicon.noun_frames) for writer in writers}) == 4


def test_the_mean_silence_is_kept_where_the_largest_would_not_be_a_share() -> None:
    silent = Habits(writers=3, negatives_stated=0.2)
    stated = sorted({writer_of(silent, 0, index).negatives_stated for index in range(60)})
    assert stated == pytest.approx([0.0, 0.2, 0.4])


def test_usual_habits_are_one_writer_with_all_frames() -> None:
    assert writer_of(USUAL, 0, 5).lexicon is writer_of(USUAL, 1, 6).lexicon
    assert sample_study("five", 0, 7) == sample_study("five", 0, 7, faint=0.0, habits=Habits())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"writers": 0}, "writers 0"),
        ({"passed_over": 0.7}, "passed_over 0.7"),
        ({"negatives_stated": -0.1}, "negatives_stated -0.1"),
        ({"normal_alike": 1.5}, "normal_alike 1.5"),
    ],
)
def test_a_share_outside_its_range_is_named(setting: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Habits(**setting)


def test_full_has_habits_of_its_own() -> None:
    for settings in ({"faint": 0.2}, {"habits": SILENT}):
        with pytest.raises(ValueError, match="preset five"):
            sample_study("full", 0, 0, **settings)
    with pytest.raises(ValueError, match=r"faint 1\.2"):
        sample_study("five", 0, 0, faint=1.2)
