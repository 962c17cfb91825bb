"""What each finding does to the layers of the lateral view, one function a finding; `findings` calls them."""

from __future__ import annotations

import numpy as np

from mrg_r1.phantom.anatomy import APEX, Layers, blob, ramp, stroke
from mrg_r1.phantom.lateral import back_wall, front_wall
from mrg_r1.phantom.traits import PACEMAKER, Trait, height
from mrg_r1.phantom.vessels import Floats, bezier, floats


def lung_opacity(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    size = 0.24 + 0.06 * trait.grade
    blob(layers, _depth_of(trait, y), y, size, 1.1 * size, 0.9, min(0.66 * strength * _share(trait), 1.0))


def lung_lesion(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    radius = 0.14 + 0.07 * trait.grade
    x = _depth_of(trait, y)
    rows, columns = layers.box(x - 1.2 * radius, x + 1.2 * radius, y - 1.2 * radius, y + 1.2 * radius)
    distance = np.hypot(layers.x[rows, columns] - np.float32(x), layers.y[rows] - np.float32(y))
    inside = ramp(np.float32(radius) - distance, 0.03) * np.float32(strength)
    layers.air[rows, columns] *= np.float32(1) - np.float32(0.85) * inside
    layers.bone[rows, columns] += np.float32(0.07) * inside


def edema(layers: Layers, trait: Trait, strength: float) -> None:
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


def consolidation(layers: Layers, trait: Trait, strength: float) -> None:
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


def pneumonia(layers: Layers, trait: Trait, strength: float) -> None:
    y = height(trait)
    x = _depth_of(trait, y)
    for patch, (across, down) in enumerate(((-0.15, -0.07), (0.04, -0.17), (0.15, 0.01), (-0.06, 0.11), (0.10, 0.19))):
        size = 0.065 + 0.025 * ((patch + trait.jitter[0]) % 1.7) + 0.012 * trait.grade
        blob(layers, x + across, y + down, size * 1.1, size, 0.55, min(0.80 * strength * _share(trait), 1.0))


def atelectasis(layers: Layers, trait: Trait, strength: float) -> None:
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


def pneumothorax(layers: Layers, trait: Trait, strength: float) -> None:
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


def pleural_effusion(layers: Layers, trait: Trait, strength: float) -> None:
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


def pleural_other(layers: Layers, trait: Trait, strength: float) -> None:
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
    edge = float(back_wall(floats([[middle]]))[0, 0]) - 0.05
    plaque = floats([[edge, middle - 0.09], [edge - 0.01, middle], [edge, middle + 0.09]])
    stroke(layers, layers.bone, plaque, 0.022, 0.30 * strength)


def fracture(layers: Layers, trait: Trait, strength: float) -> None:
    """A rib broken between front and back, its two ends out of line, and the haze of the bleeding around it."""
    y = -0.12 + 0.34 * trait.jitter[1]
    x = 0.08 + 0.16 * trait.jitter[0]
    blob(layers, x, y, 0.20 + 0.08 * trait.grade, 0.24, 0.5, 0.55 * strength)
    step = 0.025 + 0.035 * trait.grade
    for start, end, down in ((x - 0.24, x - 0.02, step), (x + 0.02, x + 0.24, -step)):
        ends = floats([[start, y - 0.42 * (start - x) + down], [end, y - 0.42 * (end - x) + down]])
        stroke(layers, layers.bone, ends, 0.026, 0.22 * strength)
        stroke(layers, layers.bone, ends[1:] if down > 0 else ends[:1], 0.030, 0.30 * strength)


def support_devices(layers: Layers, trait: Trait, strength: float) -> None:
    """The pacemaker lies flat under the skin of the chest's front, seen on edge; its lead ends at the heart's apex."""
    metal = layers.metal
    wander = 0.06 * (trait.jitter[0] - 0.5)
    if trait.kind == PACEMAKER:
        y = -0.44 + 0.08 * trait.jitter[1]
        x = float(front_wall(floats([[y]]))[0, 0]) - 0.06
        stroke(layers, metal, floats([[x + 0.035, y - 0.09], [x - 0.035, y + 0.09]]), 0.040, 0.96 * strength)
        vein = bezier([(x + 0.03, y - 0.09), (x + 0.15, -0.78), (-0.02, -0.66), (0.0, -0.25)])
        heart = bezier([(0.0, -0.25), (0.04, 0.20), (-0.06, 0.44), (-0.38, 0.56)])
        stroke(layers, metal, np.concatenate([vein, heart]), 0.014, 0.95 * strength)
        stroke(layers, metal, heart[-4:], 0.024, 0.95 * strength)
    else:
        arm = bezier([(-0.30, -0.92 + wander), (-0.20, -0.74), (-0.08, -0.62)])
        vein = bezier([(-0.08, -0.62), (0.02, -0.54), (-0.01, -0.30), (0.0, 0.06 + wander)])
        stroke(layers, metal, np.concatenate([arm, vein]), 0.018, 0.90 * strength)


def _depth_of(trait: Trait, y: float) -> float:
    """x of a finding in the lung: anywhere between the walls, by the jitter that places it across in the
    frontal view.
    """
    front, back = (float(edge[0, 0]) for edge in (front_wall(floats([[y]])), back_wall(floats([[y]]))))
    return front + (back - front) * (0.25 + 0.5 * trait.jitter[0])


def _share(trait: Trait) -> float:
    """How much of the air a finding in one lung, or in both, can take."""
    return 1.0 if trait.side == "both" else 0.72
