"""A tiny random Qwen2.5-VL with its own tokenizer and image processor: for the demo, for tests, without a network.

The directory it writes has the layout of a published checkpoint, so that everything else treats both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mrg_r1.files import folder_filled

_SPECIAL_TOKENS = (
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


def create_tiny_policy(
    output: Path,
    texts: Sequence[str],
    *,
    vocabulary: int = 1024,
    image_side: int = 112,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> None:
    """Write a random policy of one to two million parameters.

    Args:
        output: directory to write; made if absent.
        texts: what the byte-level BPE is learned from: reports, prompts, think texts.
        vocabulary: tokens at most, special ones included.
        image_side: pixels; larger images are reduced to this area.
        hidden: width of the language model, a multiple of 32; the vision tower has the same width.
        layers: layers of the language model.

    Raises:
        ValueError: no texts, or a width that four heads of a rotary dimension divisible by 8 cannot share.
    """
    if not texts:
        raise ValueError("create_tiny_policy: no texts to learn the tokenizer from")
    if hidden % 32:
        raise ValueError(
            f"create_tiny_policy: hidden {hidden}; it must be a multiple of 32 (4 heads, rotary halves in three "
            "sections)"
        )
    tokenizer = _learn_tokenizer(texts, vocabulary)
    model = _random_model(tokenizer, hidden=hidden, layers=layers, seed=seed)
    # What published checkpoints carry: a near-greedy generation config. A trainer that listens to it samples G equal
    # reports (docs/traps.md #1).
    model.generation_config.update(
        do_sample=True, temperature=1e-6, top_k=1, repetition_penalty=1.05, eos_token_id=[2, 0], pad_token_id=0
    )
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=image_side * image_side)
    with folder_filled(output) as fresh:
        for part in (model, tokenizer, processor):
            part.save_pretrained(fresh)


def _learn_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no report is unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL_TOKENS[1:]),
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _random_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    heads = 4
    # frequencies of a head, shared by time, height and width as in the published 16:24:24
    rotary = hidden // heads // 2
    height = rotary * 3 // 8
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [rotary - 2 * height, height, height],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": heads,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0, 2],
            "patch_size": 14,
            "window_size": 112,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)
