"""From what the workers of the GPU bench answered to figures and tables. Pure, but for `write_results`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import GpuCase
from benchmarks.results import Table, markdown_table, replace_file
from mrg_r1.training.utilisation import PEAK_FLOPS, Tokens, update_flops

HOW = (
    "Seconds are those of the fastest measured step, after one warm-up step; the device is synchronised at the "
    "ends of steps and phases. '/ ours': seconds of the contender / ours, so more is better for ours. MFU of our "
    "update = (4 N T + 4 V H C + 6 L T) / (seconds of the update x the card's dense bf16 peak): N weights of the "
    "language model's layers, L of LoRA, T tokens run (each prompt once, and of each completion all but the "
    "last), C completion tokens, V x H the head; frozen weights cost 2 N forward and 2 N backward; recomputation "
    "and attention's own products are not counted. decode, share of bound = time to read once what a step must "
    "read (merged weights and head, keys and values of prompts once a study, of completions at half length) at "
    "the card's bandwidth / measured seconds a token; decode is the rollout less one of a single token. Peak "
    "memory is what torch's allocator held at most."
)


@dataclass(frozen=True)
class Peak:
    """What a card can do at most, by its datasheet."""

    flops: float  # dense bf16, a second
    bandwidth: float  # bytes a second


_BANDWIDTHS = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA A100-SXM4-80GB": 2.04e12}
PEAKS = {name: Peak(PEAK_FLOPS[name], bandwidth) for name, bandwidth in _BANDWIDTHS.items()}


@dataclass(frozen=True)
class Shape:
    """What of a policy its costs depend on."""

    layer_weights: int  # of the language model's linear layers, without LoRA
    lora_weights: int
    vocabulary: int
    hidden: int
    cache_values: int  # keys and values of one token, over all layers
    item_bytes: int

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden


@dataclass
class Outcome:
    """What became of one contender in one case.

    Attributes:
        line: what its worker said of the case.
        error: why it failed; None where it did not.
        note: why there is nothing, or less than asked for, though nothing failed.
    """

    line: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    note: str | None = None

    @property
    def fastest(self) -> dict[str, Any] | None:
        """The fastest measured unit; the warm-up where time allowed no other."""
        units = self.line.get("repetitions") or ([self.line["warm_up"]] if "warm_up" in self.line else [])
        return min(units, key=lambda unit: unit["seconds"]) if units else None


@dataclass
class Contender:
    """One contender: what it said of itself, and an outcome a case."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def tokens_run(case: GpuCase, prompt_tokens: int) -> Tokens:
    """Tokens that one pass over a rollout takes through the layers; the last of a completion predicts nothing."""
    prompts = case.studies * prompt_tokens
    return Tokens(prompts, prompts, case.rows * (case.new_tokens - 1), case.rows * case.new_tokens)


def decode_bytes(shape: Shape, case: GpuCase, prompt_tokens: int) -> float:
    """Bytes that one decode step must read, at half of the completions' length."""
    cached = case.studies * prompt_tokens + case.rows * case.new_tokens / 2
    return shape.item_bytes * (shape.layer_weights + shape.head_weights + cached * shape.cache_values)


def figures(outcome: Outcome, case: GpuCase, *, shape: Shape | None, device: str) -> dict[str, Any]:
    """The numbers of one row; None where there is nothing to say, with the reason under `reasons`.

    Args:
        shape: of our policy; None for contenders whose phases are not known well enough.
    """
    unit = outcome.fastest
    if unit is None:
        return {}
    seconds, phases = unit["seconds"], unit["phases"]
    peaks = [
        one["peak_bytes"]
        for one in (outcome.line["warm_up"], *outcome.line["repetitions"])
        if one["peak_bytes"] is not None
    ]
    row: dict[str, Any] = {
        "seconds": seconds,
        "steps_measured": len(outcome.line["repetitions"]),
        "samples_per_second": case.rows / seconds,
        "tokens_per_second": case.rows * case.new_tokens / seconds,
        "phases": phases,
        "peak_gib": max(peaks) / 2**30 if peaks else None,
        "reasons": {} if peaks else {"peak_gib": "not a CUDA device"},
    }
    if shape is None:
        return row
    prompt_tokens, prefill, peak = outcome.line["prompt_tokens"], outcome.line["prefill_seconds"], PEAKS.get(device)
    a_token = (phases["rollout"] - prefill) / (case.new_tokens - 1)
    run = tokens_run(case, prompt_tokens)
    flops = update_flops(shape.layer_weights, shape.lora_weights, shape.head_weights, run)
    read = decode_bytes(shape, case, prompt_tokens)
    row |= {
        "prefill_seconds": prefill,
        "decode_seconds_per_token": a_token,
        "update_flops": flops,
        "decode_bytes": read,
    }
    row |= {"mfu": None, "decode_share_of_bound": None}
    if peak is None:
        row["reasons"] |= dict.fromkeys(("mfu", "decode_share_of_bound"), f"no datasheet figures for {device}")
        return row
    row["mfu"] = flops / (phases["update"] * peak.flops)
    if a_token > 0:
        row["decode_share_of_bound"] = read / (a_token * peak.bandwidth)
    else:
        row["reasons"]["decode_share_of_bound"] = "a rollout of one token took as long as the whole one"
    return row


def ratio(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float | None:
    """Their seconds a step over ours; None where one is missing."""
    return theirs["seconds"] / ours["seconds"] if "seconds" in theirs and "seconds" in ours else None


def all_figures(contenders: Sequence[Contender], cases: Sequence[GpuCase]) -> dict[str, dict[str, dict[str, Any]]]:
    """case -> contender -> figures, each but ours with its `ratio` to ours."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        rows = {}
        for one in contenders:
            shape = Shape(**one.settings["shape"]) if "shape" in one.settings else None
            rows[one.name] = figures(one.outcomes[case.name], case, shape=shape, device=one.settings.get("device", ""))
        for name, row in rows.items():
            if row and name != "ours":
                row["ratio"] = ratio(row, rows.get("ours", {}))
        found[case.name] = rows
    return found


def step_table(contenders: Sequence[Contender], cases: Sequence[GpuCase]) -> Table:
    """A row for each case and contender: speed, memory, and what went wrong."""
    header = ["case", "contender", "s a step", "steps", "samples/s", "tokens/s", "/ ours", "peak GiB", "remark"]
    rows = []
    for case_name, of_case in all_figures(contenders, cases).items():
        for one in contenders:
            row, outcome = of_case[one.name], one.outcomes[case_name]
            remarks = [f"FAILED: {outcome.error}"] if outcome.error else []
            remarks += [outcome.note] if outcome.note else []
            cells = [
                (row.get("seconds"), ".2f"),
                (row.get("steps_measured"), "d"),
                (row.get("samples_per_second"), ".2f"),
            ]
            cells += [(row.get("tokens_per_second"), ".0f"), (row.get("ratio"), ".2f"), (row.get("peak_gib"), ".1f")]
            rows.append([case_name, one.name, *(_number(*cell) for cell in cells), "; ".join(remarks)])
    return header, rows


def phase_table(contenders: Sequence[Contender], cases: Sequence[GpuCase]) -> Table:
    """Where the time of the fastest steps went, and how near our update and decode are to what the card can do."""
    header = [
        "case",
        "contender",
        "seconds by phase",
        "prefill s",
        "ms a token",
        "MFU of update",
        "decode, share of bound",
        "remark",
    ]
    rows = []
    for case_name, of_case in all_figures(contenders, cases).items():
        for name, row in of_case.items():
            if not row:
                continue
            token = row.get("decode_seconds_per_token")
            reasons = sorted({reason for key, reason in row["reasons"].items() if key != "peak_gib"})
            cells = [(row.get("prefill_seconds"), ".2f"), (None if token is None else token * 1000, ".2f")]
            cells += [(row.get("mfu"), ".1%"), (row.get("decode_share_of_bound"), ".1%")]
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items())
            rows.append([case_name, name, phases, *(_number(*cell) for cell in cells), "; ".join(reasons)])
    return header, rows


def write_results(
    folder: Path,
    *,
    contenders: Sequence[Contender],
    cases: Sequence[GpuCase],
    environment: Mapping[str, Any],
    complete: bool,
) -> None:
    """Write bench.json and bench.md, each whole or not at all."""
    content = {
        "figures": all_figures(contenders, cases),
        "complete": complete,
        "how": HOW,
        "environment": dict(environment),
        "cases": [asdict(case) for case in cases],
        "contenders": {one.name: asdict(one) for one in contenders},
    }
    replace_file(folder / "bench.json", json.dumps(content, indent=1) + "\n")
    settings: Table = (
        ["contender", "settings"],
        [[one.name, json.dumps(one.settings)] for one in contenders if one.settings],
    )
    where: Table = ["", ""], [[name, str(value)] for name, value in environment.items()]
    tables = [step_table(contenders, cases), phase_table(contenders, cases), settings, where]
    parts = ["# Bench on a GPU", *(markdown_table(table) for table in tables), HOW]
    replace_file(folder / "bench.md", "\n\n".join(parts) + "\n")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
