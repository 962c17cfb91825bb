"""The labeler behind a memory: every text is read once, as long as it is remembered.

Members of a group repeat one another, groups repeat the usual normal report, references come back every epoch, and
texts that were handed in early (`RewardService.hint`) come again with their batch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION, OBSERVATIONS

REMEMBERED = 200_000  # texts; with reports of 60 words about 100 MB

_CLASS_COUNTS = np.array(CLASSES_PER_OBSERVATION)


class Labeler(Protocol):
    """What is needed of a labeler; `mrg_r1.labels.labeler.Labeler` is one."""

    def label(self, texts: list[str]) -> NDArray[np.int64]:
        """[N, 14] classes of N texts."""


class LabelError(RuntimeError):
    """The labeler failed, or answered with something that is not 14 classes a text."""


class Reader:
    """Labels texts, each once as long as it is remembered: the one that was asked for longest ago is forgotten first.

    Args:
        labeler: reads the 14 classes out of texts.

    Attributes:
        asked: texts that were asked for.
        computed: texts that the labeler has read.
        seconds: that it took to read them.
    """

    def __init__(self, labeler: Labeler) -> None:
        self.labeler = labeler
        self.asked = self.computed = 0
        self.seconds = 0.0
        self._known: OrderedDict[str, NDArray[np.int8]] = OrderedDict()

    def label(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """[N, 14] int64 classes of N texts, by one call of the labeler over those that it has not read yet.

        Raises:
            LabelError: the labeler raised or its answer does not fit; nothing of this call is remembered.
        """
        self.asked += len(texts)
        wanted = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh: dict[str, NDArray[np.int8]] = {}
        if wanted:
            began = time.perf_counter()
            fresh = dict(zip(wanted, self._read(wanted), strict=True))
            self.computed += len(wanted)
            self.seconds += time.perf_counter() - began
        rows = [fresh[text] if text in fresh else self._known[text] for text in texts]
        for text in dict.fromkeys(texts):
            if text in fresh:
                self._known[text] = fresh[text]
            self._known.move_to_end(text)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return np.stack(rows).astype(np.int64) if rows else np.empty((0, len(OBSERVATIONS)), dtype=np.int64)

    def _read(self, texts: list[str]) -> NDArray[np.int8]:
        try:
            classes = np.asarray(self.labeler.label(texts))
        except Exception as error:  # whatever a labeler can raise; the caller names the studies
            raise LabelError(f"the labeler failed: {type(error).__name__}: {error}") from error
        problem = problem_of(classes, len(texts))
        if problem:
            raise LabelError(f"the labeler returned {problem}")
        return classes.astype(np.int8)


def problem_of(classes: NDArray[np.int64], expected: int) -> str | None:
    """What is wrong with [expected, 14] classes, or None."""
    if classes.shape != (expected, len(OBSERVATIONS)):
        return f"shape {classes.shape} instead of {(expected, len(OBSERVATIONS))}"
    if not np.issubdtype(classes.dtype, np.integer):
        return f"dtype {classes.dtype} instead of integer classes"
    outside = np.argwhere((classes < 0) | (classes >= _CLASS_COUNTS))
    if len(outside):
        row, column = outside[0]
        return (
            f"class {classes[row, column]} for {OBSERVATIONS[column]} (text {row}), which has classes 0 to "
            f"{_CLASS_COUNTS[column] - 1}"
        )
    return None
