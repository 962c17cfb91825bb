"""Reports without references: what a policy writes of studies, taken apart and read by a labeler, for people and as
JSON.

Nothing is scored here, so nothing needs a reference; `evaluate` is what compares. The prompt, the decoding and the
parsing are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mrg_r1.console import progress
from mrg_r1.data.loader import PromptBuilder, prompts_ahead
from mrg_r1.engine.ranks import Ranks, shard
from mrg_r1.labels.observations import OBSERVATIONS, values_of_classes
from mrg_r1.policy.policy import Policy
from mrg_r1.report_format import Mode, parse
from mrg_r1.rollout.decode import greedy, rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.types import Completions, Prompts, Study

NOT_FOR_CLINICAL_USE = "Not for clinical use: written by a model under research, read by no radiologist."
_WORDS: dict[int | None, Text] = {
    1: Text("positive", style="bold red"),
    0: Text("negative", style="green"),
    -1: Text("uncertain", style="yellow"),
}
_LABELLED_AT_ONCE = 256

Row = dict[str, Any]
RowsOf = Callable[[list[Study], Prompts, Completions], list[Row]]
Label = Callable[[Sequence[str]], NDArray[Any]]  # N texts -> [N, 14] classes


@torch.no_grad()
def greedy_rows(
    policy: Policy,
    studies: Sequence[Study],
    rows_of: RowsOf,
    *,
    build: PromptBuilder,
    max_new_tokens: int,
    batch_size: int,
    ranks: Ranks,
    title: str,
) -> list[Row]:
    """One greedy report a study, spread over the ranks. All ranks call it, and all get a row a study, in the order of
    `studies`.

    Args:
        rows_of: a batch of studies, their prompts and completions [B, 1, C] to one row (plain Python values) a study,
            `id` among them.
        batch_size: studies decoded together on each rank.
        title: of the bar, and of what the ranks are at.
    """
    mine = shard(studies, ranks)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rows: list[Row] = []
    with policy.whole_decoder(images=True):  # ranks have unequal numbers of batches
        shown = progress(batches, title, quiet=not ranks.is_main)
        for batch, prompts in zip(shown, prompts_ahead(build, batches), strict=True):
            ranks.beat(title)
            prompts = prompts.to(policy.device)
            completions = greedy(policy, prompts, policy.encode_images(prompts), max_new_tokens=max_new_tokens)
            rows += rows_of(batch, prompts, completions)
    by_id = {row["id"]: row for part in ranks.gather(rows) for row in part}
    return [by_id[study.id] for study in studies]


def reports_of(
    policy: Policy,
    studies: Sequence[Study],
    *,
    build: PromptBuilder,
    mode: Mode,
    max_new_tokens: int,
    batch_size: int,
    ranks: Ranks,
    title: str = "writing reports",
) -> list[Row]:
    """One greedy report a study, spread over the ranks, not yet labelled.

    All ranks call it, and all get the rows in the order of `studies`: id, text, report, think, labels (None),
    truncated, malformed.
    """

    def taken_apart(batch: list[Study], prompts: Prompts, completions: Completions) -> list[Row]:
        return [{"id": study.id} | row[0] for study, row in zip(batch, _rows(completions, mode), strict=True)]

    return greedy_rows(
        policy,
        studies,
        taken_apart,
        build=build,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        ranks=ranks,
        title=title,
    )


@torch.no_grad()
def reports_of_one(
    policy: Policy,
    study: Study,
    *,
    build: PromptBuilder,
    mode: Mode,
    max_new_tokens: int,
    samples: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """The greedy report of one study, or `samples` of them from the distribution that training samples, at the policy's
    temperature.

    Args:
        seed: of the samples, which are keyed by it, the study's id and their number.
    """
    prompts = build([study]).to(policy.device)
    vision = policy.encode_images(prompts)
    if samples is None:
        completions = greedy(policy, prompts, vision, max_new_tokens=max_new_tokens)
    else:
        completions = rollout(policy, prompts, vision, Sampling(samples, max_new_tokens, seed=seed, step=0))
    return _rows(completions, mode)[0]


def _rows(completions: Completions, mode: Mode) -> list[list[Row]]:
    """Completions [B, G] taken apart: the text as it was decoded, report and think text in it, and what is wrong with
    it.
    """
    answer = []
    for b, texts in enumerate(completions.texts):
        parsed = [parse(text, mode) for text in texts]
        answer.append(
            [
                {
                    "text": text,
                    "report": parts.report,
                    "think": parts.think,
                    "labels": None,
                    "truncated": not bool(completions.ended[b, g]),
                    "malformed": parts.report is None,
                }
                for g, (text, parts) in enumerate(zip(texts, parsed, strict=True))
            ]
        )
    return answer


def add_labels(rows: Sequence[Row], label: Label, *, beat: Callable[[str], None] = lambda doing: None) -> None:
    """Put the labeler's reading into every row that has a report: 14 values in CheXbert's order. A malformed one says
    nothing, so null.
    """
    written = [row for row in rows if row["report"] is not None]
    for batch in _shown(
        [written[start : start + _LABELLED_AT_ONCE] for start in range(0, len(written), _LABELLED_AT_ONCE)]
    ):
        beat("the labeler reads")
        for row, classes in zip(batch, label([row["report"] for row in batch]), strict=True):
            row["labels"] = values_of_classes(classes.tolist())


def _shown(batches: list[list[Row]]) -> Iterator[list[Row]]:
    yield from progress(batches, "the labeler reads", quiet=len(batches) < 2)


def shown_report(row: Row, *, title: str, mode: Mode, labeler: str | None) -> Group:
    """One row for the terminal: what was written, what is wrong with it, and the findings that the labeler reads in it.

    Args:
        labeler: its name; None where nothing was labelled.
    """
    parts: list[Text | Table] = [Text(title, style="bold")]
    if row["truncated"]:
        parts.append(Text("truncated: it did not end within rollout.max_new_tokens", style="bold yellow"))
    if row["malformed"]:
        parts.append(
            Text(
                "malformed: no report can be read in it, so nothing is labelled; all that was written:",
                style="bold yellow",
            )
        )
        parts.append(Text(row["text"] or "(nothing)"))
        return Group(*parts)
    if row["think"] is not None:
        parts += [Text("think", style="bold dim"), Text(row["think"], style="dim"), Text("report", style="bold dim")]
    elif mode == "think":
        parts.append(Text("it has no well-formed think block; its report:", style="bold yellow"))
    parts.append(Text(row["report"]))
    if labeler is not None:
        parts.append(_findings(row["labels"], labeler))
    return Group(*parts)


def _findings(labels: Sequence[int | None], labeler: str) -> Table | Text:
    named = [(name, value) for name, value in zip(OBSERVATIONS, labels, strict=True) if value is not None]
    if not named:
        return Text(f"no finding in it, neither as present nor as absent ({labeler})", style="italic")
    table = Table(title=f"findings in it ({labeler})", title_justify="left")
    table.add_column("observation", no_wrap=True)
    table.add_column("said to be", no_wrap=True)
    for name, value in named:
        table.add_row(name, _WORDS[value])
    return table
