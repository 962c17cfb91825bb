"""Which tests one worker of pytest-xdist runs (`-n 2`): those that share what takes seconds to make.

Not by marks and `--dist loadgroup`: pytest-xdist 3.8 writes them into a field that pytest 9.2 does not read, and each
test is a group of its own then.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class Groups(LoadScopeScheduling):
    """All tests of ranks, which share a pool, and any other file for its fixtures; in the order of collection."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ranks" if "/ranks/" in file else file
