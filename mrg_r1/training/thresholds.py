"""The thresholds of the term `additive`: as the recipe gives them, or taken from the training references once and kept
in RUN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.engine.checkpoint import recorded_recipe
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import NO_FINDING
from mrg_r1.reward.additive import FINDINGS, attainable_f1, blind_f1, f1_threshold

FILE = "thresholds.json"


def resolve_thresholds(recipe: Recipe, classes: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """[13] thresholds, or None where the recipe has no term `additive`. For rank 0, which says and keeps what it finds.

    Args:
        classes: [N, 14] of the training references, read where `reward.threshold` is `auto`. A run that goes on from a
            checkpoint has the thresholds of its start, whatever they are now.

    Raises:
        RecipeError: `auto` without training references, or without a positive finding in them.
    """
    threshold = recipe.reward.threshold
    if threshold is None:
        return None
    if isinstance(threshold, Mapping):
        return np.array([threshold[name] for name in FINDINGS], dtype=np.float64)
    if threshold != "auto":
        return np.full(NO_FINDING, threshold, dtype=np.float64)
    kept = recipe.output_dir / FILE
    if kept.is_file() and recorded_recipe(recipe.output_dir / "checkpoints") is not None:
        began = json.loads(kept.read_text(encoding="utf-8"))
        print(f"reward.threshold auto: {began['threshold']:.3f}, as this run began with ({kept})", flush=True)
        by_name = began["thresholds"]
        return np.array([by_name[name] for name in FINDINGS], dtype=np.float64)
    if not len(classes):
        raise RecipeError(f"reward.threshold auto: no training references in {recipe.data.manifest}; set a number")
    try:
        f1 = attainable_f1(classes)
    except ValueError as error:
        raise RecipeError(f"reward.threshold auto: {error}") from error
    value, blind = f1_threshold(f1), blind_f1(classes)
    print(
        f"reward.threshold auto: {value:.3f}, half of the disease_micro13 {f1:.3f} that is taken to be within reach, "
        f"midway between {blind:.3f} without looking and 1 ({kept})",
        flush=True,
    )
    content = {
        "threshold": value,
        "attainable_f1": f1,
        "blind_f1": blind,
        "studies": len(classes),
        "thresholds": dict.fromkeys(FINDINGS, value),
    }
    write_text_atomically(kept, json.dumps(content, indent=1) + "\n")
    return np.full(NO_FINDING, value, dtype=np.float64)
