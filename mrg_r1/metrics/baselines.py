"""The rows beside every result: what is scored without looking at a radiograph, and what a definition allows at most
(docs/method.md §4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import BLANK, NO_FINDING, POSITIVE
from mrg_r1.metrics.clinical import Score, check_classes, clinical_scores


def baselines(
    reference: NDArray[np.int64], *, train: NDArray[np.int64] | None = None, seed: int = 0
) -> dict[str, dict[str, Score] | None]:
    """The scores of four predictions that know nothing of the images.

    Args:
        reference: [N, 14] integer classes of the radiologists' reports.
        train: [M, 14] classes of training reports, or None where there are none.
        seed: of the random training reports.

    Returns:
        By name, `clinical_scores` of
        - constant_normal: No Finding positive, all else blank, for every study;
        - blank: nothing said of any study;
        - random_train: for each study the labels of one training report drawn at random; None without `train`;
        - reference: the references against themselves. Below 1 where a definition makes 0 of 0/0, so it bounds what can
          be reached.

    Raises:
        ValueError: wrong shapes or classes, or no study.
    """
    check_classes(reference, reference)
    blank = np.full_like(reference, BLANK)
    normal = blank.copy()
    normal[:, NO_FINDING] = POSITIVE
    random_train = None
    if train is not None:
        check_classes(train, train)
        rows = np.random.default_rng(seed).integers(len(train), size=len(reference))
        random_train = clinical_scores(train[rows], reference)
    return {
        "constant_normal": clinical_scores(normal, reference),
        "blank": clinical_scores(blank, reference),
        "random_train": random_train,
        "reference": clinical_scores(reference, reference),
    }
