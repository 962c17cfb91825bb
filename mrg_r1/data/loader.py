"""From studies to prompts: the order in which studies come, and the only place that calls tokenizer and image processor.

The order is a pure function of (seed, position): step s takes studies s*n … s*n + n - 1 of an endless stream of seeded
permutations. Resuming needs no state but the step, and any number of ranks sees the same studies in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrg_r1.data.images import load_image
from mrg_r1.types import Prompts, Study

Positions = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PromptWords:
    """What the prompt says around the images (the recipe's `prompt` and `data.context`)."""

    instruction: str
    show_view: bool = True
    context: tuple[str, ...] = ()
    max_tokens: int = 4096


class PromptBuilder:
    """Studies -> `Prompts`, left-padded.

    Args:
        tokenizer: the checkpoint's, with its chat template.
        image_processor: PIL images -> patches and grids.
        positions: (input_ids, attention_mask, grids) -> (position_ids, next_position); `policy.positions`.
    """

    def __init__(self, *, tokenizer: Any, image_processor: Any, positions: Positions, words: PromptWords) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.positions = positions
        self.words = words
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def messages(self, study: Study) -> list[dict[str, Any]]:
        """One user turn: each image after its view where known, then the study's context where asked, then the instruction."""
        content: list[dict[str, str]] = []
        for image in study.images:
            if self.words.show_view and image.view is not None:
                content.append({"type": "text", "text": f"{image.view.capitalize()} view: "})
            content.append({"type": "image"})
        for field in self.words.context:
            value = {"indication": study.indication, "comparison": study.comparison}[field]
            if value:
                content.append({"type": "text", "text": f"\n{field.capitalize()}: {value}"})
        content.append({"type": "text", "text": f"\n{self.words.instruction}"})
        return [{"role": "user", "content": content}]

    def __call__(self, studies: Sequence[Study]) -> Prompts:
        """
        Raises:
            ValueError: an unreadable image, or a prompt longer than `max_tokens`; names the study. A prompt is never cut (trap 12).
        """
        pixels, grids, rows = [], [], []
        for study in studies:
            images = [load_image(image.path, study.id) for image in study.images]
            features = self.image_processor(images=images, return_tensors="pt")
            pixels.append(features["pixel_values"])
            grids.append(features["image_grid_thw"])
            rows.append(self._ids(study, features["image_grid_thw"]))
        length = max(len(ids) for ids in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        image_grid_thw = torch.cat(grids)
        position_ids, next_position = self.positions(input_ids, attention_mask, image_grid_thw)
        return Prompts(
            study_ids=[study.id for study in studies],
            references=[study.report for study in studies],
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            next_position=next_position,
            pixel_values=torch.cat(pixels),
            image_grid_thw=image_grid_thw,
            images_per_study=[len(study.images) for study in studies],
        )

    def _ids(self, study: Study, grid: Tensor) -> list[int]:
        """The prompt's ids, each image placeholder repeated once a merged patch."""
        text = self.tokenizer.apply_chat_template(self.messages(study), tokenize=False, add_generation_prompt=True)
        pieces = text.split(self.image_token)
        if len(pieces) != len(grid) + 1:
            raise ValueError(
                f"study {study.id}: {len(grid)} image(s), but the prompt has {len(pieces) - 1} image placeholders; "
                f"the report's context must not contain {self.image_token}"
            )
        merge = self.image_processor.merge_size**2
        ids: list[int] = []
        for piece, count in zip(pieces, [*(grid.prod(dim=1) // merge).tolist(), 0], strict=True):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] + [self.image_token_id] * count
        if len(ids) > self.words.max_tokens:
            raise ValueError(
                f"study {study.id}: prompt of {len(ids)} tokens, prompt.max_tokens is {self.words.max_tokens}; "
                "lower data.max_pixels or raise prompt.max_tokens (a prompt is never cut: that could cut an image)"
            )
        return ids


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def stream_indices(count: int, *, seed: int, start: int, length: int) -> list[int]:
    """Positions `start` … `start + length - 1` of the endless stream of seeded permutations of 0..count-1."""
    return [_permutation(count, seed, position // count)[position % count] for position in range(start, start + length)]


def rank_indices(count: int, *, seed: int, step: int, batch_size: int, rank: int, world_size: int, skip: int = 0) -> list[int]:
    """The studies of a step on one rank: a contiguous share of the global batch, a study (and so its group) on one rank only (trap 7)."""
    share = batch_size // world_size
    return stream_indices(count, seed=seed, start=skip + step * batch_size + rank * share, length=share)


class StudyLoader:
    """This rank's batches, each prepared by a thread while the step before it runs."""

    def __init__(
        self, studies: Sequence[Study], build: PromptBuilder, *, seed: int, batch_size: int, rank: int, world_size: int, skip: int = 0
    ) -> None:
        self.studies = studies
        self.build = build
        self._where: dict[str, int] = {"seed": seed, "batch_size": batch_size, "rank": rank, "world_size": world_size, "skip": skip}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: dict[int, Any] = {}

    def studies_of(self, step: int) -> list[Study]:
        return [self.studies[index] for index in rank_indices(len(self.studies), step=step, **self._where)]

    def batch(self, step: int) -> Prompts:
        """The prompts of `step`; those of the next step begin to be prepared."""
        for wanted in (step, step + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._worker.submit(self.build, self.studies_of(wanted))
        prompts: Prompts = self._ahead.pop(step).result()
        return prompts

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
