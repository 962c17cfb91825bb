"""The checkpoint's words: the chat template from wherever it is kept, and a tokenizer and configurations that are the
model's.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from mrg_r1.config.recipe import load_recipe
from mrg_r1.doctor.checks import recipe_findings
from mrg_r1.doctor.tokenizer import tokenizer_finding
from mrg_r1.policy.load import _require_own, load_policy, load_tokenizer
from tests.conftest import each_family, each_family_slowly

# what stands for an image, ends a text, and ends a turn
QWEN = ("<|image_pad|>", "<|endoftext|>", "<|im_end|>")
WORDS = {"qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "gemma3": ("<start_of_image>", "<eos>", "<end_of_turn>")}
PIXELS = "data.max_pixels=12544"  # the squares that Gemma 3 makes of all images

OF_WORDS = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"  # a text model's


def change(file, **settings):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | settings))


def leave_tokens(file, count):
    content = json.loads(file.read_text())
    words = {token: number for token, number in content["model"]["vocab"].items() if number < count}
    content["model"] |= {"vocab": words, "merges": []}
    file.write_text(json.dumps(content))


def named(template):
    return [{"name": "default", "template": template}, {"name": "tool_use", "template": OF_WORDS}]


PLACES = {
    "chat_template.jinja": lambda folder, template: (folder / "chat_template.jinja").write_text(template),
    "chat_template.json": lambda f, template: change(f / "chat_template.json", chat_template=template),
    "tokenizer_config.json": lambda f, template: change(f / "tokenizer_config.json", chat_template=template),
    "several in tokenizer_config.json": lambda f, template: change(
        f / "tokenizer_config.json", chat_template=named(template)
    ),
    "several in chat_template.json": lambda f, template: change(
        f / "chat_template.json", chat_template=named(template)
    ),
    "the processor's, beside a text model's": lambda f, template: (
        change(f / "chat_template.json", chat_template=template),
        change(f / "tokenizer_config.json", chat_template=OF_WORDS),
    ),
}


@pytest.fixture
def folder(tiny_policy_directory, tmp_path):
    copy = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, copy)
    return copy


@each_family
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_the_chat_template_is_found_in_each_of_its_places(folder, studies, build, place):
    policy = load_policy(folder, dtype=torch.float32)
    expected = build(policy)(studies).input_ids
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    place(folder, template)
    policy = load_policy(folder, dtype=torch.float32)
    assert torch.equal(build(policy)(studies).input_ids, expected)


ODD = {
    "a text model's": (lambda f: PLACES["chat_template.jinja"](f, OF_WORDS), "chat template"),
    "without a place for the image": (
        lambda f: PLACES["chat_template.jinja"](
            f, "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
        ),
        "chat template writes 0 IMAGE for a user's image, and its words",
    ),
    "no template's text": (lambda f: PLACES["chat_template.jinja"](f, "{% if"), "chat template cannot write"),
    "an empty one": (lambda f: PLACES["chat_template.jinja"](f, ""), "chat template writes 0"),
    "none by the name of default": (
        lambda f: (
            (f / "chat_template.jinja").unlink(),
            change(f / "chat_template.json", chat_template=[{"name": "rag", "template": OF_WORDS}]),
        ),
        "no default",
    ),
    "a file without one": (
        lambda f: ((f / "chat_template.jinja").unlink(), change(f / "chat_template.json", template=OF_WORDS)),
        "chat_template.json: cannot be read .*'chat_template'",
    ),
    "none anywhere": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "more tokens than the head has rows": (
        lambda f: change(f / "tokenizer_config.json", eos_token="<|never_seen|>"),
        "tokenizer has 396 tokens and the model's head 395 rows",
    ),
    "far fewer tokens than the head has rows": (
        lambda f: leave_tokens(f / "tokenizer.json", 8),
        "tokenizer has 8 tokens and the model's head 395 rows",
    ),
    "a token in pieces": (
        lambda f: change(f / "tokenizer_config.json", eos_token={"content": "<|im_end|>"}),
        "tokenizer_config.json: cannot be read .*eos_token",
    ),
    "a pointer for words": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json .*cannot be read",
    ),
    "no object": (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json: cannot be read"),
}


@each_family_slowly
@pytest.mark.parametrize(("spoil", "message"), ODD.values(), ids=ODD.keys())
def test_words_that_are_not_the_models_are_refused_by_doctor_too(
    world, tiny_policy_directory, folder, tmp_path, spoil, message
):
    spoil(folder)
    message = message.replace("IMAGE", re.escape(WORDS[tiny_policy_directory.name][0]))
    with pytest.raises(ValueError, match=message):
        load_policy(folder, dtype=torch.float32)
    finding = tokenizer_finding(load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}", PIXELS]))
    assert finding.state == "failure" and re.search(message, finding.text), finding.text
    assert finding.text.startswith(f"policy.path {folder}: ")


NUMBERS = [
    ("hidden_size", "64"),
    ("num_hidden_layers", 2.0),
    ("vocab_size", None),
    ("eos_token_id", "2"),
]


@each_family_slowly
@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_config_of_odd_values_is_named_and_the_rest_is_still_looked_at(world, folder, tmp_path, key, value):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(folder, dtype=torch.float32)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}"])
    findings = {one.name: one for one in recipe_findings(recipe, task="grpo", world_size=1, devices=[])}
    refused = [one.text for one in (findings["policy"], findings["tokenizer"]) if one.state == "failure"]
    assert refused and all(str(folder) in text and "config.json" in text for text in refused), refused
    assert findings["labeler"].state == "ok"


@pytest.mark.parametrize(
    ("tokens", "rows", "whose"),
    [
        (151_665, 151_936, "Qwen2.5-VL-3B"),
        (151_665, 152_064, "Qwen2.5-VL-7B"),
        (151_669, 151_936, "Qwen3-VL"),
        (262_145, 262_208, "Gemma 3"),
        (1000, 1024, "padded to a multiple of 64"),
        (32_000, 152_064, None),
        (151_665, 262_208, None),
        (8, 395, None),
        (1024, 1000, None),
    ],
)
def test_a_padded_vocabulary_is_told_from_a_tokenizer_of_another_model(tmp_path, tokens, rows, whose):
    if whose is not None:
        return _require_own(tmp_path, tokens, rows)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer has {tokens} tokens and the model's head {rows}"):
        _require_own(tmp_path, tokens, rows)


@each_family
def test_an_ordinary_checkpoint_may_have_more_rows_than_tokens(world, tiny_policy_directory, tmp_path):
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={tiny_policy_directory}", PIXELS])
    finding = tokenizer_finding(recipe)
    _, end_of_text, end_of_turn = WORDS[tiny_policy_directory.name]
    assert finding.state == "ok" and f"a report ends at {end_of_text} or {end_of_turn}" in finding.text
    assert len(load_tokenizer(tiny_policy_directory)) <= 400
