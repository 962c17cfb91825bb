"""The lateral view of the chest that `anatomy` draws from the front: the same patient, turned.

Coordinates: x from -1 (image left, the patient's front) to 1 (the back); y is the frontal view's, so that a zone, a
dome or a fluid level stands at one height in both. The layers are the frontal view's too. Both lungs lie over each
other here, so what one of them holds takes about half of the air away.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mrg_r1.phantom.anatomy import APEX, RIB_PITCH, Chest, Layers, chest_axes, clip01, ramp, rib_profile, shifted
from mrg_r1.phantom.vessels import Floats, lateral_vessel_templates

_DEEPEST = 0.25  # y where the chest is deepest
_MIDDLE, _DEPTH = 0.04, 0.68  # x of the chest's middle, half its inner depth
_ENTRIES = 64  # of the periodic rib profile


def build_lateral_layers(chest: Chest, side: int) -> Layers:
    """The normal lateral radiograph of `chest` as layers of [side, side].

    Raises:
        ValueError: `side` below 32, where nothing of a chest is left to see.
    """
    x, y = chest_axes(chest, side)
    back = back_wall(y)
    # distance to the front or back wall, whichever is nearer
    wall = np.minimum(x - front_wall(y), back - x)
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
    forward = np.minimum(forward, front_wall(np.maximum(y, np.float32(-0.62))) - np.float32(0.19)).astype(np.float32)
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


def _profile(y: Floats, power: float) -> Floats:
    above = np.clip((np.float32(_DEEPEST) - y) / np.float32(_DEEPEST - APEX), 0, 1)
    return np.sqrt(1 - above ** np.float32(power)).astype(np.float32)


def front_wall(y: Floats) -> Floats:
    """x of the inner front wall at height y: it slopes forward down to the breastbone's end, then back a little."""
    low = np.maximum(y - np.float32(0.35), 0)
    return np.float32(_MIDDLE) - np.float32(_DEPTH) * _profile(y, 1.7) + np.float32(0.15) * low


def back_wall(y: Floats) -> Floats:
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
    off = np.abs(x - front_wall(y) + np.float32(0.045))
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
