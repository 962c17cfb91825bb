"""Where a run's numbers go: a line for each backend, whose class stands in a file of its own."""

from __future__ import annotations

from mrg_r1.tracking.backend import Backend, Tracked
from mrg_r1.tracking.metrics_file import MetricsFile
from mrg_r1.tracking.tensorboard_run import TensorboardRun
from mrg_r1.tracking.wandb_run import WandbRun


def open_backends(run: Tracked) -> list[Backend]:
    """The run's backends, in the order in which they are told of a step: metrics.jsonl first, which has all of it."""
    # before metrics.jsonl is cut to the checkpoint: what wandb has of the steps cut off is known from them alone
    wandb = [] if run.options.wandb == "off" else [WandbRun(run)]
    tensorboard = [] if run.options.tensorboard == "off" else [TensorboardRun(run)]
    return [
        MetricsFile(run),
        *wandb,
        *tensorboard,
    ]
