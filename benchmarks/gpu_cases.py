"""The cases of the GPU bench, and what its workers share: keeping to the time, and one line for each finished case.

Imports nothing beyond the standard library and `benchmarks.workers`: workers may live in two virtual environments.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.workers import Channel

Size = Literal["7b", "tiny"]
Unit = dict[str, Any]  # of one step: `seconds`, `phases` and `peak_bytes`

LORA_RANK, LORA_ALPHA = 64, 128
REPETITIONS = 2  # measured steps of a case, after one that is not
_MARGIN = 1.2  # a unit may take this much longer than the longest before it


@dataclass(frozen=True)
class GpuCase:
    """One size of step.

    Attributes:
        name: studies x prompt tokens, about.
        side: of the square images in pixels; a merged patch of 28 x 28 is one prompt token, the words are 25 more.
    """

    name: str
    studies: int
    side: int
    group: int = 8
    new_tokens: int = 256

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.studies * self.group

    @property
    def tokens(self) -> int:
        """About how many tokens a step works on where no prompt is shared: only to tell how long a case may take."""
        return self.rows * ((self.side // 28) ** 2 + 25 + self.new_tokens)


# most important first: what the time does not allow is cut from the end
CASES: dict[Size, tuple[GpuCase, ...]] = {
    "7b": (
        GpuCase("8x1400", 8, 1036),
        GpuCase("8x350", 8, 504),
        GpuCase("16x1400", 16, 1036),
        GpuCase("16x350", 16, 504),
    ),
    "tiny": (GpuCase("2x30", 2, 56, group=2, new_tokens=4), GpuCase("2x35", 2, 84, group=2, new_tokens=4)),
}


def find_cases(size: Size, names: Sequence[str] | None) -> list[GpuCase]:
    """The cases of a size, all or those named, in their own order.

    Raises:
        ValueError: an unknown name; says which there are.
    """
    known = [case.name for case in CASES[size]]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no case {unknown[0]!r} of size {size}; there are {', '.join(known)}")
    return [case for case in CASES[size] if names is None or case.name in names]


class Allowance:
    """When a contender must be done with all its cases; it leaves by itself what would not end in time.

    Args:
        until: seconds since the epoch, so that the parent's clock and not the worker's start decides.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._pace = 0.0  # seconds a token of a case, as the last unit took them

    @property
    def left(self) -> float:
        return self._until - time.time()

    def refusal(self, case: GpuCase, *, start: float = 0.0) -> str | None:
        """Why the case is not to be begun: at the pace so far a warm-up and one step would not end. None: go on.

        Args:
            start: seconds that a case takes before its first step. The first case is begun in any case.
        """
        needed = start + 2 * self._pace * case.tokens if self._pace else 0.0
        return f"not run: {self.left:.0f} s left, about {needed:.0f} s needed" if self.left < needed else None

    def another(self, case: GpuCase, units: Sequence[Unit]) -> bool:
        """Whether one more unit is wanted and will end in time."""
        if units:
            self._pace = units[-1]["seconds"] / case.tokens
        longest = max((unit["seconds"] for unit in units), default=0.0)
        return len(units) < 1 + REPETITIONS and self.left > _MARGIN * longest


class CaseChannel(Channel):
    """The worker's end: a line when it is ready, a line for each case, a line at the end."""

    def case(self, case: GpuCase, content: Mapping[str, Any]) -> None:
        self._send({"case": case.name, **content})

    def done(self) -> None:
        self._send({"done": True})


def units_of(units: Sequence[Unit]) -> dict[str, Any]:
    """The part of a case's line that all contenders have."""
    return {"warm_up": units[0], "repetitions": list(units[1:])}


def worker_arguments(description: str | None) -> argparse.ArgumentParser:
    """What the parent tells every worker."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where benchmarks.gpu_model wrote tokenizer, config and images")
    parser.add_argument("--size", choices=list(CASES), required=True, help="of the model and the cases")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True, help="where to run")
    parser.add_argument("--cases", nargs="+", required=True, help="names of the cases to run")
    parser.add_argument(
        "--until", type=float, required=True, help="when all of them must be done, in seconds since the epoch"
    )
    return parser
