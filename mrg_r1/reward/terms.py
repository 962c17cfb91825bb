"""Reward terms: labels and texts in, one float32 a report out (docs/method.md §2). No torch, no labeler, no policy.

Each function is pure and scores N reports against N references, row by row. Negative findings count: see `ccs`.
A term is added here and nowhere else: its function, and its entry in `BUILT_IN`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics.bleu import BLEU

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, POSITIVE, signed_vector
from mrg_r1.metrics.wording import repetition
from mrg_r1.reward.additive import additive
from mrg_r1.reward.outside import is_outside, is_own, parts_of_own, require_outside

Floats = NDArray[np.float32]
CONTRADICTION = "contradiction"  # the term for which each sentence is read by itself
_PAID_TO_BE_HIGH = ("repetition", CONTRADICTION)  # named after what they are the absence of
CustomTerm = Callable[[list[str | None], list[str], NDArray[np.int64], NDArray[np.int64]], Floats]


@dataclass(frozen=True)
class Scored:
    """What a built-in term may read of N reports.

    Attributes:
        texts: N report texts; "" where a completion is malformed, which only a term with `scores_malformed` sees.
        references: N texts of the radiologists; "" where a study has labels alone, which no term with `needs_words`
            sees.
        labels: [N, 14] int64 classes of the reports; -1 throughout a malformed row.
        reference_labels: [N, 14] int64 classes of the references.
        format: [N] float32, how far each completion keeps the grammar (`report_format.format_score`).
        margin: m of `mccs`.
        ccs_weights: [13, 2] of `ccs`; None: equal.
        thresholds: [13] of `additive`; None where it is not a term.
        contradictions: [N] int64 observations that one sentence of the report affirms and another denies; read where
            the term `contradiction` has a weight.
    """

    texts: Sequence[str]
    references: Sequence[str]
    labels: NDArray[np.int64]
    reference_labels: NDArray[np.int64]
    format: Floats
    margin: float
    ccs_weights: NDArray[np.float64] | None
    thresholds: NDArray[np.float64] | None = None
    contradictions: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Term:
    """A built-in term.

    Attributes:
        score: [N] float32 of N reports.
        description: a line for `--help`.
        scores_malformed: False: a malformed completion earns 0 and is not shown to `score`.
        needs_words: it reads the reference's words, so that studies with labels alone cannot be scored.
    """

    score: Callable[[Scored], Floats]
    description: str
    scores_malformed: bool = False
    needs_words: bool = False


def ccs(generated: NDArray[np.int8], reference: NDArray[np.int8], weights: NDArray[np.float64] | None = None) -> Floats:
    """Clinical cosine similarity of signed vectors.

    >>> ccs(np.array([[1, -1, 0] + [0] * 10], dtype=np.int8), np.array([[1, 1, 0] + [0] * 10], dtype=np.int8))
    array([0.], dtype=float32)

    Args:
        generated: [N, 13] int8 in {-1, 0, 1}, from `mrg_r1.labels.observations.signed_vector`.
        reference: [N, 13] int8, likewise.
        weights: [13, 2] positive, of each observation's +1 and -1, as from `inverse_prevalence`; None: all 1, the
            paper's. An entry of weight w stands in its vector as its sign times the root of w; the cosine is of those
            vectors.

    Returns:
        [N] float32 in [-1, 1]: the cosine. Both vectors zero gives 1 (the reports agree that there is nothing to say),
        one zero gives 0.

    Raises:
        ValueError: shapes that are not equal [N, 13], a value outside -1, 0, 1, or weights that are not positive
            numbers [13, 2].

    Source: arXiv 2512.16145; the two cases of zero vectors and the weights are ours.
    """
    if generated.shape != reference.shape or generated.ndim != 2 or generated.shape[1] != NO_FINDING:
        raise ValueError(
            f"signed vectors of shape {generated.shape} and {reference.shape}; expected the same [N, {NO_FINDING}]"
        )
    for name, vectors in (("generated", generated), ("reference", reference)):
        if vectors.size and (vectors.min() < -1 or vectors.max() > 1):
            raise ValueError(
                f"{name}: signed vectors hold values outside -1, 0, 1; make them with signed_vector(classes)"
            )
    # small integers are exact in float64, so that without weights the answer is exactly symmetric
    a, b = (
        vectors.astype(np.float64) if weights is None else weighted_signs(vectors, weights)
        for vectors in (generated, reference)
    )
    dot, squares_a, squares_b = (a * b).sum(axis=1), (a * a).sum(axis=1), (b * b).sum(axis=1)
    # One square root of one product: exactly 1 for equal vectors.
    norms = np.sqrt(squares_a * squares_b)
    cosine = dot / np.where(norms == 0, 1.0, norms)
    return np.where((squares_a == 0) & (squares_b == 0), 1.0, cosine).clip(-1.0, 1.0).astype(np.float32)


def inverse_prevalence(classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights for `ccs` by which a rare finding counts more than a common negative (ours, for ablation).

    The weight of an observation's sign is 1 over the share of reports that say it, (count + 1) / (N + 2) so that what
    nobody says has a finite one.

    Args:
        classes: [N, 14] classes of the training references, N >= 1.

    Returns:
        [13, 2] float64, of +1 (positive or uncertain) and of -1.
    """
    signs = signed_vector(classes)
    counts = np.stack([(signs == 1).sum(axis=0), (signs == -1).sum(axis=0)], axis=1)
    return (len(classes) + 2) / (counts + 1.0)


def weighted_signs(signs: NDArray[np.int8], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 13] signs times the root of their weights [13, 2]; ValueError where those are not positive numbers."""
    if weights.shape != (NO_FINDING, 2) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"weights of shape {weights.shape}; expected [{NO_FINDING}, 2], each a number above 0")
    roots = np.sqrt(weights)
    return np.where(signs > 0, roots[:, 0], np.where(signs < 0, -roots[:, 1], 0.0))


def mccs(ccs: Floats, margin: float) -> Floats:
    """CCS above a margin, `max((CCS - m) / (1 - m), 0)`.

    Args:
        ccs: [N] float32 in [-1, 1].
        margin: m, 0 <= m < 1. What a report gains by naming the usual negatives without looking lies mostly below it.

    Returns:
        [N] float32 in [0, 1].

    Raises:
        ValueError: a margin outside [0, 1).

    Source: arXiv 2512.16145.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin {margin}; expected 0 <= margin < 1")
    return np.maximum((ccs.astype(np.float64) - margin) / (1 - margin), 0.0).astype(np.float32)


def ce_f1(classes_generated: NDArray[np.int64], classes_reference: NDArray[np.int64]) -> Floats:
    """Per-report F1 over the 13 positives: 2 TP / (2 TP + FP + FN).

    Args:
        classes_generated: [N, 14] classes; only class 1 is positive (uncertain is not). No Finding is left out.
        classes_reference: [N, 14] likewise.

    Returns:
        [N] float32 in [0, 1]; 1 where neither report has a positive.

    Raises:
        ValueError: shapes that are not equal [N, 14].
    """
    shape = classes_generated.shape
    if shape != classes_reference.shape or len(shape) != 2 or shape[1] != len(OBSERVATIONS):
        raise ValueError(
            f"classes of shape {shape} and {classes_reference.shape}; expected the same [N, {len(OBSERVATIONS)}]"
        )
    a, b = classes_generated[:, :NO_FINDING] == POSITIVE, classes_reference[:, :NO_FINDING] == POSITIVE
    found, said = (a & b).sum(axis=1), a.sum(axis=1) + b.sum(axis=1)  # TP, 2 TP + FP + FN
    return np.where(said == 0, 1.0, 2 * found / np.maximum(said, 1)).astype(np.float32)


def bleu4(generated: Sequence[str], references: Sequence[str]) -> Floats:
    """Sentence BLEU of up to four-grams with exponential smoothing, 13a tokens, case kept.

    A report of fewer than four tokens is scored on the orders it has (sacrebleu's effective order, its sentence-level
    default).

    Args:
        generated: N texts.
        references: N texts.

    Returns:
        [N] float32 in [0, 1]; 0 for an empty text.

    Raises:
        ValueError: unequal numbers of texts.

    Source: sacrebleu; smoothing method 3 of Chen and Cherry, WMT 2014 (W14-3346).
    """
    bleu = BLEU(smooth_method="exp", effective_order=True)
    # a perfect match comes out as 100.00000000000004
    scores = [
        min(bleu.sentence_score(text, [reference]).score / 100, 1.0)
        for text, reference in zip(generated, references, strict=True)
    ]
    return np.array(scores, dtype=np.float32)


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> Floats:
    """ROUGE-L, beta 1.2, over words separated by whitespace; case and punctuation kept.

    With P and R the longest common subsequence over the lengths: (1 + beta^2) P R / (R + beta^2 P).

    Args:
        generated: N texts.
        references: N texts.

    Returns:
        [N] float32 in [0, 1]; 0 for an empty text.

    Raises:
        ValueError: unequal numbers of texts.

    Source: Lin, 2004 (W04-1013), as pycocoevalcap computes it.
    """
    rouge = Rouge()
    scores = []
    for text, reference in zip(generated, references, strict=True):
        # pycocoevalcap splits at single spaces, so that a double space or an empty text would count as a word
        words, reference_words = " ".join(text.split()), " ".join(reference.split())
        scores.append(rouge.calc_score([words], [reference_words]) if words and reference_words else 0.0)
    return np.array(scores, dtype=np.float32)


def length(generated: Sequence[str], references: Sequence[str]) -> Floats:
    """How close a report's length comes to its reference's, min / max of the word counts (ours).

    Symmetric in too long and too short by the same factor: half and double both give 0.5.

    Args:
        generated: N texts.
        references: N texts.

    Returns:
        [N] float32 in [0, 1]: 1 for equal counts (also 0 and 0), 0 where only one text is empty.

    Raises:
        ValueError: unequal numbers of texts.
    """
    counts = [
        (len(text.split()), len(reference.split())) for text, reference in zip(generated, references, strict=True)
    ]
    return np.array([min(pair) / max(pair) if max(pair) else 1.0 for pair in counts], dtype=np.float32)


def _without_repetition(scored: Scored) -> Floats:
    return np.array([1 - repetition(text) for text in scored.texts], dtype=np.float32)


def _without_contradiction(scored: Scored) -> Floats:
    if scored.contradictions is None:
        raise ValueError("the sentences of the reports were not read")
    return (1 / (1 + scored.contradictions)).astype(np.float32)


def _ccs_of(scored: Scored) -> Floats:
    return ccs(signed_vector(scored.labels), signed_vector(scored.reference_labels), scored.ccs_weights)


def _additive_of(scored: Scored) -> Floats:
    if scored.thresholds is None:
        raise ValueError("additive has no thresholds; set reward.threshold (RewardContext.thresholds)")
    return additive(signed_vector(scored.labels), signed_vector(scored.reference_labels), scored.thresholds)


BUILT_IN: Mapping[str, Term] = {
    "mccs": Term(lambda s: mccs(_ccs_of(s), s.margin), "what of ccs is above reward.margin, 0 to 1"),
    "ccs": Term(_ccs_of, "cosine of what the two reports affirm (+1) and deny (-1) of 13 observations, -1 to 1"),
    "additive": Term(_additive_of, "findings said pay from the probability reward.threshold on, -1 to 1"),
    "ce_f1": Term(lambda s: ce_f1(s.labels, s.reference_labels), "F1 of one report's positive findings, 0 to 1"),
    "bleu4": Term(
        lambda s: bleu4(s.texts, s.references), "sentence BLEU-4 against the reference, 0 to 1", needs_words=True
    ),
    "rouge_l": Term(
        lambda s: rouge_l(s.texts, s.references), "ROUGE-L against the reference, 0 to 1", needs_words=True
    ),
    "length": Term(
        lambda s: length(s.texts, s.references), "shorter over longer of report and reference, 0 to 1", needs_words=True
    ),
    "repetition": Term(_without_repetition, "1 less the share of sentences or phrases said before, 0 to 1"),
    CONTRADICTION: Term(
        _without_contradiction, "1 over 1 + the observations that one sentence affirms and another denies, 0 to 1"
    ),
    "format": Term(lambda s: s.format, "the completion keeps the prompt's grammar, 0 to 1", scores_malformed=True),
}


def require_known(names: Iterable[str]) -> None:
    """Refuse a name that is neither built in, nor another's (`outside`), nor `module:function`.

    Raises:
        ValueError: names it and those that are allowed.
    """
    for name in names:
        if is_outside(name):
            require_outside(name)
        elif is_own(name):
            parts_of_own(name)
        elif name not in BUILT_IN:
            raise ValueError(
                f"reward term {name!r} is unknown; allowed are {', '.join(BUILT_IN)}, 'module:function', "
                "'radeval:METRIC' and 'http://HOST:PORT/PATH'"
            )


def needing_words(names: Iterable[str]) -> list[str]:
    """Those of the terms that read the reference's words, and all that are not built in, which are handed them."""
    return [name for name in names if name not in BUILT_IN or BUILT_IN[name].needs_words]


def require_signs(weights: Mapping[str, float]) -> None:
    """Refuse a negative weight where it would pay for what it is meant to price.

    Raises:
        ValueError: names the term.
    """
    for name in _PAID_TO_BE_HIGH:
        if weights.get(name, 0) < 0:
            raise ValueError(
                f"reward term {name!r}: weight {weights[name]}; the term is 1 for a report without {name}, so that a "
                "negative weight would pay for it; give a positive one"
            )


def load_callable(name: str) -> CustomTerm:
    """A user's own term, named `module:function`.

    The function is called once a batch as `function(generated, references, labels, reference_labels)`: N report texts
    (None where malformed; what such a report earns is the function's decision), N reference texts, int64 [N, 14]
    classes of each (-1 throughout a row whose report is malformed), and returns N finite numbers. The module is
    imported from Python's path; importing it runs its code.

    Args:
        name: `package.module:function`.

    Returns:
        The function with its answer checked: [N] float32, else a ValueError that names the term.

    Raises:
        ValueError: a name that is not `module:function`, a module that cannot be found, or a function that is not in it
            or not callable. An exception inside the module's own code is passed on as it is.
    """
    module_name, function_name = parts_of_own(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module was found, something that it imports was not
        raise ValueError(
            f"reward term {name!r}: no module {error.name!r} on Python's path; install it or set PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward term {name!r}: {module_name} has no function {function_name!r}")

    def checked(
        generated: list[str | None],
        references: list[str],
        labels: NDArray[np.int64],
        reference_labels: NDArray[np.int64],
    ) -> Floats:
        return _as_floats(name, function(generated, references, labels, reference_labels), len(generated))

    return checked


def _as_floats(name: str, answer: ArrayLike, expected: int) -> Floats:
    """A user's answer as [expected] float32. Whether the numbers are finite is for the caller, which knows
    the studies.
    """
    try:
        values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward term {name!r} returned {type(answer).__name__}, which is not a sequence of numbers: {error}"
        ) from error
    if values.shape != (expected,):
        raise ValueError(
            f"reward term {name!r} returned shape {values.shape}; expected ({expected},), one number a report"
        )
    return values.astype(np.float32)
