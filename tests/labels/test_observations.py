"""The 14 observations: classes, file values, the signed vector and the label CSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.labels.observations import (
    FIVE,
    NO_FINDING,
    OBSERVATIONS,
    classes_of_values,
    read_labels_csv,
    signed_vector,
    values_of_classes,
    write_labels_csv,
)
from tests.shared_data import shared_data

HEADER = ",".join(["id", *OBSERVATIONS])
CLASSES = st.tuples(*[st.integers(0, 3)] * 13, st.integers(0, 1)).map(list)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def test_the_five_are_chexperts_competition_tasks() -> None:
    names = ["Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion"]
    assert [OBSERVATIONS[index] for index in FIVE] == names
    assert OBSERVATIONS[NO_FINDING] == "No Finding"


def test_signed_vector_counts_uncertain_as_positive_and_leaves_no_finding_out() -> None:
    classes = np.array([0, 1, 2, 3] + [0] * 9 + [1])
    assert signed_vector(classes).tolist() == [0, 1, -1, 1] + [0] * 9


@given(CLASSES)
def test_classes_survive_file_values(classes: list[int]) -> None:
    assert classes_of_values(values_of_classes(classes)) == classes


def test_a_zero_under_no_finding_is_blank_and_uncertain_is_refused() -> None:
    assert classes_of_values([None] * 13 + [0])[NO_FINDING] == 0
    with pytest.raises(ValueError, match="No Finding"):
        classes_of_values([None] * 13 + [-1])


def test_labels_survive_the_csv(tmp_path: Path) -> None:
    labels = {"a": [0, 1, 2, 3] + [0] * 9 + [1], "b, with a comma": [2] * 13 + [0]}
    write_labels_csv(tmp_path / "labels.csv", labels)
    assert read_labels_csv(tmp_path / "labels.csv") == labels


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(",".join([*reversed(OBSERVATIONS), "Id"]) + "\n" + "1.0" + "," * 13 + "-1.0,s\n")
    assert read_labels_csv(path) == {"s": [3] + [0] * 12 + [1]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s" + ",2" + "," * 13, r"line 3, id 's': Enlarged Cardiomediastinum: .*2"),
        ("s" + ",yes" + "," * 13, r"line 3, id 's': Enlarged Cardiomediastinum: .*'yes'"),
        ("s" + ",0.5" + "," * 13, r"line 3, id 's': Enlarged Cardiomediastinum: .*'0.5'"),
        ("" + "," * 14, r"line 3"),
        ("first" + "," * 14, r"line 3: id 'first'"),
        ("s" + ",1" * 3, r"line 3, id 's'"),
        ("s" + "," * 15, r"line 3, id 's'"),
    ],
)
def test_a_bad_row_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "labels.csv", "first" + "," * 14, line)
    with pytest.raises(ValueError, match=message):
        read_labels_csv(path)


@pytest.mark.parametrize("column", ["Edema", "edema ", "ID"])
def test_a_column_that_stands_twice_is_refused(tmp_path: Path, column: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"{HEADER},{column}\ns{',1' * 13},,0\n")
    with pytest.raises(ValueError, match=f"{path}, line 1: .*'{column.strip().lower()}'"):
        read_labels_csv(path)


@pytest.mark.parametrize("value", ["nan", "None", "<NA>"])
def test_an_id_that_is_a_missing_value_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match="line 3, field `id`"):
        read_labels_csv(write(tmp_path / "labels.csv", "first" + "," * 14, value + "," * 14))


@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_labels(value: bool) -> None:
    with pytest.raises(ValueError, match=f"Enlarged Cardiomediastinum: label value {value}"):
        classes_of_values([value, *[None] * 13])


def test_a_missing_column_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(HEADER.replace(",Fracture", "") + "\n")
    with pytest.raises(ValueError, match="Fracture"):
        read_labels_csv(path)


def test_published_iu_labels_are_read() -> None:
    labels = read_labels_csv(shared_data() / "iu_xray" / "chexbert_labels_train_val.csv")
    assert len(labels) == 2365
    assert labels["CXR1451_IM-0291"] == [0, 2, 0, 0, 0, 0, 0, 1, 2, 2, 0, 0, 0, 0]
