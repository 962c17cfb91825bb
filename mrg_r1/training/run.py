"""What every launch sets up before its first step: checks, studies, policy, labeler, prompts; and what it leaves at the
end.

Checks come first and models last, so that bad input costs seconds and not hours.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mrg_r1.config.recipe import Recipe, RecipeError, check_recipe, dump_recipe
from mrg_r1.data.loader import PromptBuilder, PromptWords, StudyLoader
from mrg_r1.data.order import rare_finding_weights
from mrg_r1.data.study import check_images
from mrg_r1.doctor.checks import launch_findings
from mrg_r1.doctor.inputs import check_disk, check_stage, read_splits
from mrg_r1.engine.partition import RankPartition
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.evaluation.evaluate import evaluate, short_summary, write_evaluation
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.lora import merge_adapter
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.tracking.evaluation_tables import print_evaluation
from mrg_r1.tracking.log import Clock, RunLog, write_environment
from mrg_r1.tracking.page import write_page
from mrg_r1.tracking.sharing import Sample
from mrg_r1.tracking.wandb_run import check_wandb
from mrg_r1.training import nodes
from mrg_r1.training import rewards as rewarding
from mrg_r1.training.resume import check_changes, what_rounds_otherwise
from mrg_r1.training.rewards import RunRewards
from mrg_r1.types import Study

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """Everything that a launch works with. `policy` has no LoRA yet."""

    recipe: Recipe
    ranks: Ranks
    directory: Path
    studies: dict[str, list[Study]]  # by split: the recipe's train, val and test
    policy: Policy
    build: PromptBuilder
    # None where nothing is rewarded: `phases=update`, an evaluation of studies without references
    rewards: RunRewards | None
    dtype: torch.dtype
    held_out: HeldOutLabeler | None = None  # on rank 0, where the recipe has one
    notes: list[str] = field(default_factory=list)
    validated: list[Sample] = field(default_factory=list)

    @property
    def rewarding(self) -> RunRewards:
        if self.rewards is None:
            raise RuntimeError("nothing is rewarded here: there are no rewards to ask for")
        return self.rewards

    def close(self) -> None:
        """The run needs no more rewards."""
        if self.rewards is not None:
            self.rewards.close()
        if self.held_out is not None:
            self.held_out.close()

    def evaluate(
        self, studies: list[Study], *, title: str, samples: int | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Greedy reports of `studies` under the policy as it stands, and their scores.

        Args:
            samples: bootstrap samples of a validation, which leaves out what only a closing evaluation needs; None: a
                closing one.
        """
        cleaning = self.recipe.evaluation.lexical
        was_training = self.policy.training
        self.policy.eval()
        answer = evaluate(
            self.policy,
            studies,
            build=self.build,
            reward_service=self.rewarding.service,
            context_of=self.rewarding.context_of,
            ranks=self.ranks,
            max_new_tokens=self.recipe.rollout.max_new_tokens,
            batch_size=self.recipe.evaluation.batch_size,
            seed=self.recipe.seed,
            bootstrap_samples=samples or self.recipe.evaluation.bootstrap_samples,
            train=self.rewarding.classes("train") if samples is None and self.studies["train"] else None,
            labeler=self.rewarding.labeler,
            held_out=self.held_out,
            cleaning=None if samples is not None or cleaning == "off" else cleaning,
            title=title,
        )
        self.policy.train(was_training)
        return answer

    def evaluate_test(self, name: str, *, title: str) -> dict[str, Any]:
        """Evaluate the test split into RUN/evaluation/NAME.json, or read what an interrupted run left there."""
        path = self.directory / "evaluation" / f"{name}.json"
        done = self.ranks.agree(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
        if done is not None:
            result: dict[str, Any] = done
            return result
        result, predictions = self.evaluate(
            self.studies["test"][: self.recipe.evaluation.max_test_studies], title=title
        )
        if self.ranks.is_main:
            write_evaluation(path.parent, name, result, predictions)
        self.ranks.barrier()
        return result

    def validate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scores and predictions on the validation split; few bootstrap samples, since only the point values
        are read.
        """
        studies = self.studies["val"][: self.recipe.evaluation.max_studies]
        result, predictions = self.evaluate(studies, title="validating", samples=100)
        self.validated = list(zip(studies, predictions, strict=True))
        return result, predictions

    def take_validated(self) -> list[Sample]:
        """The studies and predictions of a validation that nobody has taken yet."""
        taken, self.validated = self.validated, []
        return taken

    def write_summary(self, content: dict[str, Any]) -> None:
        """RUN/summary.json, by rank 0."""
        if self.ranks.is_main:
            write_text_atomically(self.directory / "summary.json", json.dumps(content, indent=1) + "\n")


def open_run(recipe: Recipe, ranks: Ranks, *, task: Literal["grpo", "sft", "evaluate"]) -> Run:
    """Check everything that can be checked, then load what the run needs.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named; before any model is loaded.
    """
    check_wandb(recipe.tracking.wandb)
    nodes.check_files(recipe, ranks)
    check_recipe(recipe, world_size=ranks.world_size, task=task)
    partition = _partition(recipe, ranks, task)
    studies = _read_studies(recipe, ranks, task)
    if task != "evaluate":
        check_changes(recipe, ranks)
    _claim_directory(recipe, ranks, task)
    nodes.check_shared(recipe.output_dir, ranks)
    _examine(recipe, ranks, studies, task)
    dtype = _DTYPES[recipe.policy.dtype]
    context_of = recipe.phases != "update" and all(study.report for study in studies["test"])
    # the labeler is loaded by its own process while the policy is loaded here
    supervisor = rewarding.start_service(recipe, ranks) if context_of else None
    held_out_process = rewarding.start_held_out(recipe, ranks) if context_of and recipe.phases == "all" else None
    policy = load_policy(
        recipe.policy.path, dtype=dtype, temperature=recipe.rollout.temperature, partition=partition
    ).to(ranks.device)
    if recipe.policy.adapter is not None:
        merge_adapter(policy, recipe.policy.adapter)
    if recipe.policy.gradient_checkpointing:
        policy.checkpoint_gradients()
    words = PromptWords(
        instruction=recipe.prompt.words,
        show_view=recipe.prompt.show_view,
        context=tuple(recipe.data.context),
        max_tokens=recipe.prompt.max_tokens,
    )
    met = {  # the studies whose references the run can need
        "train": studies["train"],
        "val": studies["val"][: recipe.evaluation.max_studies],
        "test": studies["test"][: recipe.evaluation.max_test_studies],
    }
    processor = load_image_processor(
        recipe.policy.path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels
    )
    rewards = rewarding.open_rewards(recipe, ranks, supervisor, met) if context_of else None
    held_out = None
    if rewards is not None and recipe.phases == "all":
        held_out = rewarding.open_held_out(
            recipe, ranks, held_out_process, met["val"] + met["test"], rewarded=rewards.labeler
        )
    build = PromptBuilder(
        tokenizer=policy.tokenizer,
        image_processor=processor,
        layout=policy.layout,
        words=words,
        workers=(2 if ranks.device.type == "cuda" else 0) if recipe.data.workers is None else recipe.data.workers,
    )
    for study in [study for part in studies.values() for study in part]:
        build.check_context(study)
    return Run(
        recipe=recipe,
        ranks=ranks,
        directory=recipe.output_dir,
        studies=studies,
        policy=policy,
        build=build,
        rewards=rewards,
        dtype=dtype,
        held_out=held_out,
    )


def _partition(recipe: Recipe, ranks: Ranks, task: str) -> RankPartition | None:
    """How the policy's weights are cut over the ranks: with ZeRO-3, where something is trained.

    Raises:
        RecipeError: a DeepSpeed configuration that cannot be run; ZeRO-3 with a switch that wants whole weights.
    """
    if task == "evaluate":  # sampling wants the whole policy on every rank anyway
        return None
    try:
        partition = RankPartition.of_config(
            recipe.engine.deepspeed, device=ranks.device, dtype=_DTYPES[recipe.policy.dtype]
        )
    except ValueError as error:
        raise RecipeError(f"engine.deepspeed {error}") from error
    check_stage(recipe, stage=2 if partition is None else 3, task=task)
    return partition


def _examine(
    recipe: Recipe, ranks: Ranks, studies: dict[str, list[Study]], task: Literal["grpo", "sft", "evaluate"]
) -> None:
    """What `mrg-r1 doctor` looks at and no other check of a launch: rank 0 says its warnings once, its failures end the
    launch.

    Raises:
        RecipeError: every failure, a line each.
    """
    problem = None
    if ranks.is_main:
        findings = launch_findings(recipe, task=task, ranks=ranks, studies=studies)
        for finding in findings:
            if finding.state == "warning":
                Console(stderr=True).print(f"warning: {finding}", markup=False, highlight=False, soft_wrap=True)
        problem = "\n".join(str(finding) for finding in findings if finding.state == "failure") or None
    problem = ranks.agree(problem)
    if problem is not None:
        raise RecipeError(f"{problem}\n(`mrg-r1 doctor RECIPE` shows everything that is looked at)")


def build_engine(run: Run) -> Engine:
    """DeepSpeed around the policy."""
    recipe = run.recipe
    return Engine(
        run.policy,
        ranks=run.ranks,
        config=recipe.engine.deepspeed,
        dtype=run.dtype,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        betas=recipe.optimizer.betas,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        warmup_steps=recipe.optimizer.warmup_steps,
        schedule=recipe.optimizer.schedule,
        total_steps=recipe.steps,
    )


def open_loader(run: Run, record: dict[str, Any], *, batch_size: int) -> StudyLoader:
    """This rank's studies, from the one at which the run of the checkpoint's `record` had come.

    The weights of `data.sampling` come from the labeler's reading of the training reports, which is what the reward
    compares with and which every manifest has; the manifest's own `labels.said` may be null. (`phases=update` has no
    labeler, and takes no study from here.)

    Raises:
        RecipeError: the studies or their weights are not those of the checkpoint, so that its position means others.
    """
    recipe, studies = run.recipe, run.studies["train"]
    loader = StudyLoader(
        studies,
        run.build,
        seed=recipe.seed,
        batch_size=batch_size,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        weights=rare_finding_weights(run.rewards.classes("train"))
        if run.rewards and recipe.data.sampling == "rare_findings"
        else None,
        step=record["step"],
        position=record.get("position", recipe.sft.skip_studies + record["step"] * batch_size),
    )
    if record.get("studies", loader.fingerprint) != loader.fingerprint and not recipe.resume.allow_changes:
        loader.close()
        raise RecipeError(
            f"{recipe.data.manifest}: its training studies, or what the labeler reads in them, are not those of "
            f"the checkpoint in {run.directory}: the run would pass over some and repeat others; take the old ones "
            "back, set another output_dir, or go on as another run with resume.allow_changes=true"
        )
    return loader


def open_log(run: Run, start: int, clock: Clock) -> RunLog:
    """The run's log on rank 0, silent on the others."""
    return RunLog(
        run.directory,
        active=run.ranks.is_main,
        steps=run.recipe.steps,
        options=run.recipe.tracking,
        config=run.recipe.model_dump(mode="json"),
        start_step=start,
        clock=clock,
    )


def say_resuming(run: Run, log: RunLog, record: dict[str, Any], *, stage: int) -> None:
    """Where the run goes on, and whether it is to the last bit the one that was never interrupted."""
    if not record["step"]:
        return
    log.say(f"resuming {run.directory} after step {record['step']} of {run.recipe.steps}")
    reasons = what_rounds_otherwise(record, run.recipe, world_size=run.ranks.world_size, stage=stage)
    if reasons:
        log.say(f"no longer to the last bit the uninterrupted run: {'; '.join(reasons)}")


def finish(
    run: Run,
    log: RunLog,
    clock: Clock,
    *,
    stage: int | None,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    best: dict[str, Any] | None,
) -> None:
    """RUN/summary.json and the closing table."""
    rendered = after["rendered"] if after else 0
    run.write_summary(
        {
            "before": None if before is None else short_summary(before),
            "after": None if after is None else short_summary(after),
            "seconds": {name: round(seconds, 2) for name, seconds in clock.totals.items()},
            "training_seconds": round(clock.training_seconds, 2),
            "training_cpu_seconds": round(clock.training_cpu_seconds, 2),
            "steps": run.recipe.steps,
            "best": best,
            "world_size": run.ranks.world_size,
            "zero_stage": stage,
            "seed": run.recipe.seed,
            "note": f"{rendered} of {after['n']} test studies are rendered phantoms" if after and rendered else None,
            "status": "complete",
        }
    )
    if after is not None:
        print_evaluation(log.console, after, "test split after training")
        constant = after["constant"].get("total")
        if constant is not None and after["mean_reward"] <= constant:
            log.say(
                f"mean reward {after['mean_reward']:.3f} on the test split is not above the {constant:.3f} of one "
                "training report given to every study: this policy has learned nothing that needs looking "
                "(docs/rewards.md)"
            )
    if run.ranks.is_main:
        labels = {} if run.rewards is None else run.rewards.labels
        references = {study_id: values_of_classes(classes) for study_id, classes in labels.items()}
        log.say(f"page: {write_page(run.directory, run.studies['test'] + run.studies['train'], references=references)}")
    log.close()
    run.close()


def is_finished(recipe: Recipe, ranks: Ranks) -> bool:
    """True, on every rank, where RUN holds the summary of a complete run; says so."""
    path = recipe.output_dir / "summary.json"
    done: bool = ranks.agree(path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "complete")
    if done and ranks.is_main:
        print(f"{recipe.output_dir}: this run is complete; remove it or set another output_dir to train again")
    return done


def _read_studies(recipe: Recipe, ranks: Ranks, task: str) -> dict[str, list[Study]]:
    """The recipe's three splits; rank 0 opens every image once, other nodes' ranks see whether theirs are there, for
    everybody.
    """
    studies, needed = read_splits(recipe, task=task)
    problem, shown = None, [study for part in needed for study in studies[part]]
    if recipe.data.check_images and ranks.is_main:
        try:
            check_images(shown)
        except ValueError as error:
            problem = str(error)
    elif recipe.data.check_images and ranks.node.first:
        problem = nodes.missing_images(shown, ranks)
    problems = [problem for problem in ranks.gather(problem) if problem is not None]
    if problems:
        raise RecipeError("\n".join(problems))
    return studies


def _claim_directory(recipe: Recipe, ranks: Ranks, task: str) -> None:
    """Make RUN, refuse a disk that cannot hold it, and write what the run is; an evaluation leaves what a training
    wrote there.
    """
    problem = None
    if ranks.is_main:
        try:
            recipe.output_dir.mkdir(parents=True, exist_ok=True)
            check_disk(recipe, recipe.output_dir)
            if not os.access(recipe.output_dir, os.W_OK):
                problem = f"output_dir {recipe.output_dir}: not writable"
            elif task != "evaluate" or not (recipe.output_dir / "config.yaml").is_file():
                write_text_atomically(recipe.output_dir / "config.yaml", dump_recipe(recipe))
                write_environment(
                    recipe.output_dir, world_size=ranks.world_size, device=str(ranks.device), seed=recipe.seed
                )
        except RecipeError as error:
            problem = str(error)
        except OSError as error:
            problem = f"output_dir {recipe.output_dir}: cannot be written ({error.strerror}); set another output_dir"
    problem = ranks.agree(problem)
    if problem is not None:
        raise RecipeError(problem)
