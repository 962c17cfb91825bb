"""What a run keeps and says between its steps: validations, the best adapter, batches that taught nothing, warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mrg_r1.evaluation.evaluate import short_summary
from mrg_r1.metrics.renamed import todays_names
from mrg_r1.policy.lora import save_adapter
from mrg_r1.tracking.collapse import WORDING_REMEDY, WORDING_ROSE
from mrg_r1.tracking.gaps import GapWatch
from mrg_r1.tracking.log import RunLog
from mrg_r1.training.experience import adapter_folder, keep_newest_adapters, write_step
from mrg_r1.training.looks import Looks, plus_minus
from mrg_r1.training.run import Run
from mrg_r1.types import Sampled

_WORDING = {  # key of an evaluation -> what it is
    "repeated_sentence": "reports in which a whole sentence stands twice",
    "repetition": "share of a report's sentences or phrases that were said before",
    "contradiction": "reports that affirm and deny one observation",
}
LOGP_GAP_WARNING = 0.05  # nats; bf16 of a sound rollout is seen at 0.004 on average


def keep_for_replay(run: Run, step: int, sampled: Sampled, *, problem: str | None = None) -> None:
    """Write a batch that could not be learned from, and the LoRA as the update left out found it, for `phases=update`.

    Args:
        problem: why there are no rewards; there was no update then, and nothing to repeat but the sampling.
    """
    folder = run.directory / "not_finite"
    if problem is None and run.ranks.is_main:
        adapter = adapter_folder(folder, step)
        shutil.rmtree(adapter, ignore_errors=True)
        save_adapter(run.policy, adapter)
        keep_newest_adapters(folder, run.recipe.engine.max_skipped)
    write_step(folder, step, sampled, recipe=run.recipe, ranks=run.ranks, problem=problem, own_weights=problem is None)


def warn_of_gap(log: RunLog, step: int, gap: float | None, correction: str) -> None:
    """Say where sampled and scored log-probs have come apart: the policy is then trained on samples of another one."""
    if gap is not None and gap > LOGP_GAP_WARNING:
        remedy = (
            "grpo.correction=tis weights it out"
            if correction == "none"
            else "grpo.correction=tis weights what its cap allows"
        )
        log.say(
            f"step {step}: sampling/logp_gap {gap:.3f} nats a token on average, over {LOGP_GAP_WARNING}; {remedy}; "
            "float32 closes it"
        )


def validate_before(run: Run, gaps: GapWatch, looks: Looks, log: RunLog) -> dict[str, Any] | None:
    """The validation that all later ones are compared with, of the policy before it is rewarded for anything: the first
    candidate for the best adapter. None without a validation split, or where `evaluation.before` is false.
    """
    if not run.recipe.evaluation.before or not run.studies["val"]:
        return None
    metrics: dict[str, Any] = {}
    best = keep_best(run, None, step=0, metrics=metrics, gaps=gaps, looks=looks, log=log)
    assert best is not None
    if run.ranks.is_main:
        settle_best(run.directory, best)  # a run without a checkpoint begins with this one
    run.ranks.barrier()
    held_out = ""
    if run.recipe.evaluation.held_out_labeler is not None:
        held_out = (
            f", validation/held_out_disease_micro13 {metrics['validation/held_out_disease_micro13']:.3f}, "
            f"validation/hacking_gap {metrics['validation/hacking_gap']:+.3f}"
        )
    log.say(
        f"before training, validation's {run.recipe.evaluation.select} {best['score']:.3f}"
        f"{plus_minus(metrics['validation/standard_error'])}{held_out}: what validations are compared with"
    )
    return best


def warn_at_close(run: Run, log: RunLog) -> None:
    """Say where a gap has widened, or repetition and contradiction have risen, between the test split's evaluations
    before and after training, as RUN/evaluation has them.
    """
    if not run.ranks.is_main:
        return
    watch, folder = GapWatch(), run.directory / "evaluation"
    results = []
    for name, when in (("test_before", "before training"), ("test", "after training, on the test split")):
        result = todays_names(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        results.append(result)
        lines = (folder / f"{name}_predictions.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [todays_names(json.loads(line)) for line in lines if line]
        for warning in watch.update(rows, _readers(result), when=when):
            log.say(warning)
    before, after = results
    for name, words in _WORDING.items():
        first, now = before.get(name), after.get(name)
        if first is not None and now is not None and now > first + WORDING_ROSE:
            log.say(f"{name} has risen from {first:.1%} to {now:.1%} on the test split ({words}); {WORDING_REMEDY}")


def _readers(result: dict[str, Any]) -> str:
    """Fingerprints of the labelers that an evaluation was read by."""
    held_out = result.get("held_out")
    return f"{result['labeler']['fingerprint']} {held_out['labeler']['fingerprint'] if held_out else '-'}"


def keep_best(
    run: Run,
    best: dict[str, Any] | None,
    *,
    step: int,
    metrics: dict[str, Any],
    gaps: GapWatch,
    looks: Looks,
    log: RunLog,
) -> dict[str, Any] | None:
    """Validate; where the score is the best so far, this adapter is laid ready to become RUN's (`settle_best`), once
    a checkpoint names it. Step 0 is the policy before training: what does not beat it is not kept. Without a validation
    split, the last is kept.
    """
    score: float | None = None
    if run.studies["val"]:
        result, rows = run.validate()
        for warning in gaps.update(rows, _readers(result), when=f"after step {step}" if step else "before training"):
            log.say(warning)
        score = result[run.recipe.evaluation.select] if run.recipe.evaluation.select in result else None
        score = result["definitions"][run.recipe.evaluation.select]["f1"] if score is None else score
        metrics |= {f"validation/{key}": value for key, value in short_summary(result).items() if value is not None}
        metrics |= {
            "validation/labeler_gap": result["labeler_gap"],
            "validation/no_finding_rate": result["no_finding_rate"],
            **{f"validation/{key}": result.get(key) for key in _WORDING},  # null where no report can be read
        }
        metrics |= looks.take(step, score, rows, best=best is None or score > best["score"])
    if best is None or score is None or score > best["score"]:
        best = {"step": step, "score": score}
        if run.ranks.is_main:
            half = run.directory / ".adapter.tmp"
            shutil.rmtree(half, ignore_errors=True)
            save_adapter(run.policy, half)
            ready = _ready(run.directory, step)
            shutil.rmtree(ready, ignore_errors=True)
            half.rename(ready)
        run.ranks.barrier()
    return best


def settle_best(directory: Path, best: dict[str, Any] | None) -> None:
    """Make RUN/adapter the one that the newest checkpoint names; others that lie ready are of steps that no checkpoint
    has, and go. To be called on rank 0, after a checkpoint and at a resume: whatever moment a kill takes, one of both
    folders is there.
    """
    ready = None if best is None else _ready(directory, best["step"])
    if ready is not None and ready.is_dir():
        shutil.rmtree(directory / "adapter", ignore_errors=True)
        ready.rename(directory / "adapter")
    for left in directory.glob(".adapter_step_*"):
        shutil.rmtree(left, ignore_errors=True)


def _ready(directory: Path, step: int) -> Path:
    return directory / f".adapter_step_{step}"
