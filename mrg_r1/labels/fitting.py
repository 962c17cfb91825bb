"""The optimisation of one labeler: its regime, its passes over the reports, and the pass that is kept.

A model and labelled reports enter, trained weights leave in the model. `labels.training` says what it starts from.

Source: CheXbert (arXiv 2004.09167), section 3.3: the sum of the 14 cross-entropies.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mrg_r1.console import progress_bar
from mrg_r1.labels.augmentation import Augmentation, Example, SpecialIds, one_pass
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import POSITIVE
from mrg_r1.labels.teaching import average_answer, taught_loss

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


class TrainingBar:
    """One progress bar over several trainings, one after another."""

    def __init__(self, work: Sequence[float]) -> None:
        """The time that each training takes, in any unit."""
        self._work = list(work)
        self._begun = 0
        self._progress = progress_bar()
        self._task = self._progress.add_task("training the labeler", total=sum(self._work))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str) -> None:
        """The next training starts."""
        self._begun += 1
        self.describe(description)
        self.update(0.0)

    def update(self, done: float) -> None:
        """So great a share of the present training is done."""
        now = self._begun - 1
        self._progress.update(self._task, completed=sum(self._work[:now]) + min(done, 1.0) * self._work[now])

    def describe(self, description: str) -> None:
        self._progress.update(self._task, description=description)


class Fitting:
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
            loss = label_loss(logits, classes)
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
            "validation_loss": float(label_loss(logits, torch.from_numpy(classes))),
            "micro_f1": float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1)),
            "classes_right": float((predicted == classes).mean()),
        }


def label_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum of the 14 cross-entropies, averaged over the reports, of logits [N, 14, 4] and classes [N, 14]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="sum") / len(classes)


def _rate(done: float) -> float:
    """The learning rate's share of its peak at a share of the training: a rise over the first tenth, then a straight
    fall to zero.
    """
    return min((done + 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))
