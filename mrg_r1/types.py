"""The plain things that travel through a step: studies, prompts, completions, rewards, experience.

A study enters as a `Study`, is batched into `Prompts`, answered by `Completions`, scored as `Rewards`, and leaves as
`Experience` for the loss. Letters used for shapes everywhere: B studies on this rank, G completions a study (the
group), C completion tokens, P prompt tokens, I images in the batch, H the language model's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class StudyImage:
    """One radiograph of a study."""

    path: Path  # absolute
    view: str | None = None  # "frontal", "lateral" or None where it is not known


@dataclass(frozen=True)
class Study:
    """One line of a manifest (docs/method.md §7). Label values are 1, 0, -1 or None, in CheXbert's order of 14."""

    id: str
    patient_id: str
    images: tuple[StudyImage, ...]
    report: str  # the text to learn; "" only where an evaluation has no reference
    split: str
    findings: str | None = None
    impression: str | None = None
    indication: str | None = None
    comparison: str | None = None
    said: tuple[int | None, ...] | None = None  # what the reference text says
    drawn: tuple[int | None, ...] | None = None  # the truth that a phantom was rendered from
    rendered: bool = False  # True: the radiograph is a phantom
    prior: str | None = None  # id of an earlier study of the same patient
    prior_report: str | None = None  # its report, where a recipe asks for it (`data.context`); not in the manifest


@dataclass
class Prompts:
    """A batch of studies as the policy reads them; made once by the loader and never recomputed."""

    study_ids: list[str]  # B
    references: list[str]  # B, the radiologists' reports
    input_ids: Tensor  # [B, P] int64, left-padded
    attention_mask: Tensor  # [B, P] int64, 0 on padding
    position_ids: Tensor  # [3, B, P] int64, multimodal rotary positions
    next_position: Tensor  # [B] int64, the position of the first completion token
    pixel_values: Tensor  # [patches of all I images, channels * 2 * 14 * 14] float32
    image_grid_thw: Tensor  # [I, 3] int64, patches in time, height and width
    images_per_study: list[int]  # B, sums to I

    def __len__(self) -> int:
        return len(self.study_ids)

    def select(self, rows: Sequence[int]) -> Prompts:
        """The studies at `rows`, with their own pixels (docs/traps.md #10: pixels must not drift from their
        prompts).
        """
        patches = self.image_grid_thw.prod(dim=1).tolist()
        pixels = self.pixel_values.split(patches)
        starts = [sum(self.images_per_study[:b]) for b in range(len(self))]
        images = [i for b in rows for i in range(starts[b], starts[b] + self.images_per_study[b])]
        index = torch.tensor(list(rows), dtype=torch.long, device=self.input_ids.device)
        return Prompts(
            study_ids=[self.study_ids[b] for b in rows],
            references=[self.references[b] for b in rows],
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            position_ids=self.position_ids[:, index],
            next_position=self.next_position[index],
            pixel_values=torch.cat([pixels[i] for i in images]),
            image_grid_thw=self.image_grid_thw[torch.tensor(images, device=self.image_grid_thw.device)],
            images_per_study=[self.images_per_study[b] for b in rows],
        )

    def to(self, device: torch.device | str) -> Prompts:
        """The same batch with its tensors on `device`."""
        return Prompts(
            study_ids=self.study_ids,
            references=self.references,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            next_position=self.next_position.to(device),
            pixel_values=self.pixel_values.to(device),
            image_grid_thw=self.image_grid_thw.to(device),
            images_per_study=self.images_per_study,
        )


@dataclass
class VisionFeatures:
    """What the vision tower saw, once an image; every later pass of the step reuses it."""

    per_study: list[Tensor]  # B, each [image tokens of the study, H], images in prompt order

    def select(self, rows: Sequence[int]) -> VisionFeatures:
        return VisionFeatures([self.per_study[b] for b in rows])


@dataclass
class Completions:
    """The sampled reports. The ids here are the ids trained on: nothing is tokenised again (docs/traps.md #21)."""

    token_ids: Tensor  # [B, G, C] int64, padded on the right
    mask: Tensor  # [B, G, C] bool, True up to and including the EOS
    logp: Tensor  # [B, G, C] float32, log-prob of each token under the sampling distribution; 0 where masked
    ended: Tensor  # [B, G] bool, True where an EOS was sampled, False where the length ran out
    texts: list[list[str]]  # B lists of G

    @property
    def lengths(self) -> Tensor:
        """[B, G] int64, tokens including the EOS."""
        return self.mask.sum(dim=-1)

    @staticmethod
    def join(parts: Sequence[Completions], *, pad_id: int) -> Completions:
        """Completions of several batches of studies as those of one, padded to the longest."""
        length = max(part.token_ids.shape[2] for part in parts)

        def joined(tensors: list[Tensor], fill: float) -> Tensor:
            return torch.cat(
                [torch.nn.functional.pad(tensor, (0, length - tensor.shape[2]), value=fill) for tensor in tensors]
            )

        return Completions(
            token_ids=joined([part.token_ids for part in parts], pad_id),
            mask=joined([part.mask for part in parts], False),
            logp=joined([part.logp for part in parts], 0.0),
            ended=torch.cat([part.ended for part in parts]),
            texts=[group for part in parts for group in part.texts],
        )


@dataclass
class Rewards:
    """What the reward stage made of a batch of completions."""

    total: Tensor  # [B, G] float32
    terms: dict[str, Tensor]  # name -> [B, G] float32, before weights
    weights: dict[str, float]  # name -> weight
    labels: Tensor  # [B, G, 14] int64 classes read from the reports; -1 in rows that were not labelled
    report_texts: list[list[str | None]]  # B lists of G: the text that was labelled, None where malformed
    reference_labels: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, 14] int64 classes
    # `total` and each term -> [B] float32, of one report given to every study
    constant: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Sampled:
    """A rollout and what is known of it before anything is learned: what the disk keeps of a step (`experience.py`)."""

    prompts: Prompts
    completions: Completions
    rewards: Rewards | None = None  # None: not made yet, or not finite
    reference_logp: Tensor | None = None  # [B, G, C] float32
    old_logp: Tensor | None = None  # [B, G, C] float32


@dataclass
class Experience:
    """One rollout, ready for the loss. `old_logp` is the rollout's for every inner iteration (docs/traps.md #16)."""

    prompts: Prompts
    vision: VisionFeatures
    completions: Completions
    rewards: Rewards
    advantages: Tensor  # [B, G] float32
    reference_logp: Tensor | None  # [B, G, C] float32, None where beta is 0
    old_logp: Tensor | None  # [B, G, C] float32, None where the policy's own detached log-probs are the old ones
