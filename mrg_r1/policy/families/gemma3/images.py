"""Images before the tower: the processor, how images stand in a prompt, and the positions of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mrg_r1.policy.family import read_config, reading, require_place_of_image
from mrg_r1.types import ImageInputs

PIXELS = "pixel_values"  # [I, channels, side, side] float32


def banned_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of an image's tokens and of the marks around them."""
    return {config.image_token_id, config.boi_token_id, config.eoi_token_id}


def image_processor(path: Path, min_pixels: int, max_pixels: int) -> Gemma3ImageProcessorPil:
    """The PIL one, which needs no torchvision. Each image becomes a square of the tower's side, whatever its own.

    Raises:
        ValueError: pan-and-scan is on, another size than the tower's, or one beyond the recipe's limits.
    """
    with reading(path / "preprocessor_config.json"):
        processor = Gemma3ImageProcessorPil.from_pretrained(path, local_files_only=True)
    if processor.do_pan_and_scan:
        raise ValueError(
            f"{path}: the image processor is to pan and scan (do_pan_and_scan), which is not supported: an image here "
            "is one square; write do_pan_and_scan: false in preprocessor_config.json"
        )
    side = read_config(path).get("vision_config", {}).get("image_size")
    size = (processor.size["height"], processor.size["width"])
    if size != (side, side):
        raise ValueError(
            f"{path}: the image processor makes images of {size[0]} x {size[1]}, and config.json's tower takes "
            f"{side} x {side}; fetch the checkpoint's own preprocessor_config.json"
        )
    if not min_pixels <= side * side <= max_pixels:
        name = "max_pixels" if side * side > max_pixels else "min_pixels"
        limit = max_pixels if name == "max_pixels" else min_pixels
        raise ValueError(
            f"{path}: this policy sees every image as {side} x {side} pixels, whatever its own size, and "
            f"data.{name} {limit:,} forbids that; write data.{name}: {side * side}"
        )
    return processor


@dataclass(frozen=True)
class ImageTokens:
    """Prompts of text and images: an image is always as many tokens, between two marks, with an empty line around, as
    Gemma3Processor writes it. Every token advances the position by one.
    """

    around_image: ClassVar[str] = "\n\n"
    placeholder: str  # the mark before an image: what the chat template writes
    begin_id: int
    image_token_id: int
    end_id: int
    tokens: int  # of an image

    @classmethod
    def read(cls, config: Any, tokenizer: PreTrainedTokenizerBase) -> ImageTokens:
        """
        Raises:
            ValueError: the tokenizer does not know the image's tokens of the config, or its chat template has no place
                for an image or does not begin with BOS.
        """
        for name in ("boi", "eoi", "image"):
            token, number = getattr(tokenizer, f"{name}_token", None), getattr(config, f"{name}_token_id")
            known = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
            if known is None or (token is not None and token != known):
                raise ValueError(
                    f"the tokenizer's {name}_token is {token!r} and its token {number} {known!r}; config.json says "
                    f"{name}_token_index {number}: the two are of different checkpoints"
                )
        placeholder = tokenizer.convert_ids_to_tokens(config.boi_token_id)
        text = require_place_of_image(tokenizer, placeholder)
        if tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token):
            raise ValueError(
                f"the chat template does not begin with the tokenizer's bos_token ({tokenizer.bos_token!r}), without "
                "which this family's models write nonsense; take the published template (chat_template.jinja, "
                "chat_template.json)"
            )
        return cls(
            placeholder, config.boi_token_id, config.image_token_id, config.eoi_token_id, config.mm_tokens_per_image
        )

    def image_inputs(self, processed: Mapping[str, Tensor]) -> ImageInputs:
        """The squares of all images."""
        return ImageInputs({PIXELS: processed[PIXELS]}, {PIXELS: [1] * len(processed[PIXELS])})

    def image_ids(self, images: ImageInputs) -> list[list[int]]:
        return [[self.begin_id, *[self.image_token_id] * self.tokens, self.end_id] for _ in range(len(images))]

    def positions(self, input_ids: Tensor, attention_mask: Tensor, images: ImageInputs) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: [B, P] int64.
            attention_mask: [B, P], 0 on padding.
            images: of the batch.

        Returns:
            positions [B, P, 2] int64, the place in the prompt and the number of the image in it, 1, 2, ..., at an
            image's tokens (0 at text and on padding); next_position [B] int64, where the completion begins.

        Raises:
            ValueError: the image tokens of the batch are not those that the images call for.
        """
        at_images = input_ids == self.image_token_id
        begins = at_images & ~torch.nn.functional.pad(at_images, (1, 0))[:, :-1]
        numbers = begins.cumsum(dim=1) * at_images
        runs = [int((row == number).sum()) for row in numbers for number in range(1, int(row.max()) + 1)]
        if runs != [self.tokens] * len(images):
            raise ValueError(
                f"the batch has {len(images)} images of {self.tokens} tokens each, and its prompts have runs of "
                f"{runs} image tokens; a prompt was cut"
            )
        places = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return torch.stack([places, numbers], dim=2), attention_mask.sum(dim=1)


def in_order(positions: Tensor) -> Tensor:
    """[..., 2] -> [...] int64, the places of tokens in their prompt."""
    return positions[..., 0]


def image_numbers(positions: Tensor) -> Tensor:
    """[..., 2] -> [...] int64, the number of the image that a token is of, 0 of text."""
    return positions[..., 1]
