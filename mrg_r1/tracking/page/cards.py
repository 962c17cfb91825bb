"""Study cards: a study's reference and what was written of it, before, during and after training, as the page's JSON.

A card is `{id, split, ref, said, drawn, images, views, at: [version]}`, a version `{name, samples: [sample]}`, one a
moment of the training; a sample `{report, think, raw, total, terms, labels, ended, tokens, member}`. Labels are 14
letters (`reading.letters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrg_r1.report_format import parse
from mrg_r1.tracking.page.embedding import size_of
from mrg_r1.tracking.page.pictures import picture
from mrg_r1.tracking.page.reading import letters, number, read_lines
from mrg_r1.types import LABELS_ONLY, Study

_LONGEST = 6000  # letters of one text on the page
_PREDICTION = ("id", "text", "report", "reference", "total", "terms", "labels", "reference_labels")


@dataclass
class Pictures:
    """The page's radiographs, each once, until `budget` bytes are spent."""

    budget: int
    data: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # files
    _index: dict[Path, int] = field(default_factory=dict)

    def add(self, study: Study) -> list[int]:
        """The places of a study's radiographs in `data`; none where there is no room left."""
        if self.budget <= 0:
            return []
        places = []
        for image in study.images:
            if image.path not in self._index:
                content = picture(image.path, study.id)
                if content is None:
                    self.unreadable.append(str(image.path))
                    continue
                self.budget -= len(content)
                self._index[image.path] = len(self.data)
                self.data.append(content)
            places.append(self._index[image.path])
        return places


def sample(where: str, row: Mapping[str, Any], *, member: int | None = None) -> dict[str, Any]:
    """One report with its labels and rewards, from a line of predictions or of completions."""
    text, report = row["text"], row["report"]
    for name, value in (("text", text), ("report", report)):
        if not isinstance(value, str) and not (name == "report" and value is None):
            raise ValueError(f"{where}: field `{name}` is {str(value)[:60]!r} and not a text; mend or remove the line")
    if not isinstance(row["terms"], dict):
        raise ValueError(
            f"{where}: field `terms` is {str(row['terms'])[:60]!r} and not an object; mend or remove the line"
        )
    parsed = parse(text, "think")
    plain = report is not None and text.strip() == report
    content: dict[str, Any] = {
        "report": None if report is None else _cut(report),
        "total": round(number(row["total"], where, "total"), 4),
        "terms": {name: round(number(value, where, f"terms.{name}"), 4) for name, value in row["terms"].items()},
        "labels": None if row["labels"] is None else letters(row["labels"], where),
    }
    if not plain and parsed.think is not None:
        content["think"] = _cut(parsed.think)
    if not plain and not all(parsed.rules.values()):
        content["raw"] = _cut(text)
    if row.get("ended") is False:
        content["ended"] = False
    if isinstance(row.get("tokens"), int):
        content["tokens"] = row["tokens"]
    if member is not None:
        content["member"] = member
    return content


def card(study_id: str, reference: str | None, study: Study | None) -> dict[str, Any]:
    """A card without labels, radiographs and versions; where the reference is labels alone, it says so."""
    if reference is None and study is not None:
        reference = LABELS_ONLY
    content: dict[str, Any] = {
        "id": study_id,
        "ref": None if reference is None else _cut(reference),
        "said": None,
        "images": [],
        "at": [],
    }
    if study is not None:
        content["split"] = study.split
        content["views"] = [image.view or "" for image in study.images]
        if study.indication:
            content["indication"] = _cut(study.indication)
        if study.drawn is not None:
            content["drawn"] = letters(study.drawn, f"study {study.id!r}")
    return content


def prediction_cards(files: Sequence[tuple[str, Path]], studies: Mapping[str, Study]) -> dict[str, dict[str, Any]]:
    """Cards of the evaluated studies, in the order of the last file.

    Args:
        files: moments of the training and their predictions, the earlier first; files need not be there.

    Raises:
        ValueError: a line that cannot be read; names file and line.
    """
    cards: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    for name, path in files:
        here = []
        for where, row in read_lines(path, _PREDICTION):
            if not isinstance(row["id"], str) or not isinstance(row["reference"], str | None):
                raise ValueError(f"{where}: fields `id` and `reference` have to be texts; mend or remove the line")
            reference = LABELS_ONLY if row["reference"] is None else row["reference"]
            own = cards.setdefault(row["id"], card(row["id"], reference, studies.get(row["id"])))
            own["said"] = letters(row["reference_labels"], where)
            own["at"].append({"name": name, "samples": [sample(where, row)]})
            here.append(row["id"])
        order = here or order
    return {study_id: cards[study_id] for study_id in dict.fromkeys([*order, *cards])}


def within(cards: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first cards that together take no more than `budget` bytes on the page."""
    kept = []
    for content in cards:
        budget -= size_of(content) + 2
        if budget < 0:
            break
        kept.append(content)
    return kept


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … [{len(text) - _LONGEST:,} more letters are left out of this page]"
