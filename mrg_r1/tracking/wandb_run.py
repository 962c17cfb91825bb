"""What wandb is given, and when: numbers by default, never a reason for a run to stop.

Privacy: the recipe goes to wandb with its paths cut to base names; the machine's name, command line, user, git state,
code, console and probes do not. Texts and images go only where the recipe says so (`tracking.share_text`,
`tracking.share_images`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, Literal

from mrg_r1.data.images import load_image
from mrg_r1.files import write_text_atomically
from mrg_r1.types import Study

WandbMode = Literal["off", "offline", "online"]
Sample = tuple[Study, Mapping[str, Any]]  # a study of the validation split, and its prediction

# What a tracker raises must not end a run, and wandb raises plain Exceptions of private classes where its process has
# died.
_ANYTHING = Exception
_SHARED = 8  # reports or studies a validation
_SIDE = 224  # pixels of a shared radiograph
# their summary is the best
_UP = ("reward/total", "validation/mean_reward", "validation/disease_micro13", "validation/disease_macro13")


def check_wandb(mode: WandbMode) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: wandb was asked for by name and is not there.
    """
    if mode == "online" and find_spec("wandb") is None:
        raise ValueError(
            "tracking.wandb 'online': the package wandb is not installed; pip install 'mrg-r1[wandb]', or "
            "tracking.wandb=offline"
        )


class WandbRun:
    """One wandb run for one RUN, however often it is interrupted.

    RUN/wandb_run.json holds its id and the last step that it was given. A resumed run repeats steps after its
    checkpoint; those that wandb has already are not sent again, since wandb refuses a step below its last one and the
    repeated ones have the same values.

    Args:
        logged: the last step in metrics.jsonl before it was cut, -1 where there is none.
        start_step: 0 begins a new wandb run; another one goes on with RUN's.
        say: prints a line.
    """

    def __init__(
        self,
        directory: Path,
        *,
        mode: Literal["offline", "online"],
        project: str,
        config: Mapping[str, Any],
        start_step: int,
        logged: int,
        share_text: bool,
        share_images: bool,
        say: Callable[[str], None],
    ) -> None:
        self._say, self._run, self.problem = say, None, ""
        self._text, self._images = share_text, share_images
        record = directory / "wandb_run.json"
        known = json.loads(record.read_text(encoding="utf-8")) if start_step and record.is_file() else None
        self._id: str = known["id"] if known else uuid.uuid4().hex[:12]
        self._last: int = max(known["last_step"], logged) if known else start_step - 1
        write_text_atomically(record, json.dumps({"id": self._id, "last_step": self._last}) + "\n")
        try:
            import wandb
        except ImportError:
            say("wandb is not installed (pip install 'mrg-r1[wandb]'): metrics go to metrics.jsonl only")
            return
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=self._id,
                resume="allow" if mode == "online" else None,  # offline parts share the id
                dir=directory,
                mode=mode,
                config=without_paths(config),
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    silent=True,
                    host="",
                    program="",
                    x_disable_meta=True,
                    x_save_requirements=False,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                ),
            )
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            for name in _UP:
                self._run.define_metric(name, step_metric="step", summary="max")
        except _ANYTHING as error:
            self._give_up(error)
        if self._run is not None and (share_text or share_images):
            self._announce(project, mode, directory)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over the step's numbers, unless wandb has the step from before an interruption."""
        if self._run is None or step <= self._last:
            return
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        try:
            self._run.log({"step": step, **numbers}, step=step)
        except _ANYTHING as error:
            self._give_up(error)

    def share(self, step: int, samples: Sequence[Sample]) -> None:
        """A table of a validation's reports or images, where the recipe shares them. Call it before `log` of the same
        step.
        """
        if self._run is None or not samples or not (self._text or self._images) or step <= self._last:
            return
        shown: dict[str, Any] = {}  # numbered, without the studies' ids, which may be patients'
        if self._text:
            rows = [[number, row["text"], study.report] for number, (study, row) in enumerate(samples[:_SHARED])]
            shown["samples/reports"] = self._wandb.Table(columns=["study", "report", "reference"], data=rows)
        if self._images:
            images = [load_image(study.images[0].path, study.id) for study, _ in samples[:_SHARED]]
            for image in images:
                image.thumbnail((_SIDE, _SIDE))
            shown["samples/images"] = [
                self._wandb.Image(image, caption=str(number)) for number, image in enumerate(images)
            ]
        try:
            self._run.log({"step": step, **shown}, step=step)
        except _ANYTHING as error:
            self._give_up(error)

    def close(self) -> None:
        """End the wandb run; says again where it had failed."""
        if self._run is not None:
            try:
                self._run.finish()
            except _ANYTHING as error:
                self._give_up(error)
        if self.problem:
            self._say(f"wandb has only a part of this run ({self.problem}); metrics.jsonl has all of it")

    def _give_up(self, error: Exception) -> None:
        self.problem, self._run = f"{type(error).__name__}: {error}", None
        self._say(f"wandb failed ({self.problem}); the run goes on, metrics go to metrics.jsonl only")

    def _announce(self, project: str, mode: str, directory: Path) -> None:
        what = [f"sampled reports and their references of up to {_SHARED} studies"] if self._text else []
        what += [f"radiographs (at most {_SIDE} pixels) of up to {_SHARED} studies"] if self._images else []
        where = (
            f"to wandb, project {project}, now"
            if mode == "online"
            else f"into {directory / 'wandb'}, and to wandb when that is synced"
        )
        self._say(f"tracking.share_text / share_images: at each validation {' and '.join(what)} go {where}")


def without_paths(value: Any, key: str = "") -> Any:
    """A recipe in which every path is cut to its last part: folders may be named after patients. The prompt's
    instruction stays.
    """
    if isinstance(value, Mapping):
        return {without_paths(str(name)): without_paths(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and key != "instruction" and ("/" in value or "\\" in value):
        return PurePath(value.replace("\\", "/")).name
    return value
