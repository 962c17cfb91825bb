"""A procedural frontal chest radiograph: the normal anatomy on which `findings` draws.

Coordinates: the chest's own frame, x from -1 (image left, the patient's right) to 1, y from -1 (top) to 1, before the
small shift, scale and tilt of the individual chest. The radiograph is kept as layers (air, vessels, bone, metal) until
the end, because findings act on what they touch in life: fluid takes air away, a pneumothorax takes vessels away, a
device is metal. Everything is numpy over cached grids. No image is taken from anywhere: nothing here needs a licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from mrg_r1.phantom.vessels import VESSEL_VARIANTS, Floats, floats, stroke_pixels, vessel_templates

APEX = -0.80  # y of the lung apices
WIDEST = 0.42  # y below which the rib cage stays wide
RIB_PITCH = 0.165  # vertical distance between ribs
_TABLE = 64  # entries of the periodic rib profile


@dataclass(frozen=True)
class Chest:
    """One patient's proportions and one exposure; lengths in half-image units."""

    shift_x: float
    shift_y: float
    scale: float
    tilt: float  # shear of x by y
    half_width: float  # inner half-width of the rib cage at its widest
    dome_right: float  # y of the top of each diaphragm dome
    dome_left: float
    heart: float  # half-width of the heart
    mediastinum: float  # half-width of the upper mediastinum
    rib_phase: float
    air: float  # how dark full lungs are
    gain: float
    gamma: float
    noise: float  # standard deviation of the quantum noise, full scale 1
    vessels: int  # which vessel template
    bubble: float  # size of the gastric bubble


def sample_chest(rng: np.random.Generator) -> Chest:
    """A normal chest: cardiothoracic ratio 0.42 to 0.50, diaphragm within one rib, exposure within about 15 %."""
    u = rng.random(16)

    def between(i: int, low: float, high: float) -> float:
        return float(low + (high - low) * u[i])

    dome = between(5, 0.50, 0.60)
    return Chest(
        shift_x=between(0, -0.05, 0.05),
        shift_y=between(1, -0.04, 0.04),
        scale=between(2, 0.95, 1.06),
        tilt=between(3, -0.03, 0.03),
        half_width=between(4, 0.75, 0.82),
        dome_right=dome,
        dome_left=dome + between(6, 0.03, 0.08),
        heart=between(7, 0.31, 0.36),
        mediastinum=between(8, 0.135, 0.16),
        rib_phase=between(9, 0.0, RIB_PITCH),
        air=between(10, 0.43, 0.49),
        gain=between(11, 0.92, 1.05),
        gamma=between(12, 0.88, 1.15),
        noise=between(13, 0.010, 0.020),
        vessels=int(u[14] * VESSEL_VARIANTS),
        bubble=between(15, 0.07, 0.12),
    )


@dataclass
class Layers:
    """A radiograph before exposure. Every array is [S, S] float32 unless said otherwise; findings change them
    in place.
    """

    chest: Chest
    side: int  # S, pixels
    x: Floats  # chest coordinates of every pixel
    abs_x: Floats
    y: Floats  # [S, 1]
    wall: Floats  # distance to the inner chest wall, measured along x; negative outside
    air: Floats  # 0 soft tissue, 1 aerated lung; above 1 where air has no lung in it
    vessels: Floats  # lung markings, 0 to about 1
    bone: Floats  # brightness that bone adds
    metal: Floats  # 0 to 1, blended over everything else
    soft: Floats  # brightness of the tissue without air

    def pixel(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Chest coordinates -> pixel coordinates (column, row) of this image, same shape."""
        rows = y * np.float32(self.chest.scale) + np.float32(self.chest.shift_y)
        columns = x * np.float32(self.chest.scale) + np.float32(self.chest.shift_x) + np.float32(self.chest.tilt) * rows
        half = np.float32(self.side / 2)
        return (columns + 1) * half - np.float32(0.5), (rows + 1) * half - np.float32(0.5)

    def box(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """(rows, columns) of the pixels that hold a rectangle given in chest coordinates, cut to the image; never
        empty.
        """
        chest, half = self.chest, self.side / 2
        rows = top * chest.scale + chest.shift_y, bottom * chest.scale + chest.shift_y
        leans = sorted(chest.tilt * row for row in rows)
        first = left * chest.scale + chest.shift_x + leans[0]
        last = right * chest.scale + chest.shift_x + leans[1]
        return (
            _cut((rows[0] + 1) * half - 0.5, (rows[1] + 1) * half - 0.5, self.side),
            _cut((first + 1) * half - 0.5, (last + 1) * half - 0.5, self.side),
        )


def build_layers(chest: Chest, side: int) -> Layers:
    """The normal radiograph of `chest` as layers of [side, side].

    Raises:
        ValueError: `side` below 32, where nothing of a chest is left to see.
    """
    x, y = chest_axes(chest, side)
    abs_x = np.abs(x)
    abs_x_squared = x * x
    wall = _cage(chest, y) - abs_x
    # 1 in the lung fields as the rib cage, the mediastinum and the domes bound them
    dome = np.where(x < 0, np.float32(chest.dome_right), np.float32(chest.dome_left))
    off_centre = abs_x - np.float32(0.34)
    below = y - dome - np.float32(1.05) * off_centre * off_centre
    air = ramp(wall, 0.035) * ramp(abs_x - _medial(chest, y), 0.04)
    air *= ramp(-below, 0.03)

    rise = np.exp(-abs_x_squared * np.float32(1 / 0.16**2))
    soft = np.float32(0.60) + np.float32(0.13) * rise
    soft += np.float32(0.09) * ramp(below + np.float32(0.05), 0.14)
    # the chest wall is thinner, hence darker, towards the skin
    soft -= np.float32(0.40) * clip01((-wall - np.float32(0.02)) * np.float32(1.4))
    soft *= _body(abs_x, y)
    layers = Layers(
        chest=chest,
        side=side,
        x=x,
        abs_x=abs_x,
        y=y,
        wall=wall,
        air=air,
        vessels=shifted(vessel_templates(side)[chest.vessels], chest, side),
        bone=_ribs(chest, abs_x, abs_x_squared, y, wall),
        metal=np.zeros((side, side), dtype=np.float32),
        soft=soft,
    )
    _heart_and_aorta(layers)
    _spine_and_trachea(layers)
    _gastric_bubble(layers)
    _clavicles(layers)
    return layers


def chest_axes(chest: Chest, side: int) -> tuple[Floats, Floats]:
    """x [S, S] and y [S, 1] of every pixel in the chest's own frame.

    Raises:
        ValueError: `side` below 32.
    """
    if side < 32:
        raise ValueError(f"side {side}: a phantom radiograph needs at least 32 pixels; ask for 32 or more")
    axis = _axis(side)
    inverse = np.float32(1 / chest.scale)
    y = (axis - np.float32(chest.shift_y))[:, None] * inverse
    x = (axis[None, :] - (np.float32(chest.shift_x) + np.float32(chest.tilt) * axis[:, None])) * inverse
    return x, y


def expose(layers: Layers, noise: Floats) -> NDArray[np.uint8]:
    """Layers and noise [S, S] of standard deviation 1 -> the radiograph, [S, S] uint8: bright is dense."""
    chest = layers.chest
    image = layers.vessels * np.float32(0.20)
    image -= np.float32(chest.air)
    image *= layers.air
    image += layers.soft
    image += layers.bone
    image += (np.float32(0.99) - image) * layers.metal
    np.clip(image, 0.02, 1.0, out=image)
    np.power(image, np.float32(chest.gamma), out=image)
    image *= np.float32(chest.gain * 255)
    image += noise * np.float32(chest.noise * 255)
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8)


def ramp(distance: Floats, width: float) -> Floats:
    """A soft edge: 0 below -width / 2, 1 above width / 2, linear between; same shape as `distance`."""
    return clip01(distance * np.float32(1 / width) + np.float32(0.5))


def stroke(layers: Layers, target: Floats, points: Floats, radius: float, value: float) -> None:
    """Draw a polyline into `target` [S, S] in place, by maximum.

    Args:
        points: [N, 2] chest coordinates (x, y).
        radius: half the line's width in half-image units; never thinner than 0.6 pixels, so that it survives small
            images.
        value: what the line's core is worth.
    """
    columns, rows = layers.pixel(points[:, 0], points[:, 1])
    stroke_pixels(target, np.stack([columns, rows], axis=1), max(radius * layers.side / 2, 0.6), value)


def blob(layers: Layers, x: float, y: float, half_width: float, half_height: float, edge: float, depth: float) -> None:
    """Take the share `depth` of the air away inside an ellipse; `edge` is the soft share of its radius."""
    rows, columns = layers.box(x - 1.3 * half_width, x + 1.3 * half_width, y - 1.3 * half_height, y + 1.3 * half_height)
    across = (layers.x[rows, columns] - np.float32(x)) * np.float32(1 / half_width)
    down = (layers.y[rows] - np.float32(y)) * np.float32(1 / half_height)
    inside = ramp(np.float32(1) - across * across - down * down, 2 * edge)
    layers.air[rows, columns] *= np.float32(1) - np.float32(depth) * inside


def cage_half_width(chest: Chest, y: float) -> float:
    """Inner half-width of the rib cage at height `y`."""
    return float(_cage(chest, floats([[y]]))[0, 0])


def rib_brightness(chest: Chest, abs_x: Floats, abs_x_squared: Floats, y: Floats, drop: float = 0.0) -> Floats:
    """Posterior and anterior ribs, as if moved down by `drop`; broadcasts over its arrays, float32."""
    y = y - np.float32(drop)
    posterior = (y - np.float32(0.50) * abs_x_squared - np.float32(chest.rib_phase)) * np.float32(_TABLE / RIB_PITCH)
    anterior = (y + np.float32(0.55) * abs_x - np.float32(chest.rib_phase)) * np.float32(_TABLE / (1.25 * RIB_PITCH))
    table = rib_profile()
    # 64 periods are added, so that truncation is a floor
    back = table.take((posterior + np.float32(64 * _TABLE)).astype(np.int32) & (_TABLE - 1))
    front = table.take((anterior + np.float32(64 * _TABLE)).astype(np.int32) & (_TABLE - 1))
    front *= clip01((abs_x - np.float32(0.30)) * np.float32(4)) * np.float32(0.45)
    back += front
    return back


def clip01(values: Floats) -> Floats:
    """Between 0 and 1, in place."""
    return values.clip(np.float32(0), np.float32(1), out=values)


def _cut(low: float, high: float, side: int) -> slice:
    start = min(max(floor(low), 0), side - 1)
    return slice(start, min(max(ceil(high) + 1, start + 1), side))


@lru_cache(maxsize=16)
def _axis(side: int) -> Floats:
    """[S] the pixel centres from -1 to 1."""
    return ((np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / side)) - np.float32(1)


def _cage(chest: Chest, y: Floats) -> Floats:
    """[S, 1] inner half-width of the rib cage: a superellipse from the apex down to the widest point."""
    above = np.clip((np.float32(WIDEST) - y) / np.float32(WIDEST - APEX), 0, 1)
    return np.float32(chest.half_width) * np.sqrt(1 - above ** np.float32(2.3)).astype(np.float32)


def _medial(chest: Chest, y: Floats) -> Floats:
    """[S, 1] half-width of the mediastinum; it widens into the neck, which rounds the apices."""
    neck = np.clip((np.float32(-0.50) - y) * np.float32(3.4), 0, 1)
    return np.float32(chest.mediastinum) + np.float32(0.13) * neck * neck


def _heart_and_aorta(layers: Layers) -> None:
    chest = layers.chest
    # the heart lies to the patient's left and leans with its apex
    half = chest.heart
    rows, columns = layers.box(-1.0, 1.0, -0.10, 0.90)
    x, y = layers.x[rows, columns], layers.y[rows]
    centre_x, centre_y = 0.06 + 0.16 * half, 0.38
    lean = (x - np.float32(centre_x) - np.float32(0.30) * (y - np.float32(centre_y))) * np.float32(1 / half)
    upright = (y - np.float32(centre_y)) * np.float32(1 / (0.29 + 0.26 * half))
    layers.air[rows, columns] *= ramp(lean * lean + upright * upright - np.float32(1), 0.16)
    # the aortic knob, patient's left
    rows, columns = layers.box(chest.mediastinum - 0.09, chest.mediastinum + 0.12, -0.40, -0.14)
    across = (layers.x[rows, columns] - np.float32(chest.mediastinum + 0.015)) * np.float32(1 / 0.075)
    down = (layers.y[rows] - np.float32(-0.27)) * np.float32(1 / 0.10)
    layers.air[rows, columns] *= ramp(across * across + down * down - np.float32(1), 0.5)


def _spine_and_trachea(layers: Layers) -> None:
    rows, columns = layers.box(-0.11, 0.11, -1.3, 1.3)
    abs_x, y, soft = layers.abs_x[rows, columns], layers.y[rows], layers.soft[rows, columns]
    discs = np.float32(0.045) + np.float32(0.03) * np.cos(y * np.float32(2 * np.pi / 0.15))
    soft += ramp(np.float32(0.085) - abs_x, 0.03) * discs.astype(np.float32)
    above_carina = np.clip((np.float32(-0.18) - y) * np.float32(8), 0, 1)
    soft -= ramp(np.float32(0.05) - abs_x, 0.035) * (np.float32(0.13) * above_carina)


def _gastric_bubble(layers: Layers) -> None:
    size = layers.chest.bubble
    centre = layers.chest.dome_left + 0.06 + size
    rows, columns = layers.box(0.40 - 2.0 * size, 0.40 + 2.0 * size, centre - 1.2 * size, centre + 1.2 * size)
    across = (layers.x[rows, columns] - np.float32(0.40)) * np.float32(1 / (1.7 * size))
    down = (layers.y[rows] - np.float32(centre)) * np.float32(1 / size)
    layers.soft[rows, columns] -= np.float32(0.22) * ramp(np.float32(1) - across * across - down * down, 0.6)


def _body(abs_x: Floats, y: Floats) -> Floats:
    """1 in the body, about 0.1 in the air around neck and shoulders."""
    shoulder = y + np.float32(0.93) - np.float32(0.42) * clip01(abs_x - np.float32(0.34))
    neck = ramp(np.float32(0.30) - abs_x, 0.08)
    return np.float32(0.12) + np.float32(0.88) * np.maximum(ramp(shoulder, 0.10), neck)


def _ribs(chest: Chest, abs_x: Floats, abs_x_squared: Floats, y: Floats, wall: Floats) -> Floats:
    bone = rib_brightness(chest, abs_x, abs_x_squared, y)
    bone *= ramp(wall + np.float32(0.045), 0.02)
    # the mediastinum hides the rib heads
    bone *= np.float32(0.25) + np.float32(0.75) * ramp(abs_x - np.float32(chest.mediastinum + 0.03), 0.16)
    bone *= (
        np.float32(0.15)
        * clip01((np.float32(0.95) - y) * np.float32(2))
        * clip01((y + np.float32(0.86)) * np.float32(8))
    )
    # the inner rim of the ribs, seen edge-on along the chest wall
    bone += np.float32(0.10) * clip01(np.float32(1) - np.abs(wall + np.float32(0.02)) * np.float32(28)) * (y > APEX)
    return bone


@lru_cache(maxsize=1)
def rib_profile() -> Floats:
    """[64] one period across a rib: a band with bright cortical edges, then the space to the next."""
    at = (np.arange(_TABLE) + 0.5) / _TABLE
    band = np.clip((0.24 - np.abs(at - 0.5)) * 18, 0, 1)
    edges = np.exp(-(((np.abs(at - 0.5) - 0.19) / 0.045) ** 2))
    return (0.60 * band + 0.45 * edges).astype(np.float32)


def _clavicles(layers: Layers) -> None:
    rows, columns = layers.box(-0.95, 0.95, -0.86, -0.46)
    abs_x, y = layers.abs_x[rows, columns], layers.y[rows]
    centre = np.float32(-0.53) - np.float32(0.42) * abs_x + np.float32(0.22) * abs_x * abs_x
    band = clip01((np.float32(0.042) - np.abs(y - centre)) * np.float32(40))
    band *= ramp(abs_x - np.float32(0.10), 0.04) * ramp(np.float32(0.88) - abs_x, 0.10)
    bone = layers.bone[rows, columns]
    np.maximum(bone, band * np.float32(0.15), out=bone)


def shifted(template: Floats, chest: Chest, side: int) -> Floats:
    """[S, S] a markings template under this chest's own shift; a copy, since findings change it."""
    margin = (template.shape[0] - side) // 2
    half = side / 2
    row = margin - int(round(chest.shift_y * half))
    column = margin - int(round(chest.shift_x * half))
    return template[row : row + side, column : column + side].copy()
