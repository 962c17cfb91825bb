"""A small world for real runs: phantoms, a labeler, a random policy, and recipes that point at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from mrg_r1.data.prepare import phantoms
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.observations import classes_of_values, write_labels_csv
from mrg_r1.labels.reports import write_reports_csv
from mrg_r1.labels.training import train_labeler
from mrg_r1.policy.family import find_family


@contextmanager
def few_texts() -> Iterator[None]:
    """Data sets of phantoms come with 400 texts for a labeler and 40 that it was not taught: 10,000 take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "LABELER_TEXTS", 400)
        patch.setattr(phantoms, "HELD_OUT_TEXTS", 40)
        yield


@dataclass(frozen=True)
class World:
    """Everything that a recipe points at, small: 16 + 8 + 8 phantoms, a labeler, a random policy."""

    folder: Path
    policy: str = "policy"  # its folder, inside

    def of_family(self, family: str, *, layers: int) -> World:
        """The same with a policy of another family, which is made once."""
        if not (self.folder / family).is_dir():
            write_policy(self.folder, family, layers=layers)
        return replace(self, policy=family)

    def recipe(self, output: Path, *, name: str = "recipe.yaml") -> Path:
        """A GRPO recipe of four studies a step into `output`."""
        path = output.parent / name
        path.write_text(
            yaml.safe_dump(
                {
                    "output_dir": str(output),
                    "steps": 4,
                    "data": {"manifest": str(self.folder / "phantoms/manifest.jsonl"), "max_pixels": 3136},
                    "prompt": {"mode": "plain", "instruction": "Write.", "show_view": False},
                    "policy": {
                        "path": str(self.folder / self.policy),
                        "dtype": "float32",
                        "lora": {"rank": 4, "alpha": 8},
                    },
                    "rollout": {"max_new_tokens": 8},
                    "grpo": {"group_size": 3, "studies_per_step": 4},
                    "reward": {
                        "labeler": str(self.folder / "labeler"),
                        "weights": {"mccs": 0.75, "length": 0.25, "format": 0.0},
                    },
                    "optimizer": {"learning_rate": 1e-2},
                    "sft": {"batch_size": 4},
                    "engine": {"micro_batch_tokens": 96},
                    "evaluation": {
                        "batch_size": 8,
                        "bootstrap_samples": 100,
                        "lexical": "off",
                    },  # METEOR takes 25 s where Java runs
                    "tracking": {"wandb": "off"},
                    "checkpoint": {"every": 2},
                }
            )
        )
        return path


def build_world(folder: Path) -> World:
    """Write everything into a new folder; seconds."""
    splits = {"train": 16, "val": 8, "test": 8}
    with few_texts():
        write_phantoms(folder / "phantoms", preset="five", seed=0, side=56, splits=splits, workers=1)
    studies = read_manifest(folder / "phantoms/manifest.jsonl")
    write_reports_csv(folder / "reports.csv", {study.id: study.report for study in studies})
    write_labels_csv(folder / "labels.csv", {study.id: classes_of_values(study.said) for study in studies})
    train_labeler(folder / "reports.csv", folder / "labels.csv", folder / "labeler", size="tiny", passes=2)
    write_policy(folder, "qwen2_5_vl", name="policy", layers=2)
    return World(folder)


def write_policy(folder: Path, family: str, *, layers: int, name: str | None = None) -> None:
    """A family's random policy beside a world's studies, whose words it knows."""
    reports = [study.report for study in read_manifest(folder / "phantoms/manifest.jsonl")]
    find_family(family).create_tiny(
        folder / (name or family), reports * 4, vocabulary=400, image_side=56, hidden=64, layers=layers
    )
