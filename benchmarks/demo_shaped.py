"""Studies, labeler and policies of the demo's shapes, for what the demo's steps cost.

`policy` has random weights. `taught` is what the demo's cold start makes of it in a few steps: it writes as the demo's
policy does when GRPO begins, reports that end, of the demo's lengths, which often begin alike.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.task import INSTRUCTION, SEED
from benchmarks.workers import WORKER_ENVIRONMENT
from mrg_r1.cores import read_cores
from mrg_r1.data.prepare.phantoms import write_phantoms
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.starting import SIZES, random_start
from mrg_r1.phantom.habits import Habits
from mrg_r1.policy.families.qwen2_5_vl.tiny import create_tiny_policy

SIDE = 84  # pixels
_ROOT = Path(__file__).resolve().parents[1]
_SPLITS = {"train": 512, "sft": 1024, "val": 2, "test": 2}
_STEPS = 200  # of the cold start, 32 studies each: enough for words, not for sight
# the Makefile's HABITS
_HABITS = Habits(writers=4, negatives_stated=0.9, passed_over=0.4, normal_alike=0.9)
_FAINT = 0.3


def write_demo_shaped(folder: Path, *, splits: dict[str, int] = _SPLITS, steps: int = _STEPS) -> Path:
    """Write `folder`/demo-shaped with phantoms, labeler and policies, unless it is there; never a half-written one.

    Args:
        splits: name -> studies; `sft` is what the policy is taught on.
        steps: of its cold start.

    Returns:
        That folder: `manifest.jsonl`, `labeler`, `policy` and `taught` are in it.

    Raises:
        RuntimeError: the cold start failed; what it said last is in the message.
    """
    transformers_logging.disable_progress_bar()
    whole = folder / "demo-shaped"
    if (whole / "taught").is_dir():
        return whole
    fresh = folder / "demo-shaped.tmp"
    for old in (fresh, whole):  # half-written, or an earlier bench's, which taught nothing
        shutil.rmtree(old, ignore_errors=True)
    cores = read_cores().usable
    manifest = write_phantoms(
        fresh, preset="five", seed=SEED, side=SIDE, splits=splits, workers=cores, faint=_FAINT, habits=_HABITS
    )
    reports = [study.report for study in read_manifest(manifest, split="train") if study.report is not None]
    create_tiny_policy(fresh / "policy", [*reports, INSTRUCTION], image_side=SIDE, seed=SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, words = random_start(reports, SIZES["tiny"])
    Labeler(model.eval(), words, name="random", device="cpu").save(fresh / "labeler")
    _teach(fresh, steps=steps)
    fresh.rename(whole)
    return whole


def _teach(folder: Path, *, steps: int) -> None:
    """The demo's own cold start, shorter: `folder`/policy -> `folder`/taught."""
    keys = {
        "output_dir": folder / "sft",
        "seed": SEED,
        "steps": steps,
        "data.manifest": folder / "manifest.jsonl",
        "policy.path": folder / "policy",
        "reward.labeler": folder / "labeler",
        "evaluation.every": 0,
        "evaluation.before": "false",
    }
    command = [sys.executable, "launch/sft.py", "launch/recipes/demo_sft.yaml"]
    ran = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in keys.items())],
        cwd=_ROOT,
        env=os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"the cold start of the bench's policy failed: {ran.stdout.strip()[-2000:]}")
    (folder / "sft" / "policy").rename(folder / "taught")
    shutil.rmtree(folder / "sft")
