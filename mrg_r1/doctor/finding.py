"""What was looked at, how it stands, and what to do about it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    state: State
    text: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def examined(name: str, look: Callable[[], str]) -> Finding:
    """What `look` says, or what it refuses: messages of the project's own checks carry their remedy. A check that fails
    itself is a finding too, so that it takes nobody else's with it.
    """
    try:
        return Finding(name, "ok", look())
    except (ValueError, OSError) as error:
        return Finding(name, "failure", str(error))
    except Exception as error:  # a check's own fault, of whatever kind, must not cost the whole report
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"this could not be looked at: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        return Finding(name, "failure", text, "please report it, with the file that it was about")


def as_json(findings: list[Finding]) -> str:
    """For scripts: {"state": the worst, "findings": [{name, state, text, remedy}]}."""
    lines = [{"name": one.name, "state": one.state, "text": one.text, "remedy": one.remedy} for one in findings]
    return json.dumps({"state": worst(findings), "findings": lines}, indent=1)


def worst(findings: list[Finding]) -> str:
    """The state of the whole."""
    states = {finding.state for finding in findings}
    return next(state for state in ("failure", "warning", "ok") if state in states or state == "ok")
