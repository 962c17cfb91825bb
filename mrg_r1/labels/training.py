"""Training a labeler: a CSV of reports and a CSV of their labels enter, a directory that `Labeler.load` reads leaves.

CheXbert's architecture at a size that a CPU trains in minutes, from random weights with a vocabulary of its own: for
tests, for phantoms, and for reports in other languages than the published labeler's. Or from a pretrained BERT,
fine-tuned as CheXbert was.

Source: CheXbert (arXiv 2004.09167), section 3.3: the sum of the 14 cross-entropies.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import random
import re
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
from torch import Tensor, nn

from mrg_r1.labels.augmentation import Augmentation, Example, SpecialIds, one_pass
from mrg_r1.labels.chexbert import CheXbert, Labeler, special_id
from mrg_r1.labels.observations import OBSERVATIONS, POSITIVE, read_labels_csv
from mrg_r1.labels.starting import SIZES, random_model, random_start, read_start
from mrg_r1.labels.teaching import TEACHER_COST, TrainingBar, average_answer, taught_loss

VALIDATION_SHARE = 0.05  # enough to tell a pass that broke; what is held out is not learned from
FEWEST_REPORTS = 20
BATCH = 16  # examples a step
WARM_UP = 0.1  # share of the training
WEIGHT_DECAY = 0.01
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Regime:
    """How long and how a model is trained."""

    passes: int  # over the training reports, at least
    fewest_read: int  # reports read in all, at least: small files are passed over more often
    peak_rate: float
    augmentation: Augmentation
    teachers: int = 0  # trained alike first, whose average the model learns beside the labels
    taught_below: int = 0  # so many training reports; more of them need no teachers


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
            if None in row.values():
                raise ValueError(f"{where}, id {study_id!r}: the row ends before its last column")
            if None in row:
                raise ValueError(
                    f"{where}, id {study_id!r}: more fields than columns; a report with a comma stands in quotes"
                )
            reports[study_id] = row[report_column]
    return reports


def write_reports_csv(path: Path, reports: Mapping[str, str]) -> None:
    """Write reports by id as `id,report`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "report"])
        writer.writerows(reports.items())


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
    if start is None and tokenizer is not None:
        raise ValueError(
            f"tokenizer {tokenizer!r} without a start; from random weights the vocabulary is learned from the reports"
        )
    if start is not None and size is not None:
        raise ValueError(
            f"size {size!r} with the start {start}; the start has a size of its own, leave one of the two out"
        )
    size = size or "small"
    if size not in SIZES:
        raise ValueError(f"size {size!r}; allowed are {', '.join(SIZES)}")
    if passes is not None and passes < 1:
        raise ValueError(f"passes {passes}; at least 1 is needed")
    started = time.monotonic()
    texts, classes = _join(Path(reports), Path(labels))
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

        def run_of(learner: CheXbert, taught_by: Sequence[CheXbert] = ()) -> _Run:
            return _Run(
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
                for _ in run_of(teacher).each_pass(rng=rng, passes=passes, seconds=None, bar=bar):
                    pass  # a teacher stays as the last pass leaves it
                teachers.append(teacher)
            bar.begin("training the labeler")
            seconds = None if max_minutes is None else 60 * max_minutes - (time.monotonic() - started)
            curve, best = run_of(model, teachers).fit(
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
    (Path(output) / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
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


def kept_pass(micro_f1: Sequence[float], positives: int) -> int:
    """Which pass is kept: the last whose micro-F1 is within one standard error of the best.

    Between passes nearer than that, a few hundred held-out reports choose by luck, and the later pass is the better: it
    has learned more, at a lower rate. Of one training on IU X-Ray the best on 158 held-out reports was pass 11 of 64,
    which reads 788 others at a micro-F1 of 0.774; the last pass reads them at 0.823.

    Args:
        micro_f1: of the positives, on the held-out reports, after each pass.
        positives: in the held-out labels; the standard error is that of a share of them.

    Returns:
        A position in `micro_f1`. An earlier pass that was left is never returned to, so one copy of the weights is
        enough.

    Source: the one-standard-error rule, Hastie et al., The Elements of Statistical Learning, section 7.10.
    """
    best = max(micro_f1)
    error = math.sqrt(best * (1 - best) / max(positives, 1))
    return max(index for index, score in enumerate(micro_f1) if score >= best - error)


class _Run:
    """One training: the encoded reports, the model, its teachers and its optimiser."""

    def __init__(
        self,
        labeler: Labeler,
        special: SpecialIds,
        texts: Sequence[str],
        classes: NDArray[np.int64],
        regime: Regime,
        teachers: Sequence[CheXbert] = (),
    ) -> None:
        self.labeler = labeler
        self.model = labeler.model
        self.teachers = teachers
        self.special = special
        self.classes = classes
        self.augmentation = regime.augmentation
        # encoded by sentences: the same ids as of the whole, since the pieces of a word never cross white space
        self.sentences = [[row[1:-1] for row in labeler.encode(_SENTENCE_END.split(text))] for text in texts]
        self.peak_rate = regime.peak_rate
        decayed = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Linear)}
        groups = [
            {"params": [p for p in self.model.parameters() if id(p) in decayed], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=self.peak_rate, betas=(0.9, 0.98), fused=True)

    def each_pass(self, *, rng: random.Random, passes: int, seconds: float | None, bar: TrainingBar) -> Iterator[float]:
        """Train; yields after each pass its mean loss."""
        began = time.monotonic()
        read, done = 0, 0.0
        while done < 1.0:
            losses = []
            for examples in one_pass(
                self.sentences,
                self.classes,
                self.augmentation,
                self.special,
                batch=BATCH,
                longest=self.labeler.max_tokens,
                rng=rng,
            ):
                losses.append(self._update(examples, rate=self.peak_rate * _rate(done)))
                read += sum(example.reports for example in examples)
                spent = 0.0 if seconds is None else (time.monotonic() - began) / max(seconds, 1e-9)
                done = max(read / (passes * len(self.sentences)), spent)
                bar.update(done)
                if done >= 1.0:
                    break
            yield float(torch.stack(losses).mean())

    def fit(
        self,
        texts: Sequence[str],
        classes: NDArray[np.int64],
        *,
        rng: random.Random,
        passes: int,
        seconds: float | None,
        bar: TrainingBar,
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Train, and leave the model at the pass that the held-out `texts` choose. Returns the curve and that pass's
        entry.
        """
        curve: list[dict[str, float]] = []
        kept, kept_state = 0, {}
        positives = int((classes == POSITIVE).sum())
        for loss in self.each_pass(rng=rng, passes=passes, seconds=seconds, bar=bar):
            curve.append({"pass": len(curve) + 1, "training_loss": loss, **self._validate(texts, classes)})
            if kept_pass([entry["micro_f1"] for entry in curve], positives) == len(curve) - 1:
                kept = len(curve) - 1
                kept_state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            bar.describe(f"training the labeler (held-out micro-F1 {curve[kept]['micro_f1']:.3f})")
        self.model.load_state_dict(kept_state)
        self.model.eval()
        return curve, curve[kept]

    def _update(self, examples: Sequence[Example], rate: float) -> Tensor:
        """One step; returns the loss, summed over the observations and averaged over the examples."""
        self.model.train()
        ids, mask = self.labeler.pad([example.ids for example in examples])
        classes = torch.from_numpy(np.stack([example.classes for example in examples])).to(ids.device)
        logits = self.model(ids, mask)
        if self.teachers:
            answer = average_answer(
                self.teachers, [example.ids for example in examples], pad=self.special.pad, device=ids.device
            )
            loss = taught_loss(logits, classes, answer)
        else:
            loss = _loss(logits, classes)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return loss.detach()

    def _validate(self, texts: Sequence[str], classes: NDArray[np.int64]) -> dict[str, float]:
        self.model.eval()
        logits = self.labeler.logits(texts)
        predicted = logits.argmax(dim=-1).numpy()
        said, true = predicted == POSITIVE, classes == POSITIVE
        return {
            "validation_loss": float(_loss(logits, torch.from_numpy(classes))),
            "micro_f1": float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1)),
            "classes_right": float((predicted == classes).mean()),
        }


def _loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum of the 14 cross-entropies, averaged over the reports, of logits [N, 14, 4] and classes [N, 14]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="sum") / len(classes)


def _rate(done: float) -> float:
    """The learning rate's share of its peak at a share of the training: a rise over the first tenth, then a straight
    fall to zero.
    """
    return min((done + 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))


def _join(reports: Path, labels: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and [N, 14] classes in the order of `reports`; every id must stand in both files."""
    texts, classes = read_reports_csv(reports), read_labels_csv(labels)
    for ids, path, others, other_path in ((texts, reports, classes, labels), (classes, labels, texts, reports)):
        lonely = [study_id for study_id in ids if study_id not in others]
        if lonely:
            raise ValueError(
                f"{path}, line {_line_of(path, lonely[0])}: id {lonely[0]!r} is not in {other_path} ({len(lonely)} "
                "such ids); every report needs its labels and every row of labels its report"
            )
    for study_id, text in texts.items():
        if not text.strip():
            raise ValueError(
                f"{reports}, line {_line_of(reports, study_id)}: the report of id {study_id!r} is empty; leave the "
                "study out"
            )
    if len(texts) < FEWEST_REPORTS:
        raise ValueError(
            f"{reports}: {len(texts)} reports; at least {FEWEST_REPORTS} are needed to train and to hold some out"
        )
    return list(texts.values()), np.array([classes[study_id] for study_id in texts], dtype=np.int64)


def _line_of(path: Path, study_id: str) -> int:
    """The line on which the row of `study_id` ends, for an error message."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        column = next(name for name in reader.fieldnames or [] if name.strip().lower() == "id")
        return next(reader.line_num for row in reader if row[column].strip() == study_id)
