"""The closing tables: narrow enough for a pipe, no cell without a number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mrg_r1.metrics.clinical import DEFINITIONS
from mrg_r1.tracking.evaluation_tables import (
    evaluation_notes,
    evaluation_table,
    other_readers_table,
    print_evaluation,
    reference_sources,
)

SCORE = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "f1_ci": [0.4, 0.6]}


def result(*, truth=False, held_out=False, random=True):
    """The content of evaluation/test.json, as far as it is shown."""
    scores = {name: SCORE for name in DEFINITIONS}
    names = ("constant_normal", "blank", "random_train", "reference")
    reader = {"labeler": {"name": "a_second_labeler"}, "definitions": scores, "agreement_on_references": 0.9}
    return {
        "n": 3,
        "rendered": 3,
        "definitions": scores,
        "baselines": {name: scores if random or name != "random_train" else None for name in names},
        "constant": {"total": 0.4},
        "mean_reward": 0.6,
        "labeler": {"name": "labeler"},
        "held_out": reader if held_out else None,
        "hacking_gap": 0.01 if held_out else None,
        **({"truth": {"disease_micro13": SCORE, "disease_macro13": SCORE}} if truth else {}),
    }


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("held_out", [True, False])
def test_tables_fit_80_columns_and_no_definition_is_cut(truth, held_out):
    console = Console(width=80, file=io.StringIO())
    print_evaluation(console, result(truth=truth, held_out=held_out), "test split after training")
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not [line for line in lines if "…" in line]
    for name in DEFINITIONS:
        assert [line for line in lines if line.strip().startswith(f"{name} ")]


def test_a_baseline_that_is_missing_is_no_column_of_dashes():
    assert len(evaluation_table(result()).columns) == len(evaluation_table(result(random=False)).columns) + 1


def test_other_readers_have_a_table_of_their_own_only_where_there_are_any():
    assert other_readers_table(result()) is None
    counts = [other_readers_table(result(truth=True, held_out=held_out)).row_count for held_out in (False, True)]
    assert counts == [2, 2 + len(DEFINITIONS)]
    for held_out in (False, True):
        table = other_readers_table(result(truth=not held_out, held_out=held_out))
        assert all(cell for column in table.columns for cell in column.cells)


def test_where_the_references_labels_are_from_is_said():
    labeler = {"name": "chexbert", "fingerprint": "c0ffee"}
    read = {"said": 0, "read": 3, "labeler": labeler}
    assert "references' labels: read by the labeler chexbert (c0ffee), of all 3 studies" in evaluation_notes(
        result() | {"reference_labels": read}
    )
    both = reference_sources({"reference_labels": {"said": 1, "read": 2, "labeler": labeler}})
    assert both == "what the manifest says (labels.said) of 1 studies, read by the labeler chexbert (c0ffee) of 2"
    said = reference_sources({"reference_labels": {"said": 3, "read": 0, "labeler": None}})
    assert said == "what the manifest says (labels.said), of all 3 studies"
    assert reference_sources({}) is None
