"""What the scripts in launch/ share: read the recipe on every rank, run, and end with one clear message where the input
is bad.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from transformers.utils import logging as transformers_logging

from mrg_r1.config.recipe import Recipe, RecipeError, describe_fields, load_recipe
from mrg_r1.cores import affinity, asked_for, read_cores, share_cores
from mrg_r1.data.images import ImageError
from mrg_r1.data.loader import PromptError
from mrg_r1.data.study import ManifestError
from mrg_r1.engine.checkpoint import CheckpointError
from mrg_r1.engine.faults import REQUEUE, NotFinite, Requeue, Watch, describe, is_broken_connection, shared_store
from mrg_r1.engine.ranks import MEET_WITHIN, Ranks, finish_ranks, on_one_node, start_ranks
from mrg_r1.kernels import library as kernels
from mrg_r1.reward.compute import RewardError
from mrg_r1.reward.service.interface import RewardsMissing
from mrg_r1.tracking.library_log import LibraryLog
from mrg_r1.training.nodes import agree_on_recipe


def run_on_ranks(
    task: Callable[[Recipe, Ranks], None], description: str | None, *, labeler_beside: bool = False
) -> None:
    """Parse the command line, join the ranks, run the task.

    Args:
        labeler_beside: the labeler works while the ranks do, and wants a core where it has no GPU.

    A bad recipe or bad data prints its message once (before the ranks have met, once a node) and exits with 2, a step
    without rewards with 3, a hanging rank with 4, a signal or a rank that is gone with 75; anything else keeps its
    traceback. Whichever rank fails, it speaks last, and all leave with its code. What libraries say goes to
    RUN/launch.log.
    """
    log = LibraryLog(f"rank {os.environ.get('RANK', '0')}")
    log.take_over()
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Keys of a recipe:\n\n" + describe_fields().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the experiment; launch/recipes/ has examples")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values to change, as in steps=100 grpo.group_size=16"
    )
    # launchers add it, older ones with an underscore
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()  # a launcher's option may stand between recipe and values
    recipe, problem = None, None
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        asked_for()
    except (ValueError, OSError) as error:
        problem = str(error)
    try:
        if problem is not None and on_one_node():
            raise RecipeError(problem)
        # hanging ranks are named by `Watch`; a collective must not lose patience while rank 0 reads a large dataset's
        # images
        ranks = start_ranks(0 if recipe is None else recipe.seed, collective_timeout=24 * 3600)
        recipe = agree_on_recipe(recipe, problem, ranks)  # on several nodes it may be bad on one of them
    except (ValueError, OSError) as error:
        _end_together(f"error: {error}", code=2)
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        met = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        _end_together(
            log.mention()
            + f"error: rank {os.environ['RANK']} on {socket.gethostname()}: the ranks have not met at {met} "
            f"(they wait {MEET_WITHIN} s at most): {str(error).splitlines()[0]}; is every node started, with this "
            f"address, port and number of ranks, and is the port open and free? exit code {REQUEUE}",
            code=REQUEUE,
        )
    log.take_over()  # of DeepSpeed's logger too, which is there now
    node = ranks.node.number
    log.write_to(recipe.output_dir / ("launch.log" if node == 0 else f"launch_node{node}.log"))
    threads = _use_cores(ranks, labeler=labeler_beside and recipe.reward.device == "cpu")
    if ranks.is_main:
        many = f"{ranks.world_size} {'rank' if ranks.world_size == 1 else 'ranks'} on {ranks.device.type}{threads}"
        print(f"{Path(sys.argv[0]).name} {arguments.recipe}: {many}, into {recipe.output_dir}", file=sys.stderr)
    rank = ranks.name([ranks.rank])
    watch = Watch(ranks, store=shared_store(), timeout=recipe.engine.hang_timeout)

    def fail(text: str, *, code: int) -> NoReturn:
        mention = log.mention()
        log.write(text)
        watch.fail(mention + text, code=code)
        raise AssertionError("Watch.fail has ended this process")

    try:
        task(recipe, replace(ranks, beat=watch.beat))
    except Requeue as stopped:
        fail(f"{stopped}; exit code {REQUEUE}: the same command goes on", code=REQUEUE)
    except (RecipeError, ManifestError, CheckpointError) as error:
        fail(f"error: {error}", code=2)
    except (ImageError, PromptError) as error:  # on the rank that met the study
        fail(f"error on {rank}: {error}", code=2)
    except RewardsMissing as error:  # on all ranks, with a checkpoint where something was learned
        fail(f"error: no rewards: {error}", code=3)
    except NotFinite as error:
        fail(f"error: {error}", code=3)
    except RewardError as error:
        fail(f"error on {rank}: no rewards: {error}", code=3)
    except (ValueError, OSError) as error:
        fail(describe(error, traceback.format_exc(), who=rank), code=2)
    except Exception as error:  # whatever it is, the other ranks must hear of it, and it keeps its traceback
        trace, mention = traceback.format_exc(), log.mention()
        log.write(trace)
        watch.fail_unexpectedly(error, mention + trace)
    ranks.barrier()  # a rank that stops its watch before the others have done their work would be missed
    watch.stop()
    finish_ranks()


def _use_cores(ranks: Ranks, *, labeler: bool) -> str:
    """Give this rank its share of the node's cores, where it computes on them. Every rank calls this.

    Returns:
        For the line that a launch begins with; empty where a GPU computes.
    """
    masks = ranks.gather(sorted(affinity()))  # a launcher may have bound each rank to cores of its own
    if ranks.device.type != "cpu":
        return ""
    allowed = set().union(*(masks[rank] for rank in ranks.node.ranks))
    cores = replace(read_cores(), allowed=len(allowed))
    threads = share_cores(cores, ranks=ranks.node.size, labeler=labeler)
    torch.set_num_threads(threads.rank)
    if ranks.leads_node:
        for note in threads.notes:
            print(f"cores: {note}", file=sys.stderr)
        if kernels.state().missing:
            print(f"kernels: {kernels.state().text}", file=sys.stderr)
    return f" x {threads.rank} {'thread' if threads.rank == 1 else 'threads'} (cores: {cores.usable})"


def _end_together(text: str, *, code: int) -> NoReturn:
    """End where every rank has found the same fault: the first of each node speaks, since nodes may have terminals of
    their own.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # the launcher ends all when one ends
    os._exit(code)
