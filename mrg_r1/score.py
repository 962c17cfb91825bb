"""`mrg-r1 score`: two CSVs enter, every definition of clinical efficacy with its interval and baselines leaves (spec section 4)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from mrg_r1.labels.chexbert import Labeler
from mrg_r1.labels.observations import OBSERVATIONS, read_labels_csv
from mrg_r1.labels.training import read_reports_csv
from mrg_r1.metrics.baselines import baselines
from mrg_r1.metrics.bootstrap import bootstrap_intervals
from mrg_r1.metrics.clinical import clinical_scores, support

SHOWN_IDS = 10
PIPE_WIDTH = 120  # a pipe has no width, and a table cut to 80 columns loses figures
_COMPARED = {"constant_normal": "normal", "blank": "blank", "random_train": "random", "reference": "itself"}


def score_files(
    predicted: Path, reference: Path, *, train: Path | None = None, load_labeler: Callable[[], Labeler] | None = None
) -> dict[str, Any]:
    """Score one CSV against another, study by study.

    Args:
        predicted: a label CSV (`id` and the 14 observations) or a report CSV (`id,report`).
        reference: the same; the two need not be of one kind.
        train: training reports or labels, for the random-report baseline.
        load_labeler: called once, when a file holds reports; None where there is no labeler.

    Returns:
        The JSON of spec section 8: `definitions.NAME.{precision, recall, f1, f1_ci}`, `support.OBSERVATION`,
        `baselines.{constant_normal, blank, random_train, reference}.NAME.{precision, recall, f1}` and `n`; beside them
        `random_train_reason` (why `random_train` is null, or null) and `labeler` (name and fingerprint, or null).

    Raises:
        ValueError: a study that stands in one file only, reports without a labeler, or a CSV that cannot be read as either kind.
        OSError: a file cannot be read.
    """
    labeler = None if load_labeler is None else cache(load_labeler)
    of_predicted, of_reference = _read_observations(predicted, labeler), _read_observations(reference, labeler)
    _require_same_ids(predicted, of_predicted, reference, of_reference)
    of_train = None if train is None else _read_observations(train, labeler)
    if of_train is not None and not of_train:
        raise ValueError(f"{train}: no reports in it; give the training split's, or leave --train out")
    ids = list(of_reference)
    scores = _scores(
        np.array([of_predicted[i] for i in ids]),
        np.array([of_reference[i] for i in ids]),
        None if of_train is None else np.array(list(of_train.values())),
    )
    used = labeler() if labeler is not None and labeler.cache_info().currsize else None
    scores["labeler"] = None if used is None else {"name": used.name, "fingerprint": used.fingerprint}
    return scores


def print_scores(scores: Mapping[str, Any]) -> None:
    """The result of `score_files` as a table on the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table("definition", title=f"Clinical efficacy, {scores['n']:,} studies; right: the F1 of baselines", box=box.SIMPLE)
    for column in ("P", "R", "F1", "95 % of F1", *_COMPARED.values()):
        table.add_column(column, justify="right", no_wrap=True)
    for name, score in scores["definitions"].items():
        entries = [scores["baselines"][baseline] for baseline in _COMPARED]
        table.add_row(
            name,
            *(f"{score[part]:.3f}" for part in ("precision", "recall", "f1")),
            "{:.3f}-{:.3f}".format(*score["f1_ci"]),
            *("-" if entry is None else f"{entry[name]['f1']:.3f}" for entry in entries),
        )
    console.print(table)
    lines = [
        "normal: every report No Finding; random: a random training report; itself: the references against themselves",
        "support: " + ", ".join(f"{name} {count}" for name, count in scores["support"].items()),
    ]
    if scores["random_train_reason"]:
        lines.append(f"random is missing: {scores['random_train_reason']}")
    for line in lines:
        console.print(line, highlight=False)


def _scores(predicted: NDArray[np.int64], reference: NDArray[np.int64], train: NDArray[np.int64] | None) -> dict[str, Any]:
    """Classes, [N, 14] each and [M, 14], to the numbers of the JSON."""
    intervals = bootstrap_intervals(predicted, reference)
    return {
        "n": len(reference),
        "definitions": {
            name: {**asdict(score), "f1_ci": list(intervals[name])} for name, score in clinical_scores(predicted, reference).items()
        },
        "support": support(reference),
        "baselines": {
            baseline: None if entry is None else {name: asdict(score) for name, score in entry.items()}
            for baseline, entry in baselines(reference, train=train).items()
        },
        "random_train_reason": "no training reports were given (--train TRAIN.csv)" if train is None else None,
    }


def _read_observations(path: Path, labeler: Callable[[], Labeler] | None) -> dict[str, list[int]]:
    """Classes by id, from a label CSV or from a report CSV through the labeler."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file), [])
    if set(OBSERVATIONS) & set(columns):
        return read_labels_csv(path)
    reports = read_reports_csv(path)
    if labeler is None:
        raise ValueError(f"{path}: holds reports, not labels; give a labeler with --labeler, or a CSV with the 14 observations")
    return dict(zip(reports, labeler().label(list(reports.values()), progress=True).tolist(), strict=True))


def _require_same_ids(predicted_path: Path, predicted: Collection[str], reference_path: Path, reference: Collection[str]) -> None:
    problems = []
    for path, missing in (
        (predicted_path, [i for i in reference if i not in predicted]),
        (reference_path, [i for i in predicted if i not in reference]),
    ):
        if missing:
            more = f" and {len(missing) - SHOWN_IDS:,} more" if len(missing) > SHOWN_IDS else ""
            problems.append(f"{path}: {len(missing):,} studies of the other file are missing: {', '.join(missing[:SHOWN_IDS])}{more}")
    if problems:
        raise ValueError("\n".join([*problems, "scoring goes study by study: give both files the same ids"]))
    if not reference:
        raise ValueError(f"{reference_path}: no studies in it")
