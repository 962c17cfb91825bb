"""A tiny random Qwen2.5-VL with its own tokenizer and image processor: for the demo, for tests, without a network.

The directory it writes has the layout of a published checkpoint, so that everything else treats both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mrg_r1.policy.qwen_vl.tiny import learn_tokenizer, special_ids, write_checkpoint


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
    if hidden % 32:
        raise ValueError(
            f"create_tiny_policy: hidden {hidden}; it must be a multiple of 32 (4 heads, rotary halves in three "
            "sections)"
        )
    tokenizer = learn_tokenizer(texts, vocabulary)
    model = _random_model(tokenizer, hidden=hidden, layers=layers, seed=seed)
    write_checkpoint(model, tokenizer, output, max_pixels=image_side * image_side)


def _random_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    heads = 4
    # frequencies of a head, shared by time, height and width as in the published 16:24:24
    rotary = hidden // heads // 2
    height = rotary * 3 // 8
    ids, text_ids = special_ids(tokenizer)
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
            **text_ids,
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
        **ids,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)
