"""The run on the terminal: a line that updates in place, plain lines in a log file, and where the time went."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.control import Control
from rich.segment import ControlType

from mrg_r1.console import watched, wide_console

_PLAIN_LINES = 10  # of a run, where nobody watches
_LONG = ("validation", "checkpoint", "evaluation")  # phases that may show a bar of their own
_LINE = (  # what is shown of a step, as far as the line reaches: title, metric, columns of its value
    ("reward", "reward/total", 5),
    ("constant", "reward/constant", 5),
    ("mccs", "reward/mccs", 6),
    ("kl", "policy/kl", 7),
    ("length", "groups/length", 5),
    ("loss", "loss", 8),
    ("tok/s", "time/tokens_per_second", 6),
    ("zero-signal", "groups/zero_signal", 5),
)
_VALIDATION = ("disease_micro13", "mean_reward", "held_out_disease_micro13", "hacking_gap")


@dataclass(frozen=True)
class Budget:
    """The time that ends a run, before its steps do.

    Attributes:
        limited_by: the key and its value, in words.
        spent: of it, in its unit.
        limit: in its unit.
        unit: "seconds" or "processor seconds".
    """

    limited_by: str
    spent: float
    limit: float
    unit: str

    @property
    def share(self) -> float:
        """What is spent of it, at most 1."""
        return min(1.0, self.spent / self.limit)


class StepLine:
    """A line a step on a terminal, rewritten in place; a line that stays at validations.

    Piped or under `CI`: the first step, the last, each validation and every tenth of the run.
    """

    def __init__(self, *, active: bool, steps: int) -> None:
        self.console = wide_console(stderr=True, quiet=not active)
        self.steps, self._shown = steps, False
        self._live = active and watched()
        self._began, self._first = time.monotonic(), -1
        self._last_validation = ""
        self._rates: list[float] = []
        self._tenths = 0  # of the budget, at the step before

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the steps shown; None where they had none."""
        return statistics.median(self._rates) if self._rates else None

    def step(self, step: int, metrics: Mapping[str, Any], budget: Budget | None = None) -> None:
        """Show the step just taken, counted from 0; of a run that a time ends, how much of it is spent."""
        self._first = step if self._first < 0 else self._first
        if metrics.get("time/tokens_per_second") is not None:
            self._rates.append(metrics["time/tokens_per_second"])
        last, tenth = self._place(step, budget)
        line = self._line(step, metrics, budget, last=last)
        if self._live and not last:
            self.clear()
            # whatever comes next begins at the left, on this line
            self.console.print(line, end="\r", highlight=False, markup=False, no_wrap=True, overflow="crop")
            self._shown = True
        elif last or tenth or step == self._first:
            self.say(line)
        validated = {name: metrics.get(f"validation/{name}") for name in _VALIDATION}
        if validated["disease_micro13"] is not None:
            self._last_validation = f"val micro13 {_short(validated['disease_micro13'])}"
            shown = [f"{name} {_short(value)}" for name, value in validated.items() if value is not None]
            self.say(f"{self._counted(step, budget)}  validation: {'  '.join(shown)}{_how_sure(metrics)}")

    def _place(self, step: int, budget: Budget | None) -> tuple[bool, bool]:
        """Whether the step is the run's last, and whether it ends a tenth of it, by steps or by time."""
        last = step + 1 == self.steps
        if budget is None:
            return last, (step + 1) % max(self.steps // _PLAIN_LINES, 1) == 0
        tenths, self._tenths = self._tenths, int(budget.share * _PLAIN_LINES)
        return last or budget.share >= 1, self._tenths > tenths

    def _line(self, step: int, metrics: Mapping[str, Any], budget: Budget | None, *, last: bool) -> str:
        """The step in one line of the console's width; what does not fit is left to metrics.jsonl."""
        begins, ends = self._counted(step, budget), f"  {self._left(step, budget)} left"
        parts = [
            f"  {title} {_short(metrics[name]):>{columns}}"
            for title, name, columns in _LINE
            if metrics.get(name) is not None
        ]
        if self._live and self._last_validation and not last:
            parts.insert(2, f"  {self._last_validation}")
        for part in parts:
            if len(begins) + len(part) + len(ends) < self.console.width:
                begins += part
        return begins + ends

    def _left(self, step: int, budget: Budget | None) -> str:
        """Minutes and seconds until the end, by the steps' pace or of the budget, whichever is nearer."""
        done = step - self._first + 1
        left = (time.monotonic() - self._began) / done * (self.steps - step - 1)
        if budget is not None:
            left = min(left, max(budget.limit - budget.spent, 0.0))
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def _counted(self, step: int, budget: Budget | None = None) -> str:
        if budget is not None:
            return f"step {step + 1:5}  {budget.share:4.0%} of {budget.limit:,.0f} {budget.unit}"
        return f"step {step + 1:{len(str(self.steps))}}/{self.steps}"

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


def _how_sure(metrics: Mapping[str, Any]) -> str:
    """Of the score that chooses the best adapter: its standard error, and how far it is from the best before it."""
    error, over = metrics.get("validation/standard_error"), metrics.get("validation/over_best")
    if error is None:
        return ""
    to_best = metrics.get("validation/over_best_standard_error")
    return f"  ±{error:.3f}" + (
        "" if over is None or to_best is None else f", over the best {over:+.3f} ±{to_best:.3f}"
    )


def where_time_went(totals: Mapping[str, float], tokens_per_second: float | None, labelers: float = 0.0) -> str:
    """Seconds by phase, longest first, in one line; what is short beside the whole comes together at its end.

    Args:
        labelers: processor seconds that the labelers' processes took beside the ranks.
    """
    everything = sum(totals.values()) or 1.0
    shown = {name: seconds for name, seconds in totals.items() if seconds >= max(0.01 * everything, 0.5)}
    phases = [f"{name} {seconds:.0f}" for name, seconds in sorted(shown.items(), key=lambda item: -item[1])]
    rest = everything - sum(shown.values())
    phases += [f"the rest {rest:.0f}"] if len(shown) < len(totals) and rest >= 0.5 else []
    rate = "" if tokens_per_second is None else f"; {tokens_per_second:,.0f} tokens/s in the steps"
    beside = f"; beside it {labelers:.0f} s of processor time by labelers" if labelers >= 0.5 else ""
    return f"{everything:.0f} s: {', '.join(phases)}{rate}{beside}"


def _short(value: float) -> str:
    """A number in at most 7 characters and a sign, of which three or four are its digits."""
    size = abs(value)
    if isinstance(value, int) or size == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:,.0f}" if size >= 100 else f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.1e}"
