"""A radiology report's text enters, its sections leave: findings, impression, indication and comparison.

Nothing is guessed from the wording of sentences. What decides is where a heading stands and how it is written:

- at a line's start with a colon, in capitals or beginning with one (`FINDINGS:`, `Impression:`);
- alone on its line in capitals, and `Findings` and `Impression` also in small letters;
- in capitals at a line's start without a colon, where what follows is not all capitals (`FINDINGS The lungs are
  clear.`, `FINDINGS - The ...`);
- in capitals with a colon behind a sentence's end or two blanks (`... clear.  IMPRESSION: Normal.`).

A semicolon is as good as a colon, and so are an equals sign and a note in parentheses before the colon
(`IMPRESSION (PRELIMINARY):`). Marks of a text program around a heading (`**IMPRESSION:**`, `<b>IMPRESSION:</b>`,
`[IMPRESSION]`, `# IMPRESSION`) and its number (`1. IMPRESSION:`) belong to it.

A heading that is misspelt (`IMPRESION:`) opens the section that it means, where it stands with a colon or alone on its
line in capitals, and findings and an impression without a colon too. Other words in capitals with a colon or a dash, or
alone on a line (`SUMMARY:`), belong to the section that they stand in, and are named (`Report.unknown`); so are words
that stand for an impression elsewhere (`Summary:`, `OPINION Normal.`).

Headings that are merged (`FINDINGS AND IMPRESSION:`, `COMPARISON/TECHNIQUE:`) open one section, of the first of
findings, impression and the rest that is among them; findings and impression also beside words that are no heading
(`IMPRESSION AND PLAN:`). Other words with a colon (`LUNGS:`) belong to the section that
they stand in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from mrg_r1.data.prepare.headings import nearest

# heading -> section; first match wins among merged headings in the order of _RANK
_HEADINGS = {
    "findings": ("FINDINGS", "FINDING", "RADIOGRAPHIC FINDINGS", "CHEST FINDINGS"),
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS"),
    "indication": (
        *(
            "INDICATION",
            "INDICATIONS",
            "CLINICAL INDICATION",
            "CLINICAL INDICATIONS",
            "HISTORY",
            "CLINICAL HISTORY",
            "PATIENT HISTORY",
        ),
        *(
            "CLINICAL INFORMATION",
            "REASON FOR EXAM",
            "REASON FOR EXAMINATION",
            "REASON FOR THE EXAM",
            "REASON FOR THE EXAMINATION",
        ),
        *("REASON FOR STUDY", "REASON FOR THE STUDY"),
    ),
    "comparison": (
        "COMPARISON",
        "COMPARISONS",
        "COMPARISON STUDY",
        "COMPARISON STUDIES",
        "COMPARISON EXAM",
        "COMPARISON FILM",
    ),
    "technique": ("TECHNIQUE", "PROCEDURE"),
    "examination": ("EXAMINATION", "EXAM", "STUDY", "TYPE OF EXAMINATION", "TYPE OF EXAM"),
    "recommendation": ("RECOMMENDATION", "RECOMMENDATIONS"),
    "notification": ("NOTIFICATION", "NOTIFICATIONS"),
    "addendum": ("ADDENDUM", "ADDENDA"),
    "wet read": ("WET READ", "WET READ VERSION"),
}
_SECTION_OF = {heading: name for name, headings in _HEADINGS.items() for heading in headings}
_REPORTED = ("findings", "impression")
_RANK = {name: rank for rank, name in enumerate(_HEADINGS)}
# These say one thing, in one paragraph; what follows a blank line without a heading is no longer theirs.
_ONE_PARAGRAPH = ("indication", "comparison", "technique", "examination", "body")

_WORDS = "|".join(re.escape(heading).replace(r"\ ", r"\s+") for heading in sorted(_SECTION_OF, key=len, reverse=True))
_MERGED = (
    rf"(?:{_WORDS})(?:\(S\))?(?:\s*(?:[,/&]|\bAND\b)\s*(?:{_WORDS})(?:\(S\))?)*(?!\w)(?:\s*#?\s*\d+(?=\s*:|\s*$))?"
)
_COLON = r"\s*\.?\s*[:;\uff1a]"
# Marks of a text program before a heading and behind it. Brackets are where nothing but a heading is inside: a comment
# that begins with one has its text there. A tag may be a line's break.
_OPEN = r"(?:(?:[*#>]|\[(?=[^\[\]:;]*[:;]?\s*\])|</?\w+\s*/?>)\s*)*"
_CLOSE = r"(?:\s*(?:[*#]|\]|</?\w+\s*/?>))*"
# and a number or a stroke of a list, behind which only capitals are a heading: its points begin with other words
_LIST = r"(?:(?:\(?\d{1,2}[.)]|[\u2022\u2013\u2014-])\s*)?"
_LEAD = re.compile(rf"(?P<list>{_LIST}){_OPEN}")
_AT_START = re.compile(
    rf"(?P<heading>{_MERGED})(?P<marks>{_CLOSE})(?P<colon>{_COLON}|\s*=(?!=))?{_CLOSE}", re.IGNORECASE
)
_NOTE = rf"\s*\([^()]{{1,40}}\){_COLON}{_CLOSE}"
_NOTE_BEHIND = re.compile(_NOTE)
_NO_WORDS = re.compile(r"</?\w+\s*/?>|\((?!S\))[^()]*\)")  # within a heading: tags and notes
# Words that may be a heading: whether they are one, or one misspelt, is looked up.
_CAPITALS = r"[A-Z](?=[A-Z-])[A-Z0-9'\u2019]*(?:[\s,/&-]+[A-Z][A-Z0-9'\u2019]*)*(?:\(S\))?"
_SENTENCE_ENDS = r"(?:(?<=[.!?:;)\]_]\s)|(?<=\s\s)|(?<!>)(?=<\w+>))"
_WITHIN = re.compile(
    rf"{_SENTENCE_ENDS}{_LIST}{_OPEN}(?:(?P<known>{_MERGED}){_CLOSE}(?:{_NOTE}|{_COLON}|\s*=(?!=))|"
    rf"(?P<perhaps>{_CAPITALS}){_CLOSE}{_COLON}){_CLOSE}"
)
_PERHAPS = re.compile(rf"(?P<heading>{_CAPITALS}|[A-Z][a-z]+){_CLOSE}(?:(?P<colon>{_COLON}){_CLOSE}|(?=[\s.-]*$))")
_BARE = re.compile(r"(?P<heading>[A-Z]{6,})\b")
# Words that open an impression in other hospitals. Ours do not say so, and what they mean is for a person to decide.
_ELSEWHERE = r"SUMMARY|OPINION|INTERPRETATION|DIAGNOS[IE]S|RESULTS?|ASSESSMENT"
_ELSEWHERE_AT_START = re.compile(
    rf"(?P<heading>{_ELSEWHERE})\b{_CLOSE}(?P<colon>{_COLON}|\s*=|\s*[\u2013\u2014-]+\s)?", re.IGNORECASE
)
_TITLED = re.compile(
    rf"{_SENTENCE_ENDS}{_OPEN}(?P<heading>{_ELSEWHERE}|FINDINGS?|IMPRESSIONS?|CONCLUSIONS?){_CLOSE}{_COLON}",
    re.IGNORECASE,
)
_DASHED = re.compile(rf"(?P<heading>{_CAPITALS}){_CLOSE}(?:\s+[\u2013\u2014-]+\s*|[\u2013\u2014-]+\s+)(?=\S)")
# what stands between a heading in capitals without a colon and its text
_MARKS = re.compile(r"\s*[.\u2013\u2014-]*\s*(?=[A-Z0-9_(])")
_TWICE = ("FINDINGS", "IMPRESSION", "IMPRESSIONS")
_VIEW = (
    r"AP|PA|LAT(?:ERAL)?|FRONTAL|CHEST|PORTABLE|UPRIGHT|SUPINE|ERECT|SEMI-?\s?(?:UPRIGHT|ERECT)|SINGLE|ONE|TWO|[1-4]|VIEWS?|FILMS?|"
    r"RADIOGRAPHS?|X-?RAYS?|OF|THE|AND"
)
# The colon is asked for, and one of the words that make it a title: "TWO:" is none.
_VIEWS = re.compile(rf"(?:{_VIEW})(?:[\s,/&()-]+(?:{_VIEW}))*\)?")
_VIEW_TITLE = re.compile(rf"(?=[^:]*\b(?:CHEST|VIEWS?|RADIOGRAPHS?))(?:{_VIEW})(?:[\s,/&()-]+(?:{_VIEW}))*\)?\s*:")
_BANNER = re.compile(r"[\W_]*(?P<words>FINAL\s+REPORT|FINAL\s+ADDENDUM)[\W_]*")
_SEPARATOR = re.compile(r"[_=*-]{10,}")  # a de-identified word is three underscores
_FEWEST_LETTERS = 5  # of words alone on a line that may be a heading: fewer are a radiologist's initials
_ENDS = " :;.=*#]-\uff1a\u2013\u2014"  # behind a heading's words
_FEWEST_WORDS = 5  # of a text without a heading of its own: a title or a time of day has fewer


@dataclass(frozen=True)
class Section:
    """One stretch of a report. Behind one another, headings and texts are the whole report but for white space."""

    name: str  # a key of _HEADINGS, "view" (the title of a view, "PORTABLE CHEST:"), or "body" (no heading)
    heading: str  # as it is written, with its colon; also a banner or a separating line; empty where there is none
    text: str  # white space collapsed


@dataclass(frozen=True)
class Report:
    """What a report's sections say; None where there is none or it is empty. Sections of one kind are joined in their
    order.
    """

    findings: str | None
    impression: str | None
    indication: str | None
    comparison: str | None
    combined: bool  # the findings stand under FINDINGS AND IMPRESSION
    last_paragraph: str | None  # without a heading, where there are neither findings nor an impression
    misspelt: tuple[tuple[str, str], ...] = ()  # headings that are misspelt, and the sections that they opened
    unknown: tuple[str, ...] = ()  # words in capitals with a colon or alone on a line that opened none


def read_report(text: str) -> Report:
    """Read a report's sections.

    Findings and impression hold what stands under their headings and nothing else: addenda, wet reads before a FINAL
    REPORT, recommendations and notifications have sections of their own. Where no heading says FINDINGS, the text under
    the title of a view (`PORTABLE CHEST: There is ...`) is taken for it if it has at least five words. Text under
    FINDINGS AND IMPRESSION is findings.

    Args:
        text: any text.

    Returns:
        The sections; `___`, which stands for what was de-identified, is kept as it is.
    """
    sections = split_sections(text)
    titled = [section for section in sections if section.name == "view" and _is_narrative(section.text)]
    findings = _joined(sections, "findings") or _joined(titled, "view")
    impression = _joined(sections, "impression")
    last = None
    if findings is None and impression is None:
        last = next(
            (section.text for section in reversed(sections) if section.name == "body" and _is_narrative(section.text)),
            None,
        )
    return Report(
        findings=findings,
        impression=impression,
        indication=_joined(sections, "indication"),
        comparison=_joined(sections, "comparison"),
        combined=any(
            section.name == "findings" and "impression" in _sections_meant(section.heading) for section in sections
        ),
        last_paragraph=last,
        misspelt=tuple(
            (words, section.name)
            for section in sections
            if (words := _words(section.heading)) and _misspelt(words) == section.name
        ),
        unknown=tuple(_unknown_headings(text, sections)),
    )


def split_sections(text: str) -> list[Section]:
    """Cut a report at its headings, banners (FINAL REPORT, FINAL ADDENDUM), separating lines, and blank lines that end
    a section.

    Between WET READ and FINAL REPORT nothing counts as a heading: what stands there is preliminary.

    Returns:
        The sections in order. Nothing is lost: see `Section`.
    """
    lines = [line.strip() for line in text.splitlines()]
    banners = {number for number, line in enumerate(lines) if _BANNER.fullmatch(line)}
    last_report = max((number for number in banners if "REPORT" in lines[number]), default=-1)
    found: list[tuple[str, str, list[str]]] = [("body", "", [])]

    for number, line in enumerate(lines):
        name, heading, texts = found[-1]
        preliminary = name == "wet read" and number < last_report
        if number in banners:
            found.append(("addendum" if "ADDENDUM" in line else "body", line, []))
        elif _SEPARATOR.fullmatch(line):
            found.append((name, line, []))
        elif not line:
            if name in _ONE_PARAGRAPH and texts:
                found.append(("body", "", []))
        elif preliminary:
            texts.append(line)
        else:
            for opened, title, rest in _cut(line, name):
                if opened is not None:
                    found.append((opened, title, []))
                if rest.strip():
                    found[-1][2].append(rest)
    sections = [Section(name, _collapsed(heading), _collapsed(" ".join(texts))) for name, heading, texts in found]
    return [section for section in sections if section.heading or section.text]


def _cut(line: str, current: str) -> list[tuple[str | None, str, str]]:
    """A line as (section that is opened, or None for what belongs to the one before; its heading; text)."""
    start = _opening(line, current)
    pieces: list[tuple[str | None, str, str]] = []
    opened, begin, after = (start[0], 0, start[1]) if start else (None, 0, 0)
    for match in _WITHIN.finditer(line, after):
        name = _named(match["known"]) if match["known"] else _misspelt(match["perhaps"])
        if name is None:
            continue
        pieces.append((opened, line[begin:after], line[after : match.start()]))
        opened, begin, after = name, match.start(), match.end()
    pieces.append((opened, line[begin:after], line[after:]))
    return pieces


def _opening(line: str, current: str) -> tuple[str, int] | None:
    """The section that a line opens, and where its heading ends."""
    begin, listed = _marks(line)
    found = _opening_behind(line[begin:], current)
    if found is None or (listed and not _words(line[: begin + found[1]]).isupper()):
        return None
    return found[0], begin + found[1]


def _marks(line: str) -> tuple[int, bool]:
    """Where a line's first word stands, behind marks; and whether the line is a point of a list."""
    lead = _LEAD.match(line)
    return (lead.end(), bool(lead["list"])) if lead else (0, False)


def _opening_behind(line: str, current: str) -> tuple[str, int] | None:
    """The same of a line without the marks before its first word."""
    match = _AT_START.match(line)
    if (match is None or not match["colon"]) and (near := _PERHAPS.match(line)):
        name = _misspelt(near["heading"]) if near["colon"] or near["heading"].isupper() else None
        if name is not None:
            return name, near.end()
    if match is None and (bare := _BARE.match(line)) and (end := _end_without_colon(line, bare.end())):
        name = _misspelt(bare["heading"])
        if name in _REPORTED:
            return name, end
    if match is None:
        title = _VIEW_TITLE.match(line)
        # within findings or an impression such a title is a part of them
        return ("view", title.end()) if title and current not in ("findings", "impression", "addendum") else None
    heading, rest, end = match["heading"], line[match.end() :], match.end()
    note = None if match["colon"] or _named(heading) not in _REPORTED else _NOTE_BEHIND.match(line, match.end())
    if note:
        end = note.end()
    if not "".join(heading.split()).isascii():  # case-blind matching takes the Kelvin sign for a K
        return None
    capitals = heading.isupper()
    if match["colon"] or note or match["marks"]:
        opens = heading[0].isupper()
    elif not rest.strip(" .-"):
        opens = capitals or (heading[0].isupper() and _named(heading) in ("findings", "impression"))
    else:
        opens = capitals and (end := _end_without_colon(line, match.end())) > 0
    return (_named(heading), end) if opens else None


def _end_without_colon(line: str, end: int) -> int:
    """Where the text behind a heading without a colon begins, which ends at `end`; 0 where no such text follows."""
    rest = line[end:]
    marks = _MARKS.match(rest)
    return end + marks.end() if marks and marks[0] and rest != rest.upper() else 0


def _named(heading: str) -> str:
    """The section of a heading, of merged ones the first in rank."""
    names = [_SECTION_OF[word] for word in _split(heading) if word in _SECTION_OF]
    return min(names, key=_RANK.__getitem__)


@lru_cache(maxsize=4096)
def _misspelt(heading: str) -> str | None:
    """The section of a heading that is misspelt, alone or merged with others; None where it is right or no heading."""
    meant = _meant(heading)
    sections = [_SECTION_OF[word] for word in meant if word]
    if meant == _split(heading) or not (all(meant) or set(sections) & set(_REPORTED)):
        return None
    return min(sections, key=_RANK.__getitem__)


def _meant(heading: str) -> list[str | None]:
    """The known heading that each of merged headings is or is a misspelling of."""
    return [word if word in _SECTION_OF else nearest(word, _SECTION_OF, twice=_TWICE) for word in _split(heading)]


def _sections_meant(heading: str) -> set[str]:
    return {_SECTION_OF[word] for word in _meant(_words(heading)) if word}


def _words(heading: str) -> str:
    """A heading's words: without its colon, the marks around it, its number and a note in parentheses."""
    return _NO_WORDS.sub("", heading[_marks(heading)[0] :]).rstrip(_ENDS)


def _split(heading: str) -> list[str]:
    plain = re.sub(r"[#\d]|\(S\)", "", heading.upper())
    return [_collapsed(part) for part in re.split(r"\s*(?:[,/&:]|\bAND\b)\s*", plain)]


def _unknown_headings(text: str, sections: list[Section]) -> list[str]:
    """Words in capitals with a colon or a dash, or alone on a line that running text follows, that opened no section;
    and words that open an impression elsewhere.
    """
    opened = {_words(section.heading) for section in sections}
    found: dict[str, None] = {}
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    for line, following in zip(lines, (*lines[1:], ""), strict=False):
        heading = _unknown_at_start(line[_marks(line)[0] :], following)
        if heading is not None and heading not in opened and _misspelt(heading) is None:
            found[heading] = None
        for match in _WITHIN.finditer(line):
            if match["perhaps"] and _misspelt(match["perhaps"]) is None:
                found[_collapsed(match["perhaps"])] = None
        for match in _TITLED.finditer(line):
            heading = match["heading"]
            if heading[0].isupper() and not heading.isupper() and heading not in opened:
                found[heading] = None
    return list(found)


def _unknown_at_start(line: str, following: str) -> str | None:
    """The words of a line's beginning that may be a heading and are none that is known."""
    if elsewhere := _ELSEWHERE_AT_START.match(line):
        heading, rest = elsewhere["heading"], line[elsewhere.end() :]
        stated = elsewhere["colon"] or not rest.strip(_ENDS)
        stated = stated or heading.isupper() and _end_without_colon(line, elsewhere.end())
        if heading[0].isupper() and stated:
            return heading
    if _AT_START.match(line) or _VIEW_TITLE.match(line) or _BANNER.fullmatch(line):
        return None
    start = _PERHAPS.match(line)
    if start and start["heading"].isupper():
        alone = _FEWEST_LETTERS <= len(line.rstrip(_ENDS)) and following != following.upper()
        said = start["colon"] or alone
    else:
        start = _DASHED.match(line)
        said = start and len(start["heading"]) >= _FEWEST_LETTERS and (rest := line[start.end() :]) != rest.upper()
    if not start or not said or _VIEWS.fullmatch(start["heading"]):
        return None
    return _collapsed(start["heading"])


def _joined(sections: list[Section], name: str) -> str | None:
    return " ".join(section.text for section in sections if section.name == name and section.text) or None


def _is_narrative(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= _FEWEST_WORDS


def _collapsed(text: str) -> str:
    return " ".join(text.split())
