"""What a run is called that is there for others to be compared with (docs/recipes.md, `control`)."""

from __future__ import annotations

CONTROLS = {
    "sft": "further SFT",
    "rft": "rejection fine-tuning",
    "random": "random reward",
}


def control_name(control: str | None, otherwise: str) -> str:
    """The control's words; `otherwise` for a run that is none."""
    return otherwise if control is None else CONTROLS[control]
