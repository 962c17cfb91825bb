"""The score card: every definition, interval and baseline of one system on one set of studies, and all that makes them
comparable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1 import __version__
from mrg_r1.console import progress
from mrg_r1.files import write_text_atomically
from mrg_r1.metrics import lexical
from mrg_r1.metrics.baselines import baselines
from mrg_r1.metrics.bootstrap import LEVEL, SAMPLES, bootstrap_intervals
from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores, per_observation, support
from mrg_r1.metrics.identity import digits, ids_hash, labels_hash
from mrg_r1.metrics.radeval import RadEval, described_scores
from mrg_r1.metrics.wording import WORDING_ARE, read_contradictions, wording
from mrg_r1.score.reading import Side, read_side, require_same_studies

FORMAT = "mrg-r1 score card 1"
LoadLabeler = Callable[[], Any]  # a `labels.labeler.Labeler`, whose module brings torch


def score_files(
    predicted: Path,
    reference: Path | None = None,
    *,
    train: Path | None = None,
    split: str | None = None,
    load_labeler: LoadLabeler | None = None,
    labels_by: str | None = None,
    cleaning: str = "raw",
    samples: int = SAMPLES,
    seed: int = 0,
    radeval: RadEval | None = None,
) -> dict[str, Any]:
    """Score one file against another, study by study.

    Args:
        predicted: labels or reports, in any form of `score.reading`.
        reference: the same; the two need not be of one kind. None where `predicted` has both sides (JSON, JSONL).
        train: training reports or labels, for the random-report baseline.
        split: only the studies of this split, where a JSON or JSONL file names several.
        load_labeler: called once, when reports are to be read; None where there is no labeler.
        labels_by: who read the labels that are given as labels, where no file says it.
        cleaning: of the texts before the lexical metrics, of `metrics.lexical.CLEANINGS`.
        samples, seed: of the bootstrap; the seed also draws the random training reports.
        radeval: a child process whose metrics are taken in too; it is closed.

    Returns:
        The card, as docs/scores.md describes it. It depends on the studies and what is said of them alone: neither on
        the order of rows nor on file names, and it holds no report.

    Raises:
        ValueError: a study that stands in one file only, reports without a labeler, or a file that cannot be read as
            any kind.
        OSError: a file cannot be read.
    """
    labeler = None if load_labeler is None else cache(load_labeler)
    of_predicted = read_side(predicted, "predicted", split=split)
    of_reference = read_side(_with_both_sides(predicted) if reference is None else reference, "reference", split=split)
    if split is not None and not (of_predicted.has_splits or of_reference.has_splits):
        raise ValueError(
            f"--split {split}: neither {of_predicted.path} nor {of_reference.path} names splits; leave it out"
        )
    require_same_studies(of_predicted, of_reference)
    of_train = None if train is None else _labelled(_read_train(train), labeler, labels_by)
    of_predicted, of_reference = (_labelled(side, labeler, labels_by) for side in (of_predicted, of_reference))
    ids = sorted(of_reference.ids)
    said, true = (_classes(side, ids) for side in (of_predicted, of_reference))
    train_ids = [] if of_train is None else sorted(of_train.ids)
    of_training = None if of_train is None else _classes(of_train, train_ids)
    of_texts, values = _texts(of_predicted, of_reference, ids, cleaning, radeval, samples, seed)
    known = [
        side.labeler
        for side in (of_predicted, of_reference)
        if side.labeler is not None and side.labeler["fingerprint"] is not None
    ]
    return {
        "format": FORMAT,
        "version": __version__,
        "n": len(ids),
        "studies": {"ids_sha256": ids_hash(ids), "identified_by": "row number" if of_reference.by_line else "id"},
        "labeler": known[0] if known else None,
        "predicted": {"labeler": of_predicted.labeler, "labels_sha256": labels_hash(ids, said)},
        "reference": {"labeler": of_reference.labeler, "labels_sha256": labels_hash(ids, true)},
        "train": None
        if of_train is None or of_training is None
        else {"n": len(train_ids), "labeler": of_train.labeler, "labels_sha256": labels_hash(train_ids, of_training)},
        "bootstrap": {
            "samples": samples,
            "seed": seed,
            "level": LEVEL,
            "method": "percentile, studies drawn with replacement",
        },
        **_clinical(said, true, of_training, samples, seed),
        **of_texts,
        "wording": {
            "predicted": _wording(of_predicted, labeler),
            "reference": _wording(of_reference, labeler),
            "are": WORDING_ARE,
        },
        "predictions": {"ids": ids, "predicted": digits(said), "reference": digits(true), **values},
    }


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """The card as JSON, whole or not at all; labels a study are on one line each side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = json.dumps({name: value for name, value in card.items() if name != "predictions"}, indent=2)
    write_text_atomically(path, f'{short[:-2]},\n  "predictions": {json.dumps(card["predictions"])}\n}}\n')


def _with_both_sides(path: Path) -> Path:
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: one file alone must have both sides, and only .json and .jsonl can; name the reference file too"
        )
    return path


def _read_train(path: Path) -> Side:
    if path.suffix.lower() in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: training reports or labels are read from a CSV or a .txt, so that no other split is among them"
        )
    return read_side(path, "reference")


def _labelled(side: Side, labeler: LoadLabeler | None, labels_by: str | None) -> Side:
    """The side with classes: read out of its reports by the labeler where one is given, else those that stand in the
    file, as are those of studies without a report.
    """
    texts = {study: text for study, text in (side.texts or {}).items() if text is not None}
    if texts and labeler is not None:
        read = labeler()
        classes = dict(zip(texts, read.label(list(texts.values()), progress=True).tolist(), strict=True))
        given = {study: own for study, own in (side.classes or {}).items() if study not in texts}
        return replace(side, classes=given | classes, labeler={"name": read.name, "fingerprint": read.fingerprint})
    if side.classes is None or len(side.classes) < len(side.ids):
        raise ValueError(
            f"{side.path}: holds reports, not labels; give a labeler with --labeler, or a CSV with the 14 observations"
        )
    if side.labeler is None and labels_by is not None:
        return replace(side, labeler={"name": labels_by, "fingerprint": None})
    return side


def _classes(side: Side, ids: Sequence[str]) -> NDArray[np.int64]:
    assert side.classes is not None
    return np.array([side.classes[study] for study in ids], dtype=np.int64)


def _clinical(
    predicted: NDArray[np.int64], reference: NDArray[np.int64], train: NDArray[np.int64] | None, samples: int, seed: int
) -> dict[str, Any]:
    """Classes, [N, 14] each and [M, 14], to the numbers of the JSON."""

    def shown(chunks: Sequence[int]) -> Iterable[int]:
        return progress(chunks, "bootstrap")

    intervals = bootstrap_intervals(predicted, reference, samples=samples, seed=seed, shown=shown)
    return {
        "definitions": {
            name: {**asdict(score), "f1_ci": list(intervals[name])}
            for name, score in clinical_scores(predicted, reference).items()
        },
        "definitions_are": definitions_are(),
        "support": support(reference),
        "observations": {name: asdict(score) for name, score in per_observation(predicted, reference).items()},
        "observations_are": "each observation alone, uncertain is not positive, 0/0 = 0",
        "baselines": {
            baseline: None if entry is None else {name: asdict(score) for name, score in entry.items()}
            for baseline, entry in baselines(reference, train=train, seed=seed).items()
        },
        "random_train_reason": "no training reports were given (--train TRAIN.csv)" if train is None else None,
    }


def definitions_are() -> dict[str, Any]:
    """Every definition in words."""
    return {name: definition.described() for name, definition in DEFINITIONS.items()}


def _wording(side: Side, labeler: LoadLabeler | None) -> dict[str, float | None] | None:
    """What no clinical score sees; None of labels. An empty report is none; sentences are read where a labeler is."""
    if side.texts is None:
        return None
    reports = [text for study in sorted(side.texts) if (text := side.texts[study]) is not None and text.strip()]
    counts: list[int | None] = [None] * len(reports)
    if labeler is not None:
        counts = read_contradictions(reports, partial(labeler().label, progress=True)).tolist()
    return asdict(wording(reports, counts))


def _texts(
    predicted: Side,
    reference: Side,
    ids: Sequence[str],
    cleaning: str,
    radeval: RadEval | None,
    samples: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is scored of words, lexical and RadEval's, and what the latter said of each study, for `predictions`."""
    named = next((name for name in lexical.CLEANINGS if name == cleaning), None)
    if named is None:
        raise ValueError(f"cleaning {cleaning!r}; there are {', '.join(lexical.CLEANINGS)}")
    reason, true = None, {}
    if predicted.texts is None or reference.texts is None:
        which = "predicted" if predicted.texts is None else "reference"
        reason = f"the {which} file has labels and no reports; give reports on both sides"
    else:
        true = {study: text for study in ids if (text := reference.texts[study]) is not None}
        reason = None if true else "no reference has a report, only labels"
    if reason is not None:
        if radeval is not None:
            radeval.close()
            raise ValueError(f"--with radeval: {reason}")
        return {"lexical": None, "lexical_reason": reason, "radeval": None}, {}
    assert predicted.texts is not None
    said = {study: predicted.texts[study] or "" for study in true}
    scores = lexical.described_scores(said, true, named, shown=lambda names: progress(names, "lexical metrics"))
    counted = {} if len(true) == len(ids) else {"studies": len(true)}
    found = {"lexical": scores | counted, "lexical_reason": None, "radeval": None}
    if radeval is None:
        return found, {}
    found["radeval"], values = described_scores(
        radeval, said, true, samples=samples, seed=seed, shown=lambda names: progress(names, "RadEval's metrics")
    )
    row = {study: number for number, study in enumerate(true)}
    by_study = {
        output: [None if study not in row else float(column[row[study]]) for study in ids]
        for output, column in values.items()
    }
    return found, {"radeval": by_study}
