"""What a probe says of samples that are written by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mrg_r1.evaluation.probe import Sample, measure, outlook, verdict
from mrg_r1.labels.observations import NEGATIVE, OBSERVATIONS, POSITIVE

HEART, EFFUSION, EDEMA = (OBSERVATIONS.index(name) for name in ("Cardiomegaly", "Pleural Effusion", "Edema"))
STUDIES, GROUP = 12, 4


def classes(*shape):
    return np.zeros((*shape, len(OBSERVATIONS)), dtype=np.int64)


@pytest.fixture
def sample():
    """Of twelve studies the first six have a large heart, the first four an effusion, the last three an edema. Every
    other sample sees the heart, nobody speaks of the effusion, edema is said of anybody; greedy reports are silent.
    """
    reference, labels = classes(STUDIES), classes(STUDIES, GROUP)
    reference[:6, HEART] = reference[:4, EFFUSION] = reference[9:, EDEMA] = POSITIVE
    labels[:6, ::2, HEART] = POSITIVE
    labels[:, 1, EDEMA] = POSITIVE
    labels[6:, :, HEART] = NEGATIVE
    total = np.tile(np.array([0.5, 0.2, 0.6, 0.1]), (STUDIES, 1))
    return Sample(
        reference=reference,
        labels=labels,
        greedy_labels=classes(STUDIES),
        total=total,
        greedy_total=np.full(STUDIES, 0.4),
        constant=np.full(STUDIES, 0.3),
        other_total=total / 2,
        silent=np.zeros(STUDIES, dtype=bool),
        texts=[[f"report {study}, {member}" for member in range(GROUP)] for study in range(STUDIES)],
        greedy_texts=[f"report {study}" for study in range(STUDIES)],
        lengths=np.full((STUDIES, GROUP), 10),
        greedy_lengths=np.full(STUDIES, 8),
        ended=np.ones((STUDIES, GROUP), dtype=bool),
    )


def said(sample):
    return "\n".join(verdict(measure(sample)))


def test_numbers_are_those_of_the_samples(sample):
    result = measure(sample)
    assert json.loads(json.dumps(result)) == result  # plain values
    reward = result["reward"]
    assert (reward["greedy"], reward["sampled"], reward["best"]) == pytest.approx((0.4, 0.35, 0.6))
    assert (reward["constant"], reward["best_for_another_study"]) == pytest.approx((0.3, 0.3))
    heart = result["observations"]["Cardiomegaly"]
    assert (heart["true"], heart["false"], heart["greedy_recall"]) == (6, 6, 0)
    assert (heart["said_when_true"], heart["said_when_false"], heart["recall_at_group"], heart["auc"]) == (0.5, 0, 1, 1)
    assert result["observations"]["Pleural Effusion"]["recall_at_group"] == 0
    assert result["observations"]["Fracture"]["recall_at_group"] is None and "No Finding" not in result["observations"]
    # of the best report of each group, the third: the six hearts right; four effusions and three edemas missed
    best = result["disease_micro13"]["best"]
    assert (best["precision"], best["recall"]) == pytest.approx((1, 6 / 13))
    assert result["disease_micro13"]["greedy"]["f1"] == 0
    # studies 4 and 5 (a heart alone): samples 0 and 2; 6 to 8 (nothing): 0, 2, 3; 9 to 11 (edema): 1
    right = result["all_findings_right"]
    assert right["sampled"] == pytest.approx((2 * 2 + 3 * 3 + 3) / 48)
    assert (right["any"], right["mixed"], right["greedy"]) == pytest.approx((8 / 12, 8 / 12, 3 / 12))


def test_findings_that_are_never_sampled_cannot_be_found(sample):
    assert "1 of 3 findings are never sampled where they are true (Pleural Effusion): RL cannot find them" in said(
        sample
    )


def test_what_is_said_of_anybody_is_not_seen(sample):
    assert "1 of 3 findings are sampled about as often where they are absent (Edema)" in said(sample)


def test_what_is_seen_and_not_said_is_what_rl_mends(sample):
    assert "1 of 3 findings are seen and not said" in said(sample) and "Cardiomegaly 0.00" in said(sample)
    spoken = classes(STUDIES)
    spoken[:6, HEART] = POSITIVE
    assert "not said" not in said(replace(sample, greedy_labels=spoken))


def test_too_few_true_studies_say_nothing(sample):
    reference = sample.reference.copy()
    reference[2:, EFFUSION] = 0
    text = said(replace(sample, reference=reference))
    assert "never sampled" not in text and "Pleural Effusion: fewer than 3 true studies" in text


def test_studies_without_any_finding_are_named(sample):
    assert "no reference has a positive finding" in said(replace(sample, reference=classes(STUDIES)))


def test_a_policy_that_always_writes_one_report_is_named_so(sample):
    one = replace(
        sample,
        texts=[["The same."] * GROUP] * STUDIES,
        greedy_texts=["The same."] * STUDIES,
        silent=np.ones(STUDIES, dtype=bool),
        total=np.full((STUDIES, GROUP), 0.4),
        other_total=np.full((STUDIES, GROUP), 0.4),
    )
    assert outlook(measure(one)) == "nothing"
    assert verdict(measure(one))[0].startswith("the policy always writes one report: all 48 samples are the same")
    greedy_alone = replace(sample, greedy_texts=["The same."] * STUDIES)
    assert "the greedy report is one and the same for all 12 studies" in said(greedy_alone)
    assert "always writes one report" not in said(greedy_alone)


def test_gain_luck_noise_and_the_constant_report_are_told_with_their_numbers(sample):
    text = said(sample)
    assert outlook(measure(sample)) == "something"
    assert "the best of 4 earns 0.600, the greedy report 0.400: at most 0.200 is within reach" in text
    assert "the best of 4 of another study, luck alone, earns 0.300" in text
    assert "a sample earns 0.050 less than the greedy report" in text
    assert "one training report for every study" not in text
    assert "one training report for every study earns 0.500" in said(replace(sample, constant=np.full(STUDIES, 0.5)))


def test_a_start_with_little_to_gain_is_called_so(sample):
    at_the_top = replace(sample, greedy_total=np.full(STUDIES, 0.6))
    assert outlook(measure(at_the_top)) == "little" and "hardly anything better" in said(at_the_top)
    blind = replace(sample, other_total=sample.total)
    assert outlook(measure(blind)) == "little" and "hardly depends on the radiograph" in said(blind)
    tiny = replace(
        sample, total=sample.total / 50, greedy_total=sample.greedy_total / 50, other_total=sample.total / 100
    )
    assert outlook(measure(tiny)) == "something"  # a reward of another scale
    alone = replace(sample, other_total=None)  # a single study has no other
    assert outlook(measure(alone)) == "something" and "luck" not in said(alone)


def test_silent_groups_and_bad_form_are_named(sample):
    assert "signal" not in said(sample) and "max_new_tokens" not in said(sample)
    silent = np.arange(STUDIES) < 9
    assert "75% of groups have no signal" in said(replace(sample, silent=silent))
    ended = sample.ended.copy()
    ended[:, 0] = False
    assert "25% of samples are cut off at rollout.max_new_tokens" in said(replace(sample, ended=ended))
    labels, texts = sample.labels.copy(), [[None, *group[1:]] for group in sample.texts]
    labels[:, 0] = -1
    malformed = replace(sample, labels=labels, texts=texts)
    assert "25% of samples hold no report that can be read" in said(malformed)
    assert measure(malformed)["observations"]["Cardiomegaly"]["said_when_true"] == 0.25
