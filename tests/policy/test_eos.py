"""What the chat template ends a turn with ends a completion, whatever the checkpoint's configurations name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from mrg_r1.config.recipe import load_recipe
from mrg_r1.doctor.tokenizer import tokenizer_finding
from mrg_r1.policy.export.export import export
from mrg_r1.policy.load import load_policy, save_policy
from mrg_r1.policy.lora import add_lora, save_adapter

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}END{% endfor %}"
)
NOT_AT_THE_END = "{% if not loop.last %}<|im_end|>\n{% endif %}"


def only_endoftext(source, folder, end):
    """The checkpoint whose configurations name <|endoftext|> alone, and whose template ends a turn with `end`."""
    shutil.copytree(source, folder)
    for name, change in {
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("END", end))
    return folder


@pytest.mark.parametrize(
    ("end", "ids"),
    [("<|im_end|>\n", [0, 2]), ("\n<|im_end|>", [0, 2]), (NOT_AT_THE_END, [0, 2]), ("\n", [0])],
    ids=["right after", "after white space", "not after the last turn", "none"],
)
def test_the_templates_end_of_turn_is_an_eos_or_doctor_says_that_there_is_none(
    world, tiny_policy_directory, tmp_path, end, ids
):
    folder = only_endoftext(tiny_policy_directory, tmp_path / "policy", end)
    policy = load_policy(folder, dtype=torch.float32)
    assert policy.eos_ids == ids and policy.end_id == ids[-1]
    assert policy.tokenizer.eos_token_id == 0
    finding = tokenizer_finding(load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}"]))
    assert finding.state == ("ok" if 2 in ids else "warning"), finding
    assert ("<|im_end|>" in finding.text) == (2 in ids) and "<|endoftext|>" in finding.text


@pytest.mark.parametrize("stated", [0, [0], None, ...], ids=["a number", "a list", "null", "no file"])
def test_other_programs_are_told_where_a_run_stopped(tiny_policy_directory, tmp_path, stated):
    source = only_endoftext(tiny_policy_directory, tmp_path / "policy", "<|im_end|>\n")
    file = source / "generation_config.json"
    before = json.loads(file.read_text())
    if stated is ...:
        file.unlink()
    else:
        file.write_text(json.dumps(before | {"eos_token_id": stated}))
    policy = load_policy(source, dtype=torch.float32)
    save_policy(policy, tmp_path / "trained", source=source)
    add_lora(policy, rank=2, alpha=2, seed=0)
    save_adapter(policy, tmp_path / "run/adapter")
    export(
        tmp_path / "run",
        policy=source,
        cold_start=None,
        merged=tmp_path / "merged",
        adapter=None,
        card=lambda record: "",
    )
    for written in ("trained", "merged"):
        found = json.loads((tmp_path / written / "generation_config.json").read_text())
        assert found["eos_token_id"] == [0, 2]
        assert stated is ... or found == before | {"eos_token_id": [0, 2]}
        assert GenerationConfig.from_pretrained(tmp_path / written).eos_token_id == [0, 2]


def test_a_generation_config_that_transformers_reads_and_will_not_write_ends_no_run(tiny_policy_directory, tmp_path):
    source = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, source)
    file = source / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 0], "do_sample": False, "temperature": 0.1, "top_p": 0.9}))
    (source / "preprocessor_config.json").rename(source / "processor_config.json")
    save_policy(load_policy(source, dtype=torch.float32), tmp_path / "trained", source=source)
    assert (tmp_path / "trained/generation_config.json").read_bytes() == file.read_bytes()
    assert (tmp_path / "trained/processor_config.json").is_file()


@pytest.mark.parametrize("stated", ["2", ["2"], [2, None], 2.0, True, -1, {"a": 1}], ids=str)
def test_an_eos_that_is_no_id_is_named(world, tiny_policy_directory, tmp_path, stated):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": stated}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is "):
        load_policy(folder, dtype=torch.float32)
    finding = tokenizer_finding(load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}"]))
    assert finding.state == "failure" and "eos_token_id is " in finding.text
