"""The run on the terminal: a line that updates in place, plain lines in a log file, and where the time went."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from mrg_r1.progress import watched

_PLAIN_LINES = 20  # of a run, where nobody watches
_LONG = ("validation", "checkpoint", "evaluation")  # phases that may show a bar of their own
_LINE = {  # what is shown of a step: title -> metric
    "reward": "reward/total",
    "constant": "reward/constant",
    "mccs": "reward/mccs",
    "loss": "loss",
    "kl": "policy/kl",
    "length": "groups/length",
    "zero-signal": "groups/zero_signal",
    "tok/s": "time/tokens_per_second",
    "| val disease_micro13": "validation/disease_micro13",
    "val reward": "validation/mean_reward",
}


class StepLine:
    """A line a step on a terminal, rewritten in place; a line that stays at validations.

    Piped or under `CI`: the first step, the last, each validation and every twentieth of the run.
    """

    def __init__(self, *, active: bool, steps: int) -> None:
        # a pipe or a log file has no width: wide enough for the closing table
        self.console = Console(stderr=True, quiet=not active, width=None if sys.stderr.isatty() else 120)
        self.steps, self._live, self._shown = steps, active and watched(), False
        self._began, self._first = time.monotonic(), -1
        self._last_f1 = ""

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the step just taken, counted from 0."""
        self._first = step if self._first < 0 else self._first
        parts = [f"{title} {_short(metrics[name])}" for title, name in _LINE.items() if metrics.get(name) is not None]
        validated = metrics.get("validation/disease_micro13") is not None
        if validated:
            self._last_f1 = f"last val disease_micro13 {_short(metrics['validation/disease_micro13'])}"
        elif self._last_f1 and self._live:
            parts.append(self._last_f1)
        left = int((time.monotonic() - self._began) / (step - self._first + 1) * (self.steps - step - 1))
        line = f"step {step + 1}/{self.steps}  {'  '.join(parts)}  {left // 60}:{left % 60:02d} left"
        last = step + 1 == self.steps
        if self._live and not (validated or last):
            self.clear()
            shown = Text(line)
            shown.truncate(max(self.console.width - 1, 1), overflow="ellipsis")
            self.console.print(shown, end="\r")  # whatever comes next begins at the left, on this line
            self._shown = True
        elif (
            self._live
            or validated
            or last
            or step == self._first
            or (step + 1) % max(self.steps // _PLAIN_LINES, 1) == 0
        ):
            self.say(line)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.clear()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def entering(self, phase: str) -> None:
        """Make room for the bar that a long phase may show."""
        if phase in _LONG:
            self.clear()

    def clear(self) -> None:
        """Take the line off that is rewritten in place."""
        if self._shown:
            self.console.control(Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)))
            self._shown = False


def phase_table(totals: Mapping[str, float], tokens_per_second: float | None) -> Table:
    """Seconds and share by phase, longest first."""
    everything = sum(totals.values()) or 1.0
    rate = "" if tokens_per_second is None else f", {tokens_per_second:.0f} tokens/s in the steps"
    table = Table(title=f"where {everything:.0f} s went{rate}")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(totals.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.1f}", f"{seconds / everything:.1%}")
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
