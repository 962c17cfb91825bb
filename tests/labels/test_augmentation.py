"""Augmentation: the labels of two reports read as one, and a pass that holds every report once."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrg_r1.labels.augmentation import Augmentation, Example, SpecialIds, one_pass, unite
from mrg_r1.labels.observations import BLANK, NEGATIVE, NO_FINDING, POSITIVE, UNCERTAIN

SPECIAL = SpecialIds(cls=1, sep=2, mask=3, unknown=4, pad=0)
UNCHANGED = Augmentation(joined=0.0, shuffled=0.0, masked=0.0, spread=0.0)
CLASSES = st.builds(
    lambda thirteen, no_finding: np.array([*thirteen, no_finding]),
    st.lists(st.integers(0, 3), min_size=13, max_size=13),
    st.integers(0, 1),
)


def drawn(augmentation: Augmentation, reports: int, seed: int = 0, longest: int = 512) -> list[Example]:
    """One pass over reports of two sentences; report r says 100 + r and 1000 + r, and has its own classes."""
    sentences = [[[100 + row], [1000 + row]] for row in range(reports)]
    rng = random.Random(seed)
    batches = list(one_pass(sentences, classes_of(reports), augmentation, SPECIAL, batch=4, longest=longest, rng=rng))
    assert all(len(batch) == 4 for batch in sorted(batches, key=len)[1:])
    return [example for batch in batches for example in batch]


def classes_of(reports: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (reports, 14))
    classes[:, NO_FINDING] %= 2
    return classes


def test_of_two_reports_the_stronger_class_holds() -> None:
    by_strength = [BLANK, NEGATIVE, UNCERTAIN, POSITIVE]
    for weaker, first in enumerate(by_strength):
        for second in by_strength[weaker:]:
            both = unite(np.full(14, first), np.full(14, second))
            assert (both[:NO_FINDING] == second).all()
            assert (unite(np.full(14, second), np.full(14, first))[:NO_FINDING] == second).all()


def test_no_finding_holds_only_where_both_reports_have_none() -> None:
    for first, second, both in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0)):
        a, b = np.zeros(14, dtype=np.int64), np.zeros(14, dtype=np.int64)
        a[NO_FINDING], b[NO_FINDING] = first, second
        assert unite(a, b)[NO_FINDING] == both


@given(CLASSES, CLASSES, CLASSES)
def test_uniting_keeps_to_a_set_unions_laws(a: NDArray[np.int64], b: NDArray[np.int64], c: NDArray[np.int64]) -> None:
    before = a.copy()
    assert (unite(a, b) == unite(b, a)).all()
    assert (unite(a, a) == a).all()
    assert (unite(unite(a, b), c) == unite(a, unite(b, c))).all()
    assert (a == before).all()  # the caller's classes stay


def test_without_changes_every_report_comes_whole_once() -> None:
    examples = drawn(UNCHANGED, 11)
    assert sorted(example.ids for example in examples) == [[1, 100 + row, 1000 + row, 2] for row in range(11)]
    for example in examples:
        assert (example.classes == classes_of(11)[example.ids[1] - 100]).all()


def test_joined_reports_carry_both_texts_and_their_united_labels() -> None:
    classes = classes_of(7)
    examples = drawn(Augmentation(joined=1.0, shuffled=1.0, masked=0.0, spread=0.0), 7)
    assert sorted(example.reports for example in examples) == [1, 2, 2, 2]
    assert sorted(token for example in examples for token in example.ids[1:-1]) == sorted(
        [*range(100, 107), *range(1000, 1007)]
    )
    for example in examples:
        rows = sorted({token % 100 for token in example.ids[1:-1]})
        assert len(rows) == example.reports
        assert (example.classes == unite(classes[rows[0]], classes[rows[-1]])).all()


def test_the_share_of_joined_reports_is_as_asked() -> None:
    examples = drawn(Augmentation(joined=0.6, shuffled=0.0, masked=0.0, spread=0.0), 4000)
    assert sum(example.reports for example in examples) == 4000
    assert abs(sum(2 for example in examples if example.reports == 2) / 4000 - 0.6) < 0.03


def test_masking_and_spreading_touch_the_asked_share_and_no_special_token() -> None:
    masked = drawn(Augmentation(joined=0.0, shuffled=0.0, masked=0.3, spread=0.0), 2000)
    assert abs(np.mean([token == SPECIAL.mask for example in masked for token in example.ids[1:-1]]) - 0.3) < 0.03
    spread = drawn(Augmentation(joined=0.0, shuffled=0.0, masked=0.0, spread=0.5), 2000)
    strewn = sum(token == SPECIAL.unknown for example in spread for token in example.ids)
    assert abs(strewn / 4000 - 0.5 * 1.5) < 0.05
    for example in [*masked, *spread]:
        assert example.ids[0] == SPECIAL.cls and example.ids[-1] == SPECIAL.sep


def test_a_long_example_is_cut_with_sep_last() -> None:
    for example in drawn(Augmentation(joined=1.0, shuffled=0.0, masked=0.0, spread=0.0), 8, longest=5):
        assert len(example.ids) == 5 and example.ids[-1] == SPECIAL.sep


def test_the_same_seed_draws_the_same_pass() -> None:
    changed = Augmentation(joined=0.5, shuffled=0.5, masked=0.1, spread=0.2)
    first, second, other = ([example.ids for example in drawn(changed, 50, seed)] for seed in (1, 1, 2))
    assert first == second != other
