"""A page of phantoms for a person to judge: is this a chest, and does each finding look like itself?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.findings import CARDIOMEGALY, EDEMA, ENLARGED_CARDIOMEDIASTINUM, SUPPORT_DEVICES, Trait, render, sample_traits
from mrg_r1.phantom.sampler import FIVE_FINDINGS

_CAPTION = 16  # pixels below each picture
_NO_SIDE = (CARDIOMEGALY, EDEMA, ENLARGED_CARDIOMEDIASTINUM)
_EXAMPLES = (1, 1, 1, -1)


def contact_sheet(path: Path, *, side: int = 224, seed: int = 0, values: Sequence[int] | None = None) -> None:
    """Write a PNG: a row of normal studies, then a row for each observation (the five of the preset first), captioned.

    Args:
        path: where the PNG goes; its folder must exist.
        side: pixels of each radiograph, at least 32.
        seed: as `render`'s.
        values: the label value of each example in a row, left to right, 1 or -1; default three positive and one uncertain.

    Raises:
        ValueError: no values, another value than 1 and -1, or a side below 32.
    """
    values = _EXAMPLES if values is None else tuple(values)
    if not values or not set(values) <= {1, -1}:
        raise ValueError(f"values {values}: give at least one example a row, each 1 (positive) or -1 (uncertain)")
    rows: list[int | None] = [None, *FIVE_FINDINGS, *(i for i in range(NO_FINDING) if i not in FIVE_FINDINGS)]
    sheet = Image.new("L", (side * len(values), (side + _CAPTION) * len(rows)), color=255)
    write = ImageDraw.Draw(sheet)
    for r, observation in enumerate(rows):
        for c, value in enumerate(values):
            index = r * len(values) + c
            drawn: list[int | None] = [None] * len(OBSERVATIONS)
            caption = "normal"
            if observation is not None:
                drawn[observation] = value
                caption = _caption(observation, value, sample_traits(seed, index)[observation])
            sheet.paste(Image.fromarray(render(drawn, seed=seed, index=index, side=side)), (c * side, r * (side + _CAPTION)))
            write.text((c * side + 3, r * (side + _CAPTION) + side + 2), caption, fill=0)
    sheet.save(path, format="PNG")


def _caption(observation: int, value: int, trait: Trait) -> str:
    where = "" if observation in _NO_SIDE else f" {trait.side}"
    what = ("pacemaker", "line")[trait.kind] if observation == SUPPORT_DEVICES else f"{trait.grade:.2f}"
    return f"{OBSERVATIONS[observation]}{where} {what}{' (faint)' if value == -1 else ''}"
