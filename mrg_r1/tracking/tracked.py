"""The run as a backend of its log is shown it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol


class TrackingOptions(Protocol):
    """The recipe's section `tracking`, as far as backends read it."""

    @property
    def wandb(self) -> Literal["off", "offline", "online"]: ...
    @property
    def wandb_project(self) -> str: ...
    @property
    def share_text(self) -> bool: ...
    @property
    def share_images(self) -> bool: ...


@dataclass(frozen=True)
class Tracked:
    """The run that a backend is opened for.

    Attributes:
        directory: RUN; a backend writes nowhere else on this machine.
        config: the recipe, every path in it cut to its last part.
        start_step: steps already done, 0 in a run that begins; a resumed run repeats those after its checkpoint.
        say: prints one line on the terminal, over all that moves there.
    """

    directory: Path
    options: TrackingOptions
    config: Mapping[str, Any]
    start_step: int
    say: Callable[[str], None]
