"""What is Gemma 3's alone: its prompts as its own processor writes them, its windows, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, Gemma3Processor

from mrg_r1.policy.families.gemma3.tiny import WINDOW
from mrg_r1.policy.family import shape_of
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.masks import PromptSight
from tests.conftest import make_study

pytestmark = pytest.mark.parametrize("tiny_policy_directory", ["gemma3"], indirect=True)
AREA = 112 * 112


def test_a_prompt_is_what_the_familys_processor_writes(policy, tiny_policy_directory, studies, build):
    """Ids, squares and which tokens are an image's; empty lines around an image join those of the words there."""
    builder = build(policy)
    [one] = [studies[1]]
    text = policy.tokenizer.apply_chat_template(builder.messages(one), tokenize=False, add_generation_prompt=True)
    images = AutoImageProcessor.from_pretrained(tiny_policy_directory, backend="pil")
    tokenizer = policy.tokenizer
    for name, number in (("boi", 5), ("eoi", 6), ("image", 7)):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
        setattr(tokenizer, f"{name}_token_id", number)
    processor = Gemma3Processor(images, tokenizer, image_seq_length=policy.layout.tokens)
    shown = [Image.open(image.path).convert("RGB") for image in one.images]
    wanted = processor(images=[shown], text=[text], add_special_tokens=False, return_tensors="pt")
    prompts = builder([one])
    assert torch.equal(prompts.input_ids, wanted["input_ids"])
    assert torch.equal(prompts.images.tensors["pixel_values"], wanted["pixel_values"])
    assert torch.equal(prompts.positions[..., 1] > 0, wanted["token_type_ids"] == 1)
    assert tokenizer.decode(prompts.input_ids[0]).startswith("<bos><start_of_turn>user\nFrontal view:\n\n<start_of_")


def test_the_other_tests_prompts_are_longer_than_the_window(policy, studies, build, monkeypatch):
    """And both kinds of layers see images in both directions: without it the last states are others."""
    prompts = build(policy)(studies)
    assert prompts.attention_mask.sum(dim=1).min() > WINDOW > prompts.positions[0, :, 1].sum()
    layers = policy.read_language().layers
    assert [layer.window for layer in layers] == [WINDOW, None, WINDOW]
    with torch.no_grad():
        vision = policy.encode_images(prompts)
        states = policy.prompt_cache(prompts, vision).last
        inner = PromptSight.attend
        for change in ((lambda s, w: (PromptSight(s.seq_lens), w)), (lambda s, w: (s, None))):
            monkeypatch.setattr(
                PromptSight, "attend", lambda s, q, k, v, w, c=change: inner(c(s, w)[0], q, k, v, c(s, w)[1])
            )
            assert (policy.prompt_cache(prompts, vision).last - states).abs().max() > 1e-3


def test_words_that_follow_one_another_keep_what_is_between_them(policy, tmp_path, build):
    """The template strips each part of a turn."""
    study = make_study(tmp_path, "a", [(84, 84)])
    study = type(study)(**{**study.__dict__, "indication": "cough"})
    prompts = build(policy, context=("indication",))([study])
    assert "Indication: cough\nWrite the findings" in policy.tokenizer.decode(prompts.input_ids[0])


def test_the_head_is_the_embedding_and_stays_it(policy, tiny_policy_directory):
    assert policy.base.lm_head.weight is policy.language_model.embed_tokens.weight
    assert not [name for name in load_file(tiny_policy_directory / "model.safetensors") if "lm_head" in name]
    assert policy.eos_ids == [1, 4] and policy.end_id == 4  # <eos>, <end_of_turn>


def text(**settings):
    return lambda config: config | {"text_config": config["text_config"] | settings}


def tower(**settings):
    return lambda config: config | {"vision_config": config["vision_config"] | settings}


CONFIGS = {
    "scores capped": (text(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0: soft-capping"),
    "logits capped": (text(final_logit_softcapping=30.0), "final_logit_softcapping 30.0: soft-capping"),
    "heads": (text(num_key_value_heads=3), "num_attention_heads 4 and num_key_value_heads 3"),
    "no keys": (text(num_key_value_heads=0), "num_attention_heads 4 and num_key_value_heads 0"),
    "heads of other tensors": (text(num_attention_heads=8), r"q_proj.weight is \[96, 64\], config.json makes it"),
    "both directions": (text(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "no window": (text(sliding_window=None), "sliding_window None"),
    "a layer of another kind": (text(layer_types=["linear_attention"] * 3), "layer of type linear_attention"),
    "other positions": (
        text(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0}}),
        "positions of type yarn",
    ),
    "a head on the tower": (tower(vision_use_head=True), "vision_use_head"),
    "heads of the tower": (tower(num_attention_heads=3), "hidden_size 32 and num_attention_heads 3"),
    "no square": (lambda config: config | {"mm_tokens_per_image": 15}, "mm_tokens_per_image 15"),
    "no tower": (lambda config: {k: v for k, v in config.items() if k != "vision_config"}, "no vision_config"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_asks_for_something_else_is_refused(tiny_policy_directory, tmp_path, change, message):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(folder, dtype=torch.float32)
    assert str(folder) in str(caught.value)
    if "tensors" not in message and "q_proj" not in message:
        with pytest.raises(ValueError, match=message):
            shape_of(folder)


@pytest.mark.parametrize(
    ("settings", "limits", "message"),
    [
        ({"do_pan_and_scan": True}, (56 * 56, AREA), "pan and scan"),
        ({"size": {"height": 84, "width": 84}}, (56 * 56, AREA), "84 x 84, and config.json's tower takes 112 x 112"),
        ({}, (56 * 56, AREA - 1), r"112 x 112 pixels.*data.max_pixels 12,543 forbids.*max_pixels: 12544"),
        ({}, (AREA + 1, AREA + 2), "data.min_pixels 12,545 forbids"),
    ],
)
def test_an_image_processor_that_makes_something_else_is_refused(
    tiny_policy_directory, tmp_path, settings, limits, message
):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        load_image_processor(folder, min_pixels=limits[0], max_pixels=limits[1])


def test_a_template_without_bos_and_a_tokenizer_of_another_model_are_refused(tiny_policy_directory, tmp_path, policy):
    layout = policy.family.prompt_layout
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("{{ bos_token }}", "")
    with pytest.raises(ValueError, match="does not begin with the tokenizer's bos_token"):
        layout(policy.base.config, policy.tokenizer)
    policy.base.config.image_token_id = 10_000
    with pytest.raises(ValueError, match="image_token_index 10000: the two are of different checkpoints"):
        layout(policy.base.config, policy.tokenizer)


def test_a_cut_image_is_refused(policy, studies, build):
    prompts = build(policy)(studies[:1])
    with pytest.raises(ValueError, match="a prompt was cut"):
        policy.layout.positions(prompts.input_ids[:, :25], prompts.attention_mask[:, :25], prompts.images)
