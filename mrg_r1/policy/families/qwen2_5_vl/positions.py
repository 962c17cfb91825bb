"""Multimodal rotary positions, computed once a batch and handed to every pass (docs/traps.md #9).

The model can work them out by itself, but then it keeps the last batch's offset as hidden state, and silently falls
back to one-dimensional positions when a field is missing. Here they are data: the loader makes them, all passes read
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryPositions:
    """Positions of prompts of text and still images.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1: text advances all three axes together; an image's merged patches
    take (time, row, column) from where the text stopped; text goes on after the largest position that the image used.
    """

    image_token_id: int
    merge_size: int

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: [B, P] int64; each image stands as t*h*w / merge^2 image tokens.
            attention_mask: [B, P], 0 on padding.
            image_grid_thw: [I, 3] int64, the images in the order in which they stand in the batch.

        Returns:
            position_ids [3, B, P] int64 (0 on padding) and next_position [B] int64, where the completion begins.

        Raises:
            ValueError: the image tokens of the batch are not those that the grids call for.
        """
        position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        next_position = torch.zeros(len(input_ids), dtype=torch.long)
        grids = iter(image_grid_thw.tolist())
        for row, (ids, kept) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            tokens = [token for token, keep in zip(ids, kept, strict=True) if keep]
            pieces, position, index = [], 0, 0
            while index < len(tokens):
                if tokens[index] != self.image_token_id:
                    pieces.append(torch.full((3, 1), position))
                    position, index = position + 1, index + 1
                    continue
                grid = next(grids, None)
                if grid is None:
                    raise ValueError(
                        f"prompt {row}: more runs of image tokens than the {len(image_grid_thw)} images of the batch"
                    )
                time, height, width = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
                count = time * height * width
                if tokens[index : index + count] != [self.image_token_id] * count:
                    raise ValueError(
                        f"prompt {row}: an image of grid {grid} needs {count} image tokens; the prompt was cut "
                        "inside them"
                    )
                axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
                pieces.append(torch.stack([axis.reshape(-1) for axis in axes]) + position)
                position, index = position + max(height, width), index + count
            position_ids[:, row, torch.tensor(kept, dtype=torch.bool)] = torch.cat(pieces, dim=1)
            next_position[row] = position
        if next(grids, None) is not None:
            raise ValueError(f"the batch has {len(image_grid_thw)} images, but fewer runs of image tokens")
        return position_ids, next_position
