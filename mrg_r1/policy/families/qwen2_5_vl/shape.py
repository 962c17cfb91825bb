"""The sizes that a config.json states, and what it must not ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrg_r1.policy.qwen_vl.shape import require_known, require_tower_heads
from mrg_r1.policy.shape import PolicyShape, VisionShape

_TOWER = {"hidden_act": "silu", "rope_theta": 10_000}  # what its pass computes with, and what files leave out


def shape_of_config(config: Mapping[str, Any]) -> PolicyShape:
    """From a config.json: published checkpoints have the language model's numbers at the top, newer files under
    `text_config`.

    Raises:
        ValueError: a number is missing or contradicts another, or the model is one of another kind: with windows or
            scaled positions in its decoder, with another activation.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    try:
        hidden, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
        if not heads or hidden % heads or text.get("head_dim") not in (None, hidden // heads):
            raise ValueError(
                f"config.json has hidden_size {hidden}, num_attention_heads {heads} and head_dim "
                f"{text.get('head_dim')}; a head is hidden_size / num_attention_heads: fetch the checkpoint again"
            )
        head_size = hidden // heads
        require_known(text, head_size=head_size, rotations=["mrope"], sections=[16, 24, 24], interleaved=False)
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
    require_tower_heads(hidden, vision.get("num_heads", 16))
    for name, value in {**_TOWER, **vision, **(vision.get("rope_parameters") or {})}.items():
        if name in _TOWER and value != _TOWER[name]:
            raise ValueError(f"config.json has a vision_config of {name} {value}; {_TOWER[name]} is known")
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
