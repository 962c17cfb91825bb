"""What no clinical score sees in a report: that it repeats itself, and that it contradicts itself (docs/metrics.md,
Wording).

A labeler reads a report that says a thing twice, or says it and denies it, as if nothing were wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NEGATIVE, NO_FINDING, POSITIVE
from mrg_r1.labels.sentences import sentences

WORDING_ARE = {
    "repeated_sentence": "share of reports in which a whole sentence stands twice",
    "repetition": "mean over reports of the largest of three shares: of sentences and of three-grams of words inside "
    "sentences, those that stood before; of two-grams of words, those that stood before in the same sentence",
    "contradiction": "share of reports with an observation of 13 that one sentence affirms and another denies, each "
    "sentence read by itself; uncertain is neither",
}
_WORD = re.compile(r"\w+(?:[.'’-]\w+)*")
_NUMBERED = re.compile(r"^\d+[.)]\s+")


def repeats_sentence(text: str) -> bool:
    """A whole sentence stands twice: the same words in the same order, whatever their case and marks."""
    said = _words(text)
    return len(set(said)) < len(said)


def repetition(text: str) -> float:
    """How much of a report repeats itself, 0 (nothing) to below 1.

    The largest of three shares: of its sentences, those that stood before; of the three-grams of words inside its
    sentences, those that stood before; of the two-grams, those that stood before in the same sentence. The second sees
    "the lungs are the lungs are the lungs are", which never ends, the third "no effusion, effusion, or effusion", which
    a labeler may read as a denial of something else (docs/findings.md). Of IU X-Ray's reports 3 in 100 have a larger
    third share than the others, none one above 0.1.
    """
    said = _words(text)
    threes = [words[start : start + 3] for words in said for start in range(len(words) - 2)]
    twos = [(f"{number}", *pair) for number, words in enumerate(said) for pair in pairwise(words)]
    return max(_repeated(said), _repeated(threes), _repeated(twos))


def contradictions(lengths: Sequence[int], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Observations of 13 that one sentence of a report affirms and another denies. Uncertain is neither.

    Args:
        lengths: sentences of each of N reports.
        classes: [sum of lengths, 14] classes of the sentences, one report's after another's.

    Returns:
        [N] int64, 0 to 13.

    Raises:
        ValueError: the lengths do not add up to the rows.
    """
    if sum(lengths) != len(classes):
        raise ValueError(f"{sum(lengths)} sentences and {len(classes)} rows of classes")
    ends = np.cumsum(lengths)
    found = [
        ((rows == POSITIVE).any(axis=0) & (rows == NEGATIVE).any(axis=0)).sum()
        for rows in (classes[end - length : end, :NO_FINDING] for end, length in zip(ends, lengths, strict=True))
    ]
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True)
class Wording:
    """Of N reports, means over those that can be read; None where there is none.

    Attributes:
        repeated_sentence: share in which a whole sentence stands twice.
        repetition: mean of `repetition`.
        contradiction: share with an observation that one sentence affirms and another denies; None also where no
            labeler has read the sentences.
    """

    repeated_sentence: float | None
    repetition: float | None
    contradiction: float | None


def wording(reports: Sequence[str | None], contradicted: Sequence[int | None]) -> Wording:
    """Of N reports, None where malformed.

    Args:
        contradicted: N counts of `contradictions`; None where nobody has read the sentences.
    """
    written = [report for report in reports if report is not None]
    counts = [count for report, count in zip(reports, contradicted, strict=True) if report is not None]
    known = [count > 0 for count in counts if count is not None]
    return Wording(
        repeated_sentence=float(np.mean([repeats_sentence(report) for report in written])) if written else None,
        repetition=float(np.mean([repetition(report) for report in written])) if written else None,
        contradiction=float(np.mean(known)) if known and len(known) == len(counts) else None,
    )


def read_contradictions(reports: Sequence[str], label: Callable[[list[str]], NDArray[np.int64]]) -> NDArray[np.int64]:
    """[N] `contradictions` of N reports; `label` reads [M, 14] classes out of M texts, each sentence once."""
    split = [sentences(report) for report in reports]
    different = list(dict.fromkeys(sentence for report in split for sentence in report))
    if not different:
        return np.zeros(len(reports), dtype=np.int64)
    classes = label(different)
    row = {sentence: number for number, sentence in enumerate(different)}
    return contradictions(
        [len(report) for report in split], classes[[row[sentence] for report in split for sentence in report]]
    )


@lru_cache(maxsize=4096)  # both measures of a text, and the texts that a batch repeats
def _words(text: str) -> tuple[tuple[str, ...], ...]:
    """The words of each sentence in small letters, without the number of an enumeration."""
    return tuple(tuple(_WORD.findall(_NUMBERED.sub("", said, count=1).lower())) for said in sentences(text))


def _repeated(items: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0
