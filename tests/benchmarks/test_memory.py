"""The peak reader is checked against an allocation of known size."""

from __future__ import annotations

import numpy as np

from benchmarks.memory import peak_mb, reset_peak, resident_mb


def test_the_peak_holds_an_allocation_that_was_freed() -> None:
    reset_peak()
    before = resident_mb()
    block = np.ones(64 * 1024 * 1024, dtype=np.uint8)  # 64 MB, every page touched
    assert block[-1] == 1
    del block
    assert 60 < peak_mb() - before < 80
    assert resident_mb() - before < 10


def test_resetting_forgets_an_earlier_peak() -> None:
    block = np.ones(64 * 1024 * 1024, dtype=np.uint8)
    assert block[-1] == 1
    del block
    reset_peak()
    assert peak_mb() - resident_mb() < 10
