"""Figures, their share of the peak, the roofline, and what has become worse, from numbers written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import RATIOS
from benchmarks.figures import compute_figures, figure_table, roofline, roofline_table
from benchmarks.kept import KEPT, LOWER_IS_BETTER, keep, read_kept, worse_than_kept
from benchmarks.results import CaseResult, Measurement
from benchmarks.roofline import Shapes, attention, count_grpo, count_sft, product


def measured(name: str, seconds: float, phases: dict[str, float] | None = None, **settings: object) -> Measurement:
    unit = {"seconds": seconds, "cpu_seconds": seconds, "phases": phases or {}, "resident_mb": 1.0, "peak_mb": 2.0}
    return Measurement(name, settings=settings, repetitions=[unit, unit | {"seconds": 2 * seconds}])


PEAK = measured("peak", 0.5, gflop=50.0)
ROLLOUTS = CaseResult(
    "rollouts",
    "",
    [
        measured(
            "16",
            2.0,
            {"rollout": 1.0, "update": 0.5},
            ranks=2,
            rollouts=128,
            counted={"rollout": {"flop": 60e9, "bytes": 3e9}, "update": {"flop": 40e9, "bytes": 1e9}},
        ),
        measured("64", 4.0, ranks=2, rollouts=512, counted={}),
        Measurement("256", error="no memory"),
        PEAK,
    ],
)


def test_figures_are_units_over_the_least_seconds_and_their_share_of_all_ranks_peak() -> None:
    figures = compute_figures([ROLLOUTS])
    assert figures["rollouts_per_second"] == {"16": 64.0, "64": 128.0, "256": None}
    assert figures["gemm_gflops"] == 100.0 and figures["sft_studies_per_second"] == {}
    assert figures["share_of_peak"]["rollouts 16"] == pytest.approx(100 / 2.0 / 200)
    assert figures["share_of_peak"]["rollouts 256"] is None
    assert compute_figures([])["gemm_gflops"] is None and figure_table(compute_figures([]))[1]
    assert ["rollouts a second at 16 studies a step", "64", "25%"] in figure_table(figures)[1]


def test_the_roofline_has_a_row_for_each_phase_that_was_counted() -> None:
    rows = roofline([ROLLOUTS])
    assert [(row["contender"], row["phase"]) for row in rows] == [("16", "rollout"), ("16", "update")]
    first = rows[0]
    assert (first["gflop"], first["flop_per_byte"], first["gflops"]) == (60.0, 20.0, 30.0)  # of one of two ranks
    assert first["share_of_peak"] == pytest.approx(0.3) and len(roofline_table(rows)[1]) == 2


def test_products_and_attention_are_counted_as_torch_counts_them() -> None:
    query, key = torch.ones(1, 4, 7, 8), torch.ones(1, 4, 7, 8)
    with FlopCounterMode(display=False) as counter:
        torch.ones(5, 3) @ torch.ones(3, 11)
    assert product(5, 3, 11).flop == counter.get_total_flops() and product(5, 3, 11).bytes == 4 * (15 + 33 + 55)
    with FlopCounterMode(display=False) as counter:
        (query @ key.transpose(-1, -2)) @ key
    assert attention(7, 7, 32, 32).flop == counter.get_total_flops()


CONFIG = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 300,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "depth": 3,
        "fullatt_block_indexes": [0, 2],
        "temporal_patch_size": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
    },
}


def test_the_work_of_a_step_grows_as_it_should() -> None:
    shapes = Shapes.of(CONFIG, prompt=30, patches=36)
    assert shapes.window == 36 and shapes.kv_width == 16
    assert shapes.matrices(10).flop == 2 * 10 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    one = count_grpo(shapes, studies=1, group=8, tokens=20, lora=4)
    two = count_grpo(shapes, studies=2, group=8, tokens=20, lora=4)
    for phase, work in one.items():
        assert two[phase].flop == pytest.approx(2 * work.flop), phase
    assert one["update"].flop > 2 * (one["reference"].flop - shapes.prompts(1).flop - shapes.matrices(30).flop)
    assert one["rollout"].bytes > one["reference"].bytes  # weights are read for each token
    sft = count_sft(shapes, studies=4, tokens=20)["update"]
    assert sft.flop > 3 * (shapes.matrices(4 * 49) + shapes.tower(4) + shapes.head(80)).flop


def test_a_ratio_is_named_where_it_is_more_than_15_percent_worse() -> None:
    kept = {"step_short": 2.0, "step_long": 10.0, "growth_8_16": 1.4, "rollout_long": 5.0, "sft_all": None, "gone": 3.0}
    assert not worse_than_kept({"step_short": 1.71, "step_long": 20.0, "growth_8_16": 1.6, "sft_all": 0.1}, kept)
    lines = worse_than_kept({"step_short": 1.69, "growth_8_16": 1.62, "rollout_long": None, "new": 1.0}, kept)
    assert len(lines) == 3
    assert lines[0].startswith("step_short: 1.69, was 2.00") and lines[1].startswith("growth_8_16: 1.62, was 1.40")
    assert lines[2].startswith("rollout_long: 5.00") and "none now" in lines[2]


def test_figures_are_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "kept.json"
    assert read_kept(path) == {}
    figures = {"rollouts_per_second": {"16": 100.12345}}
    environment = {"cpu": "a core", "worker_environment": {}}
    keep({"ratios": {"step_short": 1.87654, "sft_all": None}, "figures": figures, "environment": environment}, path)
    assert read_kept(path) == {"step_short": 1.877, "sft_all": None}
    assert "worker_environment" not in path.read_text()


def test_the_kept_figures_are_of_ratios_that_there_are() -> None:
    names = {ratio.name for ratio in RATIOS}
    assert set(read_kept(Path(__file__).parents[2] / KEPT)) <= names and set(LOWER_IS_BETTER) <= names
