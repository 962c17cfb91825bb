"""What every launch works with: studies, policy, labelers, prompts, loaded once the checks have passed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mrg_r1.config.recipe import Recipe
from mrg_r1.cores import read_cores
from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.doctor.inputs import studies_to_learn
from mrg_r1.engine.partition import RankPartition
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.evaluation.evaluate import evaluate, write_evaluation
from mrg_r1.files import write_text_atomically
from mrg_r1.metrics.radeval import RadEval
from mrg_r1.metrics.renamed import todays_names
from mrg_r1.policy import flash_attention
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.lora import merge_adapter
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.tracking.sharing import Sample
from mrg_r1.training import rewards
from mrg_r1.training.preflight import DTYPES, Task, preflight
from mrg_r1.training.rewards import RunRewards
from mrg_r1.types import Study


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
    rewards_if_any: RunRewards | None
    dtype: torch.dtype
    held_out: HeldOutLabeler | None = None  # on rank 0, where the recipe has one
    task: Task = "grpo"
    validated: list[Sample] = field(default_factory=list)

    @property
    def learned(self) -> list[Study]:
        """The training studies that steps are made of."""
        return studies_to_learn(self.studies["train"], task=self.task)

    @property
    def rewards(self) -> RunRewards:
        if self.rewards_if_any is None:
            raise RuntimeError("nothing is rewarded here: there are no rewards to ask for")
        return self.rewards_if_any

    def labeler_cpu_seconds(self) -> float:
        """Processor seconds that the labelers' processes have taken so far, of those that this rank keeps."""
        keepers = (self.rewards_if_any, self.held_out)
        supervisors = [keeper.supervisor for keeper in keepers if keeper is not None]
        return sum(supervisor.cpu_seconds for supervisor in supervisors if supervisor is not None)

    def close(self) -> None:
        """The run needs no more rewards."""
        if self.rewards_if_any is not None:
            self.rewards_if_any.close()
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
            reward_service=self.rewards.service,
            context_of=self.rewards.context_of,
            ranks=self.ranks,
            max_new_tokens=self.recipe.rollout.max_new_tokens,
            batch_size=self.recipe.evaluation.batch_size,
            seed=self.recipe.seed,
            bootstrap_samples=samples or self.recipe.evaluation.bootstrap_samples,
            train=self.rewards.classes("train") if samples is None and self.studies["train"] else None,
            labeler=self.rewards.labeler,
            said_first=self.recipe.reward.references == "said",
            held_out=self.held_out,
            cleaning=None if samples is not None or cleaning == "off" else cleaning,
            start_radeval=self._start_radeval if samples is None and self.recipe.evaluation.radeval else None,
            title=title,
        )
        self.policy.train(was_training)
        return answer

    def _start_radeval(self) -> RadEval:
        """RadEval's process; it has the cores, or a card, to itself: everybody waits for it."""
        settings = self.recipe.radeval.settings(tuple(self.recipe.evaluation.radeval), threads=read_cores().usable)
        return RadEval(settings, log=self.directory / "radeval.log")

    def evaluate_test(self, name: str, *, title: str) -> dict[str, Any]:
        """Evaluate the test split into RUN/evaluation/NAME.json, or read what an interrupted run left there."""
        path = self.directory / "evaluation" / f"{name}.json"
        done = self.ranks.agree(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
        if done is not None:
            result: dict[str, Any] = todays_names(done)
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


def open_run(recipe: Recipe, ranks: Ranks, *, task: Task) -> Run:
    """Check everything that can be checked, then load what the run needs.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named; before any model is loaded.
    """
    checked = preflight(recipe, ranks, task=task)
    studies = checked.studies
    rewarded = recipe.phases != "update" and all(study.has_reference for study in studies["test"])
    has_held_out = rewarded and recipe.phases == "all"
    # the labelers are loaded by processes of their own while the policy is loaded here
    supervisor = rewards.start_service(recipe, ranks) if rewarded else None
    held_out_supervisor = rewards.start_held_out(recipe, ranks) if has_held_out else None
    policy = open_policy(recipe, ranks, checked.partition)
    build = open_builder(recipe, ranks, policy)
    met = {  # the studies whose references the run can need
        "train": studies["train"],
        "val": studies["val"][: recipe.evaluation.max_studies],
        "test": studies["test"][: recipe.evaluation.max_test_studies],
    }
    opened = rewards.open_rewards(recipe, ranks, supervisor, met) if rewarded else None
    held_out = None
    if opened is not None and has_held_out:
        held_out = rewards.open_held_out(
            recipe, ranks, held_out_supervisor, met["val"] + met["test"], rewarded=opened.labeler
        )
    return Run(
        recipe=recipe,
        ranks=ranks,
        directory=recipe.output_dir,
        studies=studies,
        policy=policy,
        build=build,
        rewards_if_any=opened,
        dtype=DTYPES[recipe.policy.dtype],
        held_out=held_out,
        task=task,
    )


def open_policy(recipe: Recipe, ranks: Ranks, partition: RankPartition | None) -> Policy:
    """The recipe's policy with its cold start merged into it, on this rank's device, with the kernels it asks for."""
    flash_attention.choose(recipe.policy.attention, device=ranks.device, dtype=DTYPES[recipe.policy.dtype])
    policy = load_policy(
        recipe.policy.path,
        dtype=DTYPES[recipe.policy.dtype],
        temperature=recipe.rollout.temperature,
        partition=partition,
    ).to(ranks.device)
    if recipe.policy.adapter is not None:
        merge_adapter(policy, recipe.policy.adapter)
    if recipe.policy.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy


def open_builder(recipe: Recipe, ranks: Ranks, policy: Policy) -> PromptBuilder:
    """What makes a study a prompt."""
    words = PromptWords(
        instruction=recipe.prompt.words,
        show_view=recipe.prompt.show_view,
        context=tuple(recipe.data.context),
        max_tokens=recipe.prompt.max_tokens,
    )
    processor = load_image_processor(
        recipe.policy.path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels
    )
    workers = recipe.data.workers
    return PromptBuilder(
        tokenizer=policy.tokenizer,
        image_processor=processor,
        layout=policy.layout,
        words=words,
        workers=(2 if ranks.device.type == "cuda" else 0) if workers is None else workers,
    )


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
