"""A reward term that writes down which node's service has scored what."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


def notes_node(
    generated: list[str | None], references: list[str], labels: Any, reference_labels: Any
) -> Sequence[float]:
    """Appends the reports to the file NODE_LOG.NODE; both are variables of the node's launcher."""
    with open(f"{os.environ['NODE_LOG']}.{os.environ['NODE']}", "a", encoding="utf-8") as log:
        log.writelines(json.dumps(report) + "\n" for report in generated)
    return [0.0] * len(generated)
