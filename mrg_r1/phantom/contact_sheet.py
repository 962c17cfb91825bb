"""A page of phantoms for a person to judge: is this a chest, and does each finding look like itself?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mrg_r1.files import atomically
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.sampler import FIVE_FINDINGS
from mrg_r1.phantom.traits import (
    CARDIOMEGALY,
    EDEMA,
    ENLARGED_CARDIOMEDIASTINUM,
    LINE,
    SUPPORT_DEVICES,
    Trait,
    sample_traits,
)
from mrg_r1.phantom.views import FRONTAL, LATERAL, patient_traits, render_view

SIDE = 224  # pixels of each radiograph
_CAPTION = 16  # pixels below each picture
_NO_SIDE = (CARDIOMEGALY, EDEMA, ENLARGED_CARDIOMEDIASTINUM)
_EXAMPLES = (1, 1, 1, -1)  # the label value of each in a row: three positive, one uncertain
_Cell = tuple[str, NDArray[np.uint8]]  # caption, pixels


def contact_sheet(path: Path, *, seed: int = 0) -> None:
    """Write a PNG: a row of normal studies, then a row for each observation (the five of the preset first), captioned.

    Args:
        path: where the PNG goes; its folder must exist.
        seed: as `render`'s.
    """
    rows: list[int | None] = [None, *FIVE_FINDINGS, *(i for i in range(NO_FINDING) if i not in FIVE_FINDINGS)]
    cells: list[list[_Cell]] = []
    for r, observation in enumerate(rows):
        row = []
        for c, value in enumerate(_EXAMPLES):
            index = r * len(_EXAMPLES) + c
            drawn = _only(observation, value)
            caption = (
                "normal"
                if observation is None
                else _caption(observation, value, sample_traits(seed, index)[observation])
            )
            row.append((caption, render(drawn, seed=seed, index=index, side=SIDE)))
        cells.append(row)
    _write(path, cells)


def full_contact_sheet(path: Path, *, seed: int = 0) -> None:
    """Write a PNG of preset `full`: normal studies, then each observation mild on the right and severe on the left, in
    both views.

    Args:
        path: where the PNG goes; its folder must exist.
        seed: as `views.render_view`'s.
    """
    cells: list[list[_Cell]] = []
    for observation in (None, *range(NO_FINDING)):
        row = []
        for patient in _mild_and_severe(seed, observation):
            trait = None if observation is None else patient_traits(seed, patient)[observation]
            what = "normal" if observation is None or trait is None else _caption(observation, 1, trait)
            for view in (FRONTAL, LATERAL):
                pixels = render_view(_only(observation, 1), view, seed=seed, index=patient, patient=patient, side=SIDE)
                row.append((what if view == FRONTAL else view, pixels))
        cells.append(row)
    _write(path, cells)


def _mild_and_severe(seed: int, observation: int | None) -> tuple[int, int]:
    """The first patient whose trait is mild and right-sided, and the first whose is severe and left-sided, where there
    are sides.
    """
    if observation is None:
        return 0, 1
    found: dict[bool, int] = {}
    patient = 0
    while len(found) < 2:
        trait = patient_traits(seed, patient)[observation]
        severe = bool(trait.kind == LINE if observation == SUPPORT_DEVICES else trait.grade > 0.8)
        sided = observation in _NO_SIDE or trait.side == ("left" if severe else "right")
        if sided and (severe or observation == SUPPORT_DEVICES or trait.grade < 0.2):
            found.setdefault(severe, patient)
        patient += 1
    return found[False], found[True]


def _only(observation: int | None, value: int) -> list[int | None]:
    drawn: list[int | None] = [None] * len(OBSERVATIONS)
    if observation is not None:
        drawn[observation] = value
    return drawn


def _write(path: Path, rows: Sequence[Sequence[_Cell]]) -> None:
    side = SIDE
    sheet = Image.new("L", (side * len(rows[0]), (side + _CAPTION) * len(rows)), color=255)
    write = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (caption, pixels) in enumerate(row):
            sheet.paste(Image.fromarray(pixels), (c * side, r * (side + _CAPTION)))
            write.text((c * side + 3, r * (side + _CAPTION) + side + 2), caption, fill=0)
    with atomically(path, synced=False) as temporary:
        sheet.save(temporary, format="PNG")


def _caption(observation: int, value: int, trait: Trait) -> str:
    where = "" if observation in _NO_SIDE else f" {trait.side}"
    what = ("pacemaker", "line")[trait.kind] if observation == SUPPORT_DEVICES else f"{trait.grade:.2f}"
    return f"{OBSERVATIONS[observation]}{where} {what}{' (faint)' if value == -1 else ''}"
