"""DeepSpeed configurations (`ds_configs/`): the user's, checked, and filled in from the recipe where they say
"auto".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mrg_r1.files import parse_json

_THRESHOLD = "stage3_param_persistence_threshold"
# What DeepSpeed can do with partitioned weights besides, and nobody has tried with a policy that brings its weights
# together itself.
_UNTRIED = {  # and what it holds where it is off
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zenflow": None,
}
# Keys that DeepSpeed reads as another one, past the checks below, or that change what a step computes; and what to do.
_REFUSED = {
    "bfloat16": 'it is an older name: write "bf16": {"enabled": "auto"}',
    "amp": "policy.dtype says the precision",
    "torch_autocast": "policy.dtype says the precision",
    "gradient_allreduce_op": "gradients are averaged, and the loss is scaled for that",
    "elasticity": "the batch comes from the recipe",
    "zero_optimization.cpu_offload": 'it is an older name: write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'it is an older name: write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "it is an older name: write pin_memory inside offload_optimizer "
    "or offload_param",
    "zero_optimization.param_persistence_threshold": f"it is another name: write {_THRESHOLD}",
    # what the releases that are supported here refuse themselves, once the policy is loaded
    **dict.fromkeys(
        (
            *("nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue"),
            *("sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
            *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
            "zero_optimization.zeropp_loco_param",
        ),
        "DeepSpeed has it no more",
    ),
}
_LARGEST = 2.0**63  # of any number: DeepSpeed's own largest default
# What each key holds; others are DeepSpeed's to check. Within an object a key stands for itself wherever it is.
_OBJECTS = ("zero_optimization", "bf16", "fp16", "offload_param", "offload_optimizer", "optimizer", "scheduler")
_POSITIVE = (
    "reduce_bucket_size train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print"
).split()
_COUNTS = (
    "allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_module_granularity_threshold prefetch_bucket_size model_persistence_threshold "
    "max_live_parameters max_reuse_distance module_granularity_threshold buffer_count buffer_size max_in_cpu"
).split()
_SWITCHES = (
    "enabled contiguous_gradients reduce_scatter allgather_partitions overlap_comm load_from_fp32_weights "
    "elastic_checkpoint round_robin_gradients ignore_unused_parameters use_multi_rank_bucket_allreduce "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_use_all_reduce_for_fetch_params memory_efficient_linear pin_memory fast_init pipeline_read pipeline_write "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown prescale_gradients"
).split()


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration that can be run, without the values that are "auto": they are as good as absent.

    Raises:
        ValueError: not JSON, or no object; a value of the wrong kind, a number that is not finite; a key that DeepSpeed
            takes for another one; a stage other than 1, 2 and 3; an optimizer or scheduler of its own; another
            precision than the recipe's; an offload that is not supported. Names the file and the key.
    """
    try:
        config = _read_values(path)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply to be read; ds_configs/ has examples") from error
    _refuse_keys(path, config)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}; stages 1, 2 and 3 are supported")
    if "optimizer" in config or "scheduler" in config:
        raise ValueError(f"{path}: optimizer and scheduler come from the recipe (optimizer.*); remove them here")
    if config.get("fp16", {}).get("enabled", False):
        raise ValueError(f"{path}: fp16.enabled is true; policy.dtype is bfloat16 or float32, remove it here")
    for key, off in _UNTRIED.items():
        if key in zero and (zero[key] != off or isinstance(zero[key], bool) != isinstance(off, bool)):
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


def _read_values(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: not JSON, or no object; a value of the wrong kind.
    """
    try:
        config: Any = parse_json(path.read_text(encoding="utf-8"), unique=True, finite=True)
    except ValueError as error:  # also where it is not UTF-8
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: {json.dumps(config)[:40]} is no object of settings; ds_configs/ has examples")
    _drop_auto(config)
    _check_values(path, config, "")
    return config


def _drop_auto(node: dict[str, Any]) -> None:
    for key, value in list(node.items()):
        if value == "auto":
            del node[key]
        elif isinstance(value, dict):
            _drop_auto(value)


def _refuse_keys(path: Path, config: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a key of `_REFUSED`, whatever its value is.
    """
    for key, reason in _REFUSED.items():
        section, _, name = key.rpartition(".")
        if name in (config.get(section, {}) if section else config):
            raise ValueError(f"{path}: {key} is not supported; remove it ({reason})")


def _numbers(value: Any) -> Iterator[int | float]:
    """Those that a value is, or has in lists."""
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def _check_values(path: Path, node: dict[str, Any], above: str) -> None:
    """Refuse values that DeepSpeed, or what reads them here, would stumble over.

    Raises:
        ValueError: names file, key, value, and what is expected.
    """
    for key, value in node.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _OBJECTS:
            right, expected = isinstance(value, dict), "an object"
        elif key in _POSITIVE:
            right, expected = number and value > 0 and value % 1 == 0, "a whole number above 0"
        elif key in _COUNTS:
            right, expected = number and value >= 0 and value % 1 == 0, "a whole number, 0 or more"
        elif key in _SWITCHES:
            right, expected = isinstance(value, bool), "true or false"
        elif key == "gradient_clipping":
            right, expected = number and value >= 0, "a number, 0 or more"
        elif key == "device":
            right, expected = isinstance(value, str), '"cpu" or "none"'
        else:
            right, expected = True, ""
        if right and not all(abs(one) <= _LARGEST for one in _numbers(value)):  # 1e400 is read as infinity
            right, expected = False, f"a finite number, {_LARGEST:.0e} at most"
        if not right:
            raise ValueError(
                f'{path}: {above}{key} is {json.dumps(value)[:60]}; write {expected}, or "auto", or remove it'
            )
        if isinstance(value, dict):
            _check_values(path, value, f"{above}{key}.")


def fill_config(path: Path, values: dict[str, Any], *, trainable: Sequence[int]) -> dict[str, Any]:
    """Read a DeepSpeed configuration and put the recipe's values where it says "auto" or nothing.

    Args:
        values: by dotted key.
        trainable: elements of each trained parameter. At stage 3 none is left partitioned; and the buffer in which
            gradients are reduced, new memory in each step, is never larger than all of them.

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
    zero, largest_trainable = config["zero_optimization"], max(trainable)
    if "reduce_bucket_size" in zero:
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(trainable))
    if zero["stage"] == 3:
        threshold = zero.get(_THRESHOLD, "auto")
        if threshold != "auto" and threshold < largest_trainable:
            raise ValueError(
                f"{path}: zero_optimization.{_THRESHOLD} is {threshold}, the largest trained parameter has "
                f'{largest_trainable} elements and must stay whole; write "auto"'
            )
        zero[_THRESHOLD] = largest_trainable if threshold == "auto" else threshold
    return config
