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
from tests.conftest import EOS, each_family

# What opens a turn, stands for an image, ends a turn, and ends a text.
QWEN = ("<|im_start|>", "<|image_pad|>", "<|im_end|>", "<|endoftext|>")
WORDS = {
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": ("<start_of_turn>", "<start_of_image>", "<end_of_turn>", "<eos>"),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}START{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}END{% endfor %}"
)


def only_end_of_text(source, folder, end):
    """The checkpoint whose configurations name the end of a text alone, and whose template ends a turn with `end`."""
    start, image, end_of_turn, end_of_text = WORDS[source.name]
    shutil.copytree(source, folder)
    number = EOS[source.name][0]
    for name, change in {
        "generation_config.json": {"eos_token_id": number},
        "tokenizer_config.json": {"eos_token": end_of_text},
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = number
    (folder / "config.json").write_text(json.dumps(config))
    template = TEMPLATE.replace("END", end.replace("TURN", end_of_turn))
    (folder / "chat_template.jinja").write_text(template.replace("START", start).replace("IMAGE", image))
    return folder


@each_family
@pytest.mark.parametrize(
    ("end", "ends"),
    [("TURN\n", True), ("\nTURN", True), ("{% if not loop.last %}TURN\n{% endif %}", True), ("\n", False)],
    ids=["right after", "after white space", "not after the last turn", "none"],
)
def test_the_templates_end_of_turn_is_an_eos_or_doctor_says_that_there_is_none(
    world, tiny_policy_directory, tmp_path, end, ends
):
    family = tiny_policy_directory.name
    folder = only_end_of_text(tiny_policy_directory, tmp_path / "policy", end)
    policy = load_policy(folder, dtype=torch.float32)
    ids = EOS[family] if ends else EOS[family][:1]
    assert policy.eos_ids == ids and policy.end_id == ids[-1]
    assert policy.tokenizer.eos_token_id == ids[0]
    overrides = [f"policy.path={folder}", f"data.max_pixels={112 * 112}"]
    finding = tokenizer_finding(load_recipe(world.recipe(tmp_path / "run"), overrides))
    assert finding.state == ("ok" if ends else "warning"), finding
    *_, end_of_turn, end_of_text = WORDS[family]
    assert (end_of_turn in finding.text) == ends and end_of_text in finding.text


@each_family
@pytest.mark.parametrize("stated", ["a number", "a list", "null", "no file"])
def test_other_programs_are_told_where_a_run_stopped(tiny_policy_directory, tmp_path, stated):
    ids = EOS[tiny_policy_directory.name]
    source = only_end_of_text(tiny_policy_directory, tmp_path / "policy", "TURN\n")
    file = source / "generation_config.json"
    before = json.loads(file.read_text())
    if stated == "no file":
        file.unlink()
    else:
        value = {"a number": ids[0], "a list": ids[:1], "null": None}[stated]
        file.write_text(json.dumps(before | {"eos_token_id": value}))
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
        assert found["eos_token_id"] == ids
        assert stated == "no file" or found == before | {"eos_token_id": ids}
        assert GenerationConfig.from_pretrained(tmp_path / written).eos_token_id == ids


@each_family
def test_a_generation_config_that_transformers_reads_and_will_not_write_ends_no_run(tiny_policy_directory, tmp_path):
    source = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, source)
    file = source / "generation_config.json"
    ids = EOS[tiny_policy_directory.name][::-1]
    file.write_text(json.dumps({"eos_token_id": ids, "do_sample": False, "temperature": 0.1, "top_p": 0.9}))
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
