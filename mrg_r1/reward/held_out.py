"""A second labeler that is never rewarded: it reads what an evaluation reads, so that a policy which fools the first
one is seen (docs/traps.md #26).

Rank 0 of the whole run has one; its process and its client are those of the rewarded labeler, started once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import BLANK, OBSERVATIONS
from mrg_r1.reward.service.interface import RewardService
from mrg_r1.reward.service.supervisor import Supervisor

TEXTS_AT_ONCE = 64  # so that a bar moves, and the run hears from rank 0 while it waits


@dataclass
class HeldOutLabeler:
    """Reads reports; nothing is ever rewarded by it.

    Attributes:
        service: its process.
        labeler: its name and fingerprint.
        references: study id -> the 14 classes that it reads in the reference.
    """

    service: RewardService
    labeler: dict[str, str]
    references: Mapping[str, Sequence[int]]
    supervisor: Supervisor | None = None

    def read(
        self, reports: Sequence[str | None], shown: Callable[[Sequence[int]], Iterable[int]] = iter
    ) -> NDArray[np.int64]:
        """[N, 14] classes of N reports; a malformed one (None) says nothing and is blank, as for the rewarded labeler.

        Args:
            shown: wraps the numbers of the first reports of each batch, such as in a progress bar.

        Raises:
            RewardError: the labeler fails, or its process is gone for good.
        """
        classes = np.full((len(reports), len(OBSERVATIONS)), BLANK, dtype=np.int64)
        rows = [row for row, report in enumerate(reports) if report is not None]
        written = [report for report in reports if report is not None]
        for start in shown(range(0, len(rows), TEXTS_AT_ONCE)):
            part = slice(start, start + TEXTS_AT_ONCE)
            classes[rows[part]] = self.service.label(written[part])
        return classes

    def close(self) -> None:
        """The run needs it no more."""
        self.service.close()
        if self.supervisor is not None:
            self.supervisor.close()
