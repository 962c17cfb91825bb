"""What the scripts in launch/ share: read the recipe on every rank, run, and end with one clear message where the input is bad."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from mrg_r1.config import Recipe, RecipeError, describe_fields, load_recipe
from mrg_r1.data.study import ManifestError
from mrg_r1.engine.checkpoint import CheckpointError
from mrg_r1.engine.faults import REQUEUE, NotFinite, Requeue, Watch, describe
from mrg_r1.engine.ranks import Ranks, finish_ranks, start_ranks
from mrg_r1.reward.service import RewardsMissing
from mrg_r1.reward.stage import RewardError


def run_on_ranks(task: Callable[[Recipe, Ranks], None], description: str | None) -> None:
    """Parse the command line, join the ranks, run the task.

    A bad recipe or bad data prints its message once and exits with 2, a step without rewards with 3, a hanging rank with 4, a signal
    with 75; anything else keeps its traceback. Whichever rank fails, it speaks last, and all leave with its code.
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
        # hanging ranks are named by `Watch`; a collective must not lose patience while rank 0 reads a large dataset's images
        ranks = start_ranks(recipe.seed, collective_timeout=24 * 3600)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # every rank found the same fault; the launcher ends all when one ends, and rank 0 speaks
        os._exit(2)
    watch = Watch(rank=ranks.rank, world_size=ranks.world_size, timeout=recipe.engine.hang_timeout)
    try:
        task(recipe, replace(ranks, beat=watch.beat))
    except Requeue as stopped:
        watch.fail(f"{stopped}; exit code {REQUEUE}: the same command goes on", code=REQUEUE)
    except (RecipeError, ManifestError, CheckpointError) as error:
        watch.fail(f"error: {error}", code=2)
    except RewardsMissing as error:  # on all ranks, with a checkpoint where something was learned
        watch.fail(f"error: no rewards: {error}", code=3)
    except NotFinite as error:
        watch.fail(f"error: {error}", code=3)
    except RewardError as error:
        watch.fail(f"error on rank {rank}: no rewards: {error}", code=3)
    except (ValueError, OSError) as error:
        watch.fail(describe(error, traceback.format_exc(), rank=rank), code=2)
    except Exception as error:  # whatever it is, the other ranks must hear of it, and it keeps its traceback
        watch.fail(describe(error, traceback.format_exc(), rank=rank), code=1)
    watch.stop()
    finish_ranks()
