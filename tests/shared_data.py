"""Where the real reports and radiographs lie, when a machine has them; they are never part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data() -> Path:
    """The folder of real data, or a skip that says why: a user's machine has none."""
    folder = Path(os.environ.get("MRG_R1_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "iu_xray" / "annotation.json").is_file():
        pytest.skip(f"real data not found at {folder}; set MRG_R1_SHARED_DATA to run this test")
    return folder
