"""What is scored without looking, and what a definition allows at most."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_fscore_support

from mrg_r1.labels.observations import read_labels_csv
from mrg_r1.metrics.baselines import baselines
from tests.metrics.test_clinical import drawn_classes
from tests.shared_data import shared_data


def test_a_constant_normal_report_scores_what_scikit_learn_says_on_real_labels() -> None:
    reference = np.array(list(read_labels_csv(shared_data() / "iu_xray" / "chexbert_labels_train_val.csv").values()))
    rows = baselines(reference)
    normal = rows["constant_normal"]
    assert normal is not None
    said = np.zeros_like(reference)
    said[:, 13] = 1
    rate = float((reference[:, 13] == 1).mean())
    assert rate > 0.3  # so the constant is worth something
    for name, mean in (("r2gen_micro14", "micro"), ("r2gen_macro14", "macro"), ("example14", "samples")):
        expected = precision_recall_fscore_support(reference == 1, said == 1, average=mean, zero_division=0)[:3]
        assert (normal[name].precision, normal[name].recall, normal[name].f1) == pytest.approx(expected), name
    lenient = np.isin(reference, (1, 3))
    assert normal["chexbert_micro14"].f1 == pytest.approx(f1_score(lenient, said == 1, average="micro"))
    assert normal["example14"].precision == pytest.approx(rate)
    assert normal["r2gen_macro14"].f1 == pytest.approx(2 * rate / (1 + rate) / 14)
    assert normal["chexbert_micro5"].f1 == normal["disease_micro13"].f1 == normal["disease_macro13"].f1 == 0.0
    best = rows["reference"]
    assert best is not None and best["r2gen_micro14"].f1 == 1.0
    assert best["example14"].f1 == pytest.approx(float((reference == 1).any(axis=1).mean()))
    assert best["example14"].f1 < 0.9  # studies without a positive are 0 of 0/0: nothing reaches 1


def test_a_blank_report_scores_nothing() -> None:
    blank = baselines(drawn_classes(20, 0))["blank"]
    assert blank is not None
    assert {(score.precision, score.recall, score.f1) for score in blank.values()} == {(0.0, 0.0, 0.0)}


def test_random_training_reports_are_seeded_and_absent_without_training_labels() -> None:
    reference, train = drawn_classes(50, 1), drawn_classes(80, 2)
    assert baselines(reference)["random_train"] is None
    first = baselines(reference, train=train, seed=3)["random_train"]
    assert first == baselines(reference, train=train, seed=3)["random_train"]
    assert first != baselines(reference, train=train, seed=4)["random_train"]


def test_random_training_reports_are_training_reports() -> None:
    reference = np.zeros((30, 14), dtype=np.int64)
    reference[:, 2] = 1
    assert (row := baselines(reference, train=reference[:1])["random_train"]) is not None
    assert row["r2gen_micro14"].f1 == 1.0
