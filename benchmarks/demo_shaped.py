"""Policy, studies and labeler of the demo's shapes, for what the demo's steps cost: random weights, phantoms.

Random weights cost what trained ones do as long as the reports are as long: EOS is never sampled, and every report has
the mean length of the demo's (`benchmarks.cases.REPORT`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.task import INSTRUCTION, SEED
from mrg_r1.cores import read_cores
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.starting import SIZES, random_start
from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy

SIDE = 84  # pixels
_STUDIES = 512


def write_demo_shaped(folder: Path, *, studies: int = _STUDIES) -> Path:
    """Write `folder`/demo-shaped with phantoms, labeler and policy, unless it is there; never a half-written one.

    Returns:
        That folder: `manifest.jsonl`, `labeler` and `policy` are in it.
    """
    transformers_logging.disable_progress_bar()
    whole = folder / "demo-shaped"
    if whole.is_dir():
        return whole
    fresh = folder / "demo-shaped.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    splits = {"train": studies, "val": 2, "test": 2}
    manifest = write_phantoms(fresh, preset="five", seed=SEED, side=SIDE, splits=splits, workers=read_cores().usable)
    reports = [study.report for study in read_manifest(manifest, split="train") if study.report is not None]
    create_tiny_policy(fresh / "policy", [*reports, INSTRUCTION], image_side=SIDE, seed=SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, words = random_start(reports, SIZES["tiny"])
    Labeler(model.eval(), words, name="random", device="cpu").save(fresh / "labeler")
    fresh.rename(whole)
    return whole
