"""The sizes that a config.json states, and what it must not ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrg_r1.policy.qwen_vl.shape import require_known, require_tower_heads
from mrg_r1.policy.shape import PolicyShape, VisionShape


def shape_of_config(config: Mapping[str, Any]) -> PolicyShape:
    """From a config.json.

    Raises:
        ValueError: a number is missing or contradicts another, or the model is one of another kind: with windows or
            scaled positions in its decoder, with another activation there.
    """
    try:
        text, vision = config["text_config"], config["vision_config"]
        hidden, head_size = text["hidden_size"], text.get("head_dim", 128)
        require_known(text, head_size=head_size, sections=[24, 20, 20], interleaved=True)
        return PolicyShape(
            hidden=hidden,
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            head_size=head_size,
            intermediate=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            layer_vectors=2 * head_size + 2 * hidden,  # norms of a query's and of a key's head, and of the layer
            vision=_vision(vision),
            head_norms=True,
            added=len(vision["deepstack_visual_indexes"]),
        )
    except KeyError as error:
        raise ValueError(
            f"config.json has no {error.args[0]}, which every Qwen3-VL's has; fetch the checkpoint again"
        ) from None


def _vision(vision: Mapping[str, Any]) -> VisionShape:
    depth, hidden, intermediate = vision["depth"], vision["hidden_size"], vision["intermediate_size"]
    out, merge, side = vision["out_hidden_size"], vision.get("spatial_merge_size", 2), vision.get("patch_size", 16)
    patch_values = vision.get("temporal_patch_size", 2) * side**2 * vision.get("in_channels", 3)
    require_tower_heads(hidden, vision.get("num_heads", 16))
    stacked = len(vision["deepstack_visual_indexes"])
    attention = 4 * hidden**2 + 4 * hidden
    mlp = 2 * hidden * intermediate + intermediate + hidden
    wide = hidden * merge**2
    merger = wide * wide + wide + wide * out + out  # two linear layers, behind a norm
    norms = 2 * hidden + stacked * 2 * wide  # the mergers within the tower have theirs after merging
    positions = vision["num_position_embeddings"] * hidden
    embedding = patch_values * hidden + hidden
    return VisionShape(
        parameters=embedding + positions + depth * (attention + mlp + 4 * hidden) + (1 + stacked) * merger + norms,
        depth=depth,
        hidden=hidden,
        intermediate=intermediate,
        out=(1 + stacked) * out,
        patch_values=patch_values,
        patches=merge**2,
        pixels=(side * merge) ** 2,
        merger_sides=(1 + stacked) * (2 * wide + wide + out),
        block_sides=4 * hidden + 2 * hidden + 2 * (hidden + intermediate),  # qkv, proj; two of the MLP
        mergers=1 + stacked,
    )
