"""DeepSpeed ZeRO around the policy: the optimizer, accumulation, and the one place where losses are scaled.

`ds_configs/*.json` are the user's; their "auto" values are filled in from the recipe. The optimizer is torch's AdamW,
handed in: DeepSpeed's own would be compiled on first use. Learning rates are a pure function of the step, so resuming
needs none.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mrg_r1.engine.config import fill_config
from mrg_r1.engine.partition import is_absent
from mrg_r1.engine.ranks import Ranks

Schedule = Literal["constant", "linear", "cosine"]


class Engine:
    """A module under ZeRO.

    Args:
        module: the policy; its parameters that require gradients are trained.
        config: path of a DeepSpeed configuration. Stage 3 wants a module whose frozen weights are partitioned already
            (`RankPartition.place`), and which brings them together itself where it reads them.

    Raises:
        ValueError: a configuration that contradicts the recipe, or a ZeRO stage that is not supported; names file and
            key.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ranks: Ranks,
        config: Path,
        dtype: torch.dtype,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        total_steps: int = 1,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.ranks = ranks
        self.learning_rate, self.warmup_steps, self.schedule, self.total_steps = (
            learning_rate,
            warmup_steps,
            schedule,
            total_steps,
        )
        self.trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not self.trainable:
            raise ValueError("no parameter requires a gradient: put LoRA on the policy, or train all parameters")
        filled = fill_config(
            config,
            {
                # Micro-batches are cut by tokens, so that their number changes from step to step: `backward` says which
                # is the last.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "train_batch_size": ranks.world_size,
                "gradient_clipping": max_grad_norm,
                "bf16.enabled": dtype == torch.bfloat16,
            },
            trainable=[parameter.numel() for parameter in self.trainable.values()],
        )
        self.stage: int = filled["zero_optimization"]["stage"]
        if self.stage == 3 and not any(is_absent(parameter) for parameter in module.parameters()):
            raise ValueError(
                f"{config}: stage 3 with a policy that is whole on every rank; load it with `load_policy(partition=…)`"
            )
        # fused: one walk over weights, gradients and moments instead of ten
        optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self._engine, self.optimizer, _, _ = deepspeed.initialize(model=module, config=filled, optimizer=optimizer)
        if self.stage == 3:
            self._leave_weights_to_the_module(config)

    def _leave_weights_to_the_module(self, config: Path) -> None:
        """Take off DeepSpeed's hooks, which fetch and release weights module by module: a policy runs few of its
        modules as modules.

        What it trains stays whole, and is gathered again by DeepSpeed after each step.
        """
        self.optimizer.parameter_offload.destroy()
        self._engine.module_forward_pre_hook.remove()  # it makes a look at an absent weight fetch it, for good
        self._engine.module_forward_post_hook.remove()
        lasting = self.optimizer.persistent_parameters
        lasting[0].all_gather(lasting)
        absent = [name for name, parameter in self.trainable.items() if is_absent(parameter)]
        if absent:
            raise ValueError(
                f"{config}: zero_optimization.stage3_model_persistence_threshold leaves {absent[0]} partitioned; "
                "remove it (what is trained stays whole on every rank)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with whatever ZeRO needs around it."""
        return self._engine(*args, **kwargs)

    def backward(self, loss_share: Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch's share of the *global* loss; the `last` of an optimizer step updates
        the weights.

        Every rank must make equally many calls before its last one: ZeRO-2 and 3 meet in each. DeepSpeed averages over
        ranks; a share is already divided by the global count, so that is undone here, and nowhere else.

        A loss that is not finite leaves the update out on all ranks, whatever its gradient is: that of an infinite
        log-prob may well be finite.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        sound = torch.where(loss_share.detach().isfinite(), 1.0, torch.nan)  # without waiting for the device
        self._engine.backward(loss_share * self.ranks.world_size * sound)
        self._step()

    def finish_backward(self, continuation: Tensor) -> None:
        """Go on where the backward passes of this optimizer step stopped, through a graph made outside of `__call__`;
        weights are updated.

        Args:
            continuation: a scalar whose gradient is what those passes left, already scaled by them
                (`PromptCache.continuation`).
        """
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(continuation)
        self._step()

    def _step(self) -> None:
        self._engine.step()
        if (
            self.stage == 3 and self.skipped
        ):  # DeepSpeed makes the trained parameters whole again after an update, not after one left out
            for parameter in self.trainable.values():
                if parameter.numel() != parameter.ds_numel:  # type: ignore[attr-defined]
                    parameter.all_gather()  # type: ignore[attr-defined]

    @property
    def skipped(self) -> bool:
        """Whether the last update was left out, on all ranks alike, because its gradient was not finite (DeepSpeed sees
        to that).
        """
        return bool(self.optimizer.overflow)

    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def set_learning_rate(self, step: int, *, spent: float = 0.0) -> float:
        """Learning rate of an outer step, by warm-up and schedule; it is set and returned.

        Args:
            spent: of a run that a time ends, the share that is spent; the schedule follows whichever is further.
        """
        rate = scheduled_rate(
            self.learning_rate,
            step,
            warmup=self.warmup_steps,
            total=self.total_steps,
            schedule=self.schedule,
            spent=spent,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def scheduled_rate(peak: float, step: int, *, warmup: int, total: int, schedule: Schedule, spent: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then constant, or down to a tenth of the peak at the last step, `total - 1`,
    or when all of a time is `spent`, a share.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    span = total - 1 - warmup
    # a single step after a warm-up, which has had the peak, is the last
    progress = min(1.0, max((step - warmup) / span, spent)) if span > 0 else float(warmup > 0)
    share = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (0.1 + 0.9 * share)
