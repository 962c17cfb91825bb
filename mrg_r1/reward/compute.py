"""From texts to rewards, one batch: grammar, labels, terms, total (docs/method.md §2).

Completions and references enter as texts, `Rewards` leave. One call of the labeler a batch, over texts that it has not
read yet. Whatever goes wrong raises `RewardError` with the studies' names: a reward that fails must stop the run, never
become a zero (docs/traps.md #22).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.sentences import sentences
from mrg_r1.metrics.wording import contradictions
from mrg_r1.report_format import Mode, Style, format_score, parse
from mrg_r1.reward import terms
from mrg_r1.reward.outside import OutsideSettings, is_own, open_terms
from mrg_r1.reward.reading import Labeler, LabelError, Reader, problem_of
from mrg_r1.types import Rewards

Normalise = Literal["total", "per_term"]

DEFAULT_WEIGHTS: Mapping[str, float] = {"mccs": 0.75, "format": 0.25}  # arXiv 2512.16145
DEFAULT_MARGIN = 0.5  # ours: docs/method.md §2, the reward card


class RewardError(RuntimeError):
    """A reward could not be made. The message names the term (or the labeler) and the studies."""


class NotFiniteError(RewardError):
    """A term answered with NaN or an infinity; the message names it and the studies."""


@dataclass(frozen=True)
class RewardContext:
    """How one batch is to be rewarded, beyond what the function was built with.

    Attributes:
        reference_labels: [B, 14] classes of the references where they are known; None lets the labeler read them.
        margin: m of `mccs` at this step; None takes the function's.
        ccs_weights: [13, 2] of `terms.ccs`, for `ccs` and `mccs`; None: equal.
        thresholds: [13] of `additive`; needed where that is a term.
        constant: a report that is given to every study beside the completions, to see what can be earned without
            looking.
        contradictions: read every report sentence by sentence too, as is done wherever the term `contradiction` has a
            weight, if only 0.
    """

    reference_labels: NDArray[np.int64] | None = None
    margin: float | None = None
    ccs_weights: NDArray[np.float64] | None = None
    constant: str | None = None
    thresholds: NDArray[np.float64] | None = None
    contradictions: bool = False


class RewardFunction:
    """Scores batches of completions.

    Args:
        labeler: reads the 14 classes out of texts.
        weights: term -> weight. Names from `terms.BUILT_IN`, `module:function` (`terms.load_callable`), or of others
            (`outside`). A term of weight 0 is computed and logged but does not count.
        margin: m of `mccs`, 0 <= m < 1.
        format_style: of the `format` term, `binary` or `graded`.
        mode: what the prompt asks for, `think` or `plain`.
        normalise: `total`, the weighted sum is normalised in its group; `per_term`, each term is, then they are summed.
            `total` of `score` is the weighted sum either way; the trainer reads this when it makes the advantages.
        outside: how others are asked that score terms, as OutsideSettings or what JSON has made of them.

    Attributes:
        workers: RadEval's processes; None without a term of theirs.

    Raises:
        ValueError: others that cannot be asked, no terms, an unknown term, a weight that is not finite, weights that
            are all 0, or another argument out of its range.
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
        outside: OutsideSettings | Mapping[str, Any] = OutsideSettings(),  # noqa: B008 (frozen)
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
        terms.require_known(weights)
        terms.require_signs(weights)
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"reward term {name!r}: weight {weight}; expected a finite number")
        if not any(weights.values()):
            raise ValueError(f"reward weights {dict(weights)}: no term counts; give at least one a weight other than 0")
        self.reader = Reader(labeler)
        self.weights = dict(weights)
        self.margin = margin
        self.format_style: Style = format_style
        self.mode: Mode = mode
        self.normalise: Normalise = normalise
        self._custom: dict[str, terms.CustomTerm] = {
            name: terms.load_callable(name) for name in weights if is_own(name)
        }
        settings = outside if isinstance(outside, OutsideSettings) else OutsideSettings.of(outside)
        others, self.workers = open_terms(list(weights), settings)
        self._custom |= others

    def score(
        self,
        texts: Sequence[Sequence[str]],
        ended: Tensor,
        references: Sequence[str | None],
        context: RewardContext = RewardContext(),  # noqa: B008 (frozen)
        *,
        study_ids: Sequence[str] | None = None,
    ) -> Rewards:
        """Rewards of B groups of G completions.

        A completion without a well-formed report is not labelled and earns 0 in every clinical and lexical term;
        `format` and the user's own terms score it themselves.

        Args:
            texts: B groups of G decoded completions.
            ended: [B, G] bool, an EOS was sampled.
            references: B texts of the radiologists; None where a study has labels alone, which `context` then knows.
            context: this batch's margin, weights, known labels and constant report.
            study_ids: B names for error messages; None numbers the studies.

        Returns:
            `Rewards` on the CPU; `labels` -1 in rows that were not labelled.

        Raises:
            RewardError: the labeler or a term fails or answers with something that is not finite; names it and the
                studies.
            ValueError: shapes that disagree, a margin outside [0, 1), a reference that is None where its labels are not
                known or a term reads its words.
        """
        groups, members = _checked_shape(texts, ended, references, context.reference_labels, study_ids)
        ids = list(study_ids) if study_ids is not None else [f"number {b}" for b in range(groups)]
        constants = [] if context.constant is None else [context.constant]
        self._refuse_without_words(references, context, ids)
        words = [reference or "" for reference in references]

        parsed = [parse(text, self.mode) for group in texts for text in group]  # N = B * G, row-major
        reports = [one.report for one in parsed]
        labels, per_study, constant_labels, contradicted = self._label(reports, words, constants, context, ids)
        ends = ended.flatten().tolist()
        formats = [format_score(one, self.format_style, ended=end) for one, end in zip(parsed, ends, strict=True)]
        of_reports = None if contradicted is None else contradicted[: len(reports)]
        total, scored = self._score(reports, labels, formats, words, per_study, context, ids, members, of_reports)
        constant: dict[str, Tensor] = {}
        if constants:
            rows = np.repeat(constant_labels, groups, axis=0)
            of_constant = None if contradicted is None else np.repeat(contradicted[len(reports) :], groups)
            its_total, its_terms = self._score(
                constants * groups, rows, [1.0] * groups, words, per_study, context, ids, 1, of_constant
            )
            constant = {name: values.squeeze(1) for name, values in {"total": its_total, **its_terms}.items()}
        return Rewards(
            total=total,
            terms=scored,
            weights=dict(self.weights),
            labels=torch.from_numpy(labels).reshape(groups, members, len(OBSERVATIONS)),
            report_texts=[reports[b * members : (b + 1) * members] for b in range(groups)],
            reference_labels=torch.from_numpy(per_study),
            constant=constant,
            contradictions=None if of_reports is None else torch.from_numpy(of_reports).reshape(groups, members),
        )

    def _refuse_without_words(
        self, references: Sequence[str | None], context: RewardContext, ids: Sequence[str]
    ) -> None:
        """A launch has refused such studies before (`doctor.inputs`)."""
        bare = [study for study, reference in zip(ids, references, strict=True) if reference is None]
        wanting = terms.needing_words(self.weights)
        if bare and wanting:
            raise ValueError(
                f"reward terms {', '.join(wanting)} read the reference's words; studies {_shortened(bare)} have labels "
                "alone"
            )
        if bare and context.reference_labels is None:
            raise ValueError(f"studies {_shortened(bare)} have neither a reference text nor known reference labels")

    def reports_of(self, texts: Sequence[str], context: RewardContext = RewardContext()) -> list[str]:  # noqa: B008
        """The texts that the labeler will be asked to read of these completions: reports and, where contradictions
        are looked for, their sentences.
        """
        reports = [report for report in (parse(text, self.mode).report for text in texts) if report is not None]
        if self._reads_sentences(context):
            reports += [sentence for report in reports for sentence in sentences(report)]
        return reports

    def _reads_sentences(self, context: RewardContext) -> bool:
        return context.contradictions or terms.CONTRADICTION in self.weights

    def _label(
        self,
        reports: list[str | None],
        references: list[str],
        constants: list[str],
        context: RewardContext,
        ids: list[str],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
        """Classes of the reports [N, 14] (-1 where None), of the references [B, 14] and of the constant ones, and the
        contradictions of reports (-1 where None) and constant ones, where they are looked for; by one call.
        """
        reference_labels = context.reference_labels
        rows = [row for row, report in enumerate(reports) if report is not None]
        written = [report for report in reports if report is not None]
        unknown = references if reference_labels is None else []
        split = [sentences(text) for text in (*written, *constants)] if self._reads_sentences(context) else []
        said = [sentence for report in split for sentence in report]
        whole = len(written) + len(unknown) + len(constants)
        try:
            classes = self.reader.label([*written, *unknown, *constants, *said])
        except LabelError as error:
            raise RewardError(f"the reports of studies {_shortened(ids)}: {error}") from error
        labels = np.full((len(reports), len(OBSERVATIONS)), -1, dtype=np.int64)
        labels[rows] = classes[: len(rows)]
        known = (
            classes[len(rows) : len(rows) + len(unknown)]
            if reference_labels is None
            else np.array(reference_labels, dtype=np.int64)
        )
        contradicted = None
        if self._reads_sentences(context):
            found = contradictions([len(report) for report in split], classes[whole:])
            contradicted = np.full(len(reports) + len(constants), -1, dtype=np.int64)
            contradicted[[*rows, *range(len(reports), len(contradicted))]] = found
        return labels, known, classes[len(rows) + len(unknown) : whole], contradicted

    def _score(
        self,
        reports: Sequence[str | None],
        labels: NDArray[np.int64],
        formats: list[float],
        references: list[str],
        reference_labels: NDArray[np.int64],
        context: RewardContext,
        ids: list[str],
        members: int,
        contradicted: NDArray[np.int64] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and each term, [B, members] float32, of B * members reports."""
        every_row = terms.Scored(
            texts=[report or "" for report in reports],
            references=[reference for reference in references for _ in range(members)],
            labels=labels,
            reference_labels=np.repeat(reference_labels, members, axis=0),
            format=np.array(formats, dtype=np.float32),
            margin=self.margin if context.margin is None else context.margin,
            ccs_weights=context.ccs_weights,
            thresholds=context.thresholds,
            contradictions=contradicted,
        )
        scored: dict[str, Tensor] = {}
        total = torch.zeros(len(ids), members, dtype=torch.float64)
        for name, weight in self.weights.items():
            try:
                values = self._term(name, reports, every_row)
            except Exception as error:  # whatever a term can raise, the user's own among them: never a reward of zero
                raise RewardError(
                    f"reward term {name!r} failed on studies {_shortened(ids)}: {type(error).__name__}: {error}"
                ) from error
            if not np.isfinite(values).all():
                at = [
                    f"{ids[row // members]} (member {row % members}: {values[row]})"
                    for row in np.flatnonzero(~np.isfinite(values))
                ]
                raise NotFiniteError(
                    f"reward term {name!r} is not finite for studies {_shortened(at)}; a term must be a finite number"
                )
            scored[name] = torch.from_numpy(values).reshape(len(ids), members)
            total += weight * scored[name].double()
        return total.float(), scored

    def _term(self, name: str, reports: Sequence[str | None], every_row: terms.Scored) -> NDArray[np.float32]:
        """[N] float32 of one term."""
        if name in self._custom:
            return self._custom[name](
                list(reports), list(every_row.references), every_row.labels.copy(), every_row.reference_labels.copy()
            )
        term = terms.BUILT_IN[name]
        if term.scores_malformed:
            return term.score(every_row)
        rows = [row for row, report in enumerate(reports) if report is not None]
        values = np.zeros(len(reports), dtype=np.float32)
        values[rows] = term.score(
            replace(
                every_row,
                texts=[every_row.texts[row] for row in rows],
                references=[every_row.references[row] for row in rows],
                labels=every_row.labels[rows],
                reference_labels=every_row.reference_labels[rows],
                format=every_row.format[rows],
                contradictions=None if every_row.contradictions is None else every_row.contradictions[rows],
            )
        )
        return values


def _checked_shape(
    texts: Sequence[Sequence[str]],
    ended: Tensor,
    references: Sequence[str | None],
    reference_labels: NDArray[np.int64] | None,
    study_ids: Sequence[str] | None,
) -> tuple[int, int]:
    groups = len(texts)
    sizes = {len(group) for group in texts}
    if len(sizes) != 1:
        raise ValueError(
            f"groups of {sorted(sizes)} completions; every study needs the same number, and at least one study"
        )
    members = sizes.pop()
    if tuple(ended.shape) != (groups, members):
        raise ValueError(f"ended of shape {tuple(ended.shape)}; expected {(groups, members)} as the texts")
    if len(references) != groups:
        raise ValueError(f"{len(references)} references for {groups} studies")
    if study_ids is not None and len(study_ids) != groups:
        raise ValueError(f"{len(study_ids)} study ids for {groups} studies")
    if reference_labels is not None:
        problem = problem_of(np.asarray(reference_labels), groups)
        if problem:
            raise ValueError(f"reference_labels: {problem}")
    return groups, members


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
