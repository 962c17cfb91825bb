"""The pictures of preset `full`: one patient from the front and from the side, findings from mild to severe.

`findings.render` keeps findings large, so that a small policy sees them on small images. Here a grade of 0 is drawn
smaller and a grade of 1 larger than there, more findings lie on both sides, and a patient's second study shows the same
chest, with the same findings in the same places, in another position and exposure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from mrg_r1.phantom.anatomy import RIB_PITCH, Layers, blob, build_layers, cage_half_width, expose, sample_chest, stroke
from mrg_r1.phantom.findings import FRONTAL, LATERAL, paint
from mrg_r1.phantom.lateral import build_lateral_layers
from mrg_r1.phantom.traits import (
    ATELECTASIS,
    CARDIOMEGALY,
    CHEST_STREAM,
    CONSOLIDATION,
    EDEMA,
    ENLARGED_CARDIOMEDIASTINUM,
    EXPOSURE_STREAM,
    FRACTURE,
    LUNG_LESION,
    LUNG_OPACITY,
    PLEURAL_EFFUSION,
    PLEURAL_OTHER,
    PNEUMONIA,
    PNEUMOTHORAX,
    Trait,
    keyed_generator,
    proportions,
    sample_traits,
    strengths_of,
)
from mrg_r1.phantom.vessels import Floats, floats

# The share of findings on both sides; the other findings have one side, or none.
_BOTH_SIDES: dict[int, float] = {
    EDEMA: 1.0,
    PLEURAL_EFFUSION: 0.25,
    LUNG_OPACITY: 0.2,
    PNEUMONIA: 0.15,
    CONSOLIDATION: 0.1,
    ATELECTASIS: 0.2,
    PLEURAL_OTHER: 0.2,
}
# What a painter is given for grades 0 and 1.
_PAINTED_GRADES: dict[int, tuple[float, float]] = {
    ENLARGED_CARDIOMEDIASTINUM: (-0.7, 1.2),
    CARDIOMEGALY: (-1.0, 1.2),
    LUNG_OPACITY: (-0.8, 1.5),
    LUNG_LESION: (-1.05, 1.3),
    EDEMA: (0.0, 1.6),
    CONSOLIDATION: (-0.8, 1.3),
    PNEUMONIA: (-0.8, 2.2),
    PNEUMOTHORAX: (-1.2, 1.3),
    PLEURAL_EFFUSION: (-0.25, 1.3),
    PLEURAL_OTHER: (-0.5, 1.6),
}
# How strongly grades 0 and 1 are painted, where a severe finding is also a denser one.
_PAINTED_STRENGTHS: dict[int, tuple[float, float]] = {
    LUNG_OPACITY: (0.75, 1.25),
    EDEMA: (0.65, 1.35),
    PNEUMONIA: (0.85, 1.2),
    ATELECTASIS: (0.75, 1.15),
    FRACTURE: (0.65, 1.0),
}


def patient_traits(seed: int, patient: int) -> tuple[Trait, ...]:
    """13 traits with grades 0 to 1: what the words of a report of `full` say, and what its pictures show."""
    return sample_traits(seed, patient, _BOTH_SIDES)


def render_view(
    drawn: Sequence[int | None], view: str, *, seed: int, index: int, patient: int, side: int
) -> NDArray[np.uint8]:
    """One radiograph of a study of `full`.

    Args:
        drawn: 14 file values in CheXbert's order; 1 is drawn, -1 drawn faintly, 0 and None not at all. No Finding is
            not read.
        view: "frontal" or "lateral". Both show the same findings; a fracture's and a nodule's height agree between
            them.
        seed: the data set's.
        index: the study's; position, exposure and noise follow from it.
        patient: index of the patient's first study; chest and traits follow from it.
        side: pixels of each side, at least 32.

    Returns:
        [side, side] uint8 grey levels, bright is dense; the same arguments give the same bytes on one machine.

    Raises:
        ValueError: what `findings.render` refuses, or another view.
    """
    if view not in (FRONTAL, LATERAL):
        raise ValueError(f"view {view!r}; allowed are {FRONTAL} and {LATERAL}")
    strengths = strengths_of(drawn)
    traits = list(patient_traits(seed, patient))
    for observation, (mild, severe) in _PAINTED_STRENGTHS.items():
        strengths[observation] *= mild + (severe - mild) * traits[observation].grade
    for observation, (mild, severe) in _PAINTED_GRADES.items():
        grade = traits[observation].grade
        traits[observation] = replace(traits[observation], grade=mild + (severe - mild) * grade)
    chest = sample_chest(keyed_generator(seed, patient, CHEST_STREAM))
    is_lateral = view == LATERAL
    rng = keyed_generator(seed, 2 * index + is_lateral, EXPOSURE_STREAM)
    film = sample_chest(rng)
    chest = replace(
        proportions(chest, strengths, traits),
        shift_x=film.shift_x,
        shift_y=film.shift_y,
        tilt=film.tilt,
        gain=film.gain,
        gamma=film.gamma,
        noise=film.noise,
    )
    layers = build_lateral_layers(chest, side) if is_lateral else build_layers(chest, side)
    paint(layers, view, traits, strengths)
    if strengths[FRACTURE] > 0 and not is_lateral:
        _bleeding(layers, traits[FRACTURE], strengths[FRACTURE])
    return expose(layers, _noise(rng, side))


def _bleeding(layers: Layers, trait: Trait, strength: float) -> None:
    """What tells a fresh break from a kink: dense broken ends, and a haematoma that bulges from the chest wall behind
    them.
    """
    for sign in trait.signs:
        x, y = 0.52 + 0.06 * trait.jitter[0], -0.08 + 0.34 * trait.jitter[1]
        blob(
            layers,
            sign * (cage_half_width(layers.chest, y) - 0.02),
            y,
            0.13 + 0.07 * trait.grade,
            0.24,
            0.5,
            0.75 * strength,
        )
        # the rows where ribs cross the break, as `rib_brightness` lays them
        first = layers.chest.rib_phase + 0.5 * x * x + RIB_PITCH / 2
        for rib in range(ceil((y - 0.17 - first) / RIB_PITCH), floor((y + 0.17 - first) / RIB_PITCH) + 1):
            height = first + rib * RIB_PITCH
            ends = floats([[sign * (x - 0.04), height], [sign * (x + 0.03), height + 0.07]])
            for end in (ends[:1], ends[1:]):
                stroke(layers, layers.bone, np.concatenate([end, end + np.float32(0.004)]), 0.026, 0.34 * strength)


def _noise(rng: np.random.Generator, side: int) -> Floats:
    """[S, S] of mean 0 and standard deviation 1: the sum of four uniform bytes, nearly normal and six times as fast to
    draw.
    """
    words = rng.integers(0, 2**64, size=(side * side + 1) // 2, dtype=np.uint64)
    octets = words.view(np.uint8)[: 4 * side * side].reshape(4, side, side)
    total = octets.sum(axis=0, dtype=np.uint16).astype(np.float32)
    total -= np.float32(4 * 127.5)
    total *= np.float32(1 / np.sqrt(4 * (256**2 - 1) / 12))
    return total
