"""The GPU bench: its formulas by numbers worked out by hand, and its whole course on the CPU at a tiny size."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import Allowance, GpuCase, find_cases
from benchmarks.gpu_results import (
    PEAKS,
    Contender,
    Outcome,
    Shape,
    all_figures,
    decode_bytes,
    figures,
    step_table,
    tokens_run,
    write_results,
)
from mrg_r1.training.utilisation import Tokens, update_flops
from tests.benchmarks.test_workers import ROOT

CASE = GpuCase("2x10", studies=2, side=28, group=3, new_tokens=5)  # 6 completions
SHAPE = Shape(layer_weights=1000, lora_weights=10, vocabulary=50, hidden=4, cache_values=8, item_bytes=2)


def line(*seconds: float, peak: int | None = 3 * 2**30) -> dict[str, Any]:
    units = [{"seconds": one, "phases": {"rollout": one / 2, "update": one / 4}, "peak_bytes": peak} for one in seconds]
    return {"warm_up": units[0], "repetitions": units[1:], "prefill_seconds": 0.4, "prompt_tokens": 10}


def contenders() -> list[Contender]:
    ours = Contender("ours", {"device": "NVIDIA H200", "shape": SHAPE.__dict__}, {"2x10": Outcome(line(9.0, 4.0, 5.0))})
    return [ours, Contender("trl", {"device": "NVIDIA H200"}, {"2x10": Outcome(line(20.0, 12.0))})]


def test_tokens_are_each_prompt_once_and_of_completions_all_but_the_last() -> None:
    assert tokens_run(CASE, 10) == Tokens(prompts=20, prompts_forward=20, completions=6 * 4, scored=6 * 5)


def test_the_update_costs_what_the_formula_says() -> None:
    # 44 tokens through 1000 frozen and 10 LoRA weights, 30 completion tokens through a head of 50 x 4
    run = tokens_run(CASE, 10)
    assert update_flops(1000, 10, 200, run) == 4 * 1000 * 44 + 6 * 10 * 44 + 4 * 200 * 30 == 202_640


def test_a_decode_step_reads_weights_once_and_prompts_once_a_study() -> None:
    # 1200 weights and 8 values for each of 20 prompt tokens and 6 x 2.5 completion tokens, 2 bytes each
    assert decode_bytes(SHAPE, CASE, 10) == 2 * (1200 + 8 * 35) == 2960


def test_figures_are_of_the_fastest_measured_step_and_the_largest_peak() -> None:
    outcome = Outcome(line(2.0, 4.0, 5.0))
    outcome.line["repetitions"][1]["peak_bytes"] = 7 * 2**30
    row = figures(outcome, CASE, shape=SHAPE, device="NVIDIA H200")
    assert (row["seconds"], row["steps_measured"], row["peak_gib"]) == (4.0, 2, 7.0)
    assert (row["samples_per_second"], row["tokens_per_second"]) == (1.5, 7.5)
    assert row["decode_seconds_per_token"] == pytest.approx((2.0 - 0.4) / 4)
    assert row["mfu"] == pytest.approx(202_640 / (1.0 * 989e12))
    assert row["decode_share_of_bound"] == pytest.approx(2960 / (0.4 * 4.8e12))


def test_an_unknown_card_has_no_shares_and_the_reason() -> None:
    row = figures(Outcome(line(9.0, 4.0)), CASE, shape=SHAPE, device="NVIDIA H100 PCIe")
    assert row["mfu"] is None and row["decode_share_of_bound"] is None
    assert row["reasons"]["mfu"] == "no datasheet figures for NVIDIA H100 PCIe"


def test_the_warm_up_stands_in_where_there_was_time_for_nothing_else() -> None:
    row = figures(Outcome(line(9.0)), CASE, shape=None, device="cpu")
    assert (row["seconds"], row["steps_measured"]) == (9.0, 0)
    assert figures(Outcome(note="not run"), CASE, shape=None, device="cpu") == {}


def test_ratios_are_theirs_over_ours_and_missing_where_a_side_is() -> None:
    both = contenders()
    found = all_figures(both, [CASE])["2x10"]
    assert found["trl"]["ratio"] == pytest.approx(3.0) and "ratio" not in found["ours"]
    both[0].outcomes["2x10"] = Outcome(error="out of memory")
    assert all_figures(both, [CASE])["2x10"]["trl"]["ratio"] is None


def test_the_table_has_a_row_for_what_failed_and_what_was_left_out() -> None:
    both = contenders()
    both[1].outcomes["2x10"] = Outcome(error="out of memory: 3 GiB")
    both.append(Contender("trl-vllm", outcomes={"2x10": Outcome(note="not installed: vllm")}))
    rows = step_table(both, [CASE])[1]
    assert rows[0] == ["2x10", "ours", "4.00", "2", "1.50", "8", "-", "3.0", ""]
    assert [row[-1] for row in rows[1:]] == ["FAILED: out of memory: 3 GiB", "not installed: vllm"]


def test_the_file_keeps_every_repetition(tmp_path: Path) -> None:
    write_results(tmp_path, contenders=contenders(), cases=[CASE], environment={"cards": None}, complete=False)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [unit["seconds"] for unit in content["contenders"]["ours"]["outcomes"]["2x10"]["line"]["repetitions"]] == [
        4.0,
        5.0,
    ]
    assert content["figures"]["2x10"]["trl"]["ratio"] == 3.0 and content["complete"] is False
    assert "| 2x10 | trl | 12.00 | 1 |" in (tmp_path / "bench.md").read_text()


def test_datasheet_figures_are_of_whole_cards() -> None:
    assert set(PEAKS) == {"NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"}
    assert PEAKS["NVIDIA H100 80GB HBM3"].flops == 989e12 and PEAKS["NVIDIA A100-SXM4-80GB"].bandwidth == 2.04e12


def test_the_published_cases_have_the_prompts_that_their_names_say() -> None:
    for case in find_cases("7b", None):
        studies, prompt = map(int, case.name.split("x"))
        assert case.studies == studies and (case.group, case.new_tokens) == (8, 256)
        assert abs(math.ceil((case.side / 28) ** 2) + 25 - prompt) < 10
    with pytest.raises(ValueError, match="'1x1'.*7b"):
        find_cases("7b", ["1x1"])


def test_no_unit_is_begun_that_would_not_end_in_time() -> None:
    slow = {"seconds": 100.0, "phases": {}, "peak_bytes": None}
    short, long = Allowance(time.time() + 110), Allowance(time.time() + 10_000)
    assert short.refusal(CASE, start=1000.0) is None  # nothing is known yet
    assert short.another(CASE, []) and not short.another(CASE, [slow]) and long.another(CASE, [slow])
    assert not long.another(CASE, [slow] * 3)  # a warm-up and two measured ones
    assert "about 200 s needed" in (short.refusal(CASE) or "") and long.refusal(CASE) is None


WORKER = """
import time
from benchmarks.gpu_cases import CaseChannel, GpuCase
channel = CaseChannel()
print("what a library prints must not reach the parent")
channel.ready({"device": "cpu"})
unit = {"seconds": 1.0, "phases": {}, "peak_bytes": None}
channel.case(GpuCase("a", 1, 28), {"warm_up": unit, "repetitions": [unit]})
"""
ENDS = {
    "done": ('channel.case(GpuCase("b", 1, 28), {"note": "not run: 1 s left"})\nchannel.done()', None),
    "raises": ('raise MemoryError("no room")', "ended with status 1.*MemoryError: no room"),
    "hangs": ("time.sleep(60)", "no answer within .*what a library prints"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_came_before_a_failure_is_kept(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    program, error = ENDS[end]
    cases, kept = [GpuCase(name, 1, 28) for name in "abc"[: 2 if error is None else 3]], []
    one = Contender("trl", outcomes={case.name: Outcome() for case in cases})
    gpu.run_contender(
        one,
        [sys.executable, "-c", WORKER + program],
        cases,
        log=tmp_path / "log",
        environment={"PYTHONPATH": str(ROOT)},
        until=time.time() + 2.5,
        keep=lambda: kept.append(1),
    )
    assert (
        one.settings == {"device": "cpu"} and one.outcomes["a"].fastest is not None and one.outcomes["a"].error is None
    )
    if error is None:
        assert one.outcomes["b"] == Outcome({"case": "b"}, note="not run: 1 s left") and len(kept) == 2
    else:
        assert one.outcomes["b"].error is not None and one.outcomes["c"].note == "not run: it failed in b"
        assert re.search(error, one.outcomes["b"].error)


def test_a_contender_that_fails_leaves_a_table_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "python"  # has every package, and cannot run
    broken.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "no kernel image is available" >&2\nexit 3\n')
    broken.chmod(0o755)
    out = tmp_path / "out"
    arguments = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--contenders",
        "trl",
        "--trl-python",
        str(broken),
        "--out",
        str(out),
        "--minutes",
        "1",
    ]
    assert gpu.main(arguments) == 1
    reason = "ended with status 3; its log ends: no kernel image is available"
    assert json.loads((out / "bench.json").read_text())["contenders"]["trl"]["outcomes"]["2x30"]["error"] == reason
    assert "FAILED" in capsys.readouterr().out and f"FAILED: {reason}" in (out / "bench.md").read_text()


def test_a_contender_that_is_not_installed_is_told_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.NEEDS, "trl-vllm", ("no_such_package",))
    assert (
        gpu.main(
            ["--size", "tiny", "--device", "cpu", "--contenders", "trl-vllm", "--out", str(tmp_path), "--minutes", "1"]
        )
        == 0
    )
    assert "not installed: no_such_package" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
def test_our_step_is_measured_from_the_first_to_the_last_line(tmp_path: Path) -> None:
    arguments = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--contenders",
        "ours",
        "--cases",
        "2x30",
        "--out",
        str(tmp_path),
        "--minutes",
        "3",
    ]
    assert gpu.main([*arguments, "--micro-batch-tokens", "64"]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    row, shape = content["figures"]["2x30"]["ours"], content["contenders"]["ours"]["settings"]["shape"]
    assert content["complete"] and row["steps_measured"] == 2 and row["seconds"] > 0
    assert set(row["phases"]) == {"load", "vision", "rollout", "reward_exposed", "reference", "advantages", "update"}
    assert sum(row["phases"].values()) <= row["seconds"] + 0.01
    assert row["mfu"] is None and row["reasons"]["mfu"] == "no datasheet figures for cpu"
    # two layers of hidden 128, intermediate 384, 4 heads and 2 key heads of 32: qkv, out, gate and up, down
    assert shape["layer_weights"] == 2 * (128 * 256 + 128 * 128 + 128 * 768 + 384 * 128)
    assert shape["lora_weights"] == 2 * 64 * (2 * 256 + 2 * 192 + 3 * 512)
    assert shape["cache_values"] == 2 * 2 * 2 * 32 and shape["item_bytes"] == 2
