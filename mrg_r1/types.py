"""The plain things that travel through a step: studies, prompts, completions, rewards, experience.

A study enters as a `Study`, is batched into `Prompts`, answered by `Completions`, scored as `Rewards`, and leaves as
`Experience` for the loss. Letters used for shapes everywhere: B studies on this rank, G completions a study (the
group), C completion tokens, P prompt tokens, I images in the batch, H the language model's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

LABELS_ONLY = "(labels only)"  # shown in place of a reference's text where a study has none


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; from the host it is sent without waiting for what the device has still to do."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


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
    report: str | None  # the text to learn; None where there are labels alone, or in an evaluation no reference
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

    @property
    def has_reference(self) -> bool:
        """Whether there is something to score against: a report, or the labels of one."""
        return self.report is not None or self.said is not None


@dataclass(frozen=True)
class ImageInputs:
    """Radiographs as a model family's image processor leaves them; what the tensors mean is the family's alone."""

    tensors: dict[str, Tensor]  # each [sum of `rows`, ...], the images behind one another
    rows: dict[str, list[int]]  # by the same names: how many rows of the tensor each image has

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def select(self, images: Sequence[int]) -> ImageInputs:
        """The images of these numbers, in the order given."""

        def chosen(name: str, tensor: Tensor) -> Tensor:
            pieces = tensor.split(self.rows[name])
            return torch.cat([pieces[image] for image in images])

        return ImageInputs(
            {name: chosen(name, tensor) for name, tensor in self.tensors.items()},
            {name: [rows[image] for image in images] for name, rows in self.rows.items()},
        )

    def to(self, device: torch.device | str) -> ImageInputs:
        """The same images with their pixels on `device`; whole numbers say how those lie, and are read on the host."""
        moved = {
            name: to_device(tensor, device) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }
        return ImageInputs(moved, self.rows)

    @staticmethod
    def join(parts: Sequence[ImageInputs]) -> ImageInputs:
        """Images of several studies as those of one batch."""
        names = parts[0].tensors
        return ImageInputs(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in names},
            {name: [count for part in parts for count in part.rows[name]] for name in names},
        )


class PromptLayout(Protocol):
    """How a model family writes images into a prompt; the loader asks it, and nobody else knows."""

    @property
    def placeholder(self) -> str:
        """What the chat template writes for an image."""

    @property
    def around_image(self) -> str:
        """What is written before and after each placeholder, tokenised with the text there."""

    @property
    def image_token_id(self) -> int:
        """The id whose embeddings the image features replace."""

    def image_inputs(self, processed: Mapping[str, Tensor]) -> ImageInputs:
        """What the image processor said of a study's images."""

    def image_ids(self, images: ImageInputs) -> list[list[int]]:
        """Of each image the ids that stand for it in a prompt, in place of the placeholder."""

    def positions(self, input_ids: Tensor, attention_mask: Tensor, images: ImageInputs) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids, attention_mask: [B, P] int64.
            images: in the order in which they stand in the batch.

        Returns:
            positions [B, P, ...] int64 for the family's rotation, 0 on padding; next_position [B] int64, that of the
            first completion token.

        Raises:
            ValueError: the image tokens of the batch are not those that the images call for.
        """


@dataclass
class Prompts:
    """A batch of studies as the policy reads them; made once by the loader and never recomputed."""

    study_ids: list[str]  # B
    references: list[str | None]  # B, the radiologists' reports; None: labels alone
    input_ids: Tensor  # [B, P] int64, left-padded
    attention_mask: Tensor  # [B, P] int64, 0 on padding
    positions: Tensor  # [B, P, ...] int64, what the family's rotation takes
    next_position: Tensor  # [B] int64, the position of the first completion token
    images: ImageInputs  # all I
    images_per_study: list[int]  # B, sums to I
    # B, how often the step had the study before, on all ranks; None: never
    occurrences: list[int] | None = None
    known_lengths: list[int] | None = None  # what `lengths` has read, or was handed

    @property
    def lengths(self) -> list[int]:
        """B, tokens of each prompt. The device is asked for them at most once, and not at all after `to`."""
        if self.known_lengths is None:
            self.known_lengths = self.attention_mask.sum(dim=1).tolist()
        return self.known_lengths

    def __len__(self) -> int:
        return len(self.study_ids)

    def select(self, rows: Sequence[int]) -> Prompts:
        """The studies at `rows`, with their own pixels (docs/traps.md #10: pixels must not drift from their
        prompts).
        """
        starts = [sum(self.images_per_study[:b]) for b in range(len(self))]
        index = to_device(torch.tensor(list(rows), dtype=torch.long), self.input_ids.device)
        return Prompts(
            study_ids=[self.study_ids[b] for b in rows],
            references=[self.references[b] for b in rows],
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            positions=self.positions[index],
            next_position=self.next_position[index],
            images=self.images.select([starts[b] + i for b in rows for i in range(self.images_per_study[b])]),
            images_per_study=[self.images_per_study[b] for b in rows],
            occurrences=None if self.occurrences is None else [self.occurrences[b] for b in rows],
            known_lengths=None if self.known_lengths is None else [self.known_lengths[b] for b in rows],
        )

    def to(self, device: torch.device | str) -> Prompts:
        """The same batch with its tensors on `device`."""
        return Prompts(
            study_ids=self.study_ids,
            references=self.references,
            input_ids=to_device(self.input_ids, device),
            attention_mask=to_device(self.attention_mask, device),
            positions=to_device(self.positions, device),
            next_position=to_device(self.next_position, device),
            images=self.images.to(device),
            images_per_study=self.images_per_study,
            occurrences=self.occurrences,
            known_lengths=self.lengths,
        )


@dataclass
class VisionFeatures:
    """What the vision tower saw, once an image; every later pass of the step reuses it."""

    # B, each [image tokens of the study, H] in prompt order, or wider (`policy.family.Family.merge`)
    per_study: list[Tensor]
    # B, what the tower had of each image before its merger, where the merger is trained and the tower is not
    before_merger: list[list[Tensor]] | None = None

    def select(self, rows: Sequence[int]) -> VisionFeatures:
        kept = None if self.before_merger is None else [self.before_merger[b] for b in rows]
        return VisionFeatures([self.per_study[b] for b in rows], kept)


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
    # [B, G] int64 observations that one sentence affirms and another denies, -1 in rows that were not labelled; None
    # where the sentences were not read
    contradictions: Tensor | None = None


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
    kept: Tensor | None = None  # [B, G] bool, the reports that the loss has; None: all
