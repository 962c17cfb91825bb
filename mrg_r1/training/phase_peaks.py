"""Training as it is, and beside it the most memory of each phase: what a rehearsal starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from mrg_r1.config.recipe import Recipe
from mrg_r1.engine.ranks import Ranks
from mrg_r1.files import write_text_atomically
from mrg_r1.training.grpo import train

PEAKS = "peaks.json"  # in RUN: bytes by phase
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def train_with_peaks(recipe: Recipe, ranks: Ranks) -> None:
    """`train`, and RUN/peaks.json: bytes by phase, of CUDA's allocator, without a GPU of the process; nothing where the
    system does not count them.
    """
    peaks = _Peaks(ranks.device)

    def beat(doing: str) -> None:
        ranks.beat(doing)
        peaks.enter(doing.split(",")[0])  # `update, pass 1 of 2`

    train(recipe, replace(ranks, beat=beat))
    peaks.enter("end")
    if ranks.is_main:
        write_text_atomically(recipe.output_dir / PEAKS, json.dumps(peaks.of_phase))


class _Peaks:
    def __init__(self, device: torch.device) -> None:
        self.of_phase: dict[str, int] = {}
        self._device, self._phase = device, "start"
        self._counts = device.type == "cuda" or _CLEAR.exists()

    def enter(self, phase: str) -> None:
        if phase == self._phase or not self._counts:
            return
        peak = self._taken()
        self.of_phase[self._phase] = max(self.of_phase.get(self._phase, 0), peak)
        if not self._counts:
            self.of_phase.clear()
        self._phase = phase

    def _taken(self) -> int:
        """The mark, which begins anew."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        try:
            _CLEAR.write_text("5", encoding="utf-8")  # proc(5): the mark is what is resident now
        except OSError:  # some containers refuse, and a mark of all phases before is none of this one's
            self._counts = False
        return int(line.split()[1]) * 1024
