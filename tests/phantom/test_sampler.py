from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.phantom.sampler import FIVE_FINDINGS, PRESETS, sample_study
from mrg_r1.phantom.study import PhantomStudy
from mrg_r1.phantom.traits import LINE, sample_traits
from tests.phantom.keyword_reader import read_report

SUPPORT_DEVICES = OBSERVATIONS.index("Support Devices")


@lru_cache
def studies(wording: str = "train", count: int = 3000) -> list[PhantomStudy]:
    return [sample_study("five", 7, index, wording=wording) for index in range(count)]


def test_the_five_are_large_enough_to_be_seen() -> None:
    assert PRESETS == ("five", "full", "balanced")
    assert [OBSERVATIONS[i] for i in FIVE_FINDINGS] == [
        "Cardiomegaly",
        "Lung Lesion",
        "Pneumothorax",
        "Pleural Effusion",
        "Support Devices",
    ]


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), wording=st.sampled_from(["train", "heldout", "all"]))
@settings(max_examples=60, deadline=None)
def test_a_study_follows_from_its_arguments_alone(seed: int, index: int, wording: str) -> None:
    study = sample_study("five", seed, index, wording=wording)
    sample_study("five", seed, index + 1, wording=wording)
    assert sample_study("five", seed, index, wording=wording) == study
    assert len(classes_of_values(study.drawn)) == len(classes_of_values(study.said)) == 14


def test_wording_changes_the_report_and_nothing_else() -> None:
    for train, heldout in zip(studies(), studies("heldout"), strict=True):
        assert (train.drawn, train.said, train.patient_id) == (heldout.drawn, heldout.said, heldout.patient_id)
    assert all(train.report != heldout.report for train, heldout in zip(studies(), studies("heldout"), strict=True))


def test_seeds_and_indices_give_different_studies() -> None:
    assert len({(study.drawn, study.report) for study in studies()}) > 0.9 * len(studies())
    others = [sample_study("five", 8, index) for index in range(200)]
    assert sum(a.report == b.report for a, b in zip(others, studies(), strict=False)) < 5
    assert (
        len({study.patient_id for study in studies()} | {study.patient_id for study in others}) == len(studies()) + 200
    )


def test_each_finding_is_drawn_in_about_a_third_of_studies() -> None:
    drawn = np.array([[study.drawn[i] for i in FIVE_FINDINGS] for study in studies()])
    assert (np.abs(drawn.mean(axis=0) - 0.35) < 0.04).all(), drawn.mean(axis=0)
    outside = set(range(13)) - set(FIVE_FINDINGS)
    assert all(study.drawn[i] == 0 and study.said[i] is None for study in studies() for i in outside)


@pytest.mark.parametrize("pair", [("Cardiomegaly", "Pleural Effusion"), ("Pneumothorax", "Support Devices")])
def test_what_goes_together_in_life_is_drawn_together(pair: tuple[str, str]) -> None:
    a, b = ([study.drawn[OBSERVATIONS.index(name)] for study in studies()] for name in pair)
    assert 0.1 < np.corrcoef(a, b)[0, 1] < 0.4


def test_the_truth_is_said_left_out_or_doubted_at_the_stated_rates() -> None:
    pairs = [(study.drawn[i], study.said[i]) for study in studies() for i in FIVE_FINDINGS]
    of_positives = [said for drawn, said in pairs if drawn == 1]
    of_negatives = [said for drawn, said in pairs if drawn == 0]
    for value, share in ((1, 0.93), (-1, 0.05), (None, 0.02), (0, 0.0)):
        assert abs(of_positives.count(value) / len(of_positives) - share) < 0.012, value
    for value, share in ((0, 0.85), (None, 0.15), (1, 0.0), (-1, 0.0)):
        assert abs(of_negatives.count(value) / len(of_negatives) - share) < 0.015, value


@pytest.mark.parametrize("wording", ["train", "heldout", "all"])
def test_an_independent_reader_finds_exactly_what_is_said(wording: str) -> None:
    for study in studies(wording):
        assert read_report(study.report) == list(study.said[:13]), study


def test_no_finding_is_said_exactly_where_nothing_but_devices_is_positive_or_uncertain() -> None:
    for study in studies():
        for values in (study.drawn, study.said):
            abnormal = any(values[i] in (1, -1) for i in range(13) if i != SUPPORT_DEVICES)
            assert values[13] == (None if abnormal else 1)
    normal = [study for study in studies() if study.said[13] == 1]
    assert any(study.said[SUPPORT_DEVICES] == 1 for study in normal)
    explicit = [study for study in studies() if "abnormality" in study.report or "Normal chest" in study.report]
    assert all(study.said[13] == 1 for study in explicit)
    assert 0.2 < len(explicit) / len(normal) < 0.6


@pytest.mark.parametrize("wording", ["train", "heldout"])
def test_reports_are_short_and_never_empty(wording: str) -> None:
    words = [len(study.report.split()) for study in studies(wording)]
    assert 1 < min(words) and max(words) <= 45 and np.mean(words) < 25


def test_sides_and_devices_in_the_words_are_those_of_the_picture() -> None:
    checked = 0
    for study in studies():
        traits = sample_traits(7, study.index)
        for sentence in study.report.lower().split(". "):
            if study.said[8] in (1, -1) and "pneumothorax" in sentence and ("left" in sentence or "right" in sentence):
                assert traits[8].side in sentence
                checked += 1
            if study.said[12] in (1, -1) and ("central line" in sentence or "catheter" in sentence):
                assert traits[12].kind == LINE
                checked += 1
    assert checked > 500


def test_what_cannot_be_sampled_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="preset 'six'.*five, full"):
        sample_study("six", 0, 0)
    with pytest.raises(ValueError, match="wording 'dev'.*heldout"):
        sample_study("five", 0, 0, wording="dev")
    with pytest.raises(ValueError, match="index -1"):
        sample_study("five", 0, -1)


def test_a_set_prevalence_changes_that_finding_alone() -> None:
    cardiomegaly = OBSERVATIONS.index("Cardiomegaly")
    rare = [sample_study("five", 7, index, prevalence={cardiomegaly: 0.08}) for index in range(3000)]
    share = np.mean([study.drawn[cardiomegaly] for study in rare])
    assert abs(share - 0.08) < 3 * (0.08 * 0.92 / 3000) ** 0.5
    others = [finding for finding in FIVE_FINDINGS if finding != cardiomegaly]
    assert all(one.drawn[i] == usual.drawn[i] for one, usual in zip(rare, studies(), strict=True) for i in others)


@pytest.mark.parametrize(
    ("preset", "prevalence"),
    [("full", {1: 0.1}), ("five", {OBSERVATIONS.index("Edema"): 0.1}), ("five", {1: 0.0}), ("five", {1: 1.0})],
)
def test_a_prevalence_that_the_preset_cannot_have_is_refused(preset: str, prevalence: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="prevalence"):
        sample_study(preset, 0, 0, prevalence=prevalence)


def test_balanced_shows_each_finding_as_often_as_the_others_and_says_what_it_shows() -> None:
    drawn = np.array([sample_study("balanced", 7, index).drawn[:13] for index in range(2000)], dtype=float)
    assert np.all(np.abs(drawn.mean(0) - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(13)).max() < 0.1  # independent: four standard errors are 0.09
    for study in (sample_study("balanced", 7, index) for index in range(200)):
        assert study.views == ("frontal",) and study.strengths is not None
        for said, truth, strength in zip(study.said[:13], study.drawn[:13], study.strengths, strict=True):
            assert (truth == 1) == (said in (1, -1)) == (strength > 0)
            assert said != -1 or strength < 1  # what the report is not sure of is drawn faintly
