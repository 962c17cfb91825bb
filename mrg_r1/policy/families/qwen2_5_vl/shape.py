"""The sizes that a config.json states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrg_r1.policy.shape import PolicyShape, VisionShape


def shape_of_config(config: Mapping[str, Any]) -> PolicyShape:
    """From a config.json: published checkpoints have the language model's numbers at the top, newer files under
    `text_config`.

    Raises:
        ValueError: a number is missing.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    try:
        hidden, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
        head_size = text.get("head_dim") or hidden // heads
        return PolicyShape(
            hidden=hidden,
            layers=text["num_hidden_layers"],
            heads=heads,
            key_heads=key_heads,
            head_size=head_size,
            intermediate=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            layer_vectors=(heads + 2 * key_heads) * head_size + 2 * hidden,  # biases of q, k and v; two norms
            vision=_vision(vision),
        )
    except KeyError as error:
        raise ValueError(
            f"config.json has no {error.args[0]}, which every Qwen2.5-VL's has; fetch the checkpoint again"
        ) from None


def _vision(vision: Mapping[str, Any]) -> VisionShape:
    depth, hidden, intermediate = vision["depth"], vision["hidden_size"], vision["intermediate_size"]
    out, merge, side = vision["out_hidden_size"], vision.get("spatial_merge_size", 2), vision.get("patch_size", 14)
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    patch_values = vision.get("temporal_patch_size", 2) * side**2 * channels
    attention = 4 * hidden**2 + 4 * hidden
    mlp = 3 * hidden * intermediate + 2 * intermediate + hidden
    wide = hidden * merge**2
    merger = hidden + wide * wide + wide + wide * out + out  # a norm, then two linear layers
    return VisionShape(
        parameters=patch_values * hidden + depth * (attention + mlp + 2 * hidden) + merger,
        depth=depth,
        hidden=hidden,
        intermediate=intermediate,
        out=out,
        patch_values=patch_values,
        patches=merge**2,
        pixels=(side * merge) ** 2,
        merger_sides=2 * wide + wide + out,
        block_sides=4 * hidden + 2 * hidden + 3 * (hidden + intermediate),  # qkv, proj; gate, up, down
    )
