"""One step of a rehearsal in a process of its own: training as it is, and the most memory of each phase."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrg_r1.config.recipe import Recipe
from mrg_r1.engine.ranks import Ranks
from mrg_r1.policy.export.export import export
from mrg_r1.tracking.card.card import model_card
from mrg_r1.tracking.card.facts import read_facts
from mrg_r1.training.grpo import train

RESULT, DOING = "step.json", "doing"  # beside RUN
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def rehearsed_step(recipe: Recipe, ranks: Ranks) -> None:
    """Train the recipe, export what it has learned, and leave beside RUN what each phase took.

    step.json has `seconds` by phase, `peak_bytes` by phase (of CUDA's allocator; without a GPU of the process; empty
    where the system counts neither), `new_tokens`, the mean of a completion, `loss` and `grad_norm`.
    """
    folder = recipe.output_dir.parent
    peaks = _Peaks(ranks.device, folder / DOING)

    def beat(doing: str) -> None:
        ranks.beat(doing)
        peaks.enter(doing.split(",")[0])  # `update, pass 1 of 2`

    train(recipe, replace(ranks, beat=beat))
    beat("export")
    began = time.perf_counter()
    _export(recipe, folder / "exported")
    exported = time.perf_counter() - began
    peaks.enter("end")
    metrics = json.loads((recipe.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    summary = json.loads((recipe.output_dir / "summary.json").read_text(encoding="utf-8"))
    result = {
        "seconds": {**summary["seconds"], "export": round(exported, 2)},
        "peak_bytes": peaks.of_phase,
        "new_tokens": metrics["groups/length"],
        "loss": metrics["loss"],
        "grad_norm": metrics.get("policy/grad_norm"),
    }
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


def _export(recipe: Recipe, output: Path) -> None:
    facts = read_facts(
        recipe.output_dir, recipe.model_dump(mode="json"), instruction=recipe.prompt.words, policy=recipe.policy.path
    )

    def card(record: Any) -> str:
        return model_card(facts, record)

    export(recipe.output_dir, policy=recipe.policy.path, cold_start=None, merged=output, adapter=None, card=card)


class _Peaks:
    """The most memory of each phase; where the kernel does not let its mark be set back, of none."""

    def __init__(self, device: torch.device, doing: Path) -> None:
        self.of_phase: dict[str, int] = {}
        self._device, self._doing, self._phase = device, doing, "start"
        self._counts = device.type == "cuda" or _CLEAR.exists()

    def enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        if self._counts:
            before = self.of_phase.get(self._phase, 0)
            self.of_phase[self._phase] = max(before, self._take())
        self._phase = phase
        self._doing.write_text(phase, encoding="utf-8")

    def _take(self) -> int:
        """The mark, which begins anew."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        try:
            _CLEAR.write_text("5")  # proc(5): the mark is what is resident now
        except OSError:  # some containers refuse: a peak of all phases before would be a wrong number
            self._counts = False
            self.of_phase.clear()
            return 0
        return int(line.split()[1]) * 1024
