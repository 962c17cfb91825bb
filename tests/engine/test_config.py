"""DeepSpeed configurations: what is filled in, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrg_r1.engine.config import fill_config, read_config

SHIPPED = sorted(Path("ds_configs").glob("*.json"))


def write(tmp_path: Path, zero: dict, **more: object) -> Path:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_can_be_run(path):
    filled = fill_config(path, {"gradient_clipping": 1.0, "bf16.enabled": True}, trainable=[640, 8])
    assert filled["gradient_clipping"] == 1.0 and filled["bf16"] == {"enabled": True}
    threshold = filled["zero_optimization"].get("stage3_param_persistence_threshold")
    assert threshold == (640 if "zero3" in path.stem else None)


@pytest.mark.parametrize(
    ("zero", "more", "message"),
    [
        ({}, {}, "stage is None"),
        ({"stage": 4}, {}, "stage is 4; stages 1, 2 and 3"),
        ({"stage": 2}, {"optimizer": {}}, "optimizer and scheduler come from the recipe"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size is not supported"),
        ({"stage": 3, "zero_hpz_partition_size": True}, {}, "zero_hpz_partition_size is not supported"),
        ({"stage": 3, "zero_quantized_weights": "false"}, {}, "zero_quantized_weights is not supported"),
        ({"stage": 3, "mics_shard_size": -1}, {}, "mics_shard_size is not supported"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offload_param.device is 'nvme'; cpu is supported"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "offload_param with stage 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "zero_force_ds_cpu_optimizer: false"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, zero, more, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, zero, **more))


@pytest.mark.parametrize(
    ("zero", "more", "named"),
    [
        ({"cpu_offload": True}, {}, ["zero_optimization.cpu_offload ", '"offload_optimizer": {"device": "cpu"}']),
        ({"cpu_offload": False}, {}, ["zero_optimization.cpu_offload ", "remove it"]),
        ({"cpu_offload_param": True}, {}, ["cpu_offload_param ", '"offload_param": {"device": "cpu"}']),
        ({"cpu_offload_use_pin_memory": True}, {}, ["cpu_offload_use_pin_memory ", "pin_memory"]),
        ({"param_persistence_threshold": 10}, {}, ["write stage3_param_persistence_threshold"]),
        ({}, {"bfloat16": {"enabled": True}}, ["bfloat16 ", '"bf16": {"enabled": "auto"}']),
        ({}, {"amp": {"enabled": True}}, ["amp ", "policy.dtype"]),
        ({}, {"torch_autocast": {"enabled": True}}, ["torch_autocast ", "policy.dtype"]),
        ({}, {"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op ", "averaged"]),
        ({}, {"elasticity": {"enabled": False}}, ["elasticity ", "recipe"]),
    ],
)
def test_a_key_by_another_name_does_not_go_round_the_checks(
    tmp_path: Path, zero: dict, more: dict, named: list[str]
) -> None:
    path = write(tmp_path, {"stage": 2, **zero}, **more)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert [part for part in (f"{path}: ", *named) if part not in str(error.value)] == []


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["gradient_clipping", "reduce_bucket_size", "stage3_max_live_parameters", "ratio"])
@pytest.mark.parametrize("written", ["{}", "[1, {}]"], ids=["bare", "list"])
def test_a_number_without_end_is_named(tmp_path: Path, number: str, key: str, written: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(f'{{"zero_optimization": {{"stage": 2, "{key}": {written.format(number)}}}}}')
    named = f"zero_optimization.{key} is " if "e" in number else "not valid JSON: a whole number of 401 digits"
    with pytest.raises(ValueError, match=f"zero.json: {named}"):
        read_config(path)


def test_what_is_not_supported_may_be_written_as_off(tmp_path):
    off = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zenflow": None}
    assert read_config(write(tmp_path, {"stage": 3, **off}))["zero_optimization"] == {"stage": 3, **off}


@pytest.mark.parametrize(("written", "taken"), [(50_000_000, 648), (100, 100), ("auto", None), (None, None)])
def test_the_reduction_buffer_is_never_larger_than_what_is_trained(tmp_path, written, taken):
    zero = {"stage": 2} if written is None else {"stage": 2, "reduce_bucket_size": written}
    filled = fill_config(write(tmp_path, zero), {}, trainable=[640, 8])
    assert filled["zero_optimization"].get("reduce_bucket_size") == taken


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_clipping.* 5.* 1.0"):
        fill_config(write(tmp_path, {"stage": 2}, gradient_clipping=5), {"gradient_clipping": 1.0}, trainable=[1])
    path = write(tmp_path, {"stage": 3, "stage3_param_persistence_threshold": 100})
    with pytest.raises(ValueError, match=" 100.* 640"):
        fill_config(path, {}, trainable=[640, 8])
    assert fill_config(path, {}, trainable=[64])["zero_optimization"]["stage3_param_persistence_threshold"] == 100


AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": "auto",
    "train_batch_size": "auto",
    "steps_per_print": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": "auto",
}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_is_as_good_as_absent_wherever_it_stands(tmp_path: Path, stage: int) -> None:
    zero = {"stage": stage, **dict.fromkeys((*NUMBERS, *SWITCHES, "offload_param", "offload_optimizer"), "auto")}
    assert read_config(write(tmp_path, zero, **AUTO)) == {
        "zero_optimization": {"stage": stage},
        "bf16": {},
        "fp16": {},
    }
    offload = {"device": "auto", "pin_memory": "auto"}
    config = read_config(write(tmp_path, {"stage": 3, "offload_param": offload, "offload_optimizer": offload}))
    assert config["zero_optimization"] == {"stage": 3, "offload_param": {}, "offload_optimizer": {}}
    filled = fill_config(write(tmp_path, zero, **AUTO), {"bf16.enabled": True}, trainable=[640, 8])
    assert filled["bf16"] == {"enabled": True}
    assert filled["zero_optimization"].get("stage3_param_persistence_threshold") == (640 if stage == 3 else None)


NUMBERS = [
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
]
SWITCHES = ["overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients"]
ODD = {
    "number": ["5e8", "", "Auto", None, -1, 1.5, True, [], {}, float("inf")],
    "switch": ["true", "yes", None, 1, 0, [], {}],
    "object": ["none", None, True, 1, []],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in NUMBERS for value in ODD["number"]),
        *((key, value) for key in SWITCHES for value in ODD["switch"]),
        *((key, value) for key in ("offload_param", "offload_optimizer") for value in ODD["object"]),
        *(("stage", value) for value in ("2", 2.0, True, None, -1, [2])),
    ],
)
def test_an_odd_value_is_named_by_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    path = write(tmp_path, {"stage": 3, key: value})
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(path) in str(error.value) and (key in str(error.value) or "Infinity" in str(error.value))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"bf16": True}, "bf16"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"train_batch_size": "8"}, "train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping"),
        ({"zero_force_ds_cpu_optimizer": "false"}, "zero_force_ds_cpu_optimizer"),
        ({"steps_per_print": None}, "steps_per_print"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"zero_optimization": [2]}, "zero_optimization"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": None}}}, "offload_param.device"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": "x"}}}, "offload_param.pin_memory"),
    ],
)
def test_an_odd_value_elsewhere_is_named_too(tmp_path: Path, more: dict, key: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **more}))
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert f"{path}: " in str(error.value) and key in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b'"auto"', b"3", b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 990 + b"1" + b"}" * 990],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="zero.json"):
        read_config(path)


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    path = write(tmp_path, {"stage": 3, "stage3_max_live_parameters": 1e9, "reduce_bucket_size": 5e7})
    assert read_config(path)["zero_optimization"]["stage3_max_live_parameters"] == 1_000_000_000
