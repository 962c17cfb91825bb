"""The 13 observations as things that a chest radiograph shows, and `render`, which draws them.

What lies where (side, zone, size, kind of device) is a study's traits: a function of seed and index alone, so that
image and report agree on it without either knowing the other. Left and right are the patient's: left is on the right of
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.anatomy import (
    APEX,
    Chest,
    Layers,
    build_layers,
    cage_half_width,
    expose,
    ramp,
    rib_brightness,
    sample_chest,
    stroke,
)
from mrg_r1.phantom.vessels import bezier, floats

ENLARGED_CARDIOMEDIASTINUM, CARDIOMEGALY, LUNG_OPACITY, LUNG_LESION, EDEMA, CONSOLIDATION, PNEUMONIA = range(7)
ATELECTASIS, PNEUMOTHORAX, PLEURAL_EFFUSION, PLEURAL_OTHER, FRACTURE, SUPPORT_DEVICES = range(7, NO_FINDING)
PACEMAKER, LINE = 0, 1  # Trait.kind of Support Devices

# Keys of the generators, so that no two uses of one (seed, index) share random numbers.
TRAITS_STREAM, CHEST_STREAM, NOISE_STREAM, LABELS_STREAM, WORDING_STREAM, PATIENT_STREAM, EXPOSURE_STREAM = range(7)
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


def render(drawn: Sequence[int | None], *, seed: int, index: int, side: int) -> NDArray[np.uint8]:
    """A frontal chest radiograph with the findings of `drawn`.

    Args:
        drawn: 14 file values in CheXbert's order; 1 is drawn, -1 drawn faintly, 0 and None not at all. No Finding is
            not read.
        seed: the data set's.
        index: the study's; patient, exposure and traits follow from seed and index alone.
        side: pixels of each side, at least 32.

    Returns:
        [side, side] uint8 grey levels, bright is dense. The same arguments give the same bytes on one machine; between
        processors numpy's float32 functions may differ in the last bit, so a grey level here and there by one.

    Raises:
        ValueError: not 14 values, another value than 1, 0, -1 and None, a negative seed or index, or a side below 32.
    """
    strengths = strengths_of(drawn)
    traits = sample_traits(seed, index)
    chest = proportions(sample_chest(keyed_generator(seed, index, CHEST_STREAM)), strengths, traits)
    layers = build_layers(chest, side)
    paint_frontal(layers, traits, strengths)
    return expose(layers, keyed_generator(seed, index, NOISE_STREAM).standard_normal((side, side), dtype=np.float32))


def paint_frontal(layers: Layers, traits: Sequence[Trait], strengths: Sequence[float]) -> None:
    """Draw the findings into frontal layers in place.

    Args:
        traits: 13.
        strengths: at least 13; 0 draws nothing, 1 a certain finding. What `proportions` does is not done here.
    """
    for observation, paint in _PAINTERS.items():
        if strengths[observation] > 0:
            paint(layers, traits[observation], strengths[observation])


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


def _in_lung(chest: Chest, sign: float, y: float, share: float) -> float:
    """x at `share` of the way from the mediastinum (or the heart, low on the left) to the chest wall."""
    inner = chest.mediastinum + 0.06
    if y > 0.0:
        inner = chest.heart + (0.18 if sign > 0 else -0.10)
    outer = cage_half_width(chest, y) - 0.06
    return sign * (inner + (max(outer, inner + 0.05) - inner) * share)


def blob(layers: Layers, x: float, y: float, half_width: float, half_height: float, edge: float, depth: float) -> None:
    """Take the share `depth` of the air away inside an ellipse; `edge` is the soft share of its radius."""
    rows, columns = layers.box(x - 1.3 * half_width, x + 1.3 * half_width, y - 1.3 * half_height, y + 1.3 * half_height)
    across = (layers.x[rows, columns] - np.float32(x)) * np.float32(1 / half_width)
    down = (layers.y[rows] - np.float32(y)) * np.float32(1 / half_height)
    inside = ramp(np.float32(1) - across * across - down * down, 2 * edge)
    layers.air[rows, columns] *= np.float32(1) - np.float32(depth) * inside


def _lung_opacity(layers: Layers, trait: Trait, strength: float) -> None:
    """An ill-defined haze through which vessels stay visible."""
    for sign in trait.signs:
        y = height(trait)
        size = 0.24 + 0.06 * trait.grade
        blob(
            layers,
            _in_lung(layers.chest, sign, y, 0.35 + 0.3 * trait.jitter[0]),
            y,
            size,
            1.1 * size,
            0.9,
            0.62 * strength,
        )


def _lung_lesion(layers: Layers, trait: Trait, strength: float) -> None:
    """A round, sharply bounded, dense nodule or mass."""
    for sign in trait.signs:
        y = height(trait)
        radius = 0.14 + 0.07 * trait.grade
        x = _in_lung(layers.chest, sign, y, 0.40 + 0.25 * trait.jitter[0])
        rows, columns = layers.box(x - 1.2 * radius, x + 1.2 * radius, y - 1.2 * radius, y + 1.2 * radius)
        distance = np.hypot(layers.x[rows, columns] - np.float32(x), layers.y[rows] - np.float32(y))
        inside = ramp(np.float32(radius) - distance, 0.03) * np.float32(strength)
        layers.air[rows, columns] *= np.float32(1) - np.float32(0.96) * inside
        layers.bone[rows, columns] += np.float32(0.05) * inside


def _edema(layers: Layers, trait: Trait, strength: float) -> None:
    """Bilateral perihilar haze, thickened vessels and septal lines at the lung's edge."""
    spread = np.float32(1 / (0.30 + 0.06 * trait.grade))
    away = (layers.abs_x - np.float32(0.26)) * spread
    down = (layers.y - np.float32(0.08)) * (spread * np.float32(0.75))
    haze = np.exp(-(away * away + down * down))
    layers.air *= np.float32(1) - np.float32(0.68 * strength) * haze
    layers.vessels *= np.float32(1 + 1.3 * strength)
    for sign in trait.signs:
        for line in range(6):
            y = 0.14 + 0.055 * line + 0.02 * trait.jitter[0]
            outer = sign * (cage_half_width(layers.chest, y) - 0.01)
            stroke(layers, layers.vessels, floats([[outer, y], [outer - sign * 0.10, y - 0.01]]), 0.006, 0.9 * strength)


def _consolidation(layers: Layers, trait: Trait, strength: float) -> None:
    """A dense, homogeneous area reaching the chest wall, straight-edged at the fissure, with air bronchograms."""
    height = 0.17 + 0.06 * trait.grade
    centre = {"upper": -0.36, "lower": 0.30}[trait.zone] + 0.08 * (trait.jitter[1] - 0.5)
    for sign in trait.signs:
        left, right = sorted((sign * 0.08, sign * 0.86))
        rows, columns = layers.box(left, right, centre - height - 0.05, centre + height + 0.05)
        x, y = layers.x[rows, columns], layers.y[rows]
        slope = np.float32(0.20 if trait.zone == "upper" else -0.15) * (np.abs(x) - np.float32(0.45))
        inside = ramp(np.float32(height) - np.abs(y - np.float32(centre) - slope), 0.05)
        inside *= ramp(x * np.float32(sign) - np.float32(0.22), 0.12)
        layers.air[rows, columns] *= np.float32(1) - np.float32(0.86 * strength) * inside
        bronchi = np.zeros_like(layers.air)
        for turn in (-0.6, 0.0, 0.6):
            end = (sign * 0.62, centre + turn * height)
            path = bezier([(sign * 0.22, centre), (sign * 0.40, centre + 0.2 * turn * height), end], 8)
            stroke(layers, bronchi, path, 0.011, 0.5 * strength)
        layers.air[rows, columns] += bronchi[rows, columns] * inside


def _pneumonia(layers: Layers, trait: Trait, strength: float) -> None:
    """Patchy, confluent, fluffy densities in one zone."""
    offsets = ((-0.15, -0.07), (0.04, -0.17), (0.15, 0.01), (-0.06, 0.11), (0.10, 0.19))
    for sign in trait.signs:
        y = height(trait)
        x = _in_lung(layers.chest, sign, y, 0.45)
        for patch, (across, down) in enumerate(offsets):
            size = 0.065 + 0.025 * ((patch + trait.jitter[0]) % 1.7) + 0.012 * trait.grade
            blob(layers, x + across, y + down, size * 1.1, size, 0.55, 0.74 * strength)


def _atelectasis(layers: Layers, trait: Trait, strength: float) -> None:
    """Two or three linear bands above a raised dome."""
    for sign in trait.signs:
        dome = layers.chest.dome_left if sign > 0 else layers.chest.dome_right
        inner = layers.chest.heart + (0.08 if sign > 0 else -0.12)
        for band in range(2 + (trait.grade > 0.4)):
            y = dome - 0.11 - 0.11 * band + 0.03 * trait.jitter[1]
            outer = cage_half_width(layers.chest, y) - 0.04
            start, end = (sign * (inner + 0.04 * band), y + 0.01), (sign * outer, y - 0.04 + 0.08 * trait.jitter[0])
            stroke(
                layers,
                layers.bone,
                bezier([start, ((start[0] + end[0]) / 2, y - 0.03), end], 8),
                0.020,
                0.34 * strength,
            )


def _pneumothorax(layers: Layers, trait: Trait, strength: float) -> None:
    """Air without lung markings around the apex and the side, and the pleural line of the lung that has fallen away
    from it.
    """
    for sign in trait.signs:
        left, right = sorted((sign * 0.05, sign * 0.95))
        rows, columns = layers.box(left, right, -0.9, 0.8)
        wall, y = layers.wall[rows, columns], layers.y[rows]
        upper = np.clip((np.float32(0.55) - y) * np.float32(1 / 1.1), 0, 1)
        depth = np.float32(0.08) + np.float32(0.22 + 0.15 * trait.grade) * upper
        # the lung also sinks away from the apex
        gap = np.minimum(wall - depth, y - np.float32(APEX + 0.22 + 0.20 * trait.grade))
        outside = ramp(-gap, 0.02)
        air = layers.air[rows, columns]
        line = np.clip(np.float32(1) - np.abs(gap) * np.float32(1 / max(0.018, 1.6 / layers.side)), 0, 1) * np.clip(
            air, 0, 1
        )
        layers.vessels[rows, columns] *= np.float32(1) - np.float32(strength) * outside
        layers.bone[rows, columns] += np.float32(0.26 * strength) * line
        # the free air is darker, the collapsing lung denser
        air *= np.float32(1) + np.float32(strength) * (np.float32(0.55) * outside - np.float32(0.25))


def _pleural_effusion(layers: Layers, trait: Trait, strength: float) -> None:
    """Fluid that blunts the costophrenic angle, hides the dome and climbs the chest wall (the meniscus)."""
    for sign in trait.signs:
        dome = layers.chest.dome_left if sign > 0 else layers.chest.dome_right
        level = dome + 0.06 - 0.36 * trait.grade
        left, right = sorted((sign * -0.02, sign * 0.95))
        rows, columns = layers.box(left, right, level - 0.5, 1.3)
        wall, y = layers.wall[rows, columns], layers.y[rows]
        surface = np.float32(level) - np.float32(0.20 + 0.12 * trait.grade) * np.exp(
            -np.maximum(wall, 0) * np.float32(1 / 0.13)
        )
        fluid = ramp(y - surface, 0.05) * ramp(layers.x[rows, columns] * np.float32(sign) - np.float32(0.05), 0.06)
        fluid *= np.float32(strength)
        layers.air[rows, columns] *= np.float32(1) - np.float32(0.96) * fluid
        layers.soft[rows, columns] += np.float32(0.06) * fluid * ramp(wall, 0.04)


def _pleural_other(layers: Layers, trait: Trait, strength: float) -> None:
    """Pleural thickening: a scalloped band along the chest wall, capping the apex, with a calcified plaque."""
    for sign in trait.signs:
        left, right = sorted((sign * 0.10, sign * 0.95))
        rows, columns = layers.box(left, right, -0.9, 0.45)
        wall, y = layers.wall[rows, columns], layers.y[rows]
        waves = np.float32(0.06 + 0.03 * trait.grade) + np.float32(0.022) * np.sin(
            y * np.float32(19) + np.float32(6 * trait.jitter[0])
        )
        waves = waves.astype(np.float32) * np.clip((np.float32(0.42) - y) * np.float32(6), 0, 1)
        inside = ramp(waves - wall, 0.025)
        layers.air[rows, columns] *= np.float32(1) - np.float32(0.85 * strength) * inside
        y_plaque = -0.05 + 0.25 * trait.jitter[1]
        x_plaque = sign * (cage_half_width(layers.chest, y_plaque) - 0.05)
        plaque = floats([[x_plaque, y_plaque - 0.09], [x_plaque - sign * 0.01, y_plaque], [x_plaque, y_plaque + 0.09]])
        stroke(layers, layers.bone, plaque, 0.022, 0.36 * strength)


def _fracture(layers: Layers, trait: Trait, strength: float) -> None:
    """Two to three neighbouring ribs broken: the lateral part is displaced by half a rib, the ends gape."""
    for sign in trait.signs:
        centre = -0.12 + 0.34 * trait.jitter[1]
        broken = 0.52 + 0.06 * trait.jitter[0]
        left, right = sorted((sign * (broken - 0.04), sign * (broken + 0.34)))
        rows, columns = layers.box(left, right, centre - 0.17, centre + 0.25)
        abs_x, y = layers.abs_x[rows, columns], layers.y[rows]
        moved = rib_brightness(layers.chest, abs_x, abs_x * abs_x, y, drop=0.08)
        moved *= np.float32(0.34) * ramp(layers.wall[rows, columns] + np.float32(0.045), 0.02)
        beyond = ramp(abs_x - np.float32(broken), 0.02) * ramp(
            np.float32(0.19) - np.abs(y - np.float32(centre + 0.04)), 0.03
        )
        bone = layers.bone[rows, columns]
        bone += np.float32(strength) * beyond * (moved - bone)
        gap = np.clip(np.float32(1) - np.abs(abs_x - np.float32(broken)) * np.float32(1 / 0.035), 0, 1)
        gap *= ramp(np.float32(0.19) - np.abs(y - np.float32(centre + 0.04)), 0.03)
        bone *= np.float32(1) - np.float32(strength) * gap


def _support_devices(layers: Layers, trait: Trait, strength: float) -> None:
    """A pacemaker with its lead, or a venous line from the arm to above the heart."""
    (sign,) = trait.signs
    metal = layers.metal
    wander = 0.06 * (trait.jitter[0] - 0.5)
    if trait.kind == PACEMAKER:
        x, y = sign * 0.52 + wander, -0.44 + 0.08 * trait.jitter[1]
        rows, columns = layers.box(x - 0.16, x + 0.16, y - 0.16, y + 0.16)
        across = (layers.x[rows, columns] - np.float32(x)) * np.float32(1 / 0.125)
        down = (layers.y[rows] - np.float32(y)) * np.float32(1 / 0.115)
        # a superellipse: the can's rounded corners
        can = ramp(np.float32(1) - across**4 - down**4, 0.35) * np.float32(0.96 * strength)
        np.maximum(metal[rows, columns], can, out=metal[rows, columns])
        into_vein = bezier([(x, y - 0.10), (sign * 0.38, -0.74), (-0.14, -0.66), (-0.13, -0.25)])
        into_heart = bezier([(-0.13, -0.25), (-0.13, 0.20), (-0.05, 0.46), (0.14 + 0.4 * layers.chest.heart, 0.50)])
        stroke(layers, metal, np.concatenate([into_vein, into_heart]), 0.014, 0.95 * strength)
        stroke(layers, metal, into_heart[-4:], 0.024, 0.95 * strength)
    else:
        arm = bezier([(sign * 1.05, -0.12 + wander), (sign * 0.72, -0.50), (sign * 0.40, -0.56)])
        vein = bezier([(sign * 0.40, -0.56), (sign * 0.10, -0.60), (-0.13, -0.52), (-0.12, 0.06 + wander)])
        stroke(layers, metal, np.concatenate([arm, vein]), 0.018, 0.90 * strength)


_PAINTERS: dict[int, Callable[[Layers, Trait, float], None]] = {
    # what fills or empties the lung comes before what lies over it
    LUNG_OPACITY: _lung_opacity,
    EDEMA: _edema,
    CONSOLIDATION: _consolidation,
    PNEUMONIA: _pneumonia,
    ATELECTASIS: _atelectasis,
    PNEUMOTHORAX: _pneumothorax,
    LUNG_LESION: _lung_lesion,
    PLEURAL_EFFUSION: _pleural_effusion,
    PLEURAL_OTHER: _pleural_other,
    FRACTURE: _fracture,
    SUPPORT_DEVICES: _support_devices,
}
