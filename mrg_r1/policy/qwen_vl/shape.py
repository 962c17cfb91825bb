"""What a config.json of Qwen2.5-VL and Qwen3-VL must not ask for: numbers that contradict one another, and what the
passes here do not compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Frequencies that transformers' module computes once, and that are read off it. Of the others `yarn` and `longrope`
# scale cosines and sines besides, `dynamic` and `longrope` follow the length of a sequence.
_ROTATIONS = ("default", "linear", "llama3")


def require_known(
    text: Mapping[str, Any],
    *,
    head_size: int,
    rotations: Sequence[str] = (),
    sections: Sequence[int],
    interleaved: bool,
) -> None:
    """Refuse by name what the decoder's passes do not compute.

    Args:
        text: the language model's part of a config.json.
        head_size: of the decoder.
        rotations: names by which the family's files call the default one besides.
        sections: `mrope_section` where it is left out.
        interleaved: whether the family's axes take frequencies by turns.

    Raises:
        ValueError: names the key and its value.
        KeyError: a number is missing.
    """
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    if not key_heads or heads % key_heads:
        raise ValueError(
            f"config.json has num_attention_heads {heads} and num_key_value_heads {key_heads}, which must divide it; "
            "fetch the checkpoint again"
        )
    activation = text.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json has hidden_act {activation}; silu is known: take the published config.json")
    if text.get("use_sliding_window"):
        raise ValueError(
            f"config.json has use_sliding_window {text['use_sliding_window']}; layers of this family see "
            "everything here: take the published config.json"
        )
    for kind in text.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"config.json has a layer of type {kind}; full_attention is known")
    rotation = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rotation.get("rope_type", rotation.get("type", "default"))
    if kind not in (*_ROTATIONS, *rotations):
        raise ValueError(
            f"config.json has positions of type {kind} (rope_scaling, rope_parameters); "
            f"{', '.join((*_ROTATIONS, *rotations))} are known: take the published config.json"
        )
    share = rotation.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"config.json has partial_rotary_factor {share}; this family's heads are rotated whole")
    if rotation.get("mrope_interleaved", interleaved) != interleaved:
        raise ValueError(f"config.json has mrope_interleaved {not interleaved}, which no model of this family has")
    stated = list(rotation.get("mrope_section", sections))
    if len(stated) != 3 or 2 * sum(stated) != head_size:
        raise ValueError(
            f"config.json has mrope_section {stated}, which must be three numbers that add up to {head_size / 2:g}, "
            f"half the size of one of its {heads} heads (num_attention_heads, hidden_size, head_dim); fetch the "
            "checkpoint again"
        )


def require_tower_heads(hidden: int, heads: int) -> None:
    """Refuse heads that the tower's width does not divide into, or whose halves rows and columns cannot share.

    Raises:
        ValueError: names both numbers.
    """
    if not heads or hidden % (4 * heads):
        raise ValueError(
            f"config.json has a vision_config of hidden_size {hidden} and num_heads {heads}: a head must have a "
            "multiple of 4 numbers; fetch the checkpoint again"
        )
