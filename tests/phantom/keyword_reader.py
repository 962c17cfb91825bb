"""A labeler of regular expressions, written without the grammar: what does a phantom's report say?"""

from __future__ import annotations

import re

_OBSERVATION = (
    r"mediastin",
    r"cardiomegaly|heart|cardiac",
    r"opacit|hazy|clear",
    r"nodule|mass\b",
    r"edema",
    r"consolidat",
    r"pneumonia|infiltrate",
    r"atelectasis|collapse",
    r"pneumothora",
    r"effusion|costophrenic|pleural fluid",
    r"pleural (?:thickening|scarring|plaque)",
    r"fracture|\bribs?\b",
    r"pacemaker|device|central line|catheter",
)
_NEGATED = re.compile(r"\b(?:no|not|absent|normal|sharp|clear|intact|unremarkable|negative)\b")
_UNSURE = re.compile(r"\b(?:may|possible|possibly|cannot|suspected|questionable|questionably|excluded)\b")


def read_report(report: str) -> list[int | None]:
    """13 values: 1, 0, -1, or None for what no sentence names. An observation named twice is an error."""
    values: list[int | None] = [None] * 13
    for sentence in report.lower().rstrip(".").split(". "):
        if re.search("cannot|excluded", sentence) or not _NEGATED.search(sentence):
            value = -1 if _UNSURE.search(sentence) else 1
        else:
            value = 0
        for observation, pattern in enumerate(_OBSERVATION):
            if re.search(pattern, sentence):
                assert values[observation] is None, f"said twice: {report}"
                values[observation] = value
    return values
