"""What the scripts in launch/ share: read the recipe on every rank, run, and end with one clear message where the input is bad."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from mrg_r1.config import Recipe, RecipeError, describe_fields, load_recipe
from mrg_r1.data.study import ManifestError
from mrg_r1.engine.ranks import Ranks, finish_ranks, start_ranks
from mrg_r1.reward.service import RewardsMissing
from mrg_r1.reward.stage import RewardError


def run_on_ranks(task: Callable[[Recipe, Ranks], None], description: str | None) -> None:
    """Parse the command line, join the ranks, run the task.

    A bad recipe or bad data prints its message once and exits with 2; anything else keeps its traceback.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's and transformers' own calls of their own old names
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Keys of a recipe:\n\n" + describe_fields().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the experiment; launch/recipes/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to change, as in steps=100 grpo.group_size=16")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        # on CPUs, ranks that each take every core slow one another down tenfold
        if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        ranks = start_ranks(recipe.seed)
        task(recipe, ranks)
    except (ValueError, OSError) as error:
        everywhere = isinstance(error, (RecipeError, ManifestError))  # every rank found the same fault: one of them says it
        if everywhere and rank != 0:
            time.sleep(5)  # the launcher ends all ranks when one ends; rank 0 speaks first
        else:
            print(f"error: {error}" if everywhere else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
            if not everywhere:
                traceback.print_exc()
        os._exit(2)  # peers may wait in a collective that will never be whole
    except RewardError as error:
        everywhere = isinstance(error, RewardsMissing)  # all ranks stopped together, with a checkpoint where something was learned
        if everywhere and rank != 0:
            time.sleep(5)
        else:
            print(f"error{'' if everywhere else f' on rank {rank}'}: no rewards: {error}", file=sys.stderr, flush=True)
        os._exit(3)
    finish_ranks()
