"""Real wording over films that show every finding often: reports put together from sentences of real ones.

A real collection says most findings too seldom for a small policy to learn their look and their words at once. Here
every finding is drawn in a fifth of the films, and said in a sentence that somebody wrote of another patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrg_r1.labels.observations import NEGATIVE, NO_FINDING, OBSERVATIONS, POSITIVE, UNCERTAIN
from mrg_r1.phantom.study import no_finding
from mrg_r1.phantom.traits import RECOMBINED_STREAM, keyed_generator

_WORDS = range(3, 26)  # of a sentence that is taken: shorter ones say little, longer ones many things
_DENIED = 5  # findings that the negative sentences of a report deny at least, where there are such sentences
_TRIED = 60  # negative sentences looked at for that
_OUT_OF_ORDER = 4.0  # places in CheXbert's order that a sentence may stand away from its own


@dataclass(frozen=True)
class Sentences:
    """Sentences by what a labeler reads in them.

    Attributes:
        affirming: by observation, those that say it is there and nothing else.
        denying: those that deny some findings and affirm none, each with what it denies.
    """

    affirming: tuple[tuple[str, ...], ...]
    denying: tuple[tuple[frozenset[int], str], ...]


def sort_sentences(texts: Sequence[str], classes: Sequence[Sequence[int]]) -> Sentences:
    """Sort sentences by what a labeler read in each; those that say several things, or nothing, are left out.

    Args:
        texts: sentences, each once.
        classes: of each 14 classes in CheXbert's order.

    Raises:
        ValueError: not one sentence affirms a finding, or not one denies any.
    """
    affirming: list[list[str]] = [[] for _ in range(NO_FINDING)]
    denying: list[tuple[frozenset[int], str]] = []
    for text, row in zip(texts, classes, strict=True):
        if len(text.split()) not in _WORDS:
            continue
        said = [observation for observation in range(NO_FINDING) if row[observation] in (POSITIVE, UNCERTAIN)]
        denied = frozenset(observation for observation in range(NO_FINDING) if row[observation] == NEGATIVE)
        if len(said) == 1 and not denied and row[said[0]] == POSITIVE:
            affirming[said[0]].append(text)
        elif denied and not said:
            denying.append((denied, text))
    if not any(affirming) or not denying:
        what = "affirms a finding and nothing else" if not any(affirming) else "denies a finding and affirms none"
        raise ValueError(
            f"of {len(texts):,} sentences none of {_WORDS[0]} to {_WORDS[-1]} words {what}, as the labeler reads them; "
            "give more reports, or a labeler that reads them"
        )
    return Sentences(tuple(map(tuple, affirming)), tuple(denying))


def unsaid(sentences: Sentences) -> list[str]:
    """The observations that no sentence affirms."""
    return [OBSERVATIONS[observation] for observation, texts in enumerate(sentences.affirming) if not texts]


def recombine(
    sentences: Sentences, drawn: Sequence[int | None], seed: int, index: int
) -> tuple[str, tuple[int | None, ...]]:
    """A report of what is drawn, in real sentences, and what it says.

    Each finding that is there is affirmed once, where there is a sentence for it; of the others some are denied. The
    order is roughly CheXbert's.

    Args:
        sentences: from `sort_sentences`.
        drawn: 14 values; 1 is there.
        seed, index: of the study; the same give the same report.

    Returns:
        The text, and 14 values: 1 affirmed, 0 denied, None not mentioned; No Finding by CheXbert's rule.
    """
    rng = keyed_generator(seed, index, RECOMBINED_STREAM)
    there = frozenset(observation for observation in range(NO_FINDING) if drawn[observation] == 1)
    placed: list[tuple[float, str]] = []
    said: list[int | None] = [None] * NO_FINDING
    for observation in sorted(there):
        texts = sentences.affirming[observation]
        if texts:
            said[observation] = 1
            placed.append((observation + _OUT_OF_ORDER * rng.random(), texts[int(rng.integers(len(texts)))]))
    denied: set[int] = set()
    for number in rng.permutation(len(sentences.denying))[:_TRIED].tolist():
        findings, text = sentences.denying[number]
        if len(denied) >= _DENIED:
            break
        if not findings & (there | denied):
            denied |= findings
            placed.append((min(findings) + _OUT_OF_ORDER * rng.random(), text))
    for observation in denied:
        said[observation] = 0
    return " ".join(text for _, text in sorted(placed)), (*said, no_finding(said))
