"""The watch over a policy that learns to please its labeler: when it speaks, and when it does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mrg_r1.labels.observations import values_of_classes
from mrg_r1.tracking.gaps import GREW, GapWatch

BLANK = values_of_classes([0] * 14)
DISEASE = values_of_classes([0, 1] + [0] * 12)


def rows(studies=200, *, right=0.5, fooled=0.0, seed=0, drawn=False, names="s"):
    """Every reference says cardiomegaly; a share `right` of reports says it, a share `fooled` only to the rewarded
    labeler.
    """
    luck = np.random.default_rng(seed).random(studies)
    made = []
    for number, draw in enumerate(luck):
        honest, tricked = bool(draw < right), bool(right <= draw < right + fooled)
        made.append(
            {
                "id": f"{names}{number}",
                "labels": DISEASE if honest or tricked else BLANK,
                "reference_labels": DISEASE,
                "held_out_labels": None if drawn else DISEASE if honest else BLANK,
                "held_out_reference_labels": None if drawn else DISEASE,
                "drawn": [0] + [int(not tricked)] + [0] * 11 + [None] if drawn else None,
            }
        )
    return made


def test_a_policy_that_fools_one_labeler_is_told_of_once_an_amount():
    watch = GapWatch()
    assert watch.update(rows(), "a b", when="before training") == []
    (warning,) = watch.update(rows(fooled=0.2), "a b", when="after step 20")
    assert (
        "hacking_gap has widened" in warning
        and "after step 20" in warning
        and "before training" in warning
        and "grpo.beta" in warning
    )
    assert watch.update(rows(fooled=0.21), "a b", when="after step 40") == []  # known
    assert len(watch.update(rows(fooled=0.4), "a b", when="after step 60")) == 1  # and worse


def test_a_gap_that_was_there_from_the_start_is_quiet():
    """Two labelers differ on honest reports too: the first gap is the measure, not 0."""
    watch = GapWatch()
    for step in range(4):
        assert watch.update(rows(fooled=0.2, right=0.4 + 0.02 * step), "a b", when=str(step)) == []


def test_a_better_policy_is_no_worse_one():
    watch = GapWatch()
    watch.update(rows(right=0.3), "a b", when="0")
    assert watch.update(rows(right=0.9), "a b", when="1") == []
    assert watch.update(rows(right=0.9, fooled=0.0), "a b", when="2") == []


def test_chance_alone_is_quiet():
    """8 studies, one of them fooled: more than `GREW`, and what one study does."""
    watch = GapWatch()
    few, one = rows(8, right=1.0), rows(8, right=1.0)
    one[3]["held_out_labels"] = BLANK
    watch.update(few, "a b", when="0")
    assert watch.update(one, "a b", when="1") == []


def test_what_is_significant_and_small_is_quiet():
    watch = GapWatch()
    watch.update(rows(5000), "a b", when="0")
    # F1 moves by less than the share that is fooled
    assert watch.update(rows(5000, fooled=GREW / 2), "a b", when="1") == []
    assert len(watch.update(rows(5000, fooled=GREW * 3), "a b", when="2")) == 1


def test_the_drawn_truth_is_a_reader_too():
    watch = GapWatch()
    watch.update(rows(drawn=True), "a -", when="0")
    (warning,) = watch.update(rows(drawn=True, fooled=0.3), "a -", when="1")
    assert warning.startswith("labeler_gap has widened") and "drawn truth" in warning


@pytest.mark.parametrize("change", ["studies", "readers"])
def test_what_cannot_be_compared_begins_anew(change):
    watch = GapWatch()
    watch.update(rows(), "a b", when="0")
    changed = {"names": "other"} if change == "studies" else {}
    assert watch.update(rows(fooled=0.3, **changed), "a c" if change == "readers" else "a b", when="1") == []
    assert watch.state["hacking_gap"]["when"] == "1"


def test_the_order_of_rows_does_not_matter():
    """A growth that shows only where every study is compared with itself."""
    watch = GapWatch()
    watch.update(rows(right=0.4, fooled=0.3), "a b", when="0")
    assert watch.update(rows(right=0.4, fooled=0.38)[::-1], "a b", when="1")


def test_a_resumed_watch_remembers():
    watch = GapWatch()
    watch.update(rows(), "a b", when="before training")
    watch.update(rows(fooled=0.2), "a b", when="1")
    resumed = GapWatch(json.loads(json.dumps(watch.state)))
    assert resumed.update(rows(fooled=0.2), "a b", when="2") == []  # it has been said
    assert "before training" in resumed.update(rows(fooled=0.45), "a b", when="3")[0]
