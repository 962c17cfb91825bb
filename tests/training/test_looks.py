"""What is said of the choice of the best adapter: standard errors, paired over studies, and what it gained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mrg_r1.training.looks import Looks, in_words
from tests.tracking.page_runs import labels

MICRO = "disease_micro13"


def rewarded(*totals: float) -> list[dict[str, Any]]:
    return [{"id": f"s{number}", "total": total} for number, total in enumerate(totals)]


def score(rows: list[dict[str, Any]]) -> float:
    return sum(row["total"] for row in rows) / len(rows)


def test_a_difference_is_paired_and_of_the_best_before_it():
    looks, first = Looks("mean_reward"), rewarded(0.0, 0.5, 1.0)
    alone = looks.take(0, 0.5, first, best=True)
    assert alone["validation/standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert alone["validation/over_best"] is None and alone["validation/over_best_standard_error"] is None
    higher = rewarded(0.1, 0.6, 1.1)  # by as much for each study: nothing is unsure about it
    second = looks.take(5, score(higher), list(reversed(higher)), best=True)
    assert second["validation/over_best"] == pytest.approx(0.1)
    assert second["validation/over_best_standard_error"] == pytest.approx(0, abs=1e-12)
    third = looks.take(10, 0.5, rewarded(0.1, 0.3, 1.1), best=False)
    assert third["validation/over_best"] == pytest.approx(-0.1)
    assert third["validation/over_best_standard_error"] == pytest.approx(0.1)
    gained = looks.closing({"step": 5, "score": score(higher)})
    assert gained["studies"] == 3 and gained["over_last"]["step"] == 10 and gained["over_first"]["step"] == 0
    assert gained["over_last"] == pytest.approx({"step": 10, "difference": 0.1, "standard_error": 0.1})


def test_a_run_that_goes_on_says_the_same_to_the_last_bit():
    rows = [
        [
            {"id": str(n), "labels": labels(Edema=1), "reference_labels": labels(Edema=int(n % seed == 0))}
            for n in range(9)
        ]
        for seed in (2, 3, 4)
    ]
    straight = Looks(MICRO)
    said = [straight.take(step, 0.1 * step, each, best=True) for step, each in enumerate(rows)]
    first = Looks(MICRO)
    first.take(0, 0.0, rows[0], best=True)
    first.take(1, 0.1, rows[1], best=True)
    again = Looks(MICRO, json.loads(json.dumps(first.state)))
    assert again.take(2, 0.2, rows[2], best=True) == said[2] and again.state == straight.state
    assert said[2]["validation/over_best_standard_error"] > 0


def test_other_studies_and_a_best_that_was_not_seen_are_not_compared_with():
    looks = Looks("mean_reward")
    looks.take(0, 0.5, rewarded(0.0, 1.0), best=True)
    assert looks.take(5, 0.4, rewarded(0.4, 0.4, 0.4), best=False)["validation/over_best"] is None
    assert looks.closing({"step": 0, "score": 0.5}) == {}
    resumed = Looks("mean_reward")  # from a checkpoint of a version that kept no looks
    for step in (5, 10):
        assert resumed.take(step, 0.4, rewarded(0.4, 0.4), best=False)["validation/over_best"] is None
    assert resumed.closing({"step": 3, "score": 0.5}) == {}


def test_one_study_has_no_standard_error():
    looks = Looks("mean_reward")
    looks.take(0, 0.5, rewarded(0.5), best=True)
    assert looks.take(1, 0.6, rewarded(0.6), best=True)["validation/standard_error"] is None
    best = {"step": 1, "score": 0.6}
    assert "step 1, validation's mean_reward 0.600; +0.100 over the first" in in_words(
        best | looks.closing(best), "mean_reward"
    )


def test_a_gain_within_one_standard_error_is_said_to_be_one_and_how_many_studies_would_tell():
    looks = Looks("mean_reward")
    looks.take(0, 0.5, rewarded(0.5, 0.5, 0.5, 0.5), best=True)
    for step, rows, within in ((1, rewarded(0.9, 0.2, 0.9, 0.2), True), (2, rewarded(0.9, 0.8, 0.9, 0.8), False)):
        looks.take(step, score(rows), rows, best=True)
        best = {"step": step, "score": score(rows)}
        text = in_words(best | looks.closing(best), "mean_reward")
        assert ("within one standard error of the first: 4 validation studies" in text) == within
        assert "over the first, step 0" in text and "over the last" not in text
    # 4 studies, a gain of 0.05 with a standard error of 0.7 / 2 / sqrt(3): two of these are the gain at 261
    looks = Looks("mean_reward")
    looks.take(0, 0.5, rewarded(0.5, 0.5, 0.5, 0.5), best=True)
    looks.take(1, 0.55, rewarded(0.9, 0.2, 0.9, 0.2), best=True)
    best = {"step": 1, "score": 0.55}
    assert "about 262 would" in in_words(best | looks.closing(best), "mean_reward")
