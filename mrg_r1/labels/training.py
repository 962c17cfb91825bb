"""Training a labeler: a CSV of reports and a CSV of their labels enter, a directory that `Labeler.load` reads leaves.

CheXbert's architecture at a size that a CPU trains in minutes, from scratch, with a vocabulary of its own: for tests, for
phantoms, and for reports in other languages than the published labeler's.

Source: CheXbert (arXiv 2004.09167), section 3.3: the sum of the 14 cross-entropies.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import random
import re
import string
import sys
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
from rich.progress import Progress
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import BertConfig

from mrg_r1.labels.chexbert import MAX_TOKENS, SPECIAL_TOKENS, CheXbert, Labeler, bert_tokenizer, special_id
from mrg_r1.labels.observations import OBSERVATIONS, POSITIVE, read_labels_csv

VALIDATION_SHARE = 0.1
FEWEST_REPORTS = 20
BATCH = 16  # reports a step
PASSES = 11  # over the training reports, at least
FEWEST_STEPS = 800  # small files are passed over more often
PEAK_RATE = 2e-3
WARM_UP = 0.1  # share of the training
WEIGHT_DECAY = 0.01
# What is done to a report in training; without it a model from scratch learns sentences by heart and fails on other wording.
SHUFFLED = 0.5  # share of the reports whose sentences are put in another order: what a report says does not depend on it
MASKED = 0.03  # share of the tokens replaced by [MASK]
SPREAD = 0.2  # share of the tokens with one or two [UNK] put before them: "no" and its noun stand at many distances
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class LabelerSize:
    """BERT's sizes; the feed-forward width is twice `hidden`, which reads as well as BERT's four times and takes two thirds of the time."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int  # learned pieces at most, besides the characters; a small corpus has fewer


SIZES: dict[str, LabelerSize] = {
    "tiny": LabelerSize(layers=2, hidden=64, heads=4, vocabulary=2000),
    "small": LabelerSize(layers=2, hidden=128, heads=8, vocabulary=4000),
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
            if None in row.values():
                raise ValueError(f"{where}, id {study_id!r}: the row ends before its last column")
            if None in row:
                raise ValueError(f"{where}, id {study_id!r}: more fields than columns; a report with a comma stands in quotes")
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
    return bert_tokenizer(models.WordPiece(tokenizer.get_vocab(with_added_tokens=False), unk_token="[UNK]"))


def train_labeler(
    reports: Path,
    labels: Path,
    output: Path,
    *,
    seed: int = 0,
    size: str = "small",
    passes: int | None = None,
    max_minutes: float | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a labeler from scratch and write it, with training.json beside it.

    A tenth of the reports, drawn by `seed`, is held out; the pass with the best micro-F1 of positives on it is kept (the lower loss
    decides between equals). On a CPU the same seed, files and number of threads give the same weights unless `max_minutes` cuts in.

    Args:
        reports: CSV `id,report`.
        labels: CSV `id` and the 14 observations; joined with `reports` on `id`, both ways without remainder.
        output: directory for config.json, model.safetensors, the tokenizer and training.json.
        seed: of the split, the first weights, the order, the augmentation and the dropout.
        size: a name of `SIZES`.
        passes: over the training reports; None: `PASSES`, or more where these are fewer than `FEWEST_STEPS` updates.
        max_minutes: the learning rate decays to zero within this time where it is shorter than the passes.
        device: where to train.

    Returns:
        What training.json holds: the data's and the model's sizes, the curve over the passes, the kept pass's scores on the held-out
        reports (micro-F1, share of classes right, precision, recall, F1 and support by observation) and the versions.

    Raises:
        ValueError: an unknown size, a bad row, an id in one file only, an empty report, or fewer than `FEWEST_REPORTS`; names file
            and line.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}; allowed are {', '.join(SIZES)}")
    started = time.monotonic()
    texts, classes = _join(Path(reports), Path(labels))
    rng = random.Random(seed)
    order = rng.sample(range(len(texts)), len(texts))
    held_out = max(1, round(VALIDATION_SHARE * len(texts)))
    validation, training = order[:held_out], order[held_out:]
    training_texts, validation_texts = ([texts[row] for row in rows] for rows in (training, validation))
    tokenizer = train_tokenizer(training_texts, SIZES[size].vocabulary)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's seeds stay where they are
        torch.manual_seed(seed)
        model = CheXbert(_config(SIZES[size], tokenizer.get_vocab_size()))
        start_local(model)
        passes = passes or max(PASSES, math.ceil(FEWEST_STEPS * BATCH / len(training)))
        seconds = None if max_minutes is None else 60 * max_minutes - (time.monotonic() - started)
        run = _Run(model, tokenizer, training_texts, classes[training], rng, device)
        curve, best = run.fit(validation_texts, classes[validation], passes=passes, seconds=seconds)
    labeler = Labeler(model, tokenizer, name=Path(output).resolve().name, device=device)
    labeler.save(Path(output))
    summary = {
        "name": labeler.name,
        "fingerprint": labeler.fingerprint,
        "size": size,
        "seed": seed,
        "training_reports": len(training),
        "validation_reports": len(validation),
        "vocabulary": tokenizer.get_vocab_size(),
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


def start_local(model: CheXbert) -> None:
    """First weights with which the first layer's heads look at a token's neighbours, in place.

    A negation and its noun stand a few tokens apart anywhere in a report. BERT's random position embeddings give no notion of
    "next to", which a few thousand reports are too few to teach: on phantom reports of unseen wording six passes reach a micro-F1 of
    0.80 from random weights and of 0.94 from these. So positions start as sinusoids in the first H / heads dimensions, which the
    words leave free, and head h's query is the position o(h) away: scores peak there, sharply for the near neighbours, broadly
    (slow sinusoids only) for the far ones. Everything is trained from there on.

    Source: sinusoids and the rotation between two positions, Vaswani et al. (arXiv 1706.03762), section 3.5; starting attention
    from a convolution, ConViT (arXiv 2103.10697), section 3.
    """
    config = model.bert.config
    width = config.hidden_size // config.num_attention_heads  # dimensions of the positions, and of a head
    spread = 0.1  # of the embeddings before their layer norm, which makes it 1
    periods = torch.logspace(math.log10(4), math.log10(400), width // 2)  # in tokens
    frequencies = 2 * math.pi / periods
    angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies  # [positions, width / 2]
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.normal_(0.0, spread)[:, :width] = 0.0
        embeddings.position_embeddings.weight.zero_()
        embeddings.position_embeddings.weight[:, 0:width:2] = math.sqrt(2) * spread * angles.sin()
        embeddings.position_embeddings.weight[:, 1:width:2] = math.sqrt(2) * spread * angles.cos()
        attention = model.bert.encoder.layer[0].attention.self
        for projection in (attention.query, attention.key):
            projection.weight.normal_(0.0, 0.02)
        for head in range(config.num_attention_heads):
            offset, slowest_left_out = _GAZES[head % len(_GAZES)]
            for pair in range(width // 2):
                if periods[pair] < slowest_left_out:
                    continue
                row, column = head * width + 2 * pair, 2 * pair
                cosine, sine = math.cos(frequencies[pair] * offset), math.sin(frequencies[pair] * offset)
                attention.key.weight[row : row + 2, column : column + 2] += torch.eye(2)
                attention.query.weight[row : row + 2, column : column + 2] += torch.tensor([[cosine, sine], [-sine, cosine]])


# where each head of the first layer looks, and the period in tokens below which sinusoids are left out
_GAZES = ((-1, 0), (1, 0), (-2, 0), (2, 0), (-4, 10), (4, 10), (-6, 14), (6, 14))


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


class _Run:
    """One training: the encoded reports, the model and its optimiser."""

    def __init__(
        self, model: CheXbert, tokenizer: Tokenizer, texts: Sequence[str], classes: NDArray[np.int64], rng: random.Random, device: str
    ) -> None:
        self.labeler = Labeler(model, tokenizer, name="labeler in training", device=device)
        self.model = model
        self.rng = rng
        self.classes = torch.from_numpy(classes)
        self.cls, self.sep, self.mask, self.unknown = (
            special_id(tokenizer, token, "this labeler") for token in ("[CLS]", "[SEP]", "[MASK]", "[UNK]")
        )
        # encoded by sentences: the same ids as of the whole, since the pieces of a word never cross white space
        self.sentences = [[row[1:-1] for row in self.labeler.encode(_SENTENCE_END.split(text))] for text in texts]
        decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)

    def fit(
        self, texts: Sequence[str], classes: NDArray[np.int64], *, passes: int, seconds: float | None
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Train, and leave the model at its best pass on the held-out `texts`. Returns the curve and that pass's entry."""
        began = time.monotonic()
        steps, step, done = passes * math.ceil(len(self.sentences) / BATCH), 0, 0.0
        curve: list[dict[str, float]] = []
        best, best_state = 0, {}
        quiet = "CI" in os.environ or not sys.stderr.isatty()
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
            bar = progress.add_task("training the labeler", total=1.0)
            while done < 1.0:
                losses = []
                for rows in self._batches():
                    losses.append(self._update(rows, rate=_rate(done)))
                    step += 1
                    spent = 0.0 if seconds is None else (time.monotonic() - began) / max(seconds, 1e-9)
                    done = max(step / steps, spent)
                    progress.update(bar, completed=done)
                    if done >= 1.0:
                        break
                curve.append({"pass": len(curve) + 1, "training_loss": float(torch.stack(losses).mean()), **self._validate(texts, classes)})
                merits = [(entry["micro_f1"], -entry["validation_loss"]) for entry in curve]
                if merits.index(max(merits)) == len(curve) - 1:
                    best = len(curve) - 1
                    best_state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
                progress.update(bar, description=f"training the labeler (held-out micro-F1 {curve[best]['micro_f1']:.3f})")
        self.model.load_state_dict(best_state)
        self.model.eval()
        return curve, curve[best]

    def _batches(self) -> Iterator[list[int]]:
        """One pass in random order; a batch's reports are of like length, so that little is padding."""
        order = sorted(range(len(self.sentences)), key=lambda row: sum(map(len, self.sentences[row])) + self.rng.uniform(-8, 8))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        self.rng.shuffle(batches)
        yield from batches

    def _update(self, rows: list[int], rate: float) -> Tensor:
        """One step on the reports `rows`; returns the loss, summed over the observations and averaged over the reports."""
        self.model.train()
        ids, mask = self.labeler.pad([self._augmented(row) for row in rows])
        loss = _loss(self.model(ids, mask), self.classes[rows].to(ids.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return loss.detach()

    def _augmented(self, row: int) -> list[int]:
        sentences = list(self.sentences[row])
        if self.rng.random() < SHUFFLED:
            self.rng.shuffle(sentences)
        tokens: list[int] = []
        for token in (token for sentence in sentences for token in sentence):
            if self.rng.random() < SPREAD:
                tokens += [self.unknown] * self.rng.randint(1, 2)
            tokens.append(self.mask if self.rng.random() < MASKED else token)
        return [self.cls, *tokens[: MAX_TOKENS - 2], self.sep]

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
    """The learning rate at a share of the training: a rise over the first tenth, then a straight fall to zero."""
    return PEAK_RATE * min((done + 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))


def _config(size: LabelerSize, vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=2 * size.hidden,
        hidden_dropout_prob=0.0,  # the augmentation is enough, and learning is twice as fast; [CLS] keeps CheXbert's 0.1
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=size.hidden**-0.5,  # BERT's 0.02 is made for 768 dimensions
    )


def _join(reports: Path, labels: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and [N, 14] classes in the order of `reports`; every id must stand in both files."""
    texts, classes = read_reports_csv(reports), read_labels_csv(labels)
    for ids, path, others, other_path in ((texts, reports, classes, labels), (classes, labels, texts, reports)):
        lonely = [study_id for study_id in ids if study_id not in others]
        if lonely:
            raise ValueError(
                f"{path}, line {_line_of(path, lonely[0])}: id {lonely[0]!r} is not in {other_path} ({len(lonely)} such ids); every "
                "report needs its labels and every row of labels its report"
            )
    for study_id, text in texts.items():
        if not text.strip():
            raise ValueError(f"{reports}, line {_line_of(reports, study_id)}: the report of id {study_id!r} is empty; leave the study out")
    if len(texts) < FEWEST_REPORTS:
        raise ValueError(f"{reports}: {len(texts)} reports; at least {FEWEST_REPORTS} are needed to train and to hold some out")
    return list(texts.values()), np.array([classes[study_id] for study_id in texts], dtype=np.int64)


def _line_of(path: Path, study_id: str) -> int:
    """The line on which the row of `study_id` ends, for an error message."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        column = next(name for name in reader.fieldnames or [] if name.strip().lower() == "id")
        return next(reader.line_num for row in reader if row[column].strip() == study_id)
