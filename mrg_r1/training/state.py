"""What a run keeps between its steps, whether GRPO or SFT takes them: how it starts or goes on, what its checkpoints
hold, when it stops, what it leaves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.data.loader import StudyLoader
from mrg_r1.data.order import rare_finding_weights
from mrg_r1.engine.checkpoint import latest_step, load_checkpoint, save_checkpoint
from mrg_r1.engine.faults import NotFinite, Requeue, Signals, any_signal
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.evaluation.evaluate import short_summary
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.reward.service.interface import RewardsMissing
from mrg_r1.tracking.evaluation_tables import print_evaluation
from mrg_r1.tracking.log import Clock, RunLog
from mrg_r1.tracking.page import write_page
from mrg_r1.tracking.terminal import Budget
from mrg_r1.training.controls import control_words
from mrg_r1.training.preflight import Task
from mrg_r1.training.resume import what_rounds_otherwise
from mrg_r1.training.run import Run, build_engine, open_run
from mrg_r1.training.validation import settle_best

_NEW: dict[str, Any] = {"step": 0, "best": None, "seconds": {}}  # the record of a run without a checkpoint


@dataclass
class RunState:
    """A run between its steps.

    Attributes:
        engine_if_any: None where nothing is learned (`phases=rollout`).
        record: of the checkpoint that the run goes on from; `start` is its step.
        before: the test split's evaluation before training; None where there is none.
        best: step and score of the policy that is kept.
        skipped_in_a_row: steps, the last one among them, that left updates out.
        own: what a checkpoint holds of this task alone, asked for as it is written.
    """

    run: Run
    engine_if_any: Engine | None
    loader: StudyLoader
    log: RunLog
    clock: Clock
    signals: Signals
    record: dict[str, Any]
    before: dict[str, Any] | None
    best: dict[str, Any] | None
    skipped_in_a_row: int
    own: Callable[[], dict[str, Any]] = dict

    @property
    def engine(self) -> Engine:
        if self.engine_if_any is None:
            raise RuntimeError("nothing is learned here: there is no engine")
        return self.engine_if_any

    @property
    def start(self) -> int:
        step: int = self.record["step"]
        return step

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the loop over steps: a signal waits for the end of its step; an end that all ranks come to together
        closes the labelers.
        """
        self.signals.deferring = True
        # The libraries' objects, of which there are some hundred thousand, outlive the run: the collector, which steps
        # call up again and again, would walk through them each time.
        gc.collect()
        gc.freeze()
        try:
            yield
        except (NotFinite, Requeue, RewardsMissing):
            self.run.close()
            raise
        self.signals.deferring = False
        self.loader.close()

    def log_step(self, step: int, metrics: dict[str, Any], budget: Budget | None = None) -> None:
        """Write the metrics of the step just taken, and count it where it left updates out.

        Before its checkpoint: what a killed run wrote too much is cut off at resuming, what it had not written would be
        lost.

        Args:
            budget: of a run which a time ends.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.get("policy/skipped_updates") else 0
        self.log.log(step, metrics | self.clock.end_step(), self.run.take_validated(), budget)

    def end_step(self, step: int, *, last: bool, due: bool = False) -> None:
        """Write a checkpoint where it is time for one, and stop where the run is asked to or cannot go on.

        Args:
            step: the one just taken, counted from 0.
            last: the run ends with it anyway.
            due: a checkpoint is wanted, whatever `checkpoint.every` says.

        Raises:
            NotFinite: `engine.max_skipped` steps in a row have left updates out.
            Requeue: some rank has had a signal.
        """
        recipe, done = self.run.recipe, step + 1
        signalled = any_signal(self.run.ranks.gather(self.signals.received))
        failing = self.skipped_in_a_row >= recipe.engine.max_skipped
        if self.engine_if_any is not None and (
            last or due or signalled or failing or done % recipe.checkpoint.every == 0
        ):
            with self.clock.phase("checkpoint"):
                self.save(done)
        if failing:
            kept = self.run.directory / "not_finite"
            batches = f"; their batches are in {kept}" if kept.is_dir() else ""
            raise NotFinite(
                f"{self.skipped_in_a_row} steps in a row had a loss, gradient or reward that is not finite "
                f"(engine.max_skipped), the last one step {step}{batches}; the weights are as they were before them, "
                "and in the checkpoint; a smaller optimizer.learning_rate or float32 may help"
            )
        if signalled and not last:
            kept_as = "checkpoint" if self.engine_if_any is not None else "its experience"
            raise Requeue(f"stopped by {signalled} after step {done} of {recipe.steps}, {kept_as} written")

    def save(self, done: int) -> None:
        """Write RUN/checkpoints/step_`done`. Every rank calls this."""
        recipe = self.run.recipe
        extra = {
            "best": self.best,
            "seconds": self.clock.totals,
            "cpu_seconds": self.clock.training_cpu_seconds,
            "labeler_cpu_seconds": self.clock.labeler_totals,
            "skipped_in_a_row": self.skipped_in_a_row,
            "position": self.loader.position(done),
            "studies": self.loader.fingerprint,
            "recipe": recipe.model_dump(mode="json"),
            **self.own(),
        }
        self.log.sync()
        save_checkpoint(
            self.engine,
            self.run.directory / "checkpoints",
            step=done,
            extra=extra,
            keep=recipe.checkpoint.keep,
            best=self.best["step"] if self.best else None,
        )
        if self.run.ranks.is_main:
            settle_best(self.run.directory, self.best)
        self.run.ranks.barrier()

    def save_what_was_learned(self, step: int) -> None:
        """Before `step` could be taken: a checkpoint, unless it is on the disk or nothing was learned since the
        start.
        """
        if step > self.start and latest_step(self.run.directory / "checkpoints") != step:
            self.save(step)

    def evaluate_after(self) -> dict[str, Any] | None:
        """The test split's evaluation after training, where the recipe wants one."""
        with self.clock.phase("evaluation"):
            if not _evaluates(self.run.recipe):
                return None
            return self.run.evaluate_test("test", title="evaluating after")

    def finish(self, after: dict[str, Any] | None) -> None:
        """RUN/summary.json, the closing table and the page; the run is over."""
        run, log, clock = self.run, self.log, self.clock
        rendered = after["rendered"] if after else 0
        run.write_summary(
            {
                "before": None if self.before is None else short_summary(self.before),
                "after": None if after is None else short_summary(after),
                "seconds": {name: round(seconds, 2) for name, seconds in clock.totals.items()},
                "training_seconds": round(clock.training_seconds, 2),
                "training_cpu_seconds": round(clock.training_cpu_seconds, 2),
                "labeler_cpu_seconds": {name: round(spent, 2) for name, spent in clock.labeler_totals.items()},
                "steps": run.recipe.steps,
                "best": self.best,
                "world_size": run.ranks.world_size,
                "zero_stage": None if self.engine_if_any is None else self.engine_if_any.stage,
                "seed": run.recipe.seed,
                "control": run.recipe.control,
                "lora_targets": _lora_targets(run),
                "note": f"{rendered} of {after['n']} test studies are rendered phantoms"
                if after and rendered
                else None,
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
            labels = {} if run.rewards_if_any is None else run.rewards_if_any.labels
            references = {study_id: values_of_classes(classes) for study_id, classes in labels.items()}
            page = write_page(run.directory, run.studies["test"] + run.studies["train"], references=references)
            log.say(f"page: {page}")
        log.close()
        run.close()


def start_training(
    recipe: Recipe,
    ranks: Ranks,
    signals: Signals,
    clock: Clock,
    *,
    task: Task,
    batch_size: int,
    make_trainable: Callable[[Run], None],
) -> RunState:
    """Open a run, evaluate it, and bring it to where its newest checkpoint was. Every rank calls this.

    Args:
        batch_size: studies a step over all ranks.
        make_trainable: puts LoRA on the policy, or lets every parameter be trained.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named; before any model is loaded.
        CheckpointError: there are checkpoints, and none that this run can go on from.
    """
    with clock.phase("start"):
        run = open_run(recipe, ranks, task=task)
        clock.count_labelers(run.labeler_cpu_seconds, sharing=ranks.node.size)
    with clock.phase("evaluation"):
        before = None
        if _evaluates(recipe) and recipe.evaluation.before:
            before = run.evaluate_test("test_before", title="evaluating before")
    with clock.phase("start"):
        make_trainable(run)
        engine = build_engine(run)
        record = load_checkpoint(engine, run.directory / "checkpoints", needed=tuple(_NEW)) or _NEW
        if ranks.is_main:
            settle_best(run.directory, record["best"])
        ranks.barrier()
        # of the run before it was interrupted
        clock.add(record["seconds"], record.get("cpu_seconds", 0.0), record.get("labeler_cpu_seconds"))
    state = open_state(run, signals, clock, record=record, batch_size=batch_size, engine=engine, before=before)
    if recipe.control is not None:
        state.log.say(f"control: {control_words(recipe)}")
    if _lora_targets(run) not in (None, "language"):
        state.log.say(f"LoRA on {_lora_targets(run)}")
    if state.start:
        state.log.say(f"resuming {run.directory} after step {state.start} of {recipe.steps}")
        reasons = what_rounds_otherwise(record, recipe, world_size=ranks.world_size, stage=engine.stage)
        if reasons:
            state.log.say(f"no longer to the last bit the uninterrupted run: {'; '.join(reasons)}")
    if run.rewards_if_any is not None and run.rewards.constant is None and run.studies["train"]:
        state.log.say("no training study has a report to give to every study: reward/constant is left out")
    run.policy.train()
    return state


def open_state(
    run: Run,
    signals: Signals,
    clock: Clock,
    *,
    record: dict[str, Any],
    batch_size: int,
    engine: Engine | None = None,
    before: dict[str, Any] | None = None,
) -> RunState:
    """The state of a run that goes on from `record`, with its studies and its log."""
    return RunState(
        run=run,
        engine_if_any=engine,
        loader=open_loader(run, record, batch_size=batch_size),
        log=_open_log(run, record["step"], clock),
        clock=clock,
        signals=signals,
        record=record,
        before=before,
        best=record.get("best"),
        skipped_in_a_row=record.get("skipped_in_a_row", 0),
    )


def _lora_targets(run: Run) -> str | None:
    """None where every parameter is trained."""
    whole = run.task == "sft" and run.recipe.sft.trainable == "all"
    return None if whole else run.recipe.policy.lora.targets


def _evaluates(recipe: Recipe) -> bool:
    """Whether the test split is evaluated: saved experience has no rewards to do it with."""
    return recipe.evaluation.test and recipe.phases == "all"


def open_loader(run: Run, record: dict[str, Any], *, batch_size: int) -> StudyLoader:
    """This rank's studies, from the one at which the run of the checkpoint's `record` had come.

    The weights of `data.sampling` come from the labeler's reading of the training reports, which is what the reward
    compares with; the manifest's own `labels.said` may be null, and counts where there is no report.
    (`phases=update` has no labeler, and takes no study from here.)

    Raises:
        RecipeError: the studies or their weights are not those of the checkpoint, so that its position means others.
    """
    recipe, studies = run.recipe, run.learned
    weights = None
    if run.rewards_if_any is not None and recipe.data.sampling == "rare_findings":
        weights = rare_finding_weights(run.rewards.classes_of(studies))
    loader = StudyLoader(
        studies,
        run.build,
        seed=recipe.seed,
        batch_size=batch_size,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        weights=weights,
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


def _open_log(run: Run, start: int, clock: Clock) -> RunLog:
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
