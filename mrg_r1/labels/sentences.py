"""A report as its sentences, which are counted and read one by one.

The training of a labeler (`fitting`) splits at marks before white space alone, and is left so: labelers stay the same
to the last bit.
"""

from __future__ import annotations

import re

# a mark and white space; a mark between a small letter and a capital ("clear.No"); a mark that is no ASCII
_END = re.compile(r"(?<=[.!?])\s+|(?<=[a-z)][.!?])(?=[A-Z])|(?<=[。！？])\s*")
_GOES_ON = re.compile(r"(?:^|[\s(])(?:drs?|mrs?|ms|prof|st|vs|approx|resp|fig|cf|e\.g|i\.e)\.$", re.IGNORECASE)
_ENUMERATION = re.compile(r"\d+[.)]")
_SAYS_SOMETHING = re.compile(r"\w")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, white space collapsed; joined by blanks they are the text again.

    A full stop in a number ("1.5 cm") or behind an abbreviation ("Dr. Smith", "approx. 2 cm") ends none, the number of
    an enumeration belongs to what follows it, and marks alone to what stands before them.

    >>> sentences("1. Clear lungs. 2. A 1.5 cm nodule, see Dr. Smith.")
    ['1. Clear lungs.', '2. A 1.5 cm nodule, see Dr. Smith.']
    """
    found: list[str] = []
    open_ended = False  # the last piece goes on with the next
    for piece in (" ".join(part.split()) for part in _END.split(text)):
        if not piece:
            continue
        if found and (open_ended or not _SAYS_SOMETHING.search(piece)):
            found[-1] = f"{found[-1]} {piece}"
        else:
            found.append(piece)
        open_ended = bool(_GOES_ON.search(piece)) or _ENUMERATION.fullmatch(piece) is not None
    return found
