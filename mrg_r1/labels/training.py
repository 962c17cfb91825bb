"""Training a labeler: a CSV of reports and a CSV of their labels enter, a directory that `Labeler.load` reads leaves.

CheXbert's architecture at a size that a CPU trains in minutes, from random weights with a vocabulary of its own: for
tests, for phantoms, and for reports in other languages than the published labeler's. Or from a pretrained BERT,
fine-tuned as CheXbert was.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from mrg_r1.files import write_text_atomically
from mrg_r1.labels.augmentation import Augmentation, SpecialIds
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.fitting import Fitting, Regime, TrainingBar
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import OBSERVATIONS, POSITIVE
from mrg_r1.labels.reports import read_labelled_reports
from mrg_r1.labels.starting import SIZES, random_model, random_start, read_start
from mrg_r1.labels.teaching import TEACHER_COST
from mrg_r1.labels.tokenizer import special_id

VALIDATION_SHARE = 0.05  # enough to tell a pass that broke; what is held out is not learned from
FEWEST_REPORTS = 20

# Measured on a third of IU X-Ray's labelled reports, trained on the others, one seed each: 22 passes at a rate of 2e-3
# read them at a micro-F1 of 0.821; with reports joined 0.829; at 1e-3 too 0.840. Dropout in the hidden layers makes it
# 0.834 (from 0.830), but phantoms of unseen wording 0.969 (from 0.984). Teachers, read on the texts of IU X-Ray's val
# split that its train split lacks: two alone 0.790, 0.771; the model that they taught 0.799.
RANDOM_START = Regime(
    passes=6,
    fewest_read=50_000,
    peak_rate=1e-3,
    augmentation=Augmentation(joined=0.6, shuffled=0.5, masked=0.03, spread=0.2),
    teachers=2,
    taught_below=4000,
)


def fine_tuning(hidden: int) -> Regime:
    """For a pretrained model of `hidden` dimensions: CheXbert's rate at 768, more for smaller ones, and no [UNK] strewn
    in.

    Source: CheXbert (arXiv 2004.09167): Adam at 2e-5.
    """
    rate = min(2e-4, 2e-5 * (768 / hidden) ** 3.4)  # from 2e-4 at 384 dimensions to CheXbert's at 768
    return Regime(
        passes=4,
        fewest_read=16_000,
        peak_rate=rate,
        augmentation=Augmentation(joined=0.5, shuffled=0.5, masked=0.03, spread=0.0),
    )


def train_labeler(
    reports: Path,
    labels: Path,
    output: Path,
    *,
    seed: int = 0,
    size: str | None = None,
    start: Path | None = None,
    tokenizer: str | None = None,
    passes: int | None = None,
    max_minutes: float | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a labeler and write it, with training.json beside it.

    A twentieth of the reports, drawn by `seed`, is held out; `kept_pass` chooses a pass by the micro-F1 of positives on
    it. On a CPU the same seed, files and number of threads give the same weights unless `max_minutes` cuts in.

    From random weights, on few reports and with neither `passes` nor `max_minutes` given, `Regime.teachers` models are
    trained alike before, whose average the model learns beside the labels (`labels.teaching`).

    Args:
        reports: CSV `id,report`.
        labels: CSV `id` and the 14 observations; joined with `reports` on `id`, both ways without remainder.
        output: directory for config.json, model.safetensors, the tokenizer and training.json.
        seed: of the split, the first weights, the order, the augmentation and the dropout.
        size: a name of `SIZES`; None: "small". Not together with `start`, which has a size of its own.
        start: what `read_start` reads: a directory of a pretrained BERT or of ours, or a published CheXbert file. None:
            random weights and a vocabulary learned from the reports.
        tokenizer: of the `start`, where it does not carry its own.
        passes: over the training reports; None: the regime's, or more where the reports are few.
        max_minutes: the learning rate decays to zero within this time where it is shorter than the passes.
        device: where to train.

    Returns:
        What training.json holds: the data's and the model's sizes, how many teachers there were, the curve over the
        passes, the kept pass's scores on the held-out reports (micro-F1, share of classes right, precision, recall, F1
        and support by observation) and the versions.

    Raises:
        FileNotFoundError: nothing at `start`, or a file of it that is missing.
        ValueError: an unknown size, no passes, a size or a tokenizer that would be passed over, a start that is no
            BERT, a bad row, an id in one file only, an empty report, or fewer than `FEWEST_REPORTS`; names file and
            line.
    """
    _require_one_start(size, start, tokenizer, passes)
    size = size or "small"
    started = time.monotonic()
    texts, classes = read_labelled_reports(Path(reports), Path(labels))
    if len(texts) < FEWEST_REPORTS:
        raise ValueError(
            f"{reports}: {len(texts)} reports; at least {FEWEST_REPORTS} are needed to train and to hold some out"
        )
    rng = random.Random(seed)
    order = rng.sample(range(len(texts)), len(texts))
    held_out = max(1, round(VALIDATION_SHARE * len(texts)))
    validation, training = order[:held_out], order[held_out:]
    training_texts, validation_texts = ([texts[row] for row in rows] for rows in (training, validation))
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's seeds stay where they are
        torch.manual_seed(seed)
        model, words = (
            random_start(training_texts, SIZES[size]) if start is None else read_start(Path(start), tokenizer)
        )
        regime = RANDOM_START if start is None else fine_tuning(model.bert.config.hidden_size)
        name = "labeler in training" if start is None else str(start)
        special = SpecialIds(
            *(special_id(words, token, name) for token in ("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]"))
        )
        several = (
            regime.teachers if passes is None and max_minutes is None and len(training) < regime.taught_below else 0
        )
        passes = passes if passes is not None else max(regime.passes, math.ceil(regime.fewest_read / len(training)))
        teachers: list[CheXbert] = []

        def fitting(learner: CheXbert, taught_by: Sequence[CheXbert] = ()) -> Fitting:
            return Fitting(
                Labeler(learner, words, name=name, device=device),
                special,
                training_texts,
                classes[training],
                regime,
                taught_by,
            )

        with TrainingBar([1.0] * several + [1.0 + TEACHER_COST * several]) as bar:
            for number in range(several):
                bar.begin(f"training teacher {number + 1} of {several}")
                teacher = random_model(model.bert.config)
                for _ in fitting(teacher).each_pass(rng=rng, passes=passes, seconds=None, bar=bar):
                    pass  # a teacher stays as the last pass leaves it
                teachers.append(teacher)
            bar.begin("training the labeler")
            seconds = None if max_minutes is None else 60 * max_minutes - (time.monotonic() - started)
            curve, best = fitting(model, teachers).fit(
                validation_texts, classes[validation], rng=rng, passes=passes, seconds=seconds, bar=bar
            )
    labeler = Labeler(model, words, name=Path(output).resolve().name, device=device)
    labeler.save(Path(output))
    summary = {
        "name": labeler.name,
        "fingerprint": labeler.fingerprint,
        "size": size if start is None else None,
        "start": None if start is None else str(start),
        "seed": seed,
        "teachers": several,
        "training_reports": len(training),
        "validation_reports": len(validation),
        "vocabulary": words.get_vocab_size(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "best": best,
        "per_observation": observation_scores(labeler.label(validation_texts), classes[validation]),
        "curve": curve,
        "versions": {"python": platform.python_version()}
        | {library.__name__: str(library.__version__) for library in (torch, transformers, tokenizers)},
    }
    write_text_atomically(Path(output) / "training.json", json.dumps(summary, indent=2) + "\n")
    return summary


def observation_scores(predicted: NDArray[np.int64], reference: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 (0/0 = 0) and support of each observation's positives, of [N, 14] classes each."""
    said, true = predicted == POSITIVE, reference == POSITIVE
    scores = {}
    for column, name in enumerate(OBSERVATIONS):
        both, claimed, support = (int(hits[:, column].sum()) for hits in (said & true, said, true))
        scores[name] = {
            "precision": both / claimed if claimed else 0.0,
            "recall": both / support if support else 0.0,
            "f1": 2 * both / (claimed + support) if both else 0.0,
            "support": support,
        }
    return scores


def _require_one_start(size: str | None, start: Path | None, tokenizer: str | None, passes: int | None) -> None:
    """Refuse arguments of `train_labeler` that contradict one another or that no training could follow."""
    if start is None and tokenizer is not None:
        raise ValueError(
            f"tokenizer {tokenizer!r} without a start; from random weights the vocabulary is learned from the reports"
        )
    if start is not None and size is not None:
        raise ValueError(
            f"size {size!r} with the start {start}; the start has a size of its own, leave one of the two out"
        )
    if size is not None and size not in SIZES:
        raise ValueError(f"size {size!r}; allowed are {', '.join(SIZES)}")
    if passes is not None and passes < 1:
        raise ValueError(f"passes {passes}; at least 1 is needed")
