"""A tiny random Qwen3-VL with its own tokenizer and image processor: for the demo, for tests, without a network.

The directory it writes has the layout of a published checkpoint, so that everything else treats both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

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
        hidden: width of the language model, a multiple of 32; the vision tower has half of it.
        layers: layers of the language model, two or more: inner features are added after the first ones.

    Raises:
        ValueError: no texts, a single layer, or a width that four heads cannot share.
    """
    if hidden % 32 or layers < 2:
        raise ValueError(
            f"create_tiny_policy: hidden {hidden}, layers {layers}; the width must be a multiple of 32 (4 heads, "
            "rotary halves in three sections), and there must be two layers or more"
        )
    tokenizer = learn_tokenizer(texts, vocabulary)
    model = _random_model(tokenizer, hidden=hidden, layers=layers, seed=seed)
    half = [0.5, 0.5, 0.5]
    write_checkpoint(
        model, tokenizer, output, max_pixels=image_side * image_side, patch_size=16, image_mean=half, image_std=half
    )


def _random_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, seed: int
) -> Qwen3VLForConditionalGeneration:
    heads, head_size = 4, 3 * hidden // 8  # wider than the model's width over its heads, as the published ones are
    # frequencies of a head, shared by time, height and width as in the published 24:20:20
    rotary = head_size // 2
    height = rotary * 5 // 16
    ids, text_ids = special_ids(tokenizer)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": head_size,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [rotary - 2 * height, height, height],
            },
            **text_ids,
        },
        vision_config={
            "depth": 3,
            "hidden_size": hidden // 2,
            "intermediate_size": hidden,
            "num_heads": heads,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(min(2, layers - 1))),
        },
        **ids,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)
