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
    filled = fill_config(path, {"gradient_clipping": 1.0, "bf16.enabled": True}, largest_trainable=640)
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
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offload_param.device is 'nvme'; cpu is supported"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "offload_param with stage 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "zero_force_ds_cpu_optimizer: false"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, zero, more, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, zero, **more))


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_clipping.* 5.* 1.0"):
        fill_config(write(tmp_path, {"stage": 2}, gradient_clipping=5), {"gradient_clipping": 1.0}, largest_trainable=1)
    path = write(tmp_path, {"stage": 3, "stage3_param_persistence_threshold": 100})
    with pytest.raises(ValueError, match=" 100.* 640"):
        fill_config(path, {}, largest_trainable=640)
    assert fill_config(path, {}, largest_trainable=64)["zero_optimization"]["stage3_param_persistence_threshold"] == 100
