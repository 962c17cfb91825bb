"""Training studies and what was sampled of them, step by step, out of RUN/completions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrg_r1.console import progress
from mrg_r1.tracking.page.cards import card, sample
from mrg_r1.tracking.page.reading import letters, number, read_lines
from mrg_r1.types import Study

_STEPS_READ = 500  # of a longer run, steps evenly apart
_STUDIES = 300  # those sampled in most steps come first
_STEPS_SHOWN = 12  # of one study
_MEMBERS = 8  # of one group
_COMPLETION = ("step", "study", "member", "text", "report", "total", "terms", "labels")


@dataclass(frozen=True)
class Sampled:
    """Cards of training studies, and what they were chosen from."""

    cards: dict[str, dict[str, Any]]
    studies: int  # sampled in the steps that were read
    steps: int  # with completions
    steps_read: int


def read_sampled(run: Path, studies: Mapping[str, Study], references: Mapping[str, Sequence[int | None]]) -> Sampled:
    """Read RUN/completions, twice, so that memory holds no more than what is shown.

    Args:
        studies: by id, for references and radiographs.
        references: the 14 label values of references, by id; where there are none, what the manifest says of the text.

    Raises:
        ValueError: a line that cannot be read; names file and line.
    """
    files = _files(run / "completions")
    steps = _evenly(sorted(files), _STEPS_READ)
    seen: dict[str, dict[int, None]] = {}
    for step in progress(steps, "page: which studies were sampled"):
        for path in files[step]:
            for where, row in read_lines(path, _COMPLETION):
                if not isinstance(row["study"], str):
                    raise ValueError(
                        f"{where}: field `study` is {str(row['study'])[:60]!r} and not an id; mend or remove the line"
                    )
                seen.setdefault(row["study"], {})[step] = None
    shown = {study_id: set(_evenly(list(seen[study_id]), _STEPS_SHOWN)) for study_id in _chosen(seen)}
    cards: dict[str, dict[str, Any]] = {}
    for step in progress(steps, "page: what was sampled"):
        for path in files[step]:
            for where, row in read_lines(path, _COMPLETION):
                if step in shown.get(row["study"], ()) and number(row["member"], where, "member") < _MEMBERS:
                    _add(cards, where, row, studies.get(row["study"]), references)
    return Sampled(cards=cards, studies=len(seen), steps=len(files), steps_read=len(steps))


def _files(folder: Path) -> dict[int, list[Path]]:
    """The ranks' files by step."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step_*.jsonl")):
        if match := re.fullmatch(r"step_(\d+)_rank\d+\.jsonl", path.name):
            files.setdefault(int(match[1]), []).append(path)
    return files


def _chosen(seen: Mapping[str, Mapping[int, None]]) -> list[str]:
    """Studies that were sampled most often; of those sampled equally often, some from all over the training."""
    by_count: dict[int, list[str]] = {}
    for study_id, steps in seen.items():
        by_count.setdefault(len(steps), []).append(study_id)
    chosen: list[str] = []
    for count in sorted(by_count, reverse=True):
        chosen += _evenly(by_count[count], _STUDIES - len(chosen))
    return chosen


def _evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, the first and the last among them."""
    if len(items) <= most or most < 2:
        return items[: max(most, 0)]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _add(
    cards: dict[str, dict[str, Any]],
    where: str,
    row: Mapping[str, Any],
    study: Study | None,
    references: Mapping[str, Sequence[int | None]],
) -> None:
    study_id = row["study"]
    if study_id not in cards:
        cards[study_id] = card(study_id, study.report if study else None, study)
        labels = references.get(study_id) or (study.said if study else None)
        cards[study_id]["said"] = None if labels is None else letters(labels, f"reference of study {study_id!r}")
    name = f"step {int(number(row['step'], where, 'step')) + 1}"
    versions = cards[study_id]["at"]
    if not versions or versions[-1]["name"] != name:
        versions.append({"name": name, "samples": []})
    versions[-1]["samples"].append(sample(where, row, member=row["member"]))
