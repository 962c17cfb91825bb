"""Findings drawn into a chest: which function draws which, and `render`, the radiograph of a small phantom study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mrg_r1.phantom import frontal_findings as frontal
from mrg_r1.phantom import lateral_findings as lateral
from mrg_r1.phantom.anatomy import Layers, build_layers, expose, sample_chest
from mrg_r1.phantom.traits import (
    ATELECTASIS,
    CHEST_STREAM,
    CONSOLIDATION,
    EDEMA,
    FRACTURE,
    LUNG_LESION,
    LUNG_OPACITY,
    NOISE_STREAM,
    PLEURAL_EFFUSION,
    PLEURAL_OTHER,
    PNEUMONIA,
    PNEUMOTHORAX,
    SUPPORT_DEVICES,
    Trait,
    keyed_generator,
    proportions,
    sample_traits,
    strengths_of,
)

FRONTAL, LATERAL = "frontal", "lateral"
# By observation and view. A large heart and a wide mediastinum are the chest's proportions (`traits.proportions`).
PAINTERS: Mapping[int, Mapping[str, Callable[[Layers, Trait, float], None]]] = {
    # what fills or empties the lung comes before what lies over it
    LUNG_OPACITY: {FRONTAL: frontal.lung_opacity, LATERAL: lateral.lung_opacity},
    EDEMA: {FRONTAL: frontal.edema, LATERAL: lateral.edema},
    CONSOLIDATION: {FRONTAL: frontal.consolidation, LATERAL: lateral.consolidation},
    PNEUMONIA: {FRONTAL: frontal.pneumonia, LATERAL: lateral.pneumonia},
    ATELECTASIS: {FRONTAL: frontal.atelectasis, LATERAL: lateral.atelectasis},
    PNEUMOTHORAX: {FRONTAL: frontal.pneumothorax, LATERAL: lateral.pneumothorax},
    LUNG_LESION: {FRONTAL: frontal.lung_lesion, LATERAL: lateral.lung_lesion},
    PLEURAL_EFFUSION: {FRONTAL: frontal.pleural_effusion, LATERAL: lateral.pleural_effusion},
    PLEURAL_OTHER: {FRONTAL: frontal.pleural_other, LATERAL: lateral.pleural_other},
    FRACTURE: {FRONTAL: frontal.fracture, LATERAL: lateral.fracture},
    SUPPORT_DEVICES: {FRONTAL: frontal.support_devices, LATERAL: lateral.support_devices},
}


def render(
    drawn: Sequence[int | None], *, seed: int, index: int, side: int, strengths: Sequence[float] | None = None
) -> NDArray[np.uint8]:
    """A frontal chest radiograph with the findings of `drawn`.

    Args:
        drawn: 14 file values in CheXbert's order; 1 is drawn, -1 drawn faintly, 0 and None not at all. No Finding is
            not read.
        seed: the data set's.
        index: the study's; patient, exposure and traits follow from seed and index alone.
        side: pixels of each side, at least 32.
        strengths: 13, how strongly each finding is drawn, 0 to 1; None: as `drawn` says.

    Returns:
        [side, side] uint8 grey levels, bright is dense. The same arguments give the same bytes on one machine; between
        processors numpy's float32 functions may differ in the last bit, so a grey level here and there by one.

    Raises:
        ValueError: not 14 values, another value than 1, 0, -1 and None, a negative seed or index, or a side below 32.
    """
    strengths = strengths_of(drawn) if strengths is None else strengths
    traits = sample_traits(seed, index)
    chest = proportions(sample_chest(keyed_generator(seed, index, CHEST_STREAM)), strengths, traits)
    layers = build_layers(chest, side)
    paint(layers, FRONTAL, traits, strengths)
    return expose(layers, keyed_generator(seed, index, NOISE_STREAM).standard_normal((side, side), dtype=np.float32))


def paint(layers: Layers, view: str, traits: Sequence[Trait], strengths: Sequence[float]) -> None:
    """Draw the findings into the layers of a view, in place.

    Args:
        traits: 13; a grade may lie outside 0 to 1.
        strengths: at least 13; 0 draws nothing, 1 a certain finding. What `proportions` does is not done here.
    """
    for observation, painter_of in PAINTERS.items():
        if strengths[observation] > 0:
            painter_of[view](layers, traits[observation], strengths[observation])
