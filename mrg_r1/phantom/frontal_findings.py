"""What each finding does to the layers of the frontal view, one function a finding; `findings` calls them."""

from __future__ import annotations

import numpy as np

from mrg_r1.phantom.anatomy import APEX, Chest, Layers, blob, cage_half_width, ramp, rib_brightness, stroke
from mrg_r1.phantom.traits import PACEMAKER, Trait, height
from mrg_r1.phantom.vessels import bezier, floats


def lung_opacity(layers: Layers, trait: Trait, strength: float) -> None:
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


def lung_lesion(layers: Layers, trait: Trait, strength: float) -> None:
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


def edema(layers: Layers, trait: Trait, strength: float) -> None:
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


def consolidation(layers: Layers, trait: Trait, strength: float) -> None:
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


def pneumonia(layers: Layers, trait: Trait, strength: float) -> None:
    """Patchy, confluent, fluffy densities in one zone."""
    offsets = ((-0.15, -0.07), (0.04, -0.17), (0.15, 0.01), (-0.06, 0.11), (0.10, 0.19))
    for sign in trait.signs:
        y = height(trait)
        x = _in_lung(layers.chest, sign, y, 0.45)
        for patch, (across, down) in enumerate(offsets):
            size = 0.065 + 0.025 * ((patch + trait.jitter[0]) % 1.7) + 0.012 * trait.grade
            blob(layers, x + across, y + down, size * 1.1, size, 0.55, 0.74 * strength)


def atelectasis(layers: Layers, trait: Trait, strength: float) -> None:
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


def pneumothorax(layers: Layers, trait: Trait, strength: float) -> None:
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


def pleural_effusion(layers: Layers, trait: Trait, strength: float) -> None:
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


def pleural_other(layers: Layers, trait: Trait, strength: float) -> None:
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


def fracture(layers: Layers, trait: Trait, strength: float) -> None:
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


def support_devices(layers: Layers, trait: Trait, strength: float) -> None:
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


def _in_lung(chest: Chest, sign: float, y: float, share: float) -> float:
    """x at `share` of the way from the mediastinum (or the heart, low on the left) to the chest wall."""
    inner = chest.mediastinum + 0.06
    if y > 0.0:
        inner = chest.heart + (0.18 if sign > 0 else -0.10)
    outer = cage_half_width(chest, y) - 0.06
    return sign * (inner + (max(outer, inner + 0.05) - inner) * share)
