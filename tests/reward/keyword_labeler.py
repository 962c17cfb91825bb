"""A labeler that reads key words, so that every label in a test can be seen in its text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORDS = {"cardiomegaly": 1, "edema": 4, "consolidation": 5, "pneumothorax": 8, "effusion": 9}


class KeywordLabeler:
    """`X` is positive, `no X` negative, `maybe X` uncertain; no words, no labels. Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def label(self, texts: list[str]) -> NDArray[np.int64]:
        self.calls.append(list(texts))
        rows = np.zeros((len(texts), 14), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            words = text.replace(".", " ").split()
            for before, word in zip(["", *words], words, strict=False):
                if word in WORDS:
                    row[WORDS[word]] = {"no": 2, "maybe": 3}.get(before, 1)
        return rows
