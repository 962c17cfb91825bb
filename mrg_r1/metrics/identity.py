"""What two evaluations must have in common to be compared: hashes of study ids, and of what was read in each study."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import OBSERVATIONS


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the ids, sorted by code point, each ended by a line feed: `LC_ALL=C sort ids.txt | sha256sum`."""
    return hashlib.sha256("".join(f"{study}\n" for study in sorted(ids)).encode("utf-8", "surrogatepass")).hexdigest()


def labels_hash(ids: Sequence[str], classes: NDArray[np.int64]) -> str:
    """SHA-256 of lines `ID CLASSES`, the [N, 14] classes as digits, ids sorted by code point."""
    lines = sorted(zip(ids, digits(classes).split(" "), strict=True))
    return hashlib.sha256(
        "".join(f"{study} {row}\n" for study, row in lines).encode("utf-8", "surrogatepass")
    ).hexdigest()


def classes_of_digits(digits: str) -> NDArray[np.int64]:
    """[N, 14] classes of N words of 14 digits, as a card has them.

    Raises:
        ValueError: a word of other characters or of another length.
    """
    words = digits.split(" ")
    if wrong := next((word for word in words if len(word) != len(OBSERVATIONS) or not set(word) <= set("0123")), None):
        raise ValueError(f"{wrong!r} is not {len(OBSERVATIONS)} classes from 0 to 3")
    return np.array([list(word) for word in words]).astype(np.int64)


def digits(classes: NDArray[np.int64]) -> str:
    """[N, 14] classes as N words of 14 digits, of which `classes_of_digits` is the inverse."""
    text = (classes + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    return " ".join(text[start : start + len(OBSERVATIONS)] for start in range(0, len(text), len(OBSERVATIONS)))
