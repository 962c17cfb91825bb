"""What TensorBoard is given: the numbers that wandb gets, under the same names and steps; never a report or an image.

The package tensorboard is optional, and imported where a run opens it (through torch.utils.tensorboard).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Literal

from mrg_r1.files import write_text_atomically
from mrg_r1.tracking.backend import Metrics, Tracked
from mrg_r1.tracking.sharing import Shared

# What a tracker raises must not end a run: the writer's thread hands on whatever its file system raised.
_ANYTHING = Exception


def check_tensorboard(directory: Path | Literal["off"]) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: TensorBoard is wanted, and its package is not there or the directory is none.
    """
    if directory == "off":
        return
    if find_spec("tensorboard") is None:
        raise ValueError(
            f"tracking.tensorboard {directory}: the package tensorboard, which is optional, is not installed here; "
            "pip install tensorboard, or tracking.tensorboard=off"
        )
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"tracking.tensorboard {directory}: a file; give a directory, or off")


class TensorboardRun:
    """One folder of event files for one RUN, however often it is interrupted: DIR/NAME, NAME being RUN's last part, or
    NAME_2 and so on where an earlier run has that one.

    RUN/tensorboard_run.json holds which. A resumed run goes on there and has TensorBoard drop the points from its first
    step on (`purge_step`), since these steps come again; those before have been flushed at the checkpoint.

    Args:
        run: with start_step 0, a new folder is begun, and so where the directory is another one than RUN had.
    """

    def __init__(self, run: Tracked) -> None:
        self._say, self.problem = run.say, ""
        self._writer: Any = None
        directory = Path(run.options.tensorboard).resolve()
        record = run.directory / "tensorboard_run.json"
        try:
            folder = _known(record, directory) if run.start_step else None
            folder = folder or _new_folder(directory, run.directory.resolve().name)
            write_text_atomically(record, json.dumps({"directory": str(directory), "name": folder.name}) + "\n")
            from torch.utils.tensorboard import SummaryWriter

            # a run that begins has it too: TensorBoard takes a folder's first such mark for its start, and only a later
            # one for a restart
            self._writer = SummaryWriter(str(folder), purge_step=run.start_step)
        except _ANYTHING as error:
            self._give_up(error)

    def log(self, step: int, metrics: Metrics, shared: Sequence[Shared]) -> None:
        """Hand over the step's numbers; what is shared is not for TensorBoard."""
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except _ANYTHING as error:
            self._give_up(error)

    def sync(self) -> None:
        """A checkpoint that survives must find its steps here: a resumed run writes none of them again."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except _ANYTHING as error:
                self._give_up(error)

    def close(self) -> None:
        """End the event file; says again where writing had failed."""
        if self._writer is not None:
            try:
                self._writer.close()
            except _ANYTHING as error:
                self._give_up(error)
        if self.problem:
            self._say(f"TensorBoard has only a part of this run ({self.problem}); metrics.jsonl has all of it")

    def _give_up(self, error: Exception) -> None:
        self.problem, self._writer = f"{type(error).__name__}: {error}", None
        self._say(f"TensorBoard failed ({self.problem}); the run goes on, metrics go to metrics.jsonl")


def _known(record: Path, directory: Path) -> Path | None:
    """The folder that RUN has in `directory`; None where it has none."""
    if not record.is_file():
        return None
    known = json.loads(record.read_text(encoding="utf-8"))
    return directory / known["name"] if known["directory"] == str(directory) else None


def _new_folder(directory: Path, name: str) -> Path:
    """A folder of its own for a run, made here so that no other run takes it."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = directory / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # count() has no end
