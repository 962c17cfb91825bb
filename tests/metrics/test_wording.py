"""Repetition and contradiction by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.metrics.wording import contradictions, read_contradictions, repeats_sentence, repetition, wording
from tests.reward.keyword_labeler import KeywordLabeler


@pytest.mark.parametrize(
    ("text", "twice", "share"),
    [
        ("Clear lungs. No effusion.", False, 0.0),
        ("Clear lungs. No effusion. Clear lungs.", True, 1 / 3),  # a sentence of three
        ("Clear lungs. No effusion. CLEAR  lungs", True, 1 / 3),  # case, marks and white space are nothing
        ("1. No change. 2. No change.", True, 1 / 2),  # nor is the number of an enumeration
        ("No effusion. No effusion. No effusion. No effusion.", True, 3 / 4),
        # inside one sentence: 8 two-grams, three in turn; of the 7 three-grams 4 stood before
        ("the lungs are the lungs are the lungs are", False, 5 / 8),
        # 7 two-grams, `mediastinal widening` thrice, and 3 more in the second sentence
        (
            "No mediastinal widening, mediastinal widening, or mediastinal widening. No pneumothorax or device.",
            False,
            0.2,
        ),
        ("pleural pleural pleural plaque", False, 1 / 3),
        # a two-gram in two sentences is wording that comes back
        ("Mild edema left. Mild edema right.", False, 0.0),
        # a frame that serves two findings: `there is no` is one of four
        ("There is no effusion. There is no edema.", False, 1 / 4),
        # no three-gram reaches over a full stop
        ("No large effusion. No large edema.", False, 0.0),
        ("A 1.5 cm nodule. A 2.5 cm nodule.", False, 0.0),
        ("", False, 0.0),
        ("...", False, 0.0),
    ],
)
def test_repetition(text: str, twice: bool, share: float) -> None:
    assert repeats_sentence(text) is twice
    assert repetition(text) == pytest.approx(share)


@given(st.text(alphabet="ab .", max_size=60))
def test_repetition_is_a_share_and_grows_when_all_is_said_again(text: str) -> None:
    assert 0 <= repetition(text) < 1
    assert repetition(f"{text}. {text}.") >= repetition(text)
    assert repetition(text) > 0 or not repeats_sentence(text)


def test_contradictions_are_counted_by_observation_and_uncertain_is_neither() -> None:
    reports = [
        "effusion. no effusion. no effusion.",  # one observation, however often
        "effusion. no effusion. edema. no edema.",
        "maybe effusion. no effusion.",
        "effusion. maybe effusion.",
        "effusion. effusion.",
        "",
    ]
    labeler = KeywordLabeler()
    assert read_contradictions(reports, labeler.label).tolist() == [1, 2, 0, 0, 0, 0]
    assert len(labeler.calls) == 1 and len(labeler.calls[0]) == len(set(labeler.calls[0]))
    assert read_contradictions(["", ""], labeler.label).tolist() == [0, 0]


def test_no_finding_beside_a_finding_is_no_contradiction_of_it() -> None:
    rows = np.zeros((2, 14), dtype=np.int64)
    rows[0, 13], rows[1, 9] = 1, 1
    assert contradictions([2], rows).tolist() == [0]
    with pytest.raises(ValueError, match="3 sentences and 2 rows"):
        contradictions([3], rows)


def test_wording_is_of_the_reports_that_can_be_read() -> None:
    found = wording(["No edema. No edema.", None, "Edema."], [0, None, 2])
    assert found.repeated_sentence == 0.5 and found.repetition == 0.25 and found.contradiction == 0.5
    assert wording(["Edema.", "Edema."], [None, 1]).contradiction is None
    nothing = wording([None], [None])
    assert (nothing.repeated_sentence, nothing.repetition, nothing.contradiction) == (None, None, None)
