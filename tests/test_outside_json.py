"""JSON that others wrote, nested too deeply or with a number that no float holds: each reader refuses it by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.config.paths import check_checkpoint_directory
from mrg_r1.data.prepare.iu_xray.r2gen import read_split_ids
from mrg_r1.engine.config import read_config as read_deepspeed
from mrg_r1.labels.loading import read_settings
from mrg_r1.policy.adapter_files import read_adapter
from mrg_r1.policy.checkpoint_files import read_layout
from mrg_r1.policy.family import read_config

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: read_config(path.parent),
    "model.safetensors.index.json": lambda path: read_layout(path.parent),
    "adapter_config.json": lambda path: read_adapter(path.parent, tied=False),
    "settings/config.json": read_settings,
    "recipe/config.json": lambda path: check_checkpoint_directory(path.parent),
    "zero3.json": read_deepspeed,
    "ids.json": read_split_ids,
}
CONTENTS = {"deep": "[" * 100_000, "deep objects": '{"a":' * 100_000, "large": f'{{"lora_alpha": {10**400}}}'}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_cannot_be_used_is_refused_by_file(tmp_path: Path, reader: str, content: str) -> None:
    path = tmp_path / reader
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONTENTS[content])
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError) as error:
        READERS[reader](path)
    words = "a whole number of 401 digits" if content == "large" else "nested too deeply"
    assert str(path.parent) in str(error.value) and path.name in str(error.value) and words in str(error.value)


def test_a_deepspeed_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(ValueError, match="zero.json: .*`stage` stands twice"):
        read_deepspeed(path)
