"""`mrg-r1 score --compare`: two score cards enter; why they cannot be compared, or every difference with its interval,
leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from mrg_r1 import __version__
from mrg_r1.console import progress
from mrg_r1.files import write_text_atomically
from mrg_r1.metrics.bootstrap import LEVEL, SAMPLES, Difference, paired_differences, paired_mean_differences
from mrg_r1.metrics.clinical import check_classes
from mrg_r1.metrics.identity import classes_of_digits, ids_hash, labels_hash
from mrg_r1.score.card import FORMAT, definitions_are

HOW_TO_MAKE = "make one with `mrg-r1 score PREDICTED REFERENCE -o CARD.json`"


class _Labeler(BaseModel):
    name: str
    fingerprint: str | None


class _Side(BaseModel):
    labeler: _Labeler | None
    labels_sha256: str


class _Studies(BaseModel):
    ids_sha256: str
    identified_by: Literal["id", "row number"]


class _Lexical(BaseModel):
    cleaning: str
    scores: dict[str, float]
    package: str
    references_sha256: str


class _Metric(BaseModel):
    variant: str
    weights_sha256: str | None


class _Mean(BaseModel):
    mean: float


class _RadEval(BaseModel):
    package: str
    metrics: dict[str, _Metric]
    scores: dict[str, _Mean]
    metric_of: dict[str, str]
    references_sha256: str


class _Wording(BaseModel):
    predicted: dict[str, float | None] | None


class _Predictions(BaseModel):
    ids: list[str]
    predicted: str
    reference: str
    radeval: dict[str, list[float | None]] = {}


class Card(BaseModel):
    """The part of a score card that a comparison reads."""

    format: str
    version: str
    n: int
    studies: _Studies
    predicted: _Side
    reference: _Side
    definitions_are: dict[str, Any]
    lexical: _Lexical | None
    radeval: _RadEval | None = None  # younger than 0.1.0, and only where it was asked for
    wording: _Wording = _Wording(predicted=None)  # a card of 0.1.0 has none
    predictions: _Predictions


@dataclass(frozen=True)
class Read:
    """A card whose labels are what its hashes say."""

    path: Path
    card: Card
    predicted: NDArray[np.int64]  # [N, 14]
    reference: NDArray[np.int64]  # [N, 14]


def read_card(path: Path) -> Read:
    """Read a card back and check that its labels are those that were scored.

    Raises:
        ValueError: no card, a card of another format, or one that was changed; names file, field and remedy.
        OSError: it cannot be read.
    """
    try:
        card = Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = f"field `{field}`: {first['msg']}" if field else first["msg"]
        raise ValueError(f"{path}: not a score card ({what}); {HOW_TO_MAKE}") from error
    if card.format != FORMAT:
        raise ValueError(
            f"{path}, field `format`: {card.format!r}, written by mrg-r1 {card.version}; this is {FORMAT!r}: score "
            "again"
        )
    ours = definitions_are()
    if changed := [
        name
        for name in sorted(ours.keys() | card.definitions_are.keys())
        if ours.get(name) != card.definitions_are.get(name)
    ]:
        name = changed[0]
        raise ValueError(
            f"{path}, field `definitions_are.{name}`: {card.definitions_are.get(name)}, written by mrg-r1 "
            f"{card.version}; here it is {ours.get(name)}: score again"
        )
    ids = card.predictions.ids
    arrays = {}
    for side, digits in (("predicted", card.predictions.predicted), ("reference", card.predictions.reference)):
        try:
            arrays[side] = classes_of_digits(digits)
            check_classes(arrays[side], arrays[side])
        except ValueError as error:
            raise ValueError(f"{path}, field `predictions.{side}`: {error}; score again") from error
    for name, found, said in (
        ("predictions.ids", str(len(set(ids))), str(card.n)),
        ("predictions.predicted", str(len(arrays["predicted"])), str(card.n)),
        ("predictions.reference", str(len(arrays["reference"])), str(card.n)),
        ("studies.ids_sha256", ids_hash(ids), card.studies.ids_sha256),
    ):
        if found != said:
            raise ValueError(
                f"{path}, field `{name}`: {found} in the card, which says {said}; it was changed: score again"
            )
    for name, stated in (("predicted", card.predicted.labels_sha256), ("reference", card.reference.labels_sha256)):
        if (held := labels_hash(ids, arrays[name])) != stated:
            raise ValueError(
                f"{path}, field `predictions.{name}`: its hash is {held}, not {stated}; it was changed: score again"
            )
    _check_radeval(path, card)
    return Read(path, card, arrays["predicted"], arrays["reference"])


def _check_radeval(path: Path, card: Card) -> None:
    """That the values a study are those whose means the card states."""
    for name, score in () if card.radeval is None else card.radeval.scores.items():
        values = [value for value in card.predictions.radeval.get(name, []) if value is not None]
        held = float(np.mean(values)) if values and len(card.predictions.radeval[name]) == card.n else None
        if held is None or not np.isclose(held, score.mean, rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"{path}, field `predictions.radeval.{name}`: a mean of {held} in the card, which says {score.mean}; "
                "it was changed: score again"
            )


def why_not(first: Read, second: Read) -> list[str]:
    """Every reason why two cards cannot be compared, with both values and the remedy; empty where they can."""
    a, b = first.card, second.card
    reasons = []

    def same(what: str, of_first: str, of_second: str, remedy: str) -> None:
        if of_first != of_second:
            reasons.append(f"{what}: {first.path} has {of_first}, {second.path} has {of_second}; {remedy}")

    same("studies", _studies(a), _studies(b), "score both systems on the same split")
    if _studies(a) == _studies(b):
        remedy = "score both against the same reference file"
        same("reference labels", f"hash {a.reference.labels_sha256}", f"hash {b.reference.labels_sha256}", remedy)
    for side in ("predicted", "reference"):
        of_a, of_b = (_named(getattr(card, side).labeler) for card in (a, b))
        remedy = "score both with the same --labeler, or name who read label files with --labels-by"
        same(f"labeler of the {side} labels", of_a, of_b, remedy)
    if a.lexical is not None and b.lexical is not None:
        same(
            "cleaning of the lexical metrics",
            a.lexical.cleaning,
            b.lexical.cleaning,
            "score both with the same --cleaning",
        )
        same("scorer of the lexical metrics", a.lexical.package, b.lexical.package, "score both in one environment")
        if a.lexical.cleaning == b.lexical.cleaning:
            hashes = f"hash {a.lexical.references_sha256}", f"hash {b.lexical.references_sha256}"
            same("reference reports", *hashes, "score both against the same reference file")
    if a.radeval is not None and b.radeval is not None:
        remedy = "score both in one environment (`make radeval` keeps exact versions)"
        same("package of RadEval's metrics", a.radeval.package, b.radeval.package, remedy)
        for name in sorted(a.radeval.metrics.keys() & b.radeval.metrics.keys()):
            one, two = a.radeval.metrics[name], b.radeval.metrics[name]
            same(f"weights of RadEval's {name}", f"hash {one.weights_sha256}", f"hash {two.weights_sha256}", remedy)
            same(f"variant of RadEval's {name}", one.variant, two.variant, "score both with one mrg-r1")
        hashes = f"hash {a.radeval.references_sha256}", f"hash {b.radeval.references_sha256}"
        same("references of RadEval's metrics", *hashes, "score both against the same reference file")
    return reasons


def compare_cards(first: Path, second: Path, *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """The difference (second - first) of the F1 of every definition, on the same studies and the same resamples of
    them.

    Returns:
        `n`, `studies`, `bootstrap`, `definitions.NAME.{first, second, difference, ci, excludes_zero, p}`,
        `definitions_are`, `radeval.scores` as `definitions`, `lexical.NAME.{first, second, difference}` with
        `cleaning`, and `wording` likewise, each null where a card has none.

    Raises:
        ValueError: a file that is no card, or cards that cannot be compared, with every reason.
        OSError: a card cannot be read.
    """
    of_first, of_second = read_card(first), read_card(second)
    if reasons := why_not(of_first, of_second):
        raise ValueError("\n  ".join(["these cards cannot be compared:", *reasons]))
    row = {study: number for number, study in enumerate(of_second.card.predictions.ids)}
    order = np.array([row[study] for study in of_first.card.predictions.ids])
    differences = paired_differences(
        of_first.predicted,
        of_second.predicted[order],
        of_first.reference,
        samples=samples,
        seed=seed,
        shown=lambda chunks: progress(chunks, "bootstrap"),
    )
    a, b = of_first.card, of_second.card
    return {
        "format": "mrg-r1 comparison 1",
        "version": __version__,
        "cards": {
            "first": {"file": str(first), "version": a.version},
            "second": {"file": str(second), "version": b.version},
        },
        "n": a.n,
        "studies": a.studies.model_dump(),
        "predicted": {"labeler": None if a.predicted.labeler is None else a.predicted.labeler.model_dump()},
        "reference": a.reference.model_dump(),
        "bootstrap": {
            "samples": samples,
            "seed": seed,
            "level": LEVEL,
            "method": "percentile, paired: both systems on the same studies drawn with replacement",
            "p": "two-sided, min(1, 2 min(1 + #{d <= 0}, 1 + #{d >= 0}) / (samples + 1)), without a correction "
            "for ten definitions",
        },
        "definitions": {name: _difference(found) for name, found in differences.items()},
        "definitions_are": definitions_are(),
        "lexical": _lexical(a.lexical, b.lexical),
        "radeval": _radeval(of_first, of_second, order, samples, seed),
        "wording": _wording(a.wording.predicted, b.wording.predicted),
    }


def write_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """The result of `compare_cards` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(comparison, indent=2) + "\n")


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "difference": found.difference,
        "ci": list(found.ci),
        "excludes_zero": found.excludes_zero,
        "p": found.p,
    }


def _radeval(first: Read, second: Read, order: NDArray[np.int64], samples: int, seed: int) -> dict[str, Any] | None:
    """The differences of what both cards have, over the studies whose references have words; `order` is of the
    second's studies.
    """
    a, b = first.card.radeval, second.card.radeval
    both = [] if a is None or b is None else [name for name in a.scores if name in b.scores]
    if a is None or not both:
        return None
    of_first, of_second = (
        np.array([read.card.predictions.radeval[name] for name in both], dtype=np.float64) for read in (first, second)
    )
    of_second = of_second[:, order]
    worded = ~np.isnan(of_first[0])
    found = paired_mean_differences(of_first[:, worded], of_second[:, worded], samples=samples, seed=seed)
    return {
        "package": a.package,
        "metrics": {name: a.metrics[name].model_dump() for name in dict.fromkeys(a.metric_of[name] for name in both)},
        "scores": {name: _difference(one) for name, one in zip(both, found, strict=True)},
    }


def _lexical(first: _Lexical | None, second: _Lexical | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return None
    both = [name for name in first.scores if name in second.scores]
    return {
        "cleaning": first.cleaning,
        "package": first.package,
        "scores": {
            name: {
                "first": first.scores[name],
                "second": second.scores[name],
                "difference": second.scores[name] - first.scores[name],
            }
            for name in both
        },
    }


def _wording(
    first: Mapping[str, float | None] | None, second: Mapping[str, float | None] | None
) -> dict[str, Any] | None:
    if first is None or second is None:
        return None
    pairs = {name: (value, second.get(name)) for name, value in first.items()}
    return {
        name: {"first": a, "second": b, "difference": b - a}
        for name, (a, b) in pairs.items()
        if a is not None and b is not None
    }


def _studies(card: Card) -> str:
    return f"{card.n:,} studies by {card.studies.identified_by}, hash {card.studies.ids_sha256}"


def _named(labeler: _Labeler | None) -> str:
    if labeler is None:
        return "none named (label files)"
    return f"{labeler.name}, fingerprint {labeler.fingerprint or 'unknown'}"
