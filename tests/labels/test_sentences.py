"""Where a sentence of a report ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.labels.sentences import sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Clear lungs. No effusion.", ["Clear lungs.", "No effusion."]),
        ("A 1.5 cm nodule. Stable.", ["A 1.5 cm nodule.", "Stable."]),
        ("Seen by Dr. Smith. Stable.", ["Seen by Dr. Smith.", "Stable."]),
        ("A nodule, approx. 2 cm, e.g. a granuloma.", ["A nodule, approx. 2 cm, e.g. a granuloma."]),
        ("1. Clear lungs. 2) No effusion.", ["1. Clear lungs.", "2) No effusion."]),
        ("Clear lungs.No effusion.", ["Clear lungs.", "No effusion."]),
        ("the lungs are clear . no effusion .", ["the lungs are clear .", "no effusion ."]),
        ("Is it new? Yes!\n It  is.", ["Is it new?", "Yes!", "It is."]),
        ("肺は清明。胸水なし。", ["肺は清明。", "胸水なし。"]),
        ("no full stop", ["no full stop"]),
        ("Compared to 2019. No change.", ["Compared to 2019.", "No change."]),
        (" . ", ["."]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet="aB1 .!?)\n。", max_size=40))
def test_nothing_is_lost(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
