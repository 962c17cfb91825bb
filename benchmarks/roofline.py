"""What the phases of a step ask of the machine, counted from shapes: floating-point operations and bytes. Pure.

An operation is a multiplication or an addition. Counted are matrix products (linear layers, LoRA, head, patch
embedding) and attention, with the masked half of a prompt's square, of which the CPU computes a sixth to all. Norms,
rotation, softmax and the optimizer are left out: they are what keeps a phase from its peak, not what it is for.

Bytes are those that must pass at least: of a product its inputs, weights and outputs once, of attention queries, keys,
values and outputs once; on small shapes a cache holds most of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flop * times, self.bytes * times)


def product(rows: float, inputs: int, outputs: int) -> Work:
    """[rows, inputs] @ [inputs, outputs]."""
    return Work(2 * rows * inputs * outputs, _FLOAT * (rows * (inputs + outputs) + inputs * outputs))


def attention(queries: float, context: float, width: int, kv_width: int) -> Work:
    """Scores and their product with values: `queries` of `width` = heads x head_dim over `context` keys each, where
    the keys are read once.
    """
    return Work(4 * queries * context * width, _FLOAT * (2 * queries * width + 2 * context * kv_width))


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Qwen2.5-VL, and of one study's prompt.

    Attributes:
        linears: inputs and outputs of the matrices of one layer of the language model.
        tower_linears: the same of one block of the vision tower.
        tower_full: blocks that attend over the whole image.
        prompt: tokens, image tokens among them.
        patches: of all images of a study.
        window: patches that a windowed block attends over.
    """

    hidden: int
    layers: int
    vocabulary: int
    kv_width: int
    linears: tuple[tuple[int, int], ...]
    tower_width: int
    tower_depth: int
    tower_full: int
    tower_linears: tuple[tuple[int, int], ...]
    patch_values: int
    merge: int
    window: int
    prompt: int
    patches: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, prompt: int, patches: int) -> Shapes:
        """From a checkpoint's config.json."""
        text, vision = config["text_config"], config["vision_config"]
        hidden, inner = text["hidden_size"], text["intermediate_size"]
        kv = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
        tower, tower_inner = vision["hidden_size"], vision["intermediate_size"]
        return cls(
            hidden=hidden,
            layers=text["num_hidden_layers"],
            vocabulary=text["vocab_size"],
            kv_width=kv,
            linears=(
                (hidden, hidden),
                (hidden, kv),
                (hidden, kv),
                (hidden, hidden),
                (hidden, inner),
                (hidden, inner),
                (inner, hidden),
            ),
            tower_width=tower,
            tower_depth=vision["depth"],
            tower_full=len(vision["fullatt_block_indexes"]),
            tower_linears=(
                (tower, 3 * tower),
                (tower, tower),
                (tower, tower_inner),
                (tower, tower_inner),
                (tower_inner, tower),
            ),
            patch_values=vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            merge=vision["spatial_merge_size"] ** 2,
            window=min(patches, (vision["window_size"] // vision["patch_size"]) ** 2),
            prompt=prompt,
            patches=patches,
        )

    def tower(self, studies: float) -> Work:
        """The vision tower's forward pass."""
        patches, tokens = studies * self.patches, studies * self.patches / self.merge
        merged = self.merge * self.tower_width
        work = product(patches, self.patch_values, self.tower_width)
        work += product(tokens, merged, merged) + product(tokens, merged, self.hidden)
        for inputs, outputs in self.tower_linears:
            work += product(patches, inputs, outputs) * self.tower_depth
        full = attention(self.patches, self.patches, self.tower_width, self.tower_width) * studies
        windows = attention(self.window, self.window, self.tower_width, self.tower_width) * (
            studies * self.patches / self.window
        )
        return work + full * self.tower_full + windows * (self.tower_depth - self.tower_full)

    def matrices(self, tokens: float, lora: int = 0) -> Work:
        """The language model's linear layers, forward; LoRA of that rank on all of them, or none."""
        work = Work()
        for inputs, outputs in self.linears:
            work += product(tokens, inputs, outputs)
            if lora:
                work += product(tokens, inputs, lora) + product(tokens, lora, outputs)
        return work * self.layers

    def prompts(self, studies: float) -> Work:
        """Attention of the prompts over themselves."""
        return attention(self.prompt, self.prompt, self.hidden, self.kv_width) * (studies * self.layers)

    def completions(self, studies: float, group: int, tokens: float) -> Work:
        """Attention of `tokens` of each completion over its prompt, read once a study, and what is before it."""
        over_prompt = attention(group * tokens, self.prompt, self.hidden, self.kv_width)
        over_own = attention(tokens, (tokens + 1) / 2, self.hidden, self.kv_width) * group
        return (over_prompt + over_own) * (studies * self.layers)

    def head(self, tokens: float) -> Work:
        """Logits."""
        return product(tokens, self.hidden, self.vocabulary)


def count_grpo(shapes: Shapes, *, studies: int, group: int, tokens: float, lora: int) -> dict[str, Work]:
    """Work by phase of one step whose rollout's prompt pass is kept for the update.

    Backward passes: once the products again for the inputs' gradient, LoRA's twice; attention two and a half times,
    since the kernel computes the scores again.
    """
    prompt, written = studies * shapes.prompt, studies * group * tokens
    inputs = studies * group * (tokens - 1)  # the last token predicts nothing
    plain, own = shapes.matrices, shapes.completions(studies, group, tokens - 1)
    decoded = plain(studies * group) * (tokens - 1)  # merged matrices, read again for each token of all rows
    return {
        "vision": shapes.tower(studies),
        "rollout": shapes.matrices(prompt, lora) + shapes.prompts(studies) + decoded + own + shapes.head(written),
        "reference": plain(prompt) + shapes.prompts(studies) + plain(inputs) + own + shapes.head(written),
        "update": shapes.matrices(inputs, lora)
        + plain(inputs + prompt)
        + _adapters(shapes, inputs + prompt, lora) * 2.0
        + own * 3.5
        + shapes.prompts(studies) * 2.5
        + shapes.head(written) * 2.0,
    }


def _adapters(shapes: Shapes, tokens: float, lora: int) -> Work:
    """LoRA's own products, forward."""
    return shapes.matrices(tokens, lora) + shapes.matrices(tokens) * -1.0


def count_sft(shapes: Shapes, *, studies: int, tokens: float) -> dict[str, Work]:
    """Work of SFT of every parameter, forward and backward: products three times, attention three and a half times."""
    through = studies * (shapes.prompt + tokens - 1)
    linear = shapes.matrices(through) + shapes.head(studies * tokens) + shapes.tower(studies)
    over = shapes.prompts(studies) + shapes.completions(studies, 1, tokens - 1)
    return {"update": linear * 3.0 + over * 3.5}
