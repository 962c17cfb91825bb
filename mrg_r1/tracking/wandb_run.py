"""What wandb is given, and when: numbers by default, never a reason for a run to stop.

Privacy: the machine's name, command line, user, git state, code, console and probes do not go to wandb. wandb itself is
imported where a run opens it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from mrg_r1.files import write_text_atomically
from mrg_r1.tracking.backend import Metrics, Tracked
from mrg_r1.tracking.metrics_file import last_logged
from mrg_r1.tracking.panels import HIGHER_IS_BETTER
from mrg_r1.tracking.sharing import Shared, what_is_shared
from mrg_r1.types import LABELS_ONLY

# What a tracker raises must not end a run, and wandb raises plain Exceptions of private classes where its process has
# died.
_ANYTHING = Exception


def check_wandb(mode: Literal["off", "offline", "online"]) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: wandb is wanted and is not there.
    """
    if mode != "off" and find_spec("wandb") is None:
        raise ValueError(
            f"tracking.wandb {mode!r}: the package wandb, which mrg-r1 depends on, is not installed here; "
            "pip install wandb, or tracking.wandb=off"
        )


class WandbRun:
    """One wandb run for one RUN, however often it is interrupted.

    RUN/wandb_run.json holds its id and the last step that it was given. A resumed run repeats steps after its
    checkpoint; those that wandb has already are not sent again, since wandb refuses a step below its last one and the
    repeated ones have the same values.

    Args:
        run: with start_step 0, a new wandb run is begun; else RUN's goes on. RUN/metrics.jsonl is read, and must not
            have been cut to the checkpoint yet.
    """

    def __init__(self, run: Tracked) -> None:
        options, directory = run.options, run.directory
        mode: Literal["offline", "online"] = "online" if options.wandb == "online" else "offline"
        self._say, self._run, self.problem = run.say, None, ""
        record = directory / "wandb_run.json"
        known = json.loads(record.read_text(encoding="utf-8")) if run.start_step and record.is_file() else None
        self._id: str = known["id"] if known else uuid.uuid4().hex[:12]
        self._last: int = max(known["last_step"], last_logged(directory)) if known else run.start_step - 1
        write_text_atomically(record, json.dumps({"id": self._id, "last_step": self._last}) + "\n")
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=options.wandb_project,
                name=directory.name,
                id=self._id,
                resume="allow" if mode == "online" else None,  # offline parts share the id
                dir=directory,
                mode=mode,
                config=dict(run.config),
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
            for name in HIGHER_IS_BETTER:
                self._run.define_metric(name, step_metric="step", summary="max")
        except _ANYTHING as error:
            self._give_up(error)
        if self._run is not None and (options.share_text or options.share_images):
            what = what_is_shared(text=options.share_text, images=options.share_images)
            where = (
                f"to wandb, project {options.wandb_project}, now"
                if mode == "online"
                else f"into {directory / 'wandb'}, and to wandb when that is synced"
            )
            run.say(f"tracking.share_text / share_images: at each validation {what} go {where}")

    def log(self, step: int, metrics: Metrics, shared: Sequence[Shared]) -> None:
        """Hand over the step's numbers, and before them what is shared, unless wandb has the step from before an
        interruption.
        """
        if self._run is None or step <= self._last:
            return
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        samples = self._samples(shared)
        try:
            if samples:
                self._run.log({"step": step, **samples}, step=step)
            self._run.log({"step": step, **numbers}, step=step)
        except _ANYTHING as error:
            self._give_up(error)

    def sync(self) -> None:
        """wandb's own process writes its files as it goes."""

    def close(self) -> None:
        """End the wandb run; says again where it had failed."""
        if self._run is not None:
            try:
                self._run.finish()
            except _ANYTHING as error:
                self._give_up(error)
        if self.problem:
            self._say(f"wandb has only a part of this run ({self.problem}); metrics.jsonl has all of it")

    def _samples(self, shared: Sequence[Shared]) -> dict[str, Any]:
        """A table of a validation's reports, and its radiographs, as far as they are shared."""
        samples: dict[str, Any] = {}
        rows = [[one.number, one.report, one.reference or LABELS_ONLY] for one in shared if one.report is not None]
        images = [self._wandb.Image(one.image(), caption=str(one.number)) for one in shared if one.has_image]
        if rows:
            samples["samples/reports"] = self._wandb.Table(columns=["study", "report", "reference"], data=rows)
        if images:
            samples["samples/images"] = images
        return samples

    def _give_up(self, error: Exception) -> None:
        self.problem, self._run = f"{type(error).__name__}: {error}", None
        self._say(f"wandb failed ({self.problem}); the run goes on, metrics go to metrics.jsonl only")
