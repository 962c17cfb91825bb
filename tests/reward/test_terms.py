"""Reward terms: numbers worked out by hand, and the invariants of the signed vector's reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrg_r1.reward.terms import (
    bleu4,
    ccs,
    ce_f1,
    inverse_prevalence,
    length,
    load_callable,
    mccs,
    require_known,
    rouge_l,
)

VECTORS = st.lists(st.sampled_from([-1, 0, 1]), min_size=13, max_size=13)
MARGINS = st.floats(0.0, 0.95)


def vector(*values: int) -> NDArray[np.int8]:
    """[1, 13] with these first values, 0 after them."""
    return np.array([[*values, *[0] * (13 - len(values))]], dtype=np.int8)


def one(values: list[int]) -> NDArray[np.int8]:
    return np.array([values], dtype=np.int8)


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        (vector(1, -1), vector(1, -1), 1.0),
        (vector(1, -1), vector(-1, 1), -1.0),
        (vector(1, 0), vector(0, 1), 0.0),
        (vector(1, 1), vector(1, -1), 0.0),
        (vector(1), vector(1, -1, 0, 1), 1 / math.sqrt(3)),
        (vector(1, -1, -1), vector(1, -1, 1, 1), 1 / math.sqrt(12)),
        (vector(), vector(), 1.0),
        (vector(), vector(1), 0.0),
        (vector(-1), vector(), 0.0),
    ],
)
def test_ccs_by_hand(generated: NDArray[np.int8], reference: NDArray[np.int8], expected: float) -> None:
    assert ccs(generated, reference)[0] == pytest.approx(expected, rel=1e-6)
    assert ccs(generated, reference).dtype == np.float32


@pytest.mark.parametrize(
    ("cosine", "margin", "expected"),
    [(1, 0.5, 1), (0.75, 0.5, 0.5), (0.5, 0.5, 0), (-1, 0, 0), (0.6, 0.2, 0.5), (0.3, 0, 0.3)],
)
def test_mccs_by_hand(cosine: float, margin: float, expected: float) -> None:
    assert mccs(np.array([cosine], dtype=np.float32), margin)[0] == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(VECTORS, VECTORS, MARGINS)
def test_mccs_lies_in_the_unit_interval_and_is_symmetric(a: list[int], b: list[int], margin: float) -> None:
    value = mccs(ccs(one(a), one(b)), margin)[0]
    assert 0.0 <= value <= 1.0
    assert value == mccs(ccs(one(b), one(a)), margin)[0]
    assert -1.0 <= ccs(one(a), one(b))[0] <= 1.0


@settings(deadline=None)
@given(VECTORS, MARGINS)
def test_mccs_of_equal_vectors_is_exactly_one(a: list[int], margin: float) -> None:
    assert mccs(ccs(one(a), one(a)), margin)[0] == 1.0


@settings(deadline=None)
@given(VECTORS, VECTORS, MARGINS, MARGINS)
def test_mccs_never_grows_with_the_margin(a: list[int], b: list[int], m: float, n: float) -> None:
    cosine = ccs(one(a), one(b))
    assert mccs(cosine, max(m, n))[0] <= mccs(cosine, min(m, n))[0] + 1e-7


@settings(deadline=None)
@given(VECTORS, VECTORS, st.integers(0, 12), st.sampled_from([-1, 1]))
def test_flipping_a_shared_observation_strictly_lowers_ccs(a: list[int], b: list[int], place: int, sign: int) -> None:
    a[place] = b[place] = sign
    flipped = [*a]
    flipped[place] = -sign
    assert ccs(one(flipped), one(b))[0] < ccs(one(a), one(b))[0]


def test_an_all_blank_report_earns_nothing_where_findings_are_said() -> None:
    # element accuracy would give it 12 of 13
    assert mccs(ccs(vector(), vector(0, 1)), 0.0)[0] == 0.0


@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_margins_outside_their_range_are_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        mccs(np.ones(1, dtype=np.float32), margin)


def test_vectors_that_are_not_signed_are_refused() -> None:
    with pytest.raises(ValueError, match="13"):
        ccs(np.zeros((1, 14), dtype=np.int8), np.zeros((1, 14), dtype=np.int8))
    with pytest.raises(ValueError, match="reference"):
        ccs(vector(1), vector(3))


@settings(deadline=None)
@given(VECTORS, VECTORS, st.lists(st.floats(1e-3, 1e3), min_size=26, max_size=26))
def test_weighted_ccs_is_a_cosine(a: list[int], b: list[int], weights: list[float]) -> None:
    """Ours: symmetric, between -1 and 1, 1 for equal vectors, the paper's where all weights are equal."""
    table = np.array(weights).reshape(13, 2)
    value = ccs(one(a), one(b), table)
    assert -1 <= value[0] <= 1 and value[0] == ccs(one(b), one(a), table)[0]
    assert ccs(one(a), one(a), table)[0] == 1
    assert ccs(one(a), one(b), np.full((13, 2), weights[0]))[0] == pytest.approx(ccs(one(a), one(b))[0], abs=1e-6)
    if any(a) != any(b):
        assert value[0] == 0  # one vector zero


def test_a_rare_finding_outweighs_common_negatives() -> None:
    """100 reports: pneumothorax denied in 98, edema said in 2. Missing the edema costs more than missing the denial."""
    seen = np.zeros((100, 14), dtype=np.int64)
    seen[:98, 8], seen[:2, 4], seen[2, 4] = 2, 1, 3
    weights = inverse_prevalence(seen)
    assert weights.shape == (13, 2)
    assert weights[4, 0] == pytest.approx(102 / 4) and weights[8, 1] == pytest.approx(102 / 99) and weights[0, 0] == 102
    reference, edema, denial = np.zeros((3, 13), dtype=np.int8)
    reference[4], reference[8], edema[4], denial[8] = 1, -1, 1, -1
    plain = [ccs(report[None], reference[None])[0] for report in (edema, denial)]
    weighted = [ccs(report[None], reference[None], weights)[0] for report in (edema, denial)]
    assert plain[0] == plain[1] and weighted[0] > 0.95 and weighted[1] < 0.25


@pytest.mark.parametrize("weights", [np.ones(13), np.zeros((13, 2)), -np.ones((13, 2)), np.full((13, 2), np.nan)])
def test_weights_that_make_no_cosine_are_refused(weights: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="weights"):
        ccs(vector(1), vector(1), weights)


def classes(
    positives: tuple[int, ...], uncertain: tuple[int, ...] = (), negatives: tuple[int, ...] = ()
) -> NDArray[np.int64]:
    row = np.zeros((1, 14), dtype=np.int64)
    row[0, list(positives)] = 1
    row[0, list(uncertain)] = 3
    row[0, list(negatives)] = 2
    return row


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        (classes((1, 4)), classes((1, 4)), 1.0),
        (classes((1, 4, 5)), classes((1, 9)), 2 / 5),  # TP 1, FP 2, FN 1
        (classes(()), classes(()), 1.0),
        (classes(()), classes((1,)), 0.0),
        (classes((1,)), classes(()), 0.0),
        (classes((13,)), classes(()), 1.0),  # No Finding is left out
        (classes((1,), uncertain=(4,)), classes((1, 4)), 2 / 3),  # uncertain is not positive here
        (classes((), negatives=(1, 2)), classes((), negatives=(3,)), 1.0),
    ],
)
def test_ce_f1_by_hand(generated: NDArray[np.int64], reference: NDArray[np.int64], expected: float) -> None:
    assert ce_f1(generated, reference)[0] == pytest.approx(expected)


def test_ce_f1_needs_fourteen_classes() -> None:
    with pytest.raises(ValueError, match="14"):
        ce_f1(np.zeros((2, 13), dtype=np.int64), np.zeros((2, 13), dtype=np.int64))


def test_bleu4_by_hand() -> None:
    generated = ["the heart is large today", "the heart is very large", "no", "", "large the"]
    references = ["the heart is large today", "the heart is large", "no effusion", "the heart", "the heart is large"]
    # 2: matches 4/5, 2/4, 1/3; no four-gram of 2: 1 / (2 * 2). 3: one unigram, length penalty exp(1 - 2/1).
    # 5: unigrams 2/2, no bigram of 1: 1 / (2 * 1); orders up to 2; length penalty exp(1 - 4/2).
    expected = [1.0, (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25, math.exp(-1), 0.0, math.sqrt(1 / 2) * math.exp(-1)]
    assert bleu4(generated, references).tolist() == pytest.approx(expected, rel=1e-5)


def test_rouge_l_by_hand() -> None:
    generated = ["the heart is large", "heart  the\nis", "", "a b", "effusion"]
    references = ["the heart is large", "the heart is large", "the heart", "c d", ""]
    # 2: subsequence "heart is" of 2: P 2/3, R 2/4
    precision, recall, beta = 2 / 3, 1 / 2, 1.2
    second = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(generated, references).tolist() == pytest.approx([1.0, second, 0.0, 0.0, 0.0], rel=1e-6)
    assert rouge_l(["", " "], ["", ""]).tolist() == [0.0, 0.0]


def test_length_is_the_ratio_of_the_shorter_to_the_longer() -> None:
    assert length(["a b", "a b c d", "a", "", ""], ["a b", "a b", "a b c d", "a", ""]).tolist() == [
        1.0,
        0.5,
        0.25,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize("term", [bleu4, rouge_l, length])
def test_lexical_terms_refuse_unpaired_texts(term: object) -> None:
    with pytest.raises(ValueError):
        term(["a"], ["a", "b"])  # type: ignore[operator]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), min_size=1, max_size=4))
def test_lexical_terms_lie_in_the_unit_interval_and_score_row_by_row(pairs: list[tuple[str, str]]) -> None:
    generated, references = [a for a, _ in pairs], [b for _, b in pairs]
    for term in (bleu4, rouge_l, length):
        together = term(generated, references)
        assert ((together >= 0) & (together <= 1)).all()
        assert together.tolist() == [term([a], [b])[0] for a, b in pairs]


def test_a_users_term_is_loaded_and_called() -> None:
    term = load_callable("tests.reward.custom_terms:brevity")
    labels = np.zeros((2, 14), dtype=np.int64)
    values = term(["a b", None], ["x", "y"], labels, labels)
    assert values.dtype == np.float32 and values.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brevity", "module:function"),
        (":brevity", "module:function"),
        ("module:", "module:function"),
        ("module:a.b", "module:function"),
        (" module:brevity", "module:function"),
        (".module:brevity", "module:function"),
        ("ftp://h/score", "module:function"),
        ("no_such_module:brevity", "no module 'no_such_module'"),
        ("tests.reward.no_such_module:brevity", "no module 'tests.reward.no_such_module'"),
        ("tests.reward.custom_terms:missing", "no function 'missing'"),
        ("tests.reward.custom_terms:NOT_CALLABLE", "no function 'NOT_CALLABLE'"),
    ],
)
def test_terms_that_cannot_be_loaded_say_why(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_callable(name)
    if ":" in name and message == "module:function":  # seen in a recipe already
        with pytest.raises(ValueError, match=message):
            require_known([name])


def test_a_users_own_missing_import_is_not_blamed_on_the_name() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        load_callable("tests.reward.service.imports_something_missing:term")


@pytest.mark.parametrize(("name", "message"), [("too_short", r"shape \(1,\)"), ("not_numbers", "sequence of numbers")])
def test_answers_that_are_not_one_number_a_report_are_refused(name: str, message: str) -> None:
    labels = np.zeros((2, 14), dtype=np.int64)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_callable(f"tests.reward.custom_terms:{name}")(["a", "b"], ["x", "y"], labels, labels)
