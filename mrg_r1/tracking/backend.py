"""What a backend of a run's log is: told of every step, on rank 0 alone.

It is given what it may pass on and nothing else: the recipe with its paths cut to their last parts, and of a
validation's studies what the recipe shares (`tracking.sharing`). The backends are listed in `tracking.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mrg_r1.tracking.sharing import Shared

Metrics = Mapping[str, float | int | None]


class TrackingOptions(Protocol):
    """The recipe's section `tracking`, as far as backends read it."""

    @property
    def wandb(self) -> Literal["off", "offline", "online"]: ...
    @property
    def wandb_project(self) -> str: ...
    @property
    def tensorboard(self) -> Path | Literal["off"]: ...
    @property
    def share_text(self) -> bool: ...
    @property
    def share_images(self) -> bool: ...


@dataclass(frozen=True)
class Tracked:
    """The run that a backend is opened for.

    Attributes:
        directory: RUN; a backend writes nowhere else on this machine, but for TensorBoard's in the directory that the
            recipe names.
        config: the recipe, every path in it cut to its last part.
        start_step: steps already done, 0 in a run that begins; a resumed run repeats those after its checkpoint.
        say: prints one line on the terminal, over all that moves there.
    """

    directory: Path
    options: TrackingOptions
    config: Mapping[str, Any]
    start_step: int
    say: Callable[[str], None]


class Backend(Protocol):
    """What is told of a run's steps. A failure that is no reason to stop is its own affair: it says so, and is silent
    from there on.
    """

    def log(self, step: int, metrics: Metrics, shared: Sequence[Shared]) -> None:
        """Take in the step just taken, counted from 0.

        Args:
            metrics: numbers by name; None where nothing was counted, and not always finite.
            shared: of a validation's studies, what the recipe shares; empty at other steps.
        """

    def sync(self) -> None:
        """Bring what was logged to the disk, where that is the backend's to do: a checkpoint follows."""

    def close(self) -> None:
        """The run has ended."""
