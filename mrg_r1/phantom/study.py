"""`PhantomStudy`: what is known of a phantom before it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrg_r1.phantom.traits import SUPPORT_DEVICES


@dataclass(frozen=True)
class PhantomStudy:
    """One study without its images. Label values are 1, 0, -1 or None, in CheXbert's order of 14."""

    index: int
    drawn: tuple[int | None, ...]  # 14: 1 or 0, the truth; No Finding 1 or None
    said: tuple[int | None, ...]  # 14: what the report says; observations outside the preset are not spoken of
    report: str
    patient_id: str
    patient: int  # index of the patient's first study: the chest and its traits follow from it
    views: tuple[str, ...] = ("frontal",)
    indication: str | None = None
    comparison: str | None = None
    prior: int | None = None  # index of the patient's earlier study
    strengths: tuple[float, ...] | None = None  # 13, how strongly each is drawn; None: as `drawn` or `shown` say

    @property
    def shown(self) -> tuple[int | None, ...]:
        """14: `drawn`, but -1 (to be drawn faintly) for what is there and the report is not sure of or passes over."""
        return tuple(
            -1 if truth == 1 and text != 1 else truth for truth, text in zip(self.drawn, self.said, strict=True)
        )


def no_finding(values: Sequence[int | None]) -> int | None:
    """CheXbert's rule for 13 values: 1 where none but Support Devices is positive or uncertain, else blank."""
    return None if any(value in (1, -1) for i, value in enumerate(values) if i != SUPPORT_DEVICES) else 1
