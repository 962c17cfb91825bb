"""The sizes of a Qwen2.5-VL as its config.json gives them: counts of parameters, bytes of a token. No model is
built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class VisionShape:
    """The tower."""

    depth: int
    hidden: int
    intermediate: int
    out: int
    patch_values: int  # numbers of a patch: channels, frames, rows, columns
    merge: int  # patches on the side of an image token

    @property
    def parameters(self) -> int:
        attention = 4 * self.hidden**2 + 4 * self.hidden
        mlp = 3 * self.hidden * self.intermediate + 2 * self.intermediate + self.hidden
        block = attention + mlp + 2 * self.hidden  # and two norms
        wide = self.hidden * self.merge**2
        return (
            self.patch_values * self.hidden
            + self.depth * block
            + self.hidden
            + wide * wide
            + wide
            + wide * self.out
            + self.out
        )


@dataclass(frozen=True)
class PolicyShape:
    """The language model, with the tower in `vision`."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool  # the head is the embeddings
    vision: VisionShape

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> PolicyShape:
        """From a config.json: published checkpoints have the language model's numbers at the top, newer files under
        `text_config`.

        Raises:
            ValueError: a number is missing.
        """
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        try:
            channels = vision.get("in_channels", vision.get("in_chans", 3))
            patch = vision.get("temporal_patch_size", 2) * vision.get("patch_size", 14) ** 2 * channels
            return cls(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                key_heads=text["num_key_value_heads"],
                head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                intermediate=text["intermediate_size"],
                vocabulary=text["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                vision=VisionShape(
                    depth=vision["depth"],
                    hidden=vision["hidden_size"],
                    intermediate=vision["intermediate_size"],
                    out=vision["out_hidden_size"],
                    patch_values=patch,
                    merge=vision.get("spatial_merge_size", 2),
                ),
            )
        except KeyError as error:
            raise ValueError(
                f"config.json has no {error.args[0]}, which every Qwen2.5-VL's has; fetch the checkpoint again"
            ) from None

    @classmethod
    def of_directory(cls, path: Path) -> PolicyShape:
        """Of a checkpoint directory.

        Raises:
            ValueError: config.json lacks a number.
        """
        try:
            return cls.of_config(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"policy.path {path}: {error}") from error

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.key_heads) * self.head_size

    @property
    def layer_matrices(self) -> int:
        """Elements of a decoder layer's linear weights: what a rollout's merged copy holds."""
        attention = self.hidden * self.qkv_rows + self.heads * self.head_size * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def language_parameters(self) -> int:
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * (self.layer_matrices + self.qkv_rows + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision.parameters

    def lora_parameters(self, rank: int) -> int:
        """Of LoRA on q, k, v, o, gate, up and down of every layer (`policy/lora.py`)."""
        heads, keys = self.heads * self.head_size, self.key_heads * self.head_size
        ends = [(self.hidden, heads), (self.hidden, keys), (self.hidden, keys), (heads, self.hidden)]
        ends += [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return self.layers * rank * sum(inner + outer for inner, outer in ends)

    @property
    def cache_values(self) -> int:
        """Numbers of one token's keys and values in all layers."""
        return 2 * self.layers * self.key_heads * self.head_size

    def kept_values(self, lora_rank: int) -> int:
        """Numbers that one layer keeps of a token for its backward pass.

        Both norms' inputs and outputs, q, k and v, the attention's output, gate and up, their product, and the seven
        inner LoRA products.
        """
        attention = self.qkv_rows + self.heads * self.head_size
        return 4 * self.hidden + attention + 3 * self.intermediate + 7 * lora_rank
