"""A rank of the soak: launch/train.py that writes down every place it comes to, so that it can be killed there.

Started by the launcher as a script, like launch/train.py; each line of $SOAK_NOTES.RANK is a moment (seconds since the
epoch) and where the rank is from then on.
"""

from __future__ import annotations

import os
import time

from mrg_r1.cli.launch import run_on_ranks
from mrg_r1.engine.faults import Watch
from mrg_r1.training.grpo import train


def write_notes() -> None:
    """From here on every beat of this rank's watch is written down before it is passed on."""
    descriptor = os.open(f"{os.environ['SOAK_NOTES']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    beat = Watch.beat

    def noted(watch: Watch, doing: str) -> None:
        os.write(descriptor, f"{time.time():.4f} {doing.split(',')[0]}\n".encode())
        beat(watch, doing)

    Watch.beat = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    write_notes()
    run_on_ranks(train, __doc__)
