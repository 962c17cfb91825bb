"""The 13 observations as things that a chest radiograph shows: where each lies, how large and how strongly drawn.

What lies where (side, zone, size, kind of device) is a study's traits: a function of seed and index alone, so that
image and report agree on it without either knowing the other. Left and right are the patient's: left is on the right of
the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.anatomy import Chest

ENLARGED_CARDIOMEDIASTINUM, CARDIOMEGALY, LUNG_OPACITY, LUNG_LESION, EDEMA, CONSOLIDATION, PNEUMONIA = range(7)
ATELECTASIS, PNEUMOTHORAX, PLEURAL_EFFUSION, PLEURAL_OTHER, FRACTURE, SUPPORT_DEVICES = range(7, NO_FINDING)
PACEMAKER, LINE = 0, 1  # Trait.kind of Support Devices

# Keys of the generators, so that no two uses of one (seed, index) share random numbers.
(
    TRAITS_STREAM,
    CHEST_STREAM,
    NOISE_STREAM,
    LABELS_STREAM,
    WORDING_STREAM,
    PATIENT_STREAM,
    EXPOSURE_STREAM,
    WRITERS_STREAM,
    RECOMBINED_STREAM,
) = range(9)
FAINT = 0.45  # how strongly an uncertain finding (-1) is drawn
# heights, top to bottom
_ZONES: dict[str, tuple[float, float]] = {"upper": (-0.50, -0.30), "mid": (-0.18, 0.02), "lower": (0.16, 0.36)}
_ZONES_OF: dict[int, tuple[str, ...]] = {CONSOLIDATION: ("upper", "lower"), ATELECTASIS: ("lower",)}
# The ones that are seen on both sides often enough to be said so.
_SHARE_OF_BOTH_SIDES: dict[int, float] = {EDEMA: 1.0, PLEURAL_EFFUSION: 0.25}
_SHARE_OF_LEFT: dict[int, float] = {SUPPORT_DEVICES: 0.8}


@dataclass(frozen=True)
class Trait:
    """Where and how large one observation is, if it is there."""

    side: str  # the patient's "left" or "right", or "both"
    zone: str  # "upper", "mid" or "lower" third of the lung
    grade: float  # size or severity, 0 to 1
    kind: int  # Support Devices: PACEMAKER or LINE; 0 elsewhere
    jitter: tuple[float, float]  # each 0 to 1: exact position and shape

    @property
    def signs(self) -> tuple[float, ...]:
        """The sign of x on each affected side."""
        return {"left": (1.0,), "right": (-1.0,), "both": (-1.0, 1.0)}[self.side]


def keyed_generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The generator of one use of one study.

    Raises:
        ValueError: a negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed}, index {index}: both must be 0 or greater")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, stream])))


def sample_traits(seed: int, index: int, both_sides: Mapping[int, float] = _SHARE_OF_BOTH_SIDES) -> tuple[Trait, ...]:
    """13 traits, one an observation, whether it is drawn or not; `both_sides` gives the share of findings on both
    sides.
    """
    u = keyed_generator(seed, index, TRAITS_STREAM).random((NO_FINDING, 6)).tolist()
    traits = []
    for observation in range(NO_FINDING):
        both, left, zone, grade, one, two = u[observation]
        side = "left" if left < _SHARE_OF_LEFT.get(observation, 0.5) else "right"
        if both < both_sides.get(observation, 0.0):
            side = "both"
        zones = _ZONES_OF.get(observation, tuple(_ZONES))
        kind = LINE if observation == SUPPORT_DEVICES and both > 0.55 else PACEMAKER
        traits.append(Trait(side, zones[int(zone * len(zones))], grade, kind, (one, two)))
    return tuple(traits)


def strengths_of(drawn: Sequence[int | None]) -> list[float]:
    """13 strengths, 1 for 1, `FAINT` for -1 and 0 for 0 and None, from 14 file values.

    Raises:
        ValueError: not 14 values, or another value than 1, 0, -1 and None.
    """
    if len(drawn) != len(OBSERVATIONS):
        raise ValueError(f"expected {len(OBSERVATIONS)} label values, one an observation, got {len(drawn)}")
    strength_of: dict[int | None, float] = {1: 1.0, -1: FAINT, 0: 0.0, None: 0.0}
    strengths = []
    for name, value in zip(OBSERVATIONS[:NO_FINDING], drawn[:NO_FINDING], strict=True):
        if value not in strength_of:
            raise ValueError(f"{name}: label value {value!r}; allowed are 1, 0, -1 and None")
        strengths.append(strength_of[value])
    return strengths


def proportions(chest: Chest, strengths: Sequence[float], traits: Sequence[Trait]) -> Chest:
    """What a finding changes before anything is drawn: a large heart, a wide mediastinum, a raised dome beside
    collapse.
    """
    heart = chest.heart + strengths[CARDIOMEGALY] * (0.15 + 0.08 * traits[CARDIOMEGALY].grade)
    mediastinum = chest.mediastinum + strengths[ENLARGED_CARDIOMEDIASTINUM] * (
        0.12 + 0.07 * traits[ENLARGED_CARDIOMEDIASTINUM].grade
    )
    raised = 0.08 * strengths[ATELECTASIS]
    signs = traits[ATELECTASIS].signs
    return replace(
        chest,
        heart=heart,
        mediastinum=mediastinum,
        dome_right=chest.dome_right - raised * (-1.0 in signs),
        dome_left=chest.dome_left - raised * (1.0 in signs),
    )


def height(trait: Trait) -> float:
    """y of a finding: somewhere in its zone."""
    top, bottom = _ZONES[trait.zone]
    return top + (bottom - top) * trait.jitter[1]
