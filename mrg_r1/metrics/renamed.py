"""Files of version 0.1.0 under today's names: what it called the judge is the held-out labeler."""

from __future__ import annotations

from typing import Any


def todays_names(content: Any) -> Any:
    """JSON content (an evaluation, its predictions, a summary, a line of metrics.jsonl) with the keys that have another
    name today under that one; everything else as it is.

    Example:
        >>> todays_names({"judge_disease_micro13": 0.5, "validation/judge_disease_micro13": 0.5})
        {'held_out_disease_micro13': 0.5, 'validation/held_out_disease_micro13': 0.5}
    """
    if isinstance(content, dict):
        return {_todays(key): todays_names(value) for key, value in content.items()}
    return [todays_names(value) for value in content] if isinstance(content, list) else content


def _todays(key: str) -> str:
    section, slash, name = key.rpartition("/")
    if name == "judge" or name.startswith("judge_"):
        name = "held_out" + name.removeprefix("judge")
    return f"{section}{slash}{name}"
