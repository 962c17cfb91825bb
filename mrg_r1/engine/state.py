"""The trainable state of an engine, gathered from its ranks and spread over them again: whole tensors, whatever the
ZeRO stage.

Of each trained parameter: `live/` (what the forward pass uses), `master/` (fp32), `exp_avg/` and `exp_avg_sq/` (Adam's
moments).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mrg_r1.engine.zero import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_state(engine: Engine) -> dict[str, Tensor]:
    """Every tensor of the state, whole, on the CPU of every rank. All ranks call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if (
        optimizer_steps(engine) == 0
    ):  # every update so far was left out: there are no moments yet, and none is what they are
        _create_optimizer_state(engine)
        _set_steps(engine, 0)
    state = {}
    for name, parameter in engine.trainable.items():
        state[f"live/{name}"] = parameter.detach().cpu().clone()
        state[f"master/{name}"] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for moment in MOMENTS:
            state[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()
    return state


def scatter_state(engine: Engine, state: dict[str, Tensor], optimizer_steps: int) -> None:
    """Put a gathered state into the engine. All ranks call this, with the same tensors."""
    _create_optimizer_state(engine)
    with torch.no_grad():
        for name, parameter in engine.trainable.items():
            parameter.copy_(state[f"live/{name}"])  # the masters reach it only at the next update
            master = state[f"master/{name}"].to(parameter.device)
            moments = {moment: state[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS}
            if engine.stage == 3:
                _set_parts(parameter, master, moments)
            else:
                _set_whole(parameter, master, moments)
    _set_steps(engine, optimizer_steps)


def _set_steps(engine: Engine, count: int) -> None:
    for entry in engine.optimizer.optimizer.state.values():
        entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), count)


def optimizer_steps(engine: Engine) -> int:
    """Updates made so far."""
    return max((int(entry["step"]) for entry in engine.optimizer.optimizer.state.values()), default=0)


def _set_whole(parameter: nn.Parameter, master: Tensor, moments: dict[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, master)
    for moment, value in moments.items():
        safe_set_full_optimizer_state(parameter, value, moment)


def _set_parts(parameter: nn.Parameter, master: Tensor, moments: dict[str, Tensor]) -> None:
    """ZeRO-3: this rank's part of each; DeepSpeed's own setter of whole values fails where they do not divide over the
    ranks.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    attributes: Any = parameter  # DeepSpeed's own, which torch's stubs do not know
    size = attributes.ds_tensor.ds_numel
    start, ranks = size * attributes.ds_zero_partition_rank, attributes.ds_zero_partition_world_size

    def part(value: Tensor) -> Tensor:
        return pad(value.flatten(), (0, size * ranks - value.numel())).narrow(0, start, size)

    safe_set_local_fp32_param(parameter, part(master))
    for moment, value in moments.items():
        safe_set_local_optimizer_state(parameter, part(value), moment)
    # the part that the live parameter is gathered from
    parameter.partition(has_been_updated=True)  # type: ignore[attr-defined]
    parameter.all_gather()  # type: ignore[attr-defined]


def _create_optimizer_state(engine: Engine) -> None:
    """AdamW has no moments before its first step: take one of size zero, so that there is something to set.

    Weights that are not finite still get a loss and a gradient of zero: `Engine.backward` would leave the step out.
    """
    groups = engine.optimizer.param_groups
    kept = [(group["lr"], group["weight_decay"]) for group in groups]
    for group in groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    nothing = sum(
        (torch.nan_to_num(parameter.float() * 0.0).sum() for parameter in engine.trainable.values()),
        torch.zeros((), device=engine.ranks.device),
    )
    engine.backward(nothing, last=True)
    for group, (rate, decay) in zip(groups, kept, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
