"""What a recipe points at, as a launch and `mrg-r1 doctor` both check it: splits, the ZeRO stage, the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.data.context import with_prior_reports
from mrg_r1.data.study import read_manifest
from mrg_r1.reward.terms import needing_words
from mrg_r1.types import Study

_NEEDED_BYTES = 64 * 1024**2  # logs, completions and pages; checkpoints are added


def read_splits(recipe: Recipe, *, task: str = "grpo") -> tuple[dict[str, list[Study]], list[str]]:
    """The recipe's studies by part (train, val, test), and the parts that it cannot do without. No image is opened.

    Args:
        task: `evaluate` needs the test split alone, whose studies may be without references; they are then left out of
            the others.

    Raises:
        RecipeError: a part that is needed has no study; a prior report that is not there; references of a part of the
            test split; SFT without a report to learn; a reward term that reads words, and a study that has labels
            alone.
        ManifestError, OSError: the manifest cannot be read.
    """
    names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    everything = read_manifest(recipe.data.manifest, references=task != "evaluate")
    if "prior_report" in recipe.data.context:
        try:
            everything = with_prior_reports(everything)
        except ValueError as error:
            raise RecipeError(f"{recipe.data.manifest}: {error}") from error
    studies = {part: [study for study in everything if study.split == name] for part, name in names.items()}
    needed = (
        ["train"]
        + (["val"] if recipe.evaluation.every or recipe.sft.stop_at else [])
        + (["test"] if recipe.evaluation.test else [])
    )
    if recipe.phases != "all":  # nothing is validated or evaluated
        needed, studies = ["train"], {"train": studies["train"], "val": [], "test": []}
    if task == "evaluate":
        studies = {part: [study for study in studies[part] if study.has_reference or part == "test"] for part in names}
        scored = _referenced(recipe, studies["test"])
        # what these switches stand for comes from the training reports
        trained = recipe.reward.ccs_weights == "inverse_prevalence" or recipe.reward.threshold == "auto"
        needed = ["train", "test"] if scored and trained else ["test"]
    for part in needed:
        if not studies[part]:
            found = sorted({study.split for study in everything})
            raise RecipeError(
                f"data.{part}_split {names[part]!r}: {recipe.data.manifest} has no study of that split; it has {found}"
            )
    if task == "sft" and not studies_to_learn(studies["train"], task=task):
        raise RecipeError(
            f"data.train_split {names['train']!r}: its {len(studies['train'])} studies in {recipe.data.manifest} have "
            "labels and no report, and SFT learns reports; write reports, or train with launch/train.py (GRPO), which "
            "labels are enough for"
        )
    _refuse_without_words(recipe, studies, task=task)
    return studies, needed


def studies_to_learn(train: Sequence[Study], *, task: str) -> list[Study]:
    """The training studies that steps are made of: SFT learns reports, and leaves out those with labels alone."""
    return [study for study in train if task != "sft" or study.report is not None]


def _refuse_without_words(recipe: Recipe, studies: Mapping[str, Sequence[Study]], *, task: str) -> None:
    """
    Raises:
        RecipeError: a term reads the reference's words, and a study that is rewarded has labels alone.
    """
    wanting = needing_words(recipe.reward.weights)
    if not wanting or recipe.phases == "update":  # nothing is rewarded
        return
    parts = {"grpo": ("train", "val", "test"), "sft": ("val", "test"), "evaluate": ("test",)}[task]
    # of an evaluation without any reference nothing is scored
    rewarded = [study for part in parts for study in studies[part] if study.has_reference]
    bare = [study for study in rewarded if study.report is None]
    if bare:
        raise RecipeError(
            f"reward.weights {', '.join(wanting)}: read the reference's words, and {len(bare)} of the {len(rewarded)} "
            f"studies to be rewarded in {recipe.data.manifest} have labels and no report ({bare[0].id!r} of split "
            f"{bare[0].split!r} first); take the term out, or these studies (the user's own terms are handed "
            "references, so that they count as reading them)"
        )


def _referenced(recipe: Recipe, studies: Sequence[Study]) -> bool:
    """Whether these studies of the test split have references.

    Raises:
        RecipeError: some have one and some have none: scores of a part would be taken for those of the whole.
    """
    bare = [study.id for study in studies if not study.has_reference]
    if bare and len(bare) < len(studies):
        raise RecipeError(
            f"{recipe.data.manifest}: {len(bare)} of {len(studies)} studies of data.test_split "
            f"{recipe.data.test_split!r} have neither report nor labels ({bare[0]!r} first); give them a split of "
            "their own, of which reports are written without scores"
        )
    return not bare


def check_stage(recipe: Recipe, *, stage: int, task: str) -> None:
    """Refuse what cannot be done over partitioned weights.

    Raises:
        RecipeError: ZeRO-3 with a switch that wants whole weights.
    """
    if stage != 3:
        return
    if task == "sft" and recipe.sft.trainable == "all":
        raise RecipeError(
            f"sft.trainable all with {recipe.engine.deepspeed} (stage 3): only LoRA is trained over partitioned "
            "weights; set sft.trainable=lora, or engine.deepspeed=ds_configs/zero2.json"
        )
    if recipe.rollout.reuse_prefill:
        raise RecipeError(
            f"rollout.reuse_prefill with {recipe.engine.deepspeed} (stage 3): the prefill's graph would hold the "
            "weights of every layer; set it to false, or engine.deepspeed=ds_configs/zero2.json"
        )


def check_disk(output_dir: Path, *, policy: Path, trains_all: bool, keep: int) -> str:
    """Refuse a disk that cannot hold the run's checkpoints.

    Args:
        output_dir: RUN, which may have to be made yet.
        policy: the checkpoint that is trained.
        trains_all: every parameter is, and not LoRA alone.
        keep: checkpoints that are kept.

    Returns:
        What is free and what is needed, in words.

    Raises:
        RecipeError: too little is free.
    """
    free = shutil.disk_usage(_nearest(output_dir)).free
    weights = sum(path.stat().st_size for path in policy.glob("*.safetensors"))
    # LoRA is small beside the weights it adapts; all parameters mean live, master and two moments, twice while one is
    # replaced
    needed = _NEEDED_BYTES + (weights * 8 * (keep + 1) if trains_all else weights // 2)
    if free < needed:
        raise RecipeError(
            f"output_dir {output_dir}: {free / 1e9:.2f} GB free on that disk, about {needed / 1e9:.2f} GB "
            "needed for checkpoints; free some, lower checkpoint.keep or set another output_dir"
        )
    return f"{free / 1e9:.1f} GB free, about {needed / 1e9:.2f} GB needed for checkpoints"


def check_output(output_dir: Path) -> Path:
    """Refuse an output_dir that could not be made or written; nothing is left there.

    Returns:
        The folder itself or, where it is not there yet, the nearest one above it that is.

    Raises:
        RecipeError: a file stands in its place or in its way, or this user may not write there.
    """
    there = _nearest(output_dir)
    if not there.is_dir():
        raise RecipeError(f"output_dir {output_dir}: {there} is a file; set another output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"output_dir {output_dir}: {there} is not writable for this user; set another output_dir")
    return there


def _nearest(path: Path) -> Path:
    """The path itself or, where it is not there yet, the nearest one above it that is."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def most_images(studies: Sequence[Study]) -> int:
    """Images of the study that has most."""
    return max((len(study.images) for study in studies), default=1)
