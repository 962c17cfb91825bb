"""Supervised fine-tuning: the token-level baseline, and the cold start that GRPO needs (docs/method.md §3).

The loss is the mean over all target tokens of the global batch of -log p, of the very distribution that a rollout
samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mrg_r1.config.control import at_equal_time
from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.data.loader import StudyLoader
from mrg_r1.doctor.texts import text_to_learn, too_long
from mrg_r1.engine.faults import Signals
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.policy.load import save_policy
from mrg_r1.policy.logprobs import micro_batches
from mrg_r1.policy.lora import add_lora, save_adapter
from mrg_r1.tracking.log import Clock
from mrg_r1.tracking.terminal import Budget
from mrg_r1.training.preflight import is_finished
from mrg_r1.training.run import Run
from mrg_r1.training.state import start_training
from mrg_r1.training.utilisation import Tokens, utilisation
from mrg_r1.types import Study

# of a validation, what metrics.jsonl has
_VALIDATED = (
    "disease_micro13",
    "disease_macro13",
    "mean_reward",
    "format_rate",
    "held_out_disease_micro13",
    "hacking_gap",
)


def sft_step(
    step: int, *, run: Run, engine: Engine, loader: StudyLoader, clock: Clock
) -> dict[str, tuple[Tensor, Tensor]]:
    """One optimizer step on this rank's share of the batch. Returns metrics as (sum, count) pairs."""
    with clock.phase("load"):
        prompts = loader.batch(step)
    with clock.phase("targets"):
        targets = [target_ids(run, study) for study in loader.studies_of(step)]
        ids = torch.full((len(targets), max(map(len, targets))), run.policy.pad_id)  # [B, C]
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, target in enumerate(targets):
            ids[row, : len(target)] = torch.tensor(target)
            mask[row, : len(target)] = True
        tokens = float(run.ranks.sum(mask.sum()))
    total = torch.zeros((), dtype=torch.float64)
    with clock.phase("update"):
        budget, own = run.recipe.engine.micro_batch_tokens, torch.arange(len(ids))
        # ranks meet in each
        passes = max(run.ranks.gather(len(micro_batches(prompts, mask, own, token_budget=budget))))
        plan = micro_batches(prompts, mask, own, token_budget=budget, at_least=passes)
        for number, rows in enumerate(plan):
            part = prompts.select(rows.tolist()).to(run.ranks.device)
            part_ids, part_mask = ids[rows].to(run.ranks.device), mask[rows].to(run.ranks.device)
            study_of_row = torch.arange(len(part), device=run.ranks.device)
            logp, _ = engine(part, run.policy.encode_images(part), part_ids, part_mask, study_of_row)
            engine.backward(-logp.sum() / tokens, last=number + 1 == len(plan))
            total -= logp.detach().double().sum().cpu()
    skipped = torch.tensor(float(engine.skipped))
    read, scored = sum(prompts.lengths), int(mask.sum())
    return {
        "loss": (total, mask.sum()),
        "policy/skipped_updates": (skipped, torch.tensor(1.0)),
        "time/load_share": clock.share("load"),
        "sft/target_tokens": (mask.sum(), torch.tensor(float(len(targets)))),
        **clock.costs(scored, world_size=run.ranks.world_size),
        **utilisation(
            run.policy.shape,
            Tokens(prompts=read, prompts_forward=read, completions=scored - len(targets), scored=scored),
            lora_rank=run.recipe.policy.lora.rank if run.recipe.sft.trainable == "lora" else None,
            seconds=float(clock.share("update")[0]),
            dtype=run.dtype,
        ),
    }


def target_ids(run: Run, study: Study) -> list[int]:
    """The ids to learn for a study, EOS last.

    Raises:
        RecipeError: as `doctor.texts.check_targets` before the run.
    """
    text, limit = text_to_learn(study, run.recipe), run.recipe.rollout.max_new_tokens
    ids: list[int] = run.policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [run.policy.end_id]
    if len(ids) > limit:
        raise RecipeError(too_long(study, len(ids), limit))
    return ids


def train(recipe: Recipe, ranks: Ranks) -> None:
    """Run or resume an SFT recipe. Leaves RUN/adapter (LoRA) or RUN/policy (all parameters, a checkpoint directory)."""
    if is_finished(recipe.output_dir, ranks):
        return
    recipe = ranks.from_main(lambda: at_equal_time(recipe, world_size=ranks.world_size), RecipeError)

    def make_trainable(run: Run) -> None:
        if recipe.sft.trainable == "lora":
            add_lora(run.policy, **recipe.policy.lora.model_dump(), seed=recipe.seed)
        else:
            run.policy.requires_grad_(True)

    clock = Clock(ranks.beat)
    state = start_training(
        recipe,
        ranks,
        Signals(),
        clock,
        task="sft",
        batch_size=recipe.sft.batch_size,
        make_trainable=make_trainable,
    )
    run, engine, log = state.run, state.engine, state.log
    left_out = len(run.studies["train"]) - len(run.learned)
    if left_out:
        log.say(f"{left_out} of {len(run.studies['train'])} training studies have no report: SFT leaves them out")
    stopped: str | None = state.record.get("stopped")
    state.own = lambda: {"stopped": stopped}
    budget = _budget(recipe, ranks, clock)
    with state.stepping():
        for step in range(state.start, recipe.steps):
            if stopped is not None:
                break
            rate = engine.set_learning_rate(step, spent=0.0 if budget is None else budget.share)
            parts = sft_step(step, run=run, engine=engine, loader=state.loader, clock=clock)
            metrics: dict[str, Any] = {
                **ranks.reduce_metrics(parts),
                "policy/grad_norm": engine.grad_norm(),
                "policy/learning_rate": rate,
            }
            if recipe.evaluation.every and (step + 1) % recipe.evaluation.every == 0:
                with clock.phase("validation"):
                    result, _ = run.validate()
                metrics |= {f"validation/{key}": result[key] for key in _VALIDATED if result[key] is not None}
                stopped = _taught_enough(recipe, result)
            budget = _budget(recipe, ranks, clock)
            if budget is not None and budget.share >= 1:
                stopped = f"{budget.limited_by} reached"
            state.log_step(step, metrics, budget)
            state.best = {"step": step + 1, "score": None}  # the last policy is the one that is kept
            state.end_step(step, last=stopped is not None or step + 1 == recipe.steps)

    if stopped is not None:
        log.say(f"stopped early: {stopped}")
    elif recipe.sft.stop_at is not None:
        log.say(f"sft.stop_at {recipe.sft.stop_at} was not reached in {recipe.steps} steps")
    if ranks.is_main:
        if recipe.sft.trainable == "lora":
            save_adapter(run.policy, run.directory / "adapter")
        else:
            save_policy(run.policy, run.directory / "policy", source=recipe.policy.path)
    ranks.barrier()
    state.finish(state.evaluate_after())


def _taught_enough(recipe: Recipe, result: dict[str, Any]) -> str | None:
    """Why a validation ends the run, or None."""
    stop_at, reached = recipe.sft.stop_at, result["disease_micro13"]
    if stop_at is None or reached < stop_at:
        return None
    return f"validation disease_micro13 {reached:.3f} reached sft.stop_at {stop_at}"


def _budget(recipe: Recipe, ranks: Ranks, clock: Clock) -> Budget | None:
    """The time that ends the run, of two the one of which more is spent, or None. Every rank calls this; rank 0's clock
    decides.
    """
    sft = recipe.sft
    limits = [
        Budget(f"sft.{name} {limit}", spent, limit, kind)
        for name, limit, spent, kind in (
            ("max_seconds", sft.max_seconds, clock.training_seconds, "seconds"),
            ("max_cpu_seconds", sft.max_cpu_seconds, clock.training_cpu_seconds, "processor seconds"),
        )
        if limit is not None
    ]
    return ranks.agree(max(limits, key=lambda budget: budget.share)) if limits else None
