"""The sizes that a config.json states, and what it must not ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mrg_r1.policy.shape import PolicyShape, VisionShape

# What published files leave out, as transformers fills it in.
_TEXT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
_ROTATIONS = (None, "default", "linear")


def shape_of_config(config: Mapping[str, Any]) -> PolicyShape:
    """From a config.json.

    Raises:
        ValueError: a number is missing or contradicts another, or the model is one of another kind: with soft-capping,
            without windows, with attention to later words.
    """
    try:
        text, vision = {**_TEXT, **config["text_config"]}, config["vision_config"]
        _require_known(text)
        heads, key_heads, head_size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
        if not key_heads or heads % key_heads:
            raise ValueError(
                f"config.json has num_attention_heads {heads} and num_key_value_heads {key_heads}, which must divide "
                "it; fetch the checkpoint again"
            )
        hidden = text["hidden_size"]
        return PolicyShape(
            hidden=hidden,
            layers=text["num_hidden_layers"],
            heads=heads,
            key_heads=key_heads,
            head_size=head_size,
            intermediate=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
            layer_vectors=2 * head_size + 4 * hidden,  # norms of a query's and of a key's head, and of the layer
            vision=_vision(vision, hidden, config.get("mm_tokens_per_image", 256)),
            head_norms=True,
            post_norms=True,
        )
    except KeyError as error:
        raise ValueError(
            f"config.json has no {error.args[0]}, which every Gemma 3's that sees has; fetch the checkpoint again, or "
            "take one that reads images (a 1B of this family reads text alone)"
        ) from None


def _require_known(text: Mapping[str, Any]) -> None:
    """Refuse by name what the passes here do not compute."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if text.get(name) is not None:
            raise ValueError(f"config.json has {name} {text[name]}: soft-capping, Gemma 2's, is not supported")
    if text.get("use_bidirectional_attention"):
        raise ValueError("config.json has use_bidirectional_attention: an encoder of texts writes no report")
    if text.get("attention_bias"):
        raise ValueError("config.json has attention_bias, which no published Gemma 3 has; it is not supported")
    if not isinstance(text["sliding_window"], int) or text["sliding_window"] < 1:
        raise ValueError(f"config.json has sliding_window {text['sliding_window']}; it must be 1 token or more")
    if text["hidden_activation"] != "gelu_pytorch_tanh":
        raise ValueError(f"config.json has hidden_activation {text['hidden_activation']}; gelu_pytorch_tanh is known")
    for kind in text.get("layer_types") or ():
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"config.json has a layer of type {kind}; sliding_attention and full_attention are known")
    stated = [text.get("rope_scaling"), *(text.get("rope_parameters") or {}).values()]
    for one in stated:
        kind = one.get("rope_type", one.get("type")) if isinstance(one, Mapping) else None
        if kind not in _ROTATIONS:
            raise ValueError(f"config.json has positions of type {kind}; default and linear are known")


def _vision(vision: Mapping[str, Any], out: int, tokens: int) -> VisionShape:
    depth, hidden, intermediate = vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"]
    side, patch, channels = vision["image_size"], vision["patch_size"], vision.get("num_channels", 3)
    if vision.get("vision_use_head", True):
        raise ValueError(
            "config.json has a vision_config with vision_use_head true or not stated: not a Gemma 3's tower"
        )
    heads = vision.get("num_attention_heads", 12)
    if not heads or hidden % heads:
        raise ValueError(
            f"config.json has a vision_config of hidden_size {hidden} and num_attention_heads {heads}, which must "
            "divide it; fetch the checkpoint again"
        )
    tokens_side, grid = math.isqrt(tokens), side // patch
    if tokens_side**2 != tokens or side % patch or grid % tokens_side:
        raise ValueError(
            f"config.json has mm_tokens_per_image {tokens}, which is no square that {grid} x {grid} patches of an "
            "image are pooled to; fetch the checkpoint again"
        )
    patch_values, patches = channels * patch**2, grid**2
    block = 4 * (hidden**2 + hidden) + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden
    embedding = patch_values * hidden + hidden + patches * hidden
    return VisionShape(
        parameters=embedding + depth * block + 2 * hidden + hidden + hidden * out,
        depth=depth,
        hidden=hidden,
        intermediate=intermediate,
        out=out,
        patch_values=patch_values,
        patches=patches // tokens,
        pixels=side**2 // tokens,
        merger_sides=0,  # LoRA stands on the decoder alone
        block_sides=0,
        image_tokens=tokens,
    )
