"""What the chat template ends a turn with ends a completion, whatever the checkpoint's configurations name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mrg_r1.policy.load import load_policy

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}END{% endfor %}"
)


@pytest.mark.parametrize(
    ("end", "ids"),
    [("<|im_end|>\n", [0, 2]), ("\n<|im_end|>", [0, 2]), ("\n", [0])],
    ids=["right after", "after white space", "none"],
)
def test_the_templates_end_of_turn_is_an_eos(tiny_policy_directory, tmp_path, end, ids):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    for name, change in {
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("END", end))
    policy = load_policy(folder, dtype=torch.float32)
    assert policy.eos_ids == ids and policy.end_id == ids[-1]
    assert policy.tokenizer.eos_token_id == 0
