"""Ratios and tables from measurements written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CASES, RATIOS, Ratio
from benchmarks.results import CaseResult, Measurement, case_table, compute_ratios, to_markdown, write_results

RATIO = Ratio("step_long", "step_long", over="TRL", under="ours")
MEMORY = Ratio("memory_long", "step_long", over="TRL", under="ours", quantity="memory")


def unit(seconds: float, peak: float = 600.0, resident: float = 500.0) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "phases": {"all": seconds},
        "resident_mb": resident,
        "peak_mb": peak,
    }


def step_long(**trl: Any) -> CaseResult:
    ours = Measurement("ours", warm_up=unit(1.0, 9000), repetitions=[unit(3.0, 700), unit(2.0, 650), unit(4.0, 600)])
    theirs = Measurement("TRL", repetitions=[unit(30.0, 4500), unit(31.0, 4300), unit(90.0, 4400)], **trl)
    return CaseResult("step_long", "a whole step", [ours, theirs])


def test_a_ratio_is_the_quotient_of_the_minima_and_leaves_the_warm_up_out() -> None:
    ratios, reasons = compute_ratios([step_long()], [RATIO])
    assert ratios == {"step_long": pytest.approx(15.0)} and not reasons


def test_the_memory_ratio_takes_the_largest_peak_over_what_was_resident() -> None:
    assert compute_ratios([step_long()], [MEMORY])[0]["memory_long"] == pytest.approx((4500 - 500) / (700 - 500))


def test_a_failed_contender_gives_null_and_its_reason() -> None:
    ratios, reasons = compute_ratios([step_long(error="ended with status 1; its log ends: no memory")], [RATIO, MEMORY])
    assert ratios == {"step_long": None, "memory_long": None}
    assert reasons["step_long"] == "TRL: ended with status 1; its log ends: no memory"


def test_a_case_that_was_not_run_gives_null_and_says_so() -> None:
    ratios, reasons = compute_ratios([], [RATIO])
    assert ratios == {"step_long": None} and "was not run" in reasons["step_long"]


def test_no_division_by_memory_that_was_never_taken() -> None:
    result = CaseResult(
        "step_long",
        "",
        [Measurement("ours", repetitions=[unit(1, 500)]), Measurement("TRL", repetitions=[unit(1, 900)])],
    )
    ratios, reasons = compute_ratios([result], [MEMORY])
    assert ratios["memory_long"] is None and "no denominator" in reasons["memory_long"]


def test_the_table_has_minimum_median_memory_and_the_reason_of_a_failure() -> None:
    header, rows = case_table(step_long())
    assert dict(zip(header, rows[1], strict=True)) == {
        "": "TRL",
        "min s": "30.00",
        "median s": "31.00",
        "CPU s": "30.00",
        "units": "3",
        "memory MB": "4000",
        "time / first": "15.00",
        "remark": "",
    }
    assert case_table(step_long(error="no memory"))[1][1][-1] == "FAILED: no memory"


def test_a_disturbed_best_unit_is_told() -> None:
    disturbed = {**unit(3.0), "cpu_seconds": 2.0}
    assert Measurement("ours", repetitions=[disturbed]).remark == "busy machine: 1.5 s of wall clock a CPU second"
    assert Measurement("ours", repetitions=[unit(3.0)]).remark == ""


def test_every_ratio_names_contenders_that_exist() -> None:
    contenders = {case.name: {contender.name for contender in case.contenders} for case in CASES}
    for ratio in RATIOS:
        assert {ratio.over, ratio.under} <= contenders[ratio.case]


def test_the_file_has_the_agreed_keys_and_everything_measured(tmp_path: Path) -> None:
    write_results(tmp_path, results=[step_long()], ratios=RATIOS, environment={"date": "today"}, complete=False)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert set(content["ratios"]) == {
        *("step_short", "step_long", "rollout_short", "rollout_long", "scoring_long", "memory_long", "growth_8_16"),
        *("reward_single", "reward_padded", "reward_repeated", "sft_all"),
    }
    assert content["cpu_ratios"]["step_long"] == 15 and "memory_long" not in content["cpu_ratios"]
    assert content["ratios"]["step_long"] == 15 and content["ratios"]["growth_8_16"] is None
    assert [one["seconds"] for one in content["cases"]["step_long"]["contenders"]["TRL"]["repetitions"]] == [30, 31, 90]
    assert (tmp_path / "bench.md").read_text() == to_markdown(
        [step_long()], content["ratios"], content["reasons"], {"date": "today"}
    )


def test_a_reason_of_several_lines_and_bars_stays_in_its_cell() -> None:
    text = to_markdown([step_long(error="a | b\nc")], {}, {}, {})
    assert "FAILED: a \\| b c |" in text
