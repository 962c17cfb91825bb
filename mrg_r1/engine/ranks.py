"""The ranks of a run: starting the process group, and the few collectives that the trainer needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_SUFFIX = "_max"  # metrics with this ending are reduced by maximum


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the ranks. Collectives must be called by all ranks alike."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0  # among the ranks of this node, which are numbered one after another
    beat: Callable[[str], None] = lambda doing: None  # told that this rank goes on, and with what (`engine.faults.Watch`)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in float64, on the CPU."""
        total = values.detach().double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def reduce_metrics(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float | None]:
        """(sum, count) of each rank -> the mean over everything counted, None where nothing was (trap 20).

        Sums and counts are added separately: a mean of the ranks' means would be wrong wherever their counts differ. Names that
        end in `_max` carry (maximum, count) and take the maximum over ranks that counted something.
        """
        names = sorted(metrics)
        pairs = torch.stack([torch.stack([part.detach().double().cpu() for part in metrics[name]]) for name in names])
        everyone = self.gather(pairs.tolist())
        reduced: dict[str, float | None] = {}
        for index, name in enumerate(names):
            counted = [pair[index] for pair in everyone if pair[index][1] > 0]
            if not counted:
                reduced[name] = None
            elif name.endswith(MAX_SUFFIX):
                reduced[name] = max(value for value, _ in counted)
            else:
                reduced[name] = sum(value for value, _ in counted) / sum(count for _, count in counted)
        return reduced

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain Python value, in rank order, on every rank."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank: for decisions that depend on a clock or a disk."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()


def start_ranks(seed: int, *, collective_timeout: float = 1800) -> Ranks:
    """Join the process group that the launcher describes, or become a group of one when started by plain `python`.

    Args:
        seed: of torch's generators.
        collective_timeout: seconds after which a collective gives up.
    """
    # deepspeed compiles this CPU collective on first use (a minute, and a compiler); gloo does the same work
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=True, verbose=False, timeout=timedelta(seconds=collective_timeout))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.manual_seed(seed)
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))


def finish_ranks() -> None:
    """Leave the process group together, so that nobody still asks the rank that keeps its store, and the launcher sees a clean end."""
    dist.barrier()
    dist.destroy_process_group()


def shard(items: Sequence[Any], ranks: Ranks) -> list[Any]:
    """This rank's share of a list: every world_size-th item."""
    return list(items[ranks.rank :: ranks.world_size])
