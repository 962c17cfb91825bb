"""Every published definition of clinical efficacy, with scikit-learn as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support

from mrg_r1.labels.observations import FIVE, OBSERVATIONS, read_labels_csv, values_of_classes
from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores, per_observation, support, truth_scores
from tests.shared_data import shared_data

NAMES = [
    "r2gen_macro14",
    "r2gen_micro14",
    "example14",
    "chexbert_micro14",
    "chexbert_macro14",
    "chexbert_micro5",
    "chexbert_macro5",
    "chexbert_weighted14",
    "disease_micro13",
    "disease_macro13",
]


def drawn_classes(studies: int, seed: int, positive: float = 0.2) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    rest = (1 - positive) / 3
    classes = rng.choice(4, size=(studies, 14), p=[rest, positive, rest, rest])
    classes[:, 13] %= 2
    return classes


def oracle(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> dict[str, tuple[float, float, float]]:
    """scikit-learn on binary arrays; for five labels they are cut first, as f1chexbert does."""
    strict = [(classes == 1).astype(int) for classes in (reference, predicted)]
    lenient = [np.isin(classes, (1, 3)).astype(int) for classes in (reference, predicted)]
    five = [classes[:, list(FIVE)] for classes in lenient]
    disease = [classes[:, :13] for classes in strict]
    cases = [
        (strict, "macro"),
        (strict, "micro"),
        (strict, "samples"),
        (lenient, "micro"),
        (lenient, "macro"),
        (five, "micro"),
    ]
    cases += [(five, "macro"), (lenient, "weighted"), (disease, "micro"), (disease, "macro")]
    return {
        name: precision_recall_fscore_support(*pair, average=mean, zero_division=0)[:3]
        for name, (pair, mean) in zip(NAMES, cases, strict=True)
    }


def assert_agrees(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> None:
    scores = clinical_scores(predicted, reference)
    assert list(scores) == NAMES
    for name, expected in oracle(predicted, reference).items():
        assert (scores[name].precision, scores[name].recall, scores[name].f1) == pytest.approx(expected, abs=1e-12), (
            name
        )


@given(studies=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), positive=st.sampled_from([0.0, 0.05, 0.3, 0.9]))
@settings(max_examples=40, deadline=None)
def test_every_definition_agrees_with_scikit_learn(studies: int, seed: int, positive: float) -> None:
    assert_agrees(drawn_classes(studies, seed, positive), drawn_classes(studies, seed + 1, positive))


def test_the_published_case_of_f1chexbert_comes_out() -> None:
    """The five reports of f1chexbert 0.0.2's own test (tests/f1chexbert_test.py, also RadEval's) and the averages that
    it expects.

    The labels follow from the published tables: support, precision and recall of every observation and the reports that
    are right. Whether a positive is class 1 or 3 is not published, and these definitions do not ask.
    """
    said = [["No Finding"], ["No Finding"], ["Edema", "Atelectasis"], ["Consolidation"], []]
    true = [["No Finding"], ["Cardiomegaly"], ["Cardiomegaly"], ["Consolidation"], ["Lung Opacity", "Lung Lesion"]]
    predicted, reference = np.zeros((5, 14), dtype=np.int64), np.zeros((5, 14), dtype=np.int64)
    for classes, reports in ((predicted, said), (reference, true)):
        for row, names in enumerate(reports):
            classes[row, [OBSERVATIONS.index(name) for name in names]] = 1
    reference[4, 2:4] = predicted[2, 7] = 3
    scores = clinical_scores(predicted, reference)
    for name, expected in {
        "chexbert_micro14": (0.4, 0.3333333333333333, 0.36363636363636365),
        "chexbert_macro14": (0.10714285714285714, 0.14285714285714285, 0.11904761904761904),
        "chexbert_weighted14": (0.25, 0.3333333333333333, 0.27777777777777773),
        "chexbert_micro5": (0.3333333333333333, 0.3333333333333333, 0.3333333333333333),
        "chexbert_macro5": (0.2, 0.2, 0.2),
    }.items():
        assert (scores[name].precision, scores[name].recall, scores[name].f1) == pytest.approx(expected, rel=1e-15), (
            name
        )


def test_definitions_say_how_they_are_computed() -> None:
    for name, definition in DEFINITIONS.items():
        described = definition.described()
        assert described["uncertain"] == ("positive" if name.startswith("chexbert") else "not positive")
        count = next(count for count in (14, 13, 5) if name.endswith(str(count)))
        assert len(described["observations"]) == count  # type: ignore[arg-type]
        assert described["average"] in name and described["source"]


def test_real_labels_agree_with_scikit_learn() -> None:
    reference = np.array(list(read_labels_csv(shared_data() / "iu_xray" / "chexbert_labels_train_val.csv").values()))
    assert_agrees(np.roll(reference, 1, axis=0), reference)


def test_macro_f1_is_the_mean_of_per_label_f1_not_the_f1_of_means() -> None:
    reference = np.zeros((4, 14), dtype=np.int64)
    predicted = reference.copy()
    reference[:2, 0], predicted[0, 0] = 1, 1  # precision 1, recall 1/2, F1 2/3
    reference[0, 1], predicted[:, 1] = 1, 1  # precision 1/4, recall 1, F1 2/5
    score = clinical_scores(predicted, reference)["r2gen_macro14"]
    assert score.precision == pytest.approx(1.25 / 14)
    assert score.recall == pytest.approx(1.5 / 14)
    assert score.f1 == pytest.approx((2 / 3 + 2 / 5) / 14)


def test_a_report_without_positives_scores_zero_in_example_f1_even_when_right() -> None:
    reference = np.zeros((2, 14), dtype=np.int64)
    reference[0, 3] = 1
    assert clinical_scores(reference, reference)["example14"].f1 == 0.5


def test_uncertain_is_positive_for_chexbert_definitions_only() -> None:
    reference = np.zeros((1, 14), dtype=np.int64)
    predicted = reference.copy()
    reference[0, 4], predicted[0, 4] = 1, 3
    scores = clinical_scores(predicted, reference)
    positive = {name for name, score in scores.items() if score.f1 > 0}
    assert positive == {name for name in NAMES if name.startswith("chexbert")}


def test_no_finding_does_not_reach_the_disease_definitions() -> None:
    reference = np.zeros((3, 14), dtype=np.int64)
    reference[:, 13] = 1
    scores = clinical_scores(reference, reference)
    assert scores["r2gen_micro14"].f1 == 1.0
    assert scores["disease_micro13"].f1 == scores["disease_macro13"].f1 == 0.0


@given(studies=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_order_of_studies_does_not_matter_and_f1_is_symmetric(studies: int, seed: int) -> None:
    predicted, reference = drawn_classes(studies, seed), drawn_classes(studies, seed + 1)
    order = np.random.default_rng(seed).permutation(studies)
    scores, shuffled, swapped = (
        clinical_scores(*pair)
        for pair in ((predicted, reference), (predicted[order], reference[order]), (reference, predicted))
    )
    for name in NAMES:
        assert shuffled[name].f1 == pytest.approx(scores[name].f1)
        assert 0 <= scores[name].f1 <= 1
        assert (swapped[name].precision == pytest.approx(scores[name].recall)) or name == "chexbert_weighted14"
        assert (swapped[name].f1 == pytest.approx(scores[name].f1)) or name == "chexbert_weighted14"


def test_per_observation_and_support_agree_with_scikit_learn() -> None:
    predicted, reference = drawn_classes(60, 5), drawn_classes(60, 6)
    expected = precision_recall_fscore_support(reference == 1, predicted == 1, average=None, zero_division=0)
    scores, counts = per_observation(predicted, reference), support(reference)
    assert list(scores) == list(counts) == list(OBSERVATIONS)
    for column, name in enumerate(OBSERVATIONS):
        score = scores[name]
        assert (score.precision, score.recall, score.f1) == pytest.approx([expected[kind][column] for kind in range(3)])
        assert counts[name] == expected[3][column]


def test_truth_scores_leave_out_what_is_unknown() -> None:
    drawn = [[1, 0, None, 1, *[0] * 9, None], [None, 1, -1, 0, *[0] * 9, None]]
    predicted = np.zeros((2, 14), dtype=np.int64)
    predicted[0, [0, 1, 2]] = 1  # right, wrong, unknown
    predicted[1, [0, 2]] = 1  # unknown, wrong: uncertain is no positive
    scores = truth_scores(predicted, drawn)
    assert list(scores) == ["disease_micro13", "disease_macro13"]
    assert scores["disease_micro13"].precision == pytest.approx(1 / 3)
    assert scores["disease_micro13"].recall == pytest.approx(1 / 3)
    assert scores["disease_macro13"].f1 == pytest.approx(1 / 13)


def test_truth_scores_of_known_truths_are_the_disease_scores() -> None:
    predicted, truth = drawn_classes(30, 1), drawn_classes(30, 2)
    truth[:, :13] = np.where(truth[:, :13] == 0, 2, truth[:, :13])  # nothing unknown
    scores = clinical_scores(predicted, truth)
    against_truth = truth_scores(predicted, [values_of_classes(row) for row in truth])
    assert against_truth == {name: scores[name] for name in against_truth}


@pytest.mark.parametrize(
    ("predicted", "reference", "message"),
    [
        (np.zeros((2, 13), int), np.zeros((2, 14), int), r"predicted: shape \(2, 13\)"),
        (np.zeros((2, 14), int), np.zeros((3, 14), int), "2 predicted and 3 reference"),
        (np.zeros((0, 14), int), np.zeros((0, 14), int), "no study"),
        (np.zeros((2, 14)), np.zeros((2, 14), int), "predicted: dtype float64"),
        (np.full((2, 14), -1), np.zeros((2, 14), int), "predicted: study 0, Enlarged Cardiomediastinum: class -1"),
        (
            np.zeros((2, 14), int),
            np.full((2, 14), 2),
            "reference: study 0, No Finding: class 2; it has the classes 0 to 1",
        ),
    ],
)
def test_arrays_that_are_no_classes_are_refused(
    predicted: NDArray[np.int64], reference: NDArray[np.int64], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clinical_scores(predicted, reference)
