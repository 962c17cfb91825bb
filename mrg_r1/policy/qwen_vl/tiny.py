"""A tiny random checkpoint's directory, with its own tokenizer and image processor, and a published one's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mrg_r1.files import folder_filled
from mrg_r1.policy.byte_pairs import learn_byte_pairs

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens, special ones included, with the chat template.

    Raises:
        ValueError: no texts.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=learn_byte_pairs(texts, vocabulary, SPECIAL_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, int], dict[str, int]]:
    """What a config says of the special tokens, and what its `text_config` says."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    whole = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return whole, text


def write_checkpoint(model: Any, tokenizer: PreTrainedTokenizerFast, output: Path, **processor_settings: Any) -> None:
    """Weights, tokenizer and an image processor of these settings."""
    # What published checkpoints carry: a near-greedy generation config. A trainer that listens to it samples G equal
    # reports (docs/traps.md #1).
    model.generation_config.update(
        do_sample=True, temperature=1e-6, top_k=1, repetition_penalty=1.05, eos_token_id=[2, 0], pad_token_id=0
    )
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, **processor_settings)
    with folder_filled(output) as fresh:
        for part in (model, tokenizer, processor):
            part.save_pretrained(fresh)
