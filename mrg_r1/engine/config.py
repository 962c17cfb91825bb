"""DeepSpeed configurations (`ds_configs/`): the user's, checked, and filled in from the recipe where they say
"auto".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_THRESHOLD = "stage3_param_persistence_threshold"
# What DeepSpeed can do with partitioned weights besides, and nobody has tried with a policy that brings its weights
# together itself.
_UNTRIED = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
    "zenflow",
)


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration that can be run.

    Raises:
        ValueError: not JSON; a stage other than 1, 2 and 3; an optimizer or scheduler of its own; an offload that is
            not supported.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}; stages 1, 2 and 3 are supported")
    if "optimizer" in config or "scheduler" in config:
        raise ValueError(f"{path}: optimizer and scheduler come from the recipe (optimizer.*); remove them here")
    for key in _UNTRIED:
        if key in zero:
            raise ValueError(f"{path}: zero_optimization.{key} is not supported; remove it")
    for key in ("offload_param", "offload_optimizer"):
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"{path}: zero_optimization.{key}.device is {device!r}; cpu is supported, or none")
    if zero.get("offload_param", {}).get("device", "none") == "cpu" and stage != 3:
        raise ValueError(
            f"{path}: zero_optimization.offload_param with stage {stage}: whole weights are not offloaded; take stage 3"
        )
    if zero.get("offload_optimizer", {}).get("device", "none") == "cpu" and config.get(
        "zero_force_ds_cpu_optimizer", True
    ):
        raise ValueError(
            f"{path}: zero_optimization.offload_optimizer needs zero_force_ds_cpu_optimizer: false: the optimizer "
            "is torch's AdamW, DeepSpeed's own would be compiled first"
        )
    return config


def fill_config(path: Path, values: dict[str, Any], *, largest_trainable: int) -> dict[str, Any]:
    """Read a DeepSpeed configuration and put the recipe's values where it says "auto" or nothing.

    Args:
        values: by dotted key.
        largest_trainable: elements of the largest trained parameter: at stage 3 no parameter up to this size is left
            partitioned.

    Raises:
        ValueError: see `read_config`; a value that contradicts the recipe; a threshold that would partition what is
            trained.
    """
    config = read_config(path)
    for key, value in values.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if node.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f'{path}: {key} is {node[name]!r}, the recipe makes it {value!r}; write "auto" or change the recipe'
            )
        node[name] = value
    zero = config["zero_optimization"]
    if zero["stage"] == 3:
        threshold = zero.get(_THRESHOLD, "auto")
        if threshold != "auto" and threshold < largest_trainable:
            raise ValueError(
                f"{path}: zero_optimization.{_THRESHOLD} is {threshold}, the largest trained parameter has "
                f'{largest_trainable} elements and must stay whole; write "auto"'
            )
        zero[_THRESHOLD] = largest_trainable if threshold == "auto" else threshold
    return config
