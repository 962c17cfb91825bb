"""Frozen weights cut over the ranks (ZeRO-3): what DeepSpeed's partition is to a policy that reads its weights as raw
tensors.

A policy knows this as `policy.partition.Partition`: it says which weights it is about to read, and they are whole until
it has. DeepSpeed's own hooks on modules would fetch weights one module at a time, also inside a rollout, where ranks
are not at the same place; so they are taken off (`engine.zero`), and what remains of DeepSpeed here is how weights are
cut, kept and brought together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mrg_r1.engine.config import read_config


class RankPartition:
    """One part of every frozen weight on each rank.

    Args:
        device: where weights are when they are whole.
        dtype: of the policy's weights.
        offload: keep this rank's parts in the CPU's memory.
        pin_memory: of such parts: copies to a GPU are then faster, and the memory cannot be swapped out.
    """

    def __init__(
        self, *, device: torch.device, dtype: torch.dtype, offload: bool = False, pin_memory: bool = False
    ) -> None:
        self.device, self.dtype, self.offload, self.pin_memory = device, dtype, offload, pin_memory

    @classmethod
    def of_config(cls, path: Path, *, device: torch.device, dtype: torch.dtype) -> RankPartition | None:
        """The partition that a DeepSpeed configuration asks for; None for stages 1 and 2, whose weights are whole
        everywhere.

        Raises:
            ValueError: see `read_config`.
        """
        zero = read_config(path)["zero_optimization"]
        if zero["stage"] != 3:
            return None
        offload = zero.get("offload_param", {})
        # pinning is for copies to a GPU
        pin = bool(offload.get("pin_memory", False)) and device.type == "cuda"
        return cls(device=device, dtype=dtype, offload=offload.get("device") == "cpu", pin_memory=pin)

    def place(self, module: nn.Module) -> None:
        """Keep only this rank's part of each of the module's parameters. Every rank calls this, with the same
        values.
        """
        import deepspeed

        # `mem_efficient_linear` would replace torch's linear for the whole process; weights do not outlive their
        # layer's pass here anyway
        deepspeed.zero.Init(
            module=module,
            dtype=self.dtype,
            mem_efficient_linear=False,
            remote_device="cpu" if self.offload else None,
            pin_memory=self.pin_memory,
        )

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], *, written: bool = False) -> Iterator[None]:
        """Inside, these parameters are whole on every rank; those that are whole already cost nothing.

        A collective: every rank enters the same blocks in the same order. Leaving is none, unless `written`.

        Args:
            written: the block changes them, alike on all ranks; rank 0's values are kept.
        """
        import deepspeed

        absent = [parameter for parameter in parameters if is_absent(parameter)]
        if not absent:
            yield
            return
        with deepspeed.zero.GatheredParameters(absent, modifier_rank=0 if written else None):
            yield

    def most(self, count: int) -> int:
        """The largest of the ranks' counts: of passes, in each of which the ranks meet."""
        largest = torch.tensor(count, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)


def is_absent(parameter: Any) -> bool:
    """True where this rank holds a part of the parameter only."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param

    return is_zero_param(parameter) and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
