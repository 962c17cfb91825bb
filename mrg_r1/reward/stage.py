"""From texts to rewards, one batch: grammar, labels, terms, total (spec section 2).

Completions and references enter as texts, `Rewards` leave. One call of the labeler a batch, over texts that differ. Whatever
goes wrong raises `RewardError` with the studies' names: a reward that fails must stop the run, never become a zero (trap 22).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION, OBSERVATIONS, signed_vector
from mrg_r1.report_format import Mode, Style, format_score, parse
from mrg_r1.reward import terms
from mrg_r1.types import Rewards

Normalise = Literal["total", "per_term"]

DEFAULT_WEIGHTS: Mapping[str, float] = {"mccs": 0.75, "format": 0.25}  # arXiv 2512.16145
DEFAULT_MARGIN = 0.5  # ours: spec section 2, the reward card
TERM_NAMES: tuple[str, ...] = ("mccs", "ccs", "ce_f1", "bleu4", "rouge_l", "length", "format")  # and any `module:function`

_CLASS_COUNTS = np.array(CLASSES_PER_OBSERVATION)


class RewardError(RuntimeError):
    """A reward could not be made. The message names the term (or the labeler) and the studies."""


class Labeler(Protocol):
    """What the stage needs of a labeler; `mrg_r1.labels.chexbert.Labeler` is one."""

    def label(self, texts: list[str]) -> NDArray[np.int64]:
        """[N, 14] classes of N texts."""


class RewardStage:
    """Scores batches of completions.

    Args:
        labeler: reads the 14 classes out of texts.
        weights: term -> weight. Names from TERM_NAMES or `module:function` (`terms.load_callable`). A term of weight 0 is
            computed and logged but does not count.
        margin: m of `mccs`, 0 <= m < 1.
        format_style: of the `format` term, `binary` or `graded`.
        mode: what the prompt asks for, `think` or `plain`.
        normalise: `total`, the weighted sum is normalised in its group; `per_term`, each term is, then they are summed. `total`
            of `score` is the weighted sum either way; the trainer reads this when it makes the advantages.

    Raises:
        ValueError: no terms, an unknown term, a weight that is not finite, weights that are all 0, or another argument out of
            its range.
    """

    def __init__(
        self,
        labeler: Labeler,
        *,
        weights: Mapping[str, float] = DEFAULT_WEIGHTS,
        margin: float = DEFAULT_MARGIN,
        format_style: Style = "binary",
        mode: Mode = "think",
        normalise: Normalise = "total",
    ) -> None:
        for name, value, allowed in (
            ("format_style", format_style, ("binary", "graded")),
            ("mode", mode, ("think", "plain")),
            ("normalise", normalise, ("total", "per_term")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}; allowed are {allowed}")
        if not 0 <= margin < 1:
            raise ValueError(f"margin {margin}; expected 0 <= margin < 1")
        for name, weight in weights.items():
            if name not in TERM_NAMES and ":" not in name:
                raise ValueError(f"reward term {name!r} is unknown; allowed are {TERM_NAMES} and 'module:function'")
            if not math.isfinite(weight):
                raise ValueError(f"reward term {name!r}: weight {weight}; expected a finite number")
        if not any(weights.values()):
            raise ValueError(f"reward weights {dict(weights)}: no term counts; give at least one a weight other than 0")
        self.labeler = labeler
        self.weights = dict(weights)
        self.margin = margin
        self.format_style: Style = format_style
        self.mode: Mode = mode
        self.normalise: Normalise = normalise
        self._custom = {name: terms.load_callable(name) for name in weights if ":" in name}
        self._reference_classes: dict[str, NDArray[np.int8]] = {}  # text -> [14]: references come back every epoch

    def score(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        references: Sequence[str],
        reference_labels: NDArray[np.int64] | None = None,
        *,
        study_ids: Sequence[str] | None = None,
    ) -> Rewards:
        """Rewards of B groups of G completions.

        A completion without a well-formed report is not labelled and earns 0 in every clinical and lexical term; `format` and
        the user's own terms judge it themselves.

        Args:
            texts: B groups of G decoded completions.
            ended: [B, G] bool, an EOS was sampled.
            references: B texts of the radiologists.
            reference_labels: [B, 14] classes of the references, when they are known; None lets the labeler read them (once a text).
            study_ids: B names for error messages; None numbers the studies.

        Returns:
            `Rewards` on the CPU; `labels` -1 in rows that were not labelled.

        Raises:
            RewardError: the labeler or a term fails or answers with something that is not finite; names it and the studies.
            ValueError: shapes that disagree.
        """
        groups, members = _checked_shape(texts, ended, references, reference_labels, study_ids)
        ids = list(study_ids) if study_ids is not None else [f"number {b}" for b in range(groups)]

        parsed = [parse(text, self.mode) for group in texts for text in group]  # N = B * G, row-major
        reports = [one.report for one in parsed]
        labels, per_study = self._label(reports, list(references), reference_labels, ids)
        row_references = [reference for reference in references for _ in range(members)]
        row_labels = np.repeat(per_study, members, axis=0)  # [N, 14]
        ends = ended.flatten().tolist()
        format_scores = [format_score(one, self.format_style, ended=end) for one, end in zip(parsed, ends, strict=True)]
        formats = np.array(format_scores, dtype=np.float32)

        scored: dict[str, Tensor] = {}
        total = torch.zeros(groups, members, dtype=torch.float64)
        for name, weight in self.weights.items():
            try:
                values = formats if name == "format" else self._term(name, reports, row_references, labels, row_labels)
            except Exception as error:
                raise RewardError(f"reward term {name!r} failed on studies {_shortened(ids)}: {type(error).__name__}: {error}") from error
            if not np.isfinite(values).all():
                at = [f"{ids[row // members]} (member {row % members}: {values[row]})" for row in np.flatnonzero(~np.isfinite(values))]
                raise RewardError(f"reward term {name!r} is not finite for studies {_shortened(at)}; a term must be a finite number")
            scored[name] = torch.from_numpy(values).reshape(groups, members)
            total += weight * scored[name].double()
        return Rewards(
            total=total.float(),
            terms=scored,
            weights=dict(self.weights),
            labels=torch.from_numpy(labels).reshape(groups, members, len(OBSERVATIONS)),
            report_texts=[reports[b * members : (b + 1) * members] for b in range(groups)],
            reference_labels=torch.from_numpy(per_study),
        )

    def _label(
        self, reports: list[str | None], references: list[str], reference_labels: NDArray[np.int64] | None, ids: list[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Classes of the reports [N, 14] (-1 where None) and of the references [B, 14], by one call over distinct texts."""
        known = self._reference_classes
        wanted_references = [] if reference_labels is not None else [text for text in references if text not in known]
        wanted = list(dict.fromkeys([*(report for report in reports if report is not None), *wanted_references]))
        classes: NDArray[np.int64] = np.empty((0, len(OBSERVATIONS)), dtype=np.int64)
        if wanted:
            try:
                classes = np.asarray(self.labeler.label(wanted))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise RewardError(f"the labeler failed on the reports of studies {_shortened(ids)}: {what}") from error
            problem = _problem_of(classes, len(wanted))
            if problem:
                raise RewardError(f"the labeler returned {problem} for the reports of studies {_shortened(ids)}")
        row_of = {text: row for row, text in enumerate(wanted)}
        for text in wanted_references:
            known[text] = classes[row_of[text]].astype(np.int8)

        labels = np.full((len(reports), len(OBSERVATIONS)), -1, dtype=np.int64)
        for row, report in enumerate(reports):
            if report is not None:
                labels[row] = classes[row_of[report]]
        if reference_labels is not None:
            return labels, np.array(reference_labels, dtype=np.int64)
        return labels, np.stack([known[text] for text in references]).astype(np.int64)

    def _term(
        self, name: str, reports: list[str | None], references: list[str], labels: NDArray[np.int64], reference_labels: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """[N] float32; rows without a report are 0 for the terms of this package."""
        if name in self._custom:
            return self._custom[name](list(reports), list(references), labels.copy(), reference_labels.copy())
        rows = [row for row, report in enumerate(reports) if report is not None]
        texts = [report for report in reports if report is not None]
        text_references = [references[row] for row in rows]
        generated, reference = labels[rows], reference_labels[rows]
        values = np.zeros(len(reports), dtype=np.float32)
        match name:
            case "ccs":
                values[rows] = terms.ccs(signed_vector(generated), signed_vector(reference))
            case "mccs":
                values[rows] = terms.mccs(terms.ccs(signed_vector(generated), signed_vector(reference)), self.margin)
            case "ce_f1":
                values[rows] = terms.ce_f1(generated, reference)
            case "bleu4":
                values[rows] = terms.bleu4(texts, text_references)
            case "rouge_l":
                values[rows] = terms.rouge_l(texts, text_references)
            case "length":
                values[rows] = terms.length(texts, text_references)
            case _:
                raise ValueError(f"no such term; allowed are {TERM_NAMES} and 'module:function'")
        return values


def _checked_shape(
    texts: Sequence[Sequence[str]],
    ended: Tensor,
    references: Sequence[str],
    reference_labels: NDArray[np.int64] | None,
    study_ids: Sequence[str] | None,
) -> tuple[int, int]:
    groups = len(texts)
    sizes = {len(group) for group in texts}
    if len(sizes) != 1:
        raise ValueError(f"groups of {sorted(sizes)} completions; every study needs the same number, and at least one study")
    members = sizes.pop()
    if tuple(ended.shape) != (groups, members):
        raise ValueError(f"ended of shape {tuple(ended.shape)}; expected {(groups, members)} as the texts")
    if len(references) != groups:
        raise ValueError(f"{len(references)} references for {groups} studies")
    if study_ids is not None and len(study_ids) != groups:
        raise ValueError(f"{len(study_ids)} study ids for {groups} studies")
    if reference_labels is not None:
        problem = _problem_of(np.asarray(reference_labels), groups)
        if problem:
            raise ValueError(f"reference_labels: {problem}")
    return groups, members


def _problem_of(classes: NDArray[np.int64], expected: int) -> str | None:
    """What is wrong with [expected, 14] classes, or None."""
    if classes.shape != (expected, len(OBSERVATIONS)):
        return f"shape {classes.shape} instead of {(expected, len(OBSERVATIONS))}"
    if not np.issubdtype(classes.dtype, np.integer):
        return f"dtype {classes.dtype} instead of integer classes"
    outside = np.argwhere((classes < 0) | (classes >= _CLASS_COUNTS))
    if len(outside):
        row, column = outside[0]
        return f"class {classes[row, column]} for {OBSERVATIONS[column]} (text {row}), which has classes 0 to {_CLASS_COUNTS[column] - 1}"
    return None


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
