"""Training a labeler: a CSV of reports and a CSV of their labels enter, a directory that `Labeler.load` reads leaves.

CheXbert's architecture at a size that a CPU trains in minutes, from scratch, with a vocabulary of its own: for tests, for
phantoms, and for reports in other languages than the published labeler's.

Source: CheXbert (arXiv 2004.09167), section 3.3: the sum of the 14 cross-entropies.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import random
import re
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import BertConfig

from mrg_r1.labels.chexbert import MAX_TOKENS, SPECIAL_TOKENS, CheXbert, Labeler, bert_tokenizer
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, POSITIVE, read_labels_csv

VALIDATION_SHARE = 0.1
BATCH = 32  # reports a step
PEAK_RATE = 5e-4
WARM_UP = 0.1  # share of the training
WEIGHT_DECAY = 0.01
MASKED = 0.05  # share of the tokens hidden in training, so that no label hangs on one word alone
SHUFFLED = 0.5  # share of the reports whose sentences are put in another order: what a report says does not depend on it
PASSES = 20  # over the reports


@dataclass(frozen=True)
class LabelerSize:
    """BERT's sizes; the feed-forward width is four times `hidden`."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int  # at most: a small corpus has fewer pieces


SIZES: dict[str, LabelerSize] = {
    "tiny": LabelerSize(layers=2, hidden=64, heads=2, vocabulary=2000),
    "small": LabelerSize(layers=2, hidden=128, heads=2, vocabulary=4000),
}


def read_reports_csv(path: Path) -> dict[str, str]:
    """Read `id,report` (any other columns are passed over) into reports by id. A report may be empty.

    Raises:
        ValueError: a missing column, an empty or repeated id, or a row cut short; names file and line.
    """
    reports: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        id_column = next((name for name in columns if name.strip().lower() == "id"), None)
        report_column = next((name for name in columns if name.strip().lower() == "report"), None)
        if id_column is None or report_column is None:
            raise ValueError(f"{path}: the columns are {columns}; `id` and `report` are needed")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            study_id = (row[id_column] or "").strip()
            if not study_id:
                raise ValueError(f"{where}: empty id")
            if study_id in reports:
                raise ValueError(f"{where}: id {study_id!r} stands twice; keep one of the rows")
            if row[report_column] is None:
                raise ValueError(f"{where}, id {study_id!r}: the row ends before its report")
            reports[study_id] = row[report_column]
    return reports


def write_reports_csv(path: Path, reports: Mapping[str, str]) -> None:
    """Write reports by id as `id,report`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "report"])
        writer.writerows(reports.items())


def train_tokenizer(reports: Sequence[str], vocabulary: int) -> Tokenizer:
    """A lower-case WordPiece tokenizer of at most `vocabulary` learned pieces (a large alphabet may add to them).

    Every printable ASCII character, and every character of the reports, is a piece at a word's start and inside one: no such word is
    ever unknown.
    """
    tokenizer = bert_tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    seen = {character for report in reports for character in tokenizer.normalizer.normalize_str(report) if not character.isspace()}
    alphabet = sorted(seen | set(string.printable.lower()) - set(string.whitespace))
    # The trainer breaks ties by id and numbers the characters in a hash table's order; numbering them first makes it repeatable.
    first = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary + len(first), min_frequency=2, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(reports, trainer)
    return bert_tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
