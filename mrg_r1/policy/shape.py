"""The sizes of a policy: counts of parameters, numbers of a token. No model is built; a family reads them off its
config.json (`Family.shape`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionShape:
    """The tower."""

    parameters: int
    depth: int
    hidden: int
    intermediate: int
    out: int  # width of an image token's features
    patch_values: int  # numbers of a patch: channels, frames, rows, columns
    patches: int  # of an image token
    pixels: int  # of an image token
    merger_sides: int  # inputs and outputs of the mergers' linear layers together: what LoRA of rank 1 has on them
    block_sides: int  # of one of the tower's layers
    mergers: int = 1  # the one at the tower's end, and DeepStack's within it
    image_tokens: int | None = None  # of any image; None: its area says how many

    @property
    def before_merger(self) -> int:
        """Numbers of an image token before the mergers."""
        return self.mergers * self.patches * self.hidden


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
    layer_vectors: int  # elements of a layer's norms and biases
    vision: VisionShape
    head_norms: bool = False  # queries and keys have a norm, and are kept as they were before it too
    post_norms: bool = False  # so do the outputs of attention and MLP
    added: int = 0  # features of images that are added to the prompts, one after each of so many first layers

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
        return tables + self.layers * (self.layer_matrices + self.layer_vectors) + self.hidden

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision.parameters

    def lora_parameters(self, rank: int, targets: str = "language") -> int:
        """Of LoRA on q, k, v, o, gate, up and down of every layer, and on what else `policy.lora.targets` names
        (`policy/lora.py`).
        """
        beyond = 0 if targets == "language" else self.vision.merger_sides
        if targets == "all":
            beyond += self.vision.depth * self.vision.block_sides
        heads, keys = self.heads * self.head_size, self.key_heads * self.head_size
        ends = [(self.hidden, heads), (self.hidden, keys), (self.hidden, keys), (heads, self.hidden)]
        ends += [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return rank * (self.layers * sum(inner + outer for inner, outer in ends) + beyond)

    @property
    def cache_values(self) -> int:
        """Numbers of one token's keys and values in all layers."""
        return 2 * self.layers * self.key_heads * self.head_size

    def kept_values(self, lora_rank: int) -> int:
        """Numbers that one layer keeps of a token for its backward pass.

        Both norms' inputs and outputs, and those of the two behind where there are such, q, k and v, the attention's
        output, gate and up, their product, and the seven inner LoRA products.
        """
        attention = self.qkv_rows * (2 if self.head_norms else 1) + self.heads * self.head_size
        return (6 if self.post_norms else 4) * self.hidden + attention + 3 * self.intermediate + 7 * lora_rank
