"""A short soak; `make soak` is the long one."""

from __future__ import annotations

import pytest

from tests.soak.__main__ import SETTINGS, soak

pytestmark = pytest.mark.slow


def test_killed_runs_end_as_the_undisturbed_one(tmp_path):
    """Trap 19: a kill for each setting, of one process or of all."""
    kills = len(SETTINGS)
    tally = soak(tmp_path, kills=kills, seed=0)
    assert tally.good == kills, "\n".join(tally.faults)
