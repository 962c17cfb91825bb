"""Figures of an earlier bench, kept in the repository, and what has become worse since. Pure, but for reading and
writing the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import replace_file

KEPT = Path("benchmarks/results/kept.json")
WORSE = 0.15  # share by which a ratio may fall before it is named: two runs on a busy machine differ by less
LOWER_IS_BETTER = ("growth_8_16",)

Ratios = Mapping[str, float | None]


def read_kept(path: Path = KEPT) -> dict[str, float | None]:
    """Ratios of the last figures that were kept; none where nothing was."""
    if not path.is_file():
        return {}
    ratios: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    return ratios


def worse_than_kept(now: Ratios, kept: Ratios) -> list[str]:
    """A line for each ratio that is more than `WORSE` worse than it was, or that is missing where there was one.

    Args:
        now: of this bench, of the cases that were run.
    """
    lines = []
    for name, new in now.items():
        old = kept.get(name)
        if old is None:
            continue
        if new is None:
            lines.append(f"{name}: {old:.2f} when figures were last kept, none now")
            continue
        change = 1 - new / old if name in LOWER_IS_BETTER else new / old - 1
        if change < -WORSE:
            lines.append(f"{name}: {new:.2f}, was {old:.2f} when figures were last kept ({-change:.0%} worse)")
    return lines


def keep(content: Mapping[str, Any], path: Path = KEPT) -> None:
    """Write a bench's ratios and figures, and where they are from, for the next bench to compare with."""
    machine = {name: content["environment"].get(name) for name in ("date", "cpu", "cores", "commit", "python")}
    kept = {"ratios": content["ratios"], "figures": content["figures"], "environment": machine}
    replace_file(path, json.dumps(_rounded(kept), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Three decimals are more than a bench can tell."""
    if isinstance(value, float):
        return round(value, 3)
    return {name: _rounded(inner) for name, inner in value.items()} if isinstance(value, dict) else value
