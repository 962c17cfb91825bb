"""Texts that say nothing: empty to the eye, a missing value written out, a report without a word."""

from __future__ import annotations

import re
import string
import unicodedata

# What stands where something was taken out: XXXX in IU X-Ray, ___ in MIMIC-CXR.
_TAKEN_OUT = re.compile(r"[Xx]{3,}|_+")
_HEADINGS = re.compile(r"\b(?:findings?|impressions?|conclusions?|report)\s*:", re.IGNORECASE)
# Letters to Unicode, and nothing to the eye.
_BLANK_LETTERS = "\u115f\u1160\u3164\uffa0"
# What programs write for a value that is not there; without blanks, in small letters: as it is, and between marks.
_AS_IT_IS = frozenset(r"#name? #ref! #value! #div/0! #num! #null! #spill! #calc! \n".split())
_NOT_A_NUMBER = frozenset("nan null nat 1.#ind 1.#qnan nan(ind undefined inf infinity pd.na".split())
_MISSING = _NOT_A_NUMBER | frozenset(
    "none n/a n/an/a na n.a nil missing notavailable nodata noreport unknown blank tbd".split()
)
_LONG = 60  # characters; what is longer and has a word is not one of these


def visible(text: str) -> str:
    """A text without white space and without what cannot be seen: control and format characters, blanks."""
    if text.isascii() and text.isprintable():  # nearly all ids: seen without a look at every letter
        return text.replace(" ", "")
    return "".join(
        letter for letter in text if unicodedata.category(letter)[0] not in "CZ" and letter not in _BLANK_LETTERS
    )


def is_missing(text: str, *, words: bool = True) -> bool:
    """Whether a text is empty to the eye, or a missing value written out, such as NaN.

    Args:
        words: None, N/A and the like too, which are answers to some questions.
    """
    if len(text) > _LONG and re.search(r"[A-Za-z]{3}", text):
        return False
    seen = unicodedata.normalize("NFKC", visible(text)).casefold()
    known = _MISSING if words else _NOT_A_NUMBER
    if not seen or seen in _AS_IT_IS or seen.strip(string.punctuation) in known:
        return True
    several = [part for part in re.split(r"[\s,;|]+", text) if part.strip(string.punctuation)]  # joined from columns
    return len(several) > 1 and all(is_missing(part, words=words) for part in several)


def report_fault(text: str) -> str | None:
    """What keeps a text from being a report, or None: it has not one word, or is a missing value written out."""
    told = _HEADINGS.sub("", _TAKEN_OUT.sub("", text))
    if len(told) > _LONG and re.search(r"[A-Za-z]{3}", told):  # nearly all: seen without a look at every letter
        return None
    left = visible(told)
    if not any(unicodedata.category(letter).startswith("L") for letter in left):
        return "empty" if not visible(text) else "without a word"
    return "a missing value written out" if is_missing(told) else None


def missing_written_out(text: str, *, words: bool = True) -> bool:
    """Whether a text stands for a missing value, and is not empty.

    Args:
        words: as `is_missing`.
    """
    return bool(visible(text)) and is_missing(text, words=words)
