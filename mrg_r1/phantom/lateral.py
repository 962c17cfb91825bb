"""The lateral view of the chest that `findings` draws from the front: the same patient, turned.

Coordinates: x from -1 (image left, the patient's front) to 1 (the back); y is the frontal view's, so that a zone, a
dome or a fluid level stands at one height in both. The layers are the frontal view's too. Both lungs lie over each
other here, so what one of them holds takes about half of the air away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from mrg_r1.phantom.anatomy import (
    APEX,
    RIB_PITCH,
    Chest,
    Layers,
    chest_axes,
    clip01,
    ramp,
    rib_profile,
    shifted,
    stroke,
)
from mrg_r1.phantom.findings import (
    ATELECTASIS,
    CONSOLIDATION,
    EDEMA,
    FRACTURE,
    LUNG_LESION,
    LUNG_OPACITY,
    PACEMAKER,
    PLEURAL_EFFUSION,
    PLEURAL_OTHER,
    PNEUMONIA,
    PNEUMOTHORAX,
    SUPPORT_DEVICES,
    Trait,
    blob,
    height,
)
from mrg_r1.phantom.vessels import Floats, bezier, floats, lateral_vessel_templates

_DEEPEST = 0.25  # y where the chest is deepest
_MIDDLE, _DEPTH = 0.04, 0.68  # x of the chest's middle, half its inner depth
_ENTRIES = 64  # of the periodic rib profile


def build_lateral_layers(chest: Chest, side: int) -> Layers:
    """The normal lateral radiograph of `chest` as layers of [side, side].

    Raises:
        ValueError: `side` below 32, where nothing of a chest is left to see.
    """
    x, y = chest_axes(chest, side)
    back = _back(y)
    # distance to the front or back wall, whichever is nearer
    wall = np.minimum(x - _front(y), back - x)
    air = ramp(wall, 0.04) * ramp(y - np.float32(APEX), 0.04)
    off_dome = x + np.float32(0.15)
    slope = np.float32(0.50) * off_dome * off_dome
    above = slope - y
    air *= np.float32(0.5) * (
        ramp(above + np.float32(chest.dome_right), 0.025) + ramp(above + np.float32(chest.dome_left), 0.025)
    )

    soft = np.full((side, side), 0.64, dtype=np.float32)
    soft += np.float32(0.09) * ramp(np.float32(-chest.dome_left - 0.02) - above, 0.16)
    # shoulders and the muscles around them
    soft += np.float32(0.16) * clip01((np.float32(-0.42) - y) * np.float32(1.8))
    # the wall is thinner, hence darker, towards the skin
    soft -= np.float32(0.45) * clip01((-wall - np.float32(0.05)) * np.float32(2.2))
    # the body's outline: front and back of the trunk, and the neck
    forward = np.where(
        y < np.float32(-0.45), np.minimum(np.float32(-0.40) - np.float32(0.25) * clip01(y + np.float32(0.95)), 9), 9
    )
    backward = np.where(y < np.float32(-0.45), np.float32(0.62) + np.float32(0.25) * clip01(y + np.float32(0.95)), -9)
    forward = np.minimum(forward, _front(np.maximum(y, np.float32(-0.62))) - np.float32(0.19)).astype(np.float32)
    backward = np.maximum(backward, back + np.float32(0.22)).astype(np.float32)
    soft *= np.float32(0.12) + np.float32(0.88) * ramp(np.minimum(x - forward, backward - x), 0.05)
    layers = Layers(
        chest=chest,
        side=side,
        x=x,
        abs_x=np.abs(x),
        y=y,
        wall=wall,
        air=air,
        vessels=shifted(lateral_vessel_templates(side)[chest.vessels], chest, side),
        bone=_ribs(chest, x, y, wall),
        metal=np.zeros((side, side), dtype=np.float32),
        soft=soft,
    )
    _heart_and_aorta(layers)
    _trachea(layers)
    _spine(layers)
    _sternum(layers)
    _gastric_bubble(layers)
    return layers


def paint_lateral(layers: Layers, traits: Sequence[Trait], strengths: Sequence[float]) -> None:
    """Draw the findings into lateral layers in place.

    Args:
        traits: 13; a grade may lie outside 0 to 1, as for the frontal view.
        strengths: at least 13; 0 draws nothing, 1 a certain finding. A large heart is a matter of `layers.chest`.
    """
    for observation, paint in _PAINTERS.items():
        if strengths[observation] > 0:
            paint(layers, traits[observation], strengths[observation])


def _profile(y: Floats, power: float) -> Floats:
    above = np.clip((np.float32(_DEEPEST) - y) / np.float32(_DEEPEST - APEX), 0, 1)
    return np.sqrt(1 - above ** np.float32(power)).astype(np.float32)


def _front(y: Floats) -> Floats:
    """x of the inner front wall at height y: it slopes forward down to the breastbone's end, then back a little."""
    low = np.maximum(y - np.float32(0.35), 0)
    return np.float32(_MIDDLE) - np.float32(_DEPTH) * _profile(y, 1.7) + np.float32(0.15) * low


def _back(y: Floats) -> Floats:
    """x of the inner back wall at height y."""
    return np.float32(_MIDDLE) + np.float32(_DEPTH) * _profile(y, 2.6)


def _spine_x(y: Floats) -> Floats:
    """x of the middle of the vertebral bodies: the thoracic kyphosis."""
    off = y - np.float32(0.05)
    return np.float32(0.50) - np.where(off < 0, np.float32(0.26), np.float32(0.12)) * off * off


def _ribs(chest: Chest, x: Floats, y: Floats, wall: Floats) -> Floats:
    """Ribs slope down to the front; the right and the left set do not coincide."""
    at = (y + np.float32(0.42) * x - np.float32(chest.rib_phase)) * np.float32(_ENTRIES / RIB_PITCH)
    # 64 periods are added, so that truncation is a floor
    at += np.float32(64 * _ENTRIES)
    bone = _both_ribs().take(at.astype(np.int32) & (_ENTRIES - 1))
    bone *= ramp(wall + np.float32(0.05), 0.03)
    bone *= clip01((np.float32(0.80) - y) * np.float32(3)) * clip01((y + np.float32(0.80)) * np.float32(6))
    # ribs are seen through more tissue in front
    bone *= np.float32(0.35) + np.float32(0.65) * clip01((x + np.float32(0.35)) * np.float32(1.5))
    return bone


@lru_cache(maxsize=1)
def _both_ribs() -> Floats:
    """One period across the ribs of both sides, a third of a period apart."""
    near = rib_profile()
    return np.float32(0.085) * near + np.float32(0.065) * np.roll(near, len(near) // 3)


def _heart_and_aorta(layers: Layers) -> None:
    chest = layers.chest
    depth = 0.05 + 0.84 * chest.heart
    centre_x, centre_y = -0.52 + 0.86 * depth, 0.36
    tall = 0.24 + 0.36 * chest.heart
    reach = 1.1 * (depth + 0.28 * tall)
    rows, columns = layers.box(centre_x - reach, centre_x + reach, centre_y - 1.15 * tall, centre_y + 1.15 * tall)
    x, y = layers.x[rows, columns], layers.y[rows]
    lean = (x - np.float32(centre_x) - np.float32(0.28) * (y - np.float32(centre_y))) * np.float32(1 / depth)
    upright = (y - np.float32(centre_y)) * np.float32(1 / tall)
    layers.air[rows, columns] *= np.float32(0.12) + np.float32(0.88) * ramp(
        lean * lean + upright * upright - np.float32(1), 0.20
    )
    # the great vessels between heart and arch; a wide mediastinum fills the space behind the breastbone
    wide = chest.mediastinum - 0.15
    middle_x, middle_y, half_width, half_height = (
        -0.05 - 0.9 * wide,
        -0.16 - 0.9 * wide,
        0.20 + 1.5 * wide,
        0.34 + 0.9 * wide,
    )
    rows, columns = layers.box(
        middle_x - 1.2 * half_width,
        middle_x + 1.2 * half_width,
        middle_y - 1.2 * half_height,
        middle_y + 1.2 * half_height,
    )
    x, y = layers.x[rows, columns], layers.y[rows]
    across = (x - np.float32(middle_x)) * np.float32(1 / half_width)
    down = (y - np.float32(middle_y)) * np.float32(1 / half_height)
    layers.air[rows, columns] *= np.float32(1) - np.float32(0.42 + 2.4 * wide) * ramp(
        np.float32(1) - across * across - down * down, 0.7
    )


def _trachea(layers: Layers) -> None:
    rows, columns = layers.box(-0.20, 0.35, -1.2, 0.0)
    x, y = layers.x[rows, columns], layers.y[rows]
    off = np.abs(x - (np.float32(0.13) + np.float32(0.20) * (y + np.float32(0.15))))
    above_carina = np.clip((np.float32(-0.10) - y) * np.float32(8), 0, 1)
    tube = ramp(np.float32(0.045) - off, 0.035) * above_carina
    layers.soft[rows, columns] -= np.float32(0.15) * tube


def _spine(layers: Layers) -> None:
    """Vertebral bodies with bright endplates; they darken downwards, where more lung lies over them."""
    rows, columns = layers.box(0.10, 0.72, -1.3, 1.3)
    x, y = layers.x[rows, columns], layers.y[rows]
    off = np.abs(x - _spine_x(y))
    inside = ramp(np.float32(0.088) - off, 0.025)
    across = np.cos(y * np.float32(2 * np.pi / 0.155))
    body = np.float32(0.075) + np.float32(0.055) * np.clip(across * np.float32(3) + np.float32(1.6), -1, 1)
    endplate = np.float32(0.05) * np.exp(-((across + np.float32(0.35)) ** 2) * np.float32(60))
    fade = (
        np.float32(1.15)
        - np.float32(0.30) * np.clip(y + np.float32(0.6), 0, 1.2)
        - ramp(y - np.float32(0.75), 0.5) * np.float32(0.45)
    )
    layers.bone[rows, columns] += inside * ((body + endplate) * fade).astype(np.float32)
    # what lies behind the bodies: arches and muscle
    layers.air[rows, columns] *= np.float32(1) - np.float32(0.25) * inside


def _sternum(layers: Layers) -> None:
    rows, columns = layers.box(-1.0, 0.2, -0.62, 0.48)
    x, y = layers.x[rows, columns], layers.y[rows]
    off = np.abs(x - _front(y) + np.float32(0.045))
    ends = np.clip((y + np.float32(0.56)) * np.float32(14), 0, 1) * np.clip(
        (np.float32(0.40) - y) * np.float32(14), 0, 1
    )
    joints = np.float32(1) - np.float32(0.5) * (np.abs((y + np.float32(0.30)) % np.float32(0.22)) < np.float32(0.012))
    layers.bone[rows, columns] += ramp(np.float32(0.026) - off, 0.018) * (np.float32(0.20) * ends * joints).astype(
        np.float32
    )


def _gastric_bubble(layers: Layers) -> None:
    size = layers.chest.bubble
    middle = layers.chest.dome_left + 0.10 + size
    rows, columns = layers.box(-0.15 - 2.0 * size, -0.15 + 2.0 * size, middle - 1.2 * size, middle + 1.2 * size)
    across = (layers.x[rows, columns] + np.float32(0.15)) * np.float32(1 / (1.7 * size))
    down = (layers.y[rows] - np.float32(middle)) * np.float32(1 / size)
    layers.soft[rows, columns] -= np.float32(0.20) * ramp(np.float32(1) - across * across - down * down, 0.6)


def _depth_of(trait: Trait, y: float) -> float:
    """x of a finding in the lung: anywhere between the walls, by the jitter that places it across in the
    frontal view.
    """
    front, back = (float(edge[0, 0]) for edge in (_front(floats([[y]])), _back(floats([[y]]))))
    return front + (back - front) * (0.25 + 0.5 * trait.jitter[0])


def _share(trait: Trait) -> float:
    """How much of the air a finding in one lung, or in both, can take."""
    return 1.0 if trait.side == "both" else 0.72


def _lung_opacity(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    size = 0.24 + 0.06 * trait.grade
    blob(layers, _depth_of(trait, y), y, size, 1.1 * size, 0.9, min(0.66 * strength * _share(trait), 1.0))


def _lung_lesion(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    radius = 0.14 + 0.07 * trait.grade
    x = _depth_of(trait, y)
    rows, columns = layers.box(x - 1.2 * radius, x + 1.2 * radius, y - 1.2 * radius, y + 1.2 * radius)
    distance = np.hypot(layers.x[rows, columns] - np.float32(x), layers.y[rows] - np.float32(y))
    inside = ramp(np.float32(radius) - distance, 0.03) * np.float32(strength)
    layers.air[rows, columns] *= np.float32(1) - np.float32(0.85) * inside
    layers.bone[rows, columns] += np.float32(0.07) * inside


def _edema(layers: Layers, trait: Trait, strength: float) -> None:
    """Haze around the hila, thick vessels, fluid in the oblique fissure."""
    spread = np.float32(1 / (0.32 + 0.06 * trait.grade))
    rows, columns = layers.box(-0.8, 0.9, -0.75, 0.95)
    away, down = (
        (layers.x[rows, columns] - np.float32(0.08)) * spread,
        (layers.y[rows] - np.float32(0.05)) * (spread * np.float32(0.8)),
    )
    layers.air[rows, columns] *= np.float32(1) - np.float32(min(0.66 * strength, 0.95)) * np.exp(
        -(away * away + down * down)
    )
    layers.vessels *= np.float32(1 + 1.2 * strength)
    stroke(layers, layers.bone, _fissure(), 0.010, 0.13 * strength)


def _fissure() -> Floats:
    """The oblique fissure, from behind above to the front of the diaphragm."""
    return bezier([(0.52, -0.38), (0.20, -0.05), (-0.35, 0.62)], 16)


def _consolidation(layers: Layers, trait: Trait, strength: float) -> None:
    """A dense lobe: above and in front of the oblique fissure, or below and behind it, with air bronchograms."""
    upper = trait.zone == "upper"
    tall = 0.17 + 0.06 * trait.grade
    centre = {"upper": -0.36, "lower": 0.30}[trait.zone] + 0.08 * (trait.jitter[1] - 0.5)
    rows, columns = layers.box(-0.9, 0.9, centre - tall - 0.05, centre + tall + 0.05)
    x, y = layers.x[rows, columns], layers.y[rows]
    # the fissure as a line in the plane: x = 0.10 - 0.87 (y - 0.08)
    behind = x - np.float32(0.10) + np.float32(0.87) * (y - np.float32(0.08))
    inside = ramp(-behind if upper else behind, 0.03)
    inside *= ramp(np.float32(tall) - np.abs(y - np.float32(centre)), 0.05)
    layers.air[rows, columns] *= np.float32(1) - np.float32(min(0.90 * strength * _share(trait), 1.0)) * inside
    bronchi = np.zeros_like(layers.air)
    end = -0.42 if upper else 0.52
    for turn in (-0.6, 0.0, 0.6):
        path = bezier(
            [(0.08, centre - 0.2 * turn * tall), (0.5 * end, centre + 0.2 * turn * tall), (end, centre + turn * tall)],
            8,
        )
        stroke(layers, bronchi, path, 0.011, 0.40 * strength)
    layers.air[rows, columns] += bronchi[rows, columns] * inside


def _pneumonia(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    x = _depth_of(trait, y)
    for patch, (across, down) in enumerate(((-0.15, -0.07), (0.04, -0.17), (0.15, 0.01), (-0.06, 0.11), (0.10, 0.19))):
        size = 0.065 + 0.025 * ((patch + trait.jitter[0]) % 1.7) + 0.012 * trait.grade
        blob(layers, x + across, y + down, size * 1.1, size, 0.55, min(0.80 * strength * _share(trait), 1.0))


def _atelectasis(layers: Layers, trait: Trait, strength: float) -> None:
    for sign in trait.signs:
        dome = layers.chest.dome_left if sign > 0 else layers.chest.dome_right
        for band in range(2 + (trait.grade > 0.4)):
            y = dome - 0.08 - 0.11 * band + 0.03 * trait.jitter[1]
            path = bezier(
                [
                    (-0.02 + 0.05 * band, y + 0.02),
                    (0.22, y - 0.01),
                    (0.46, y - 0.02 + 0.05 * band + 0.06 * trait.jitter[0]),
                ],
                8,
            )
            stroke(layers, layers.bone, path, 0.018, 0.30 * strength)


def _pneumothorax(layers: Layers, trait: Trait, strength: float) -> None:
    """Free air at the top and in front, and the pleural line of the lung that has fallen away from it."""
    rows, columns = layers.box(-0.85, 0.85, -0.9, 0.6)
    wall, x, y = layers.wall[rows, columns], layers.x[rows, columns], layers.y[rows]
    in_front = np.float32(0.03) + np.float32(0.10 + 0.08 * trait.grade) * ramp(np.float32(-0.05) - x, 0.5)
    from_wall, from_top = wall - in_front, y - np.float32(APEX + 0.18 + 0.20 * trait.grade)
    # a minimum with a round corner
    between = from_wall - from_top
    gap = np.float32(0.5) * (from_wall + from_top - np.sqrt(between * between + np.float32(0.16)))
    outside = ramp(-gap, 0.02)
    air = layers.air[rows, columns]
    line = np.clip(np.float32(1) - np.abs(gap) * np.float32(1 / max(0.018, 1.6 / layers.side)), 0, 1) * np.clip(
        air, 0, 1
    )
    layers.vessels[rows, columns] *= np.float32(1) - np.float32(strength) * outside
    layers.bone[rows, columns] += np.float32(0.24 * strength) * line
    air *= np.float32(1) + np.float32(strength) * (np.float32(0.42) * outside - np.float32(0.10))


def _pleural_effusion(layers: Layers, trait: Trait, strength: float) -> None:
    """Fluid fills the posterior costophrenic angle first and climbs the back wall (the meniscus)."""
    dome = min(layers.chest.dome_left if sign > 0 else layers.chest.dome_right for sign in trait.signs)
    level = dome + 0.14 - 0.40 * trait.grade
    rows, columns = layers.box(-0.75, 0.9, level - 0.5, 1.3)
    wall, x, y = layers.wall[rows, columns], layers.x[rows, columns], layers.y[rows]
    climb = np.exp(-np.maximum(wall, 0) * np.float32(1 / 0.12)) * (np.float32(0.35) + np.float32(0.65) * ramp(x, 0.3))
    fluid = ramp(y - np.float32(level) + np.float32(0.22 + 0.10 * trait.grade) * climb, 0.05) * np.float32(
        strength * _share(trait)
    )
    layers.air[rows, columns] *= np.float32(1) - np.float32(0.97) * fluid
    layers.soft[rows, columns] += np.float32(0.06) * fluid * ramp(wall, 0.04)


def _pleural_other(layers: Layers, trait: Trait, strength: float) -> None:
    """A scalloped band along the back wall, with a calcified plaque."""
    rows, columns = layers.box(0.0, 0.9, -0.9, 0.55)
    wall, x, y = layers.wall[rows, columns], layers.x[rows, columns], layers.y[rows]
    waves = np.float32(0.07 + 0.035 * trait.grade) + np.float32(0.022) * np.sin(
        y * np.float32(19) + np.float32(6 * trait.jitter[0])
    )
    waves = waves.astype(np.float32) * np.clip((np.float32(0.50) - y) * np.float32(6), 0, 1)
    inside = ramp(waves - wall, 0.025) * ramp(x - np.float32(0.10), 0.1)
    layers.air[rows, columns] *= np.float32(1) - np.float32(min(0.95 * strength, 1.0)) * inside
    middle = -0.05 + 0.25 * trait.jitter[1]
    edge = float(_back(floats([[middle]]))[0, 0]) - 0.05
    plaque = floats([[edge, middle - 0.09], [edge - 0.01, middle], [edge, middle + 0.09]])
    stroke(layers, layers.bone, plaque, 0.022, 0.30 * strength)


def _fracture(layers: Layers, trait: Trait, strength: float) -> None:
    """A rib broken between front and back, its two ends out of line, and the haze of the bleeding around it."""
    y = -0.12 + 0.34 * trait.jitter[1]
    x = 0.08 + 0.16 * trait.jitter[0]
    blob(layers, x, y, 0.20 + 0.08 * trait.grade, 0.24, 0.5, 0.55 * strength)
    step = 0.025 + 0.035 * trait.grade
    for start, end, down in ((x - 0.24, x - 0.02, step), (x + 0.02, x + 0.24, -step)):
        ends = floats([[start, y - 0.42 * (start - x) + down], [end, y - 0.42 * (end - x) + down]])
        stroke(layers, layers.bone, ends, 0.026, 0.22 * strength)
        stroke(layers, layers.bone, ends[1:] if down > 0 else ends[:1], 0.030, 0.30 * strength)


def _support_devices(layers: Layers, trait: Trait, strength: float) -> None:
    """The pacemaker lies flat under the skin of the chest's front, seen on edge; its lead ends at the heart's apex."""
    metal = layers.metal
    wander = 0.06 * (trait.jitter[0] - 0.5)
    if trait.kind == PACEMAKER:
        y = -0.44 + 0.08 * trait.jitter[1]
        x = float(_front(floats([[y]]))[0, 0]) - 0.06
        stroke(layers, metal, floats([[x + 0.035, y - 0.09], [x - 0.035, y + 0.09]]), 0.040, 0.96 * strength)
        vein = bezier([(x + 0.03, y - 0.09), (x + 0.15, -0.78), (-0.02, -0.66), (0.0, -0.25)])
        heart = bezier([(0.0, -0.25), (0.04, 0.20), (-0.06, 0.44), (-0.38, 0.56)])
        stroke(layers, metal, np.concatenate([vein, heart]), 0.014, 0.95 * strength)
        stroke(layers, metal, heart[-4:], 0.024, 0.95 * strength)
    else:
        arm = bezier([(-0.30, -0.92 + wander), (-0.20, -0.74), (-0.08, -0.62)])
        vein = bezier([(-0.08, -0.62), (0.02, -0.54), (-0.01, -0.30), (0.0, 0.06 + wander)])
        stroke(layers, metal, np.concatenate([arm, vein]), 0.018, 0.90 * strength)


_PAINTERS: dict[int, Callable[[Layers, Trait, float], None]] = {
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
