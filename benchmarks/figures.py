"""From the laboratory's measurements to figures: rollouts and studies a second, shares of the core's peak, a roofline.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.results import CaseResult, Measurement, Table

PEAK = "peak"  # the contender that multiplies matrices and nothing else


def compute_figures(results: Sequence[CaseResult]) -> dict[str, Any]:
    """What is measured in units a second, each None where it was not measured.

    Returns:
        `gemm_gflops` of one core, `rollouts_per_second` by studies a step, `sft_studies_per_second` of ours and of the
        checkpoint's modules, `share_of_peak` of each: its arithmetic over what its ranks could do at the peak.
    """
    by_name = {result.name: {one.name: one for one in result.measurements} for result in results}
    rollouts, sft = by_name.get("rollouts", {}), by_name.get("sft_all", {})
    rates = {name: _rate(one, "rollouts") for name, one in rollouts.items() if name != PEAK}
    studies = {name: _rate(one, "studies") for name, one in sft.items() if name != PEAK}
    peaks = {case: peak_of(contenders) for case, contenders in by_name.items()}
    shares = {f"rollouts {name}": _share(one, peaks["rollouts"]) for name, one in rollouts.items() if name != PEAK}
    shares |= {f"sft {name}": _share(one, peaks["sft_all"]) for name, one in sft.items() if name != PEAK}
    known = [peak for peak in peaks.values() if peak is not None]
    return {
        "gemm_gflops": max(known) if known else None,
        "rollouts_per_second": rates,
        "sft_studies_per_second": studies,
        "share_of_peak": shares,
    }


def peak_of(contenders: dict[str, Measurement]) -> float | None:
    """GFLOP/s of the case's own peak, measured in turns with the others."""
    one = contenders.get(PEAK)
    seconds = one.value("seconds") if one is not None else None
    return one.settings["gflop"] / seconds if one is not None and seconds else None


def roofline(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """One row a contender and phase: seconds of the fastest unit, arithmetic and bytes of all ranks, what was reached.

    `gflops` and `share_of_peak` are a rank's, since ranks run side by side; `flop_per_byte` says on which side of a
    roof the phase lies.
    """
    rows = []
    for result in results:
        peak = peak_of({one.name: one for one in result.measurements})
        for one, phase, seconds, counted in _phases(result):
            reached = counted["flop"] / 1e9 / seconds / one.settings["ranks"]
            rows.append(
                {
                    "case": result.name,
                    "contender": one.name,
                    "phase": phase,
                    "seconds": seconds,
                    "gflop": counted["flop"] / 1e9,
                    "gbyte": counted["bytes"] / 1e9,
                    "flop_per_byte": counted["flop"] / counted["bytes"],
                    "gflops": reached,
                    "gbyte_per_second": counted["bytes"] / 1e9 / seconds / one.settings["ranks"],
                    "share_of_peak": None if peak is None else reached / peak,
                }
            )
    return rows


def figure_table(figures: dict[str, Any]) -> Table:
    """Rates and their shares of the peak."""
    rows = [["product of matrices, GFLOP/s a core", _number(figures["gemm_gflops"], ".0f"), ""]]
    for title, key, prefix in (
        ("rollouts a second at {} studies a step", "rollouts_per_second", "rollouts"),
        ("SFT studies a second: {}", "sft_studies_per_second", "sft"),
    ):
        for name, rate in figures[key].items():
            share = figures["share_of_peak"].get(f"{prefix} {name}")
            rows.append([title.format(name), _number(rate, ".0f"), _number(share, ".0%")])
    return ["", "measured", "share of peak"], rows


def roofline_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The roofline for a reader."""
    header = ["", "phase", "s", "GFLOP", "GB", "FLOP/byte", "GFLOP/s a rank", "share of peak"]
    return header, [
        [
            f"{row['case']} {row['contender']}",
            row["phase"],
            f"{row['seconds']:.2f}",
            f"{row['gflop']:.1f}",
            f"{row['gbyte']:.2f}",
            f"{row['flop_per_byte']:.0f}",
            f"{row['gflops']:.0f}",
            _number(row["share_of_peak"], ".0%"),
        ]
        for row in rows
    ]


def _phases(result: CaseResult) -> Iterator[tuple[Measurement, str, float, dict[str, float]]]:
    for one in result.measurements:
        if one.error is not None or one.fastest is None:
            continue
        for phase, counted in one.settings.get("counted", {}).items():
            seconds = one.fastest["phases"].get(phase)
            if seconds:
                yield one, phase, seconds, counted


def _rate(one: Measurement, what: str) -> float | None:
    seconds = one.value("seconds")
    return one.settings[what] / seconds if seconds else None


def _share(one: Measurement, peak: float | None) -> float | None:
    seconds = one.value("seconds")
    if not seconds or not peak:
        return None
    gflop = sum(counted["flop"] for counted in one.settings["counted"].values()) / 1e9
    return float(gflop / seconds / (peak * one.settings["ranks"]))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
