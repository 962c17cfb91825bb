"""`launch/evaluate.py`: a run's policy over a split, of the run's own manifest or another; scores where there are
references, else reports.

The run's own files stay as they are: RUN/config.yaml remains the training's recipe, and another manifest's results have
its name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mrg_r1.config.recipe import Recipe, RecipeError, load_run, with_trained_policy
from mrg_r1.console import wide_console
from mrg_r1.engine.ranks import Ranks
from mrg_r1.evaluation.evaluate import write_evaluation
from mrg_r1.evaluation.generate import NOT_FOR_CLINICAL_USE, add_labels, reports_of
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.labeler import Labeler
from mrg_r1.policy.lora import load_adapter
from mrg_r1.tracking.evaluation_tables import print_evaluation
from mrg_r1.training.run import Run, open_run
from mrg_r1.types import Study


def evaluate_run(recipe: Recipe, ranks: Ranks) -> None:
    """Evaluate the recipe's test split under what RUN has trained (RUN/adapter, RUN/policy), or under the recipe's
    policy as it is.

    Leaves RUN/evaluation/NAME.json and NAME_predictions.jsonl, or, of studies without references, NAME_reports.jsonl.
    NAME is the split's, after the manifest's where that is not the run's own.
    """
    recipe = with_trained_policy(recipe, recipe.output_dir)
    name = ranks.agree(evaluation_name(recipe))  # before an untrained RUN is given its config.yaml
    run = open_run(recipe, ranks, task="evaluate")
    studies = run.studies["test"][: recipe.evaluation.max_test_studies]
    scored = run.rewards_if_any is not None
    path = run.directory / "evaluation" / f"{name}{'_predictions' if scored else '_reports'}.jsonl"
    if name != recipe.data.test_split:
        _keep_others(path, studies, recipe)
    adapter = run.directory / "adapter"
    if (adapter / "adapter_config.json").is_file():
        load_adapter(run.policy, adapter)
    if scored:
        result, predictions = run.evaluate(studies, title=f"evaluating {name}")
        if ranks.is_main:
            write_evaluation(path.parent, name, result | {"manifest": str(recipe.data.manifest)}, predictions)
            print_evaluation(wide_console(), result, f"{name} split")
    else:
        _write_reports(run, studies, path)
    run.close()


def evaluation_name(recipe: Recipe) -> str:
    """What the files of an evaluation are called: the split; before it the manifest's name, if RUN is of another
    manifest.

    `data/iu/manifest.jsonl`, as `mrg-r1 prepare` calls it, is named after its folder.
    """
    split, manifest, trained = recipe.data.test_split, recipe.data.manifest, recipe.output_dir / "config.yaml"
    if not trained.is_file() or load_run(recipe.output_dir).data.manifest.resolve() == manifest.resolve():
        return split
    return f"{manifest.resolve().parent.name if manifest.stem == 'manifest' else manifest.stem}_{split}"


def _keep_others(path: Path, studies: list[Study], recipe: Recipe) -> None:
    """Refuse to write over the results of a third manifest, one of the same name.

    Raises:
        RecipeError: the file is there, and of other studies.
    """
    if path.is_file():
        there = {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()}
        if there != {study.id for study in studies}:
            raise RecipeError(
                f"{path}: there already, and of other studies than {recipe.data.manifest}, split "
                f"{recipe.data.test_split!r}; move it away, or give the manifest another name"
            )


def _write_reports(run: Run, studies: list[Study], path: Path) -> None:
    """Greedy reports of studies that have no references, with the labeler's reading, a line a study."""
    recipe, ranks = run.recipe, run.ranks
    labeler = None
    if ranks.is_main:  # before the reports: a labeler that cannot be loaded is to cost no hour
        dtype = getattr(torch, recipe.reward.dtype)
        labeler = Labeler.load(
            recipe.reward.labeler, tokenizer=recipe.reward.tokenizer, device=ranks.device, dtype=dtype
        )
    rows = reports_of(
        run.policy,
        studies,
        build=run.build,
        mode=recipe.prompt.mode,
        max_new_tokens=recipe.rollout.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        ranks=ranks,
    )
    if labeler is None:
        return
    add_labels(rows, labeler.label, beat=ranks.beat)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    truncated, malformed = (sum(row[what] for row in rows) for what in ("truncated", "malformed"))
    print(
        f"{path}: {len(rows)} reports, {truncated} truncated, {malformed} malformed; the studies have no "
        "references: nothing is scored"
    )
    print(NOT_FOR_CLINICAL_USE)
