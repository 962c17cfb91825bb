"""What every launch checks before it loads anything: bad input is to cost seconds and not hours.

Each check is handed what it reads. What is found on one rank is said by all, so that nobody waits for a rank that has
given up.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from mrg_r1.config.recipe import Recipe, RecipeError, check_recipe, dump_recipe
from mrg_r1.data.study import check_images
from mrg_r1.doctor.checks import launch_findings
from mrg_r1.doctor.finding import Finding
from mrg_r1.doctor.inputs import check_disk, check_stage, read_splits
from mrg_r1.engine.partition import RankPartition
from mrg_r1.engine.ranks import Ranks
from mrg_r1.files import write_text_atomically
from mrg_r1.tracking.log import write_environment
from mrg_r1.tracking.tensorboard_run import check_tensorboard
from mrg_r1.tracking.wandb_run import check_wandb
from mrg_r1.training import nodes
from mrg_r1.training.resume import check_changes
from mrg_r1.types import Study

Task = Literal["grpo", "sft", "evaluate"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checked:
    """What the checks have read, and found good."""

    studies: dict[str, list[Study]]  # by split: the recipe's train, val and test
    partition: RankPartition | None  # how the policy's weights are cut over the ranks; None: whole on each


def preflight(recipe: Recipe, ranks: Ranks, *, task: Task) -> Checked:
    """Check everything that can be checked before a model is loaded, and claim RUN. Every rank calls this.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named.
    """
    check_wandb(recipe.tracking.wandb)
    check_tensorboard(recipe.tracking.tensorboard)
    nodes.check_files(recipe, ranks)
    check_recipe(recipe, world_size=ranks.world_size, task=task)
    partition = _partition(recipe, ranks, task)
    studies, needed = read_splits(recipe, task=task)
    if recipe.data.check_images:
        _look_at_images([study for part in needed for study in studies[part]], ranks)
    if task != "evaluate":
        check_changes(recipe, ranks)
    ranks.from_main(lambda: _claim(recipe, ranks, task), RecipeError)
    nodes.check_shared(recipe.output_dir, ranks)
    ranks.from_main(
        lambda: _refuse_failures(launch_findings(recipe, task=task, ranks=ranks, studies=studies)), RecipeError
    )
    return Checked(studies, partition)


def is_finished(directory: Path, ranks: Ranks) -> bool:
    """True, on every rank, where RUN holds the summary of a complete run; says so."""
    path = directory / "summary.json"
    done: bool = ranks.agree(path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "complete")
    if done and ranks.is_main:
        print(f"{directory}: this run is complete; remove it or set another output_dir to train again")
    return done


def _partition(recipe: Recipe, ranks: Ranks, task: Task) -> RankPartition | None:
    """How the policy's weights are cut over the ranks: with ZeRO-3, where something is trained.

    Raises:
        RecipeError: a DeepSpeed configuration that cannot be run; ZeRO-3 with a switch that wants whole weights.
    """
    if task == "evaluate":  # sampling wants the whole policy on every rank anyway
        return None
    config, dtype = recipe.engine.deepspeed, DTYPES[recipe.policy.dtype]
    try:
        partition = RankPartition.of_config(config, device=ranks.device, dtype=dtype)
    except ValueError as error:
        raise RecipeError(f"engine.deepspeed {error}") from error
    check_stage(recipe, stage=2 if partition is None else 3, task=task)
    return partition


def _look_at_images(studies: list[Study], ranks: Ranks) -> None:
    """Rank 0 opens every image once; the ranks of other nodes see whether theirs are there.

    Raises:
        RecipeError: what is wrong with them, of all nodes, on every rank.
    """
    problem = None
    if ranks.is_main:
        try:
            check_images(studies)
        except ValueError as error:
            problem = str(error)
    elif ranks.node.first:
        problem = nodes.missing_images(studies, ranks)
    problems = [problem for problem in ranks.gather(problem) if problem is not None]
    if problems:
        raise RecipeError("\n".join(problems))


def _claim(recipe: Recipe, ranks: Ranks, task: Task) -> None:
    """Make RUN, refuse a disk that cannot hold it, and write what the run is; an evaluation leaves what a training
    wrote there.

    Raises:
        RecipeError: RUN cannot be written, or the disk is too full.
    """
    run = recipe.output_dir
    try:
        run.mkdir(parents=True, exist_ok=True)
        check_disk(
            run, policy=recipe.policy.path, trains_all=recipe.sft.trainable == "all", keep=recipe.checkpoint.keep
        )
        if not os.access(run, os.W_OK):
            raise RecipeError(f"output_dir {run}: not writable")
        if task != "evaluate" or not (run / "config.yaml").is_file():
            write_text_atomically(run / "config.yaml", dump_recipe(recipe))
            write_environment(run, world_size=ranks.world_size, device=str(ranks.device), seed=recipe.seed)
    except OSError as error:
        raise RecipeError(f"output_dir {run}: cannot be written ({error.strerror}); set another output_dir") from error


def _refuse_failures(findings: list[Finding]) -> None:
    """Say the warnings of what `mrg-r1 doctor` looks at and no other check of a launch; its failures end the launch.

    Raises:
        RecipeError: every failure, a line each.
    """
    for finding in findings:
        if finding.state == "warning":
            Console(stderr=True).print(f"warning: {finding}", markup=False, highlight=False, soft_wrap=True)
    failures = [str(finding) for finding in findings if finding.state == "failure"]
    if failures:
        raise RecipeError("\n".join([*failures, "(`mrg-r1 doctor RECIPE` shows everything that is looked at)"]))
