"""Preset `full`: what is true, what is said, who has two studies, and words that say no more than that."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np
import pytest

from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.phantom.full import sample_full
from mrg_r1.phantom.lexicon_full import COMPARED, FULL, INDICATIONS, NEUTRAL_INDICATIONS, REMARKS, TECHNIQUE
from mrg_r1.phantom.sampler import sample_balanced, sample_study
from mrg_r1.phantom.study import PhantomStudy
from mrg_r1.phantom.views import patient_traits
from mrg_r1.phantom.wording import SPLITS, write_report
from tests.phantom.keyword_reader import read_report
from tests.phantom.vocabulary import vocabulary_texts

SEED = 4
FRACTURE, SUPPORT_DEVICES = 11, 12


@lru_cache
def studies(wording: str = "train", count: int = 4000) -> list[PhantomStudy]:
    return [sample_study("full", SEED, index, wording=wording) for index in range(count)]


@lru_cache
def balanced(wording: str = "train", count: int = 1500) -> list[PhantomStudy]:
    return [sample_balanced("full", SEED, index, wording=wording) for index in range(count)]


def test_the_truth_follows_what_is_said() -> None:
    drawn_of: dict[int | None, list[int | None]] = defaultdict(list)
    for study in studies():
        assert len(classes_of_values(study.drawn)) == len(classes_of_values(study.said)) == 14
        for truth, text, shown in zip(study.drawn[:13], study.said[:13], study.shown[:13], strict=True):
            drawn_of[text].append(truth)
            assert shown == (truth if truth == 0 or text == 1 else -1)  # doubted and overlooked findings are faint
    assert set(drawn_of[1]) == {1} and set(drawn_of[0]) == {0}
    assert abs(np.mean(drawn_of[-1]) - 0.5) < 0.08
    assert 0 < np.mean(drawn_of[None]) < 0.005
    for study in studies():
        for values in (study.drawn, study.said):
            assert values[13] == (None if any(value in (1, -1) for value in values[:12]) else 1)


@pytest.mark.parametrize("wording", ["train", "heldout", "all"])
def test_an_independent_reader_finds_exactly_what_is_said(wording: str) -> None:
    for study in (*studies(wording, 1500), *balanced(wording)):
        assert read_report(study.report) == list(study.said[:13]), study.report


def test_wording_changes_the_report_alone() -> None:
    for train, heldout in zip(studies(), studies("heldout", 1500), strict=False):
        assert train.report != heldout.report
        assert (train.drawn, train.said, train.views, train.prior, train.indication) == (
            heldout.drawn,
            heldout.said,
            heldout.views,
            heldout.prior,
            heldout.indication,
        )


def test_the_splits_of_wording_share_no_frame_and_no_sentence() -> None:
    for frames in (FULL.noun_frames, FULL.clause_frames, FULL.change_frames):
        for value in frames["train"]:  # type: ignore[attr-defined]
            assert not set(frames["train"][value]) & set(frames["heldout"][value])  # type: ignore[index]
    for texts in (FULL.pair_frames, FULL.triple_frames, FULL.normal, REMARKS):
        assert not set(texts["train"]) & set(texts["heldout"])
    for by_kind in (TECHNIQUE, COMPARED):
        assert not {text for texts in by_kind["train"].values() for text in texts} & {
            t for ts in by_kind["heldout"].values() for t in ts
        }
    said = {
        split: {
            sentence.rstrip(".").lower()
            for study in (*studies(split, 1500), *balanced(split))
            for sentence in study.report.rstrip(".").split(". ")
        }
        for split in SPLITS
    }
    assert min(len(sentences) for sentences in said.values()) > 2000
    assert not said["train"] & said["heldout"]


def test_reports_vary_and_keep_to_a_hundred_words() -> None:
    lengths = [len(study.report.split()) for study in (*studies(), *balanced())]
    assert min(lengths) > 0 and max(lengths) <= 100
    reports = {study.report for study in studies()}
    assert len(reports) > 0.85 * len(studies())


def test_sides_zones_and_severity_in_the_words_are_those_of_the_picture() -> None:
    checked = {"left": 0, "both": 0, "severe": 0, "mild": 0, "displaced": 0}
    for index in range(4000):
        observation = index % 13
        said: list[int | None] = [None] * 14
        said[observation] = 1
        traits = patient_traits(SEED, index)
        trait = traits[observation]
        words = write_report(said, traits, np.random.default_rng(index), lexicon=FULL).lower().rstrip(".").split()
        for side in ("left", "right"):
            assert side not in words or trait.side == side
            checked["left"] += side in words
        for both in ("bilateral", "sides"):
            assert both not in words or trait.side == "both"
            checked["both"] += both in words
        for zone in ("upper", "mid", "lower"):
            assert zone not in words or trait.zone == zone
        for size, (low, high) in {
            "mild": (0, 0.34),
            "mildly": (0, 0.34),
            "severe": (0.66, 1),
            "severely": (0.66, 1),
        }.items():
            if size in words and observation != 6:
                assert low <= trait.grade <= high
                checked[size.removesuffix("ly")] += 1
        if "displaced" in words:
            assert observation == FRACTURE and trait.grade >= 0.5
            checked["displaced"] += 1
    assert min(checked.values()) > 20, checked
    sided = {o for i in range(400) for o, trait in enumerate(patient_traits(SEED, i)) if trait.side == "both"}
    assert sided == {2, 4, 5, 6, 7, 9, 10}


def test_some_patients_have_two_studies_whose_findings_go_together() -> None:
    by_index = {study.index: study for study in studies()}
    later = [study for study in studies() if study.prior is not None]
    assert abs(len(later) / len(studies()) - 0.15) < 0.025
    same, chance = [], []
    for study in later:
        assert study.prior == study.index - 1 and study.index % 2 == 1
        first = by_index[study.prior]
        assert (
            first.patient_id == study.patient_id
            and first.patient == study.patient == first.index
            and first.prior is None
        )
        other = by_index[(study.prior + 10) % len(by_index)]
        for o in range(13):
            if study.said[o] == 1:
                same.append(first.said[o] == 1)
                chance.append(other.said[o] == 1)
        assert study.comparison == "Earlier chest radiograph."
    assert np.mean(same) > 0.4 and np.mean(chance) < 0.2
    alone = [study for study in studies() if study.prior is None]
    assert all(study.comparison == "None." and study.patient == study.index for study in alone)
    assert len({study.patient_id for study in studies()}) == len(alone)


@pytest.mark.parametrize("wording", SPLITS)
def test_change_is_spoken_of_only_where_it_is_true(wording: str) -> None:
    seen = {"new": 0, "unchanged": 0}
    every = [sample_full(SEED, index, wording=wording) for index in range(4000)]
    for study in every:
        sentences = study.report.lower().rstrip(".").split(". ")
        for sentence in sentences:
            said = read_report(sentence)
            old = any(word in sentence.split() for word in ("unchanged", "again", "stable"))
            new = any(word in sentence.split() for word in ("new", "now"))
            if not old and not new:
                continue
            assert study.prior is not None
            (observation,) = [o for o, value in enumerate(said) if value is not None]
            before = every[study.prior].said[observation]
            assert said[observation] == 1 and before == (1 if old else 0), study.report
            if old:  # the same strength from the same traits: unchanged in the picture too
                assert study.shown[observation] == every[study.prior].shown[observation] == 1
            seen["unchanged" if old else "new"] += 1
        if "earlier study" in study.report and "no earlier" not in study.report.lower():
            assert study.prior is not None
        if "No comparison" in study.report or "no earlier study" in study.report or "not available" in study.report:
            assert study.prior is None
    assert min(seen.values()) > 20, seen


def test_the_lungs_are_not_called_clear_beside_a_finding_in_them() -> None:
    clear = [
        study
        for study in (*studies(), *balanced())
        if "lungs are clear" in study.report.lower() or "lungs are found clear" in study.report
    ]
    assert len(clear) > 20
    for study in clear:
        assert not any(study.said[o] in (1, -1) for o in (3, 4, 5, 6, 7, 8, 9)), study.report


def test_some_studies_have_one_view_and_no_report_speaks_of_another() -> None:
    one = [study for study in studies() if study.views == ("frontal",)]
    assert abs(len(one) / len(studies()) - 0.15) < 0.025
    assert all(study.views == ("frontal", "lateral") for study in studies() if len(study.views) != 1)
    assert not any("and lateral" in study.report for study in one)
    assert not any("single frontal" in study.report for study in studies() if len(study.views) == 2)
    assert any("and lateral" in study.report for study in studies())


def test_an_indication_hints_at_findings_and_settles_none() -> None:
    texts = {text for group in INDICATIONS for text in group} | set(NEUTRAL_INDICATIONS)
    every = [*studies(), *(sample_study("full", SEED + 1, index) for index in range(8000))]
    assert {study.indication for study in every} == texts
    groups = {**INDICATIONS, NEUTRAL_INDICATIONS: ()}
    for group, observations in groups.items():
        with_it = [study for study in every if study.indication in group]
        for observation in range(13):
            drawn = np.mean([study.drawn[observation] for study in with_it])
            base = np.mean([study.drawn[observation] for study in every])
            # the most that a weight of 3 to 1 can do is to treble
            assert drawn <= 3 * base + 0.01 and drawn < 0.6, (group, OBSERVATIONS[observation])
        if observations:
            hit = np.mean([any(study.drawn[o] == 1 for o in observations) for study in with_it])
            assert hit > 1.3 * np.mean([any(study.drawn[o] == 1 for o in observations) for study in every])


def test_balanced_texts_hold_enough_of_every_value() -> None:
    said = [study.said[:13] for study in balanced()]
    for observation in range(13):
        values = [row[observation] for row in said]
        for value, share in ((1, 0.14), (0, 0.26), (-1, 0.12), (None, 0.48)):
            assert abs(values.count(value) / len(values) - share) < 0.05


def test_the_vocabulary_texts_cover_what_is_written() -> None:
    words = {word.strip(".,").lower() for text in vocabulary_texts(FULL) for word in text.split()}
    around = [t for texts in REMARKS.values() for t in texts]
    around += [
        t
        for split in SPLITS
        for kinds in (TECHNIQUE[split], COMPARED[split])
        for texts in kinds.values()
        for t in texts
    ]
    words |= {word.strip(".,:").lower() for text in around for word in text.split()}
    written = {
        word.strip(".,:").lower()
        for study in (*studies("all", 1500), *balanced("all"))
        for word in study.report.split()
    }
    assert written <= words


def test_no_study_depends_on_the_order_of_asking() -> None:
    backwards = [sample_study("full", SEED, index) for index in reversed(range(50))]
    assert backwards[::-1] == studies()[:50]
    assert [sample_study("full", SEED + 1, index).report for index in range(50)] != [
        study.report for study in studies()[:50]
    ]
    with pytest.raises(ValueError, match="wording 'dev'.*heldout"):
        sample_study("full", 0, 0, wording="dev")
    with pytest.raises(ValueError, match="index -1"):
        sample_study("full", 0, -1)
