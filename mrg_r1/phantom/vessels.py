"""Lines and the lung markings made of them: vessels that branch from the hila, drawn once a size and shared by all
chests.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]

VESSEL_VARIANTS = 4
_MARGIN = 0.15  # half-image units that a template extends beyond the image, so that a chest can be shifted


def floats(values: ArrayLike) -> Floats:
    """Nested numbers as a float32 array."""
    return np.asarray(values, dtype=np.float32)


def stroke_pixels(target: Floats, points: Floats, radius: float, value: float) -> None:
    """Draw a polyline into `target` [H, W] in place, by maximum: `points` [N, 2] (column, row) and `radius` in pixels,
    `value` the core.
    """
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    count = max(int(along[-1] / 0.75), 2)
    at = np.linspace(0.0, along[-1], count)
    columns = np.interp(at, along, points[:, 0])
    rows = np.interp(at, along, points[:, 1])
    reach = np.arange(-int(radius + 1.5), int(radius + 1.5) + 1)
    # [count, k, 1] rows and [count, 1, k] columns of the stamped pixels
    row = np.rint(rows).astype(np.int64)[:, None, None] + reach[None, :, None]
    column = np.rint(columns).astype(np.int64)[:, None, None] + reach[None, None, :]
    distance = np.hypot(row - rows[:, None, None], column - columns[:, None, None])
    ink = (np.clip(radius + 0.5 - distance, 0, 1) * value).astype(np.float32)
    inside = (ink > 0) & (row >= 0) & (row < target.shape[0]) & (column >= 0) & (column < target.shape[1])
    np.maximum.at(
        target, (np.broadcast_to(row, inside.shape)[inside], np.broadcast_to(column, inside.shape)[inside]), ink[inside]
    )


def bezier(points: list[tuple[float, float]], count: int = 32) -> Floats:
    """[count, 2] points of the Bezier curve with the given control points (de Casteljau)."""
    t = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    levels = [np.broadcast_to(floats(point), (count, 2)) for point in points]
    while len(levels) > 1:
        levels = [a + (b - a) * t for a, b in zip(levels[:-1], levels[1:], strict=True)]
    return floats(levels[0])


@lru_cache(maxsize=8)
def vessel_templates(side: int) -> tuple[Floats, ...]:
    """Lung markings at one size: vessels branching from the hila, and a faint texture. Made once a size, the same
    everywhere.
    """
    templates = []
    for variant in range(VESSEL_VARIANTS):
        rng = np.random.default_rng([20251216, variant])
        templates.append(
            _template(
                side, rng, [(lateral, (lateral * 0.20, -0.02 if lateral > 0 else 0.03)) for lateral in (-1.0, 1.0)]
            )
        )
    return tuple(templates)


@lru_cache(maxsize=8)
def lateral_vessel_templates(side: int) -> tuple[Floats, ...]:
    """Lung markings of the lateral view: both hila lie over each other, behind the chest's middle."""
    hila = [(-1.0, (0.04, -0.02)), (1.0, (0.12, 0.02))]
    return tuple(
        _template(side, np.random.default_rng([20251217, variant]), hila) for variant in range(VESSEL_VARIANTS)
    )


def _template(side: int, rng: np.random.Generator, hila: list[tuple[float, tuple[float, float]]]) -> Floats:
    """Vessels fanning out from each hilum (direction of growth along x, position), and texture; [S + margins, S +
    margins].
    """
    margin = int(np.ceil(_MARGIN * side / 2))
    full = side + 2 * margin
    layer = np.zeros((full, full), dtype=np.float32)
    for lateral, hilum in hila:
        for angle in np.linspace(-1.35, 1.35, 8) + rng.uniform(-0.16, 0.16, 8):
            _vessel(layer, rng, hilum, lateral, float(angle), 0.55, 0.012, side, margin)
        hub = floats([[hilum[0], hilum[1] - 0.08], [hilum[0] + 0.02 * lateral, hilum[1] + 0.10]])
        stroke_pixels(layer, _template_pixels(hub, side, margin), 0.045 * side / 2, 0.6)
    coarse = rng.standard_normal((full // 4 + 2, full // 4 + 2)).astype(np.float32)
    texture = np.kron(coarse, np.ones((4, 4), dtype=np.float32))[:full, :full]
    layer = _blur(layer, max(1, round(side / 160))) + 0.10 * _blur(texture, 3)
    return layer.astype(np.float32)


def _vessel(
    layer: Floats,
    rng: np.random.Generator,
    start: tuple[float, float],
    lateral: float,
    angle: float,
    length: float,
    radius: float,
    side: int,
    margin: int,
) -> None:
    """One tapering vessel and its branches, drawn from `start` outwards; angle 0 points laterally, positive down."""
    if length < 0.07:
        return
    bend = rng.uniform(-0.35, 0.35)
    end = (start[0] + lateral * length * 0.55 * np.cos(angle), start[1] + length * 0.55 * np.sin(angle))
    middle = (
        (start[0] + end[0]) / 2 - bend * (end[1] - start[1]) * 0.3,
        (start[1] + end[1]) / 2 + bend * (end[0] - start[0]) * 0.3,
    )
    brightness = float(np.clip(0.75 * radius / 0.012, 0.2, 0.75))
    stroke_pixels(
        layer, _template_pixels(bezier([start, middle, end], 8), side, margin), max(radius * side / 2, 0.5), brightness
    )
    for turn in (-0.38, 0.34):
        _vessel(
            layer,
            rng,
            end,
            lateral,
            angle + turn + rng.uniform(-0.25, 0.25),
            length * 0.66,
            radius * 0.62,
            side,
            margin,
        )


def _template_pixels(points: Floats, side: int, margin: int) -> Floats:
    return ((points + 1) * np.float32(side / 2) + np.float32(margin - 0.5)).astype(np.float32)


def _blur(layer: Floats, passes: int) -> Floats:
    """Binomial smoothing, wrapping at the edges (the margin hides the wrap)."""
    for _ in range(passes):
        for axis in (0, 1):
            layer = 0.5 * layer + 0.25 * (np.roll(layer, 1, axis) + np.roll(layer, -1, axis))
    return layer.astype(np.float32)
