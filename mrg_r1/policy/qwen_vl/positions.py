"""How images stand in a prompt, and multimodal rotary positions, computed once a batch and handed to every pass
(docs/traps.md #9).

The model can work positions out by itself, but then it keeps the last batch's offset as hidden state, and silently
falls back to one-dimensional positions when a field is missing. Here they are data: the loader makes them, all passes
read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mrg_r1.policy.family import require_place_of_image
from mrg_r1.types import ImageInputs

PIXELS, GRIDS = "pixel_values", "image_grid_thw"  # [patches, channels * 2 * side * side] float32; [I, 3] int64
_PLACEHOLDER = "<|image_pad|>"


@dataclass(frozen=True)
class ImageTokens:
    """Prompts of text and still images: an image is one image token a merged patch.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1: text advances all three axes together; an image's merged patches
    take (time, row, column) from where the text stopped; text goes on after the largest position that the image used.
    """

    around_image: ClassVar[str] = ""
    placeholder: str
    image_token_id: int
    merge_size: int

    @classmethod
    def read(cls, config: Any, tokenizer: PreTrainedTokenizerBase) -> ImageTokens:
        """
        Raises:
            ValueError: the tokenizer's image token is not the config's (transformers makes an empty tokenizer where its
                files are missing), or its chat template has no place for an image.
        """
        found = tokenizer.convert_tokens_to_ids(_PLACEHOLDER)
        if found != config.image_token_id:
            raise ValueError(f"the tokenizer's {_PLACEHOLDER} is {found}, config.json says {config.image_token_id}")
        require_place_of_image(tokenizer, _PLACEHOLDER)
        return cls(_PLACEHOLDER, config.image_token_id, config.vision_config.spatial_merge_size)

    def image_inputs(self, processed: Mapping[str, Tensor]) -> ImageInputs:
        """Patches of all images, and their grids: patches in time, height and width."""
        grids = processed[GRIDS]
        rows = {PIXELS: grids.prod(dim=1).tolist(), GRIDS: [1] * len(grids)}
        return ImageInputs({name: processed[name] for name in rows}, rows)

    def image_ids(self, images: ImageInputs) -> list[list[int]]:
        merge = self.merge_size**2
        return [[self.image_token_id] * (patches // merge) for patches in images.rows[PIXELS]]

    def positions(self, input_ids: Tensor, attention_mask: Tensor, images: ImageInputs) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: [B, P] int64; each image stands as t*h*w / merge^2 image tokens.
            attention_mask: [B, P], 0 on padding.
            images: in the order in which they stand in the batch.

        Returns:
            positions [B, P, 3] int64 (0 on padding) and next_position [B] int64, where the completion begins.

        Raises:
            ValueError: the image tokens of the batch are not those that the grids call for.
        """
        positions = torch.zeros(*input_ids.shape, 3, dtype=torch.long)
        next_position = torch.zeros(len(input_ids), dtype=torch.long)
        grids = iter(images.tensors[GRIDS].tolist())
        for row, (ids, kept) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            tokens = [token for token, keep in zip(ids, kept, strict=True) if keep]
            pieces, position, index = [], 0, 0
            while index < len(tokens):
                if tokens[index] != self.image_token_id:
                    pieces.append(torch.full((1, 3), position))
                    position, index = position + 1, index + 1
                    continue
                grid = next(grids, None)
                if grid is None:
                    raise ValueError(
                        f"prompt {row}: more runs of image tokens than the {len(images)} images of the batch"
                    )
                time, height, width = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
                count = time * height * width
                if tokens[index : index + count] != [self.image_token_id] * count:
                    raise ValueError(
                        f"prompt {row}: an image of grid {grid} needs {count} image tokens; the prompt was cut "
                        "inside them"
                    )
                axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
                pieces.append(torch.stack([axis.reshape(-1) for axis in axes], dim=1) + position)
                position, index = position + max(height, width), index + count
            positions[row, torch.tensor(kept, dtype=torch.bool)] = torch.cat(pieces)
            next_position[row] = position
        if next(grids, None) is not None:
            raise ValueError(f"the batch has {len(images)} images, but fewer runs of image tokens")
        return positions, next_position


def places_of_patches(grid: Sequence[int], merge: int) -> Tensor:
    """[patches, 2] int64, row and column of an image's patches in the processor's order: merged patches row by row, the
    merge x merge patches of each together, frame after frame.
    """
    time, height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).view(height // merge, merge, width // merge, merge, 2)
    return places.transpose(1, 2).reshape(-1, 2).repeat(time, 1)
