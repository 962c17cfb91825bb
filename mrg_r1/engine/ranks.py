"""The ranks of a run and the nodes they stand on: starting the process group, and the few collectives that the trainer
needs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Answer = TypeVar("Answer")

MAX_SUFFIX = "_max"  # metrics with this ending are reduced by maximum
MEET_WITHIN = 900  # seconds in which the ranks of all nodes must have been started
_OF_MANY = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many processes srun or mpirun has started


@dataclass(frozen=True)
class Node:
    """A machine of a run, by one launcher's start: its ranks are numbered one after another."""

    number: int
    host: str
    first: int
    size: int

    def __str__(self) -> str:
        return f"node {self.number} ({self.host})"

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the ranks. Collectives must be called by all ranks alike."""

    rank: int
    world_size: int
    device: torch.device
    nodes: tuple[Node, ...] = (Node(0, "localhost", 0, 1),)
    # told that this rank goes on, and with what (`engine.faults.Watch`)
    beat: Callable[[str], None] = lambda doing: None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> Node:
        """The one that this rank stands on."""
        return next(node for node in self.nodes if self.rank in node.ranks)

    @property
    def leads_node(self) -> bool:
        """The first rank of its node, which does what is done once a node."""
        return self.rank == self.node.first

    def name(self, ranks: Iterable[int]) -> str:
        """`rank 1`, `ranks 1, 2`; of a run on several nodes `ranks 2, 3 (all of node 1 (host))`."""
        chosen = sorted(ranks)
        if len(self.nodes) == 1:
            return _numbered(chosen)
        parts = []
        for node in self.nodes:
            here = [rank for rank in chosen if rank in node.ranks]
            if here:
                parts.append(f"{_numbered(here)} ({'all of ' if len(here) == node.size else ''}{node})")
        return ", ".join(parts)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in float64, on the CPU."""
        total = values.detach().double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def reduce_metrics(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float | None]:
        """(sum, count) of each rank -> the mean over everything counted, None where nothing was (docs/traps.md #20).

        Sums and counts are added separately: a mean of the ranks' means would be wrong wherever their counts differ.
        Names that end in `_max` carry (maximum, count) and take the maximum over ranks that counted something.
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

    def from_main(self, work: Callable[[], Answer], *errors: type[Exception]) -> Answer:
        """What rank 0 alone finds or does, on every rank: the answer of `work`, a plain Python value, or its error.

        Args:
            work: called on rank 0.
            errors: those that are everybody's, so that nobody waits for a rank that has given up. Any other error is
                rank 0's own failure, of which the others hear by `engine.faults`.

        Raises:
            One of `errors`, on all ranks alike.
        """
        answer, problem = None, None
        if self.is_main:
            try:
                answer = work()
            except errors as error:
                problem = error
        answer, problem = self.agree((answer, problem))
        if problem is not None:
            raise problem
        return cast(Answer, answer)

    def barrier(self) -> None:
        dist.barrier()


class OneRank(Ranks):
    """A process of its own, without a process group: what all ranks are asked is asked of it alone."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(rank=0, world_size=1, device=torch.device(device))

    def sum(self, values: Tensor) -> Tensor:
        return values.detach().double().cpu()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def on_one_node() -> bool:
    """Whether the launcher's variables describe a run on one node, before any rank has spoken to another."""
    return "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == _local_size()


def start_ranks(seed: int, *, collective_timeout: float = 1800) -> Ranks:
    """Join the process group that the launcher describes, or become a group of one when started by plain `python`.

    Args:
        seed: of torch's generators.
        collective_timeout: seconds after which a collective gives up.

    Raises:
        ValueError: one of many processes that nobody has numbered, or nodes whose ranks are not numbered one after
            another.
        torch.distributed.DistError: the ranks have not met within `MEET_WITHIN` seconds.
    """
    # deepspeed compiles this CPU collective on first use (a minute, and a compiler); gloo does the same work
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    if "RANK" not in os.environ:
        _refuse_one_of_many()
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    described = (socket.gethostname(), _local_size())
    if not dist.is_initialized():
        if described[1] != int(os.environ["WORLD_SIZE"]):
            # nodes are started one by one: a missing one must not be waited for as long as a collective may take. torch
            # gives both meetings the same server, as long as the first one's store is held
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEET_WITHIN)))
        deepspeed.init_distributed(
            dist_init_required=True, verbose=False, timeout=timedelta(seconds=collective_timeout)
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.manual_seed(seed)
    alone = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    return replace(alone, nodes=nodes_of(alone.gather(described)))


def nodes_of(described: Sequence[tuple[str, int]]) -> tuple[Node, ...]:
    """The nodes of a run from what each rank says, in rank order: the name of its machine, and how many ranks its node
    has.

    Two launchers on one machine are two nodes.

    Raises:
        ValueError: the ranks of a node are not numbered one after another.
    """
    nodes: list[Node] = []
    while (first := sum(node.size for node in nodes)) < len(described):
        host, size = described[first]
        if list(described[first : first + size]) != [(host, size)] * size:
            listed = ", ".join(
                f"rank {rank} on {name} (one of {count})" for rank, (name, count) in enumerate(described)
            )
            raise ValueError(
                "the ranks of a node must be numbered one after another, and each must be told how many they are "
                f"(LOCAL_SIZE or LOCAL_WORLD_SIZE); these are {listed}; with srun use --distribution=block and "
                "equal tasks a node (docs/multi-node.md)"
            )
        nodes.append(Node(len(nodes), host, first, size))
    return tuple(nodes)


def _local_size() -> int:
    """How many ranks this node has: DeepSpeed's variable, or torchrun's."""
    said = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if said is None:
        raise ValueError(
            "RANK is set, but neither LOCAL_SIZE nor LOCAL_WORLD_SIZE, the number of ranks on this node: "
            "deepspeed and torchrun set one; with srun, export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE "
            "(docs/multi-node.md)"
        )
    return int(said)


def _refuse_one_of_many() -> None:
    """Processes that do not know of one another would each be a run of their own, all in one output_dir."""
    for name in _OF_MANY:
        if int(os.environ.get(name, "1")) > 1:
            raise ValueError(
                f"one of {os.environ[name]} processes ({name}), but RANK is not set: each would be a run of its "
                "own; set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
                "(docs/multi-node.md shows how)"
            )


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def finish_ranks() -> None:
    """Leave the process group together, so that nobody still asks the rank that keeps its store, and the launcher sees
    a clean end.
    """
    dist.barrier()
    dist.destroy_process_group()


def shard(items: Sequence[Any], ranks: Ranks) -> list[Any]:
    """This rank's share of a list: every world_size-th item."""
    return list(items[ranks.rank :: ranks.world_size])
