"""What is logged of a step's groups, by hand; and the watch over a policy that collapses (docs/traps.md #25)."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrg_r1.reward.diagnostics import group_metrics, with_stds
from mrg_r1.tracking.collapse import WINDOW, WORDING_FIRST, WORDING_WINDOW, CollapseWatch, WordingWatch
from mrg_r1.types import Rewards

DONE: Any = SimpleNamespace(ended=torch.tensor([[True, True], [True, False]]), lengths=torch.tensor([[3, 5], [4, 8]]))


def rewards() -> Rewards:
    """Two groups of two: equal rewards and texts, and one malformed report beside a good one."""
    total = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    labels = torch.zeros(2, 2, 14, dtype=torch.long)
    labels[0, :, 4] = torch.tensor([1, 2])  # edema said, denied
    labels[0, :, 9] = 3  # effusion uncertain
    labels[1, 0, 13] = 1
    labels[1, 1] = -1  # malformed
    reference = torch.zeros(2, 14, dtype=torch.long)
    reference[0, 4], reference[0, 9], reference[1, 8] = 1, 1, 2
    return Rewards(
        total,
        {"mccs": torch.tensor([[0.0, 0.0], [0.0, 0.5]])},
        {"mccs": 1.0},
        labels,
        [["same", "same"], ["one", None]],
        reference,
        {"total": torch.tensor([0.25, 0.75]), "mccs": torch.tensor([0.0, 1.0])},
    )


def means() -> dict[str, float | None]:
    pairs = group_metrics(DONE, rewards()).items()
    return with_stds({name: float(total / count) if count else None for name, (total, count) in pairs})


def test_groups_are_counted() -> None:
    found = means()
    assert found["groups/zero_signal"] == 0.5 and found["groups/all_zero_mccs"] == 0.5
    assert found["groups/malformed"] == 0.25 and found["groups/truncated"] == 0.25
    # of four reports, `same` and `one`
    assert found["groups/distinct"] == 0.5 and found["groups/distinct_in_batch"] == 0.5
    assert found["groups/length"] == 5 and found["groups/no_finding"] == 0.25


def test_rewards_have_mean_and_spread_over_all_completions() -> None:
    found = means()
    assert found["reward/total"] == 0.5 and found["reward/total_std"] == pytest.approx(
        torch.tensor([0.5, 0.5, 0, 1]).std(correction=0)
    )
    assert found["reward/mccs"] == 0.125 and found["reward/mccs_std"] == pytest.approx(
        torch.tensor([0, 0, 0, 0.5]).std(correction=0)
    )
    assert found["reward/std"] == pytest.approx(0.5**0.5 / 2)  # inside the groups, unbiased: 0 and the root of 1/2
    assert found["reward/constant"] == 0.5 and found["reward/constant_mccs"] == 0.5
    assert not any(name.endswith("_square") for name in found)


def test_agreement_is_of_what_either_report_mentions() -> None:
    found = means()
    assert found["agreement/Edema"] == 0.5  # said once, denied once, of two reports
    assert found["agreement/Pleural Effusion"] == 1.0  # uncertain counts as positive
    assert found["agreement/Pneumothorax"] == 0.0  # denied by the reference; the malformed report says nothing either
    assert found["agreement/No Finding"] == 0.0  # said, and not by the reference
    assert found["agreement/Fracture"] is None  # nobody mentions it


def step(distinct: float, length: float, normal: float) -> dict[str, float | None]:
    return {"groups/distinct_in_batch": distinct, "groups/length": length, "groups/no_finding": normal}


def warnings_of(watch: CollapseWatch, *rows: dict[str, float | None]) -> list[str]:
    return [said for row in rows for said in [watch.update(row)] if said is not None]


@pytest.mark.parametrize(
    "later", [(0.4, 40, 0.2), (0.9, 19, 0.2), (0.9, 40, 0.5)], ids=["distinct", "length", "no finding"]
)
def test_a_policy_that_collapses_is_warned_of(later: tuple[float, float, float]) -> None:
    said = warnings_of(CollapseWatch(), *[step(0.9, 40, 0.2)] * WINDOW, *[step(*later)] * WINDOW)
    assert (
        len(said) == 1
        and "collapsing to one" in said[0]
        and f"{later[0]:.0%} of a batch's reports are distinct (90%" in said[0]
    )


def test_a_policy_that_does_not_is_left_alone() -> None:
    assert not warnings_of(CollapseWatch(), *[step(0.9, 40, 0.2)] * WINDOW, *[step(0.6, 30, 0.4)] * 3 * WINDOW)
    assert not warnings_of(CollapseWatch(), *[step(0.1, 4, 0.9)] * (2 * WINDOW - 1))


def test_one_bad_step_is_no_collapse_and_a_lasting_one_is_said_once_a_window() -> None:
    start = [step(0.9, 40, 0.2)] * (2 * WINDOW)
    assert not warnings_of(CollapseWatch(), *start, step(0.0, 0, 1.0), *[step(0.9, 40, 0.2)] * WINDOW)
    assert len(warnings_of(CollapseWatch(), *start, *[step(0.1, 4, 0.9)] * 4 * WINDOW)) in (4, 5)


def test_the_watch_goes_on_after_a_resume() -> None:
    rows = [*[step(0.9, 40, 0.2)] * WINDOW, *[step(0.2, 10, 0.9)] * WINDOW * 2]
    straight, first = CollapseWatch(), CollapseWatch()
    expected = [straight.update(row) for row in rows]
    got = [first.update(row) for row in rows[:27]]
    second = CollapseWatch(json.loads(json.dumps(first.state)))
    assert got + [second.update(row) for row in rows[27:]] == expected and any(expected)


def test_repetition_and_contradiction_are_of_the_readable_reports() -> None:
    made = rewards()
    made.report_texts = [["Clear. Clear.", "Clear."], ["No edema. Edema.", None]]
    made.contradictions = torch.tensor([[0, 0], [2, -1]])
    found = {name: float(total / count) for name, (total, count) in group_metrics(DONE, made).items() if count}
    assert found["groups/repeated_sentence"] == pytest.approx(1 / 3)
    assert found["groups/repetition"] == pytest.approx(0.5 / 3)
    assert found["groups/contradiction"] == pytest.approx(1 / 3)
    assert "groups/contradiction" not in means()  # nobody has read the sentences


def worded(twice: float, share: float, contradiction: float | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {"groups/repeated_sentence": twice, "groups/repetition": share}
    return found if contradiction is None else found | {"groups/contradiction": contradiction}


def wording_warnings(*rows: dict[str, float | None]) -> list[str]:
    watch = WordingWatch()
    return [said for row in rows for said in [watch.update(row)] if said is not None]


@pytest.mark.parametrize(
    ("later", "said_of"),
    [
        ((0.3, 0.02, 0.01), ["a whole sentence stands twice in 30.0% of the reports (1.0%"]),
        ((0.01, 0.2, 0.01), ["20.0% of a report's sentences or phrases were said before (2.0%"]),
        ((0.01, 0.02, 0.4), ["40.0% of the reports affirm and deny one observation (1.0%"]),
        ((0.3, 0.2, None), ["30.0% of the reports", "20.0% of a report's"]),
    ],
)
def test_a_policy_that_repeats_or_contradicts_itself_is_warned_of(
    later: tuple[float, float, float | None], said_of: list[str]
) -> None:
    start = worded(0.01, 0.02, None if later[2] is None else 0.01)
    said = wording_warnings(*[start] * WORDING_FIRST, *[worded(*later)] * WORDING_WINDOW)
    assert len(said) == 1 and all(part in said[0] for part in said_of)
    assert "the reward terms repetition and contradiction" in said[0]


def test_a_policy_that_repeats_no_more_than_at_its_start_is_left_alone() -> None:
    assert not wording_warnings(
        *[worded(0.3, 0.2, 0.2)] * WORDING_FIRST, *[worded(0.34, 0.24, 0.24)] * 3 * WORDING_WINDOW
    )
    assert not wording_warnings(
        *[worded(0.0, 0.0, None)] * WORDING_FIRST, *[worded(0.0, 0.0, 0.9)] * 2 * WORDING_WINDOW
    )
    assert not wording_warnings(
        *[worded(0.0, 0.0, None)] * WORDING_FIRST, *[worded(0.9, 0.9, None)] * (WORDING_WINDOW - 1)
    )


def test_the_watch_over_wording_goes_on_after_a_resume() -> None:
    rows = [*[worded(0.0, 0.0, None)] * WORDING_FIRST, *[worded(0.3, 0.1, None)] * 40]
    straight, first = WordingWatch(), WordingWatch()
    expected = [straight.update(row) for row in rows]
    got = [first.update(row) for row in rows[:13]]
    second = WordingWatch(json.loads(json.dumps(first.state)))
    assert got + [second.update(row) for row in rows[13:]] == expected and len([1 for said in expected if said]) == 2
