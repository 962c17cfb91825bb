"""Think and report: the grammar of a completion, its score, and the only text that may be labelled (docs/method.md §2).

A completion's text enters; the report inside it (or None), the think text and the rules it keeps leave. Think mode is
`<think>…</think><report>…</report>`; plain mode is bare text. What stands outside the report never reaches a labeler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Mode = Literal["think", "plain"]
Style = Literal["binary", "graded"]

THINK_RULES: tuple[str, ...] = (
    "one_think",
    "one_report",
    "think_first",
    "think_not_empty",
    "report_not_empty",
    "nothing_around",
)
PLAIN_RULES: tuple[str, ...] = ("report_not_empty",)  # and that it ended, which `format_score` is told

_TAG = re.compile(r"</?(?:think|report)>")


@dataclass(frozen=True)
class Parsed:
    """What a completion says, apart from the tags around it."""

    report: str | None  # stripped; None where there is no well-formed report
    think: str | None  # stripped; None in plain mode and where there is no well-formed think block
    rules: dict[str, bool]  # THINK_RULES or PLAIN_RULES -> kept


def has_tag(text: str) -> bool:
    """Whether one of the four tags of think mode stands in a text."""
    return _TAG.search(text) is not None


def parse(text: str, mode: Mode) -> Parsed:
    """Take a completion apart.

    Think mode. A block is well-formed when its opening and its closing tag each stand exactly once in the whole
    completion, in this order, with no other tag between them. The report is well-formed when its block is, when it is
    not empty, and when no think block is open where it starts: what follows an unclosed `<think>` is think text and
    must not be labelled. A missing, empty, doubled or misplaced think block otherwise costs format but not the report.
    Tags are lower case and carry no attributes; anything else is text.

    Rules of think mode (`graded` format is the share kept):
        one_think, one_report: that block is well-formed (it may be empty);
        think_first: both blocks are well-formed, the think block before the report;
        think_not_empty, report_not_empty: that block is well-formed and holds more than whitespace;
        nothing_around: at least one block is well-formed, and only whitespace stands outside the well-formed blocks.

    Plain mode. The whole completion, stripped, is the report; empty is None. Its single rule is `report_not_empty`.

    Args:
        text: the decoded completion without special tokens.
        mode: what the prompt asked for.

    Raises:
        ValueError: a mode that is neither `think` nor `plain`.
    """
    if mode == "plain":
        report = text.strip() or None
        return Parsed(report=report, think=None, rules={"report_not_empty": report is not None})
    if mode != "think":
        raise ValueError(f"mode {mode!r}; allowed are 'think' and 'plain'")

    tags = list(_TAG.finditer(text))
    think = _block(tags, "think")
    report_block = _block(tags, "report")
    think_text = text[think[0].end() : think[1].start()].strip() if think else ""
    report_text = text[report_block[0].end() : report_block[1].start()].strip() if report_block else ""
    report_in_think = report_block is not None and _follows_open_think(tags, report_block[0])

    outside = text
    for block in sorted((b for b in (think, report_block) if b), key=lambda b: b[0].start(), reverse=True):
        outside = outside[: block[0].start()] + outside[block[1].end() :]
    rules = {
        "one_think": think is not None,
        "one_report": report_block is not None,
        "think_first": think is not None and report_block is not None and think[0].start() < report_block[0].start(),
        "think_not_empty": think_text != "",
        "report_not_empty": report_text != "",
        "nothing_around": (think is not None or report_block is not None) and outside.strip() == "",
    }
    return Parsed(report=None if report_in_think else report_text or None, think=think_text or None, rules=rules)


def format_score(parsed: Parsed, style: Style, *, ended: bool) -> float:
    """The format term of the reward, in [0, 1].

    Args:
        parsed: from `parse`.
        style: `binary`, 1 when every rule is kept and 0 otherwise; `graded`, the share of the rules kept.
        ended: an EOS was sampled. In plain mode that is a rule of its own, for there only the EOS says that the report
            is whole; in think mode `</report>` says so and `ended` is not read.

    Raises:
        ValueError: a style that is neither `binary` nor `graded`.
    """
    kept = list(parsed.rules.values())
    if tuple(parsed.rules) == PLAIN_RULES:
        kept.append(bool(ended))
    if style == "binary":
        return float(all(kept))
    if style == "graded":
        return sum(kept) / len(kept)
    raise ValueError(f"format style {style!r}; allowed are 'binary' and 'graded'")


def target_text(report: str, think: str | None, mode: Mode) -> str:
    """The text that SFT teaches: what `parse` reads back as this report and this think text.

    Args:
        report: the radiologist's report.
        think: the think text; needed in think mode, not read in plain mode.
        mode: `plain` gives the report, `think` gives `<think>…</think><report>…</report>`. Both texts are stripped.

    Raises:
        ValueError: an empty report; in think mode an empty or missing think text; a text that itself contains one of
            the tags (a target that could not be read back); an unknown mode.
    """
    if mode not in ("think", "plain"):
        raise ValueError(f"mode {mode!r}; allowed are 'think' and 'plain'")
    report = _checked("report", report)
    if mode == "plain":
        return report
    return f"<think>{_checked('think', think)}</think><report>{report}</report>"


def _block(tags: list[re.Match[str]], name: str) -> tuple[re.Match[str], re.Match[str]] | None:
    """The opening and closing tag of the only `name` block; None when it is missing, doubled, or has a tag inside."""
    own = [i for i, tag in enumerate(tags) if tag.group() in (f"<{name}>", f"</{name}>")]
    if (
        len(own) != 2
        or own[1] != own[0] + 1
        or tags[own[0]].group() != f"<{name}>"
        or tags[own[1]].group() != f"</{name}>"
    ):
        return None
    return tags[own[0]], tags[own[1]]


def _follows_open_think(tags: list[re.Match[str]], opening: re.Match[str]) -> bool:
    """Whether the last think tag before `opening` is a `<think>` (tags do not nest, so the last one decides)."""
    before = [tag.group() for tag in tags if tag.start() < opening.start() and tag.group() in ("<think>", "</think>")]
    return bool(before) and before[-1] == "<think>"


def _checked(name: str, text: str | None) -> str:
    text = (text or "").strip()
    if not text:
        raise ValueError(f"{name}: empty text cannot be a target; leave the study out or give it a {name}")
    found = _TAG.search(text)
    if found:
        raise ValueError(
            f"{name}: the text contains the tag {found.group()} and could not be read back; remove it: {text[:80]!r}"
        )
    return text
