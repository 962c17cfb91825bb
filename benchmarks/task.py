"""What both sides are given: the same words, images, reward and hyperparameters. Imports nothing but the standard
library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

INSTRUCTION = "Describe the chest x-ray findings in one report."
REFERENCE = "The heart is enlarged."

# The step that both sides take.
LORA_RANK, LORA_ALPHA = 16, 32
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BETA = 0.04
LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
MAX_GRAD_NORM = 1.0
CLIP = 0.2
SEED = 0

SMALLEST_AREA = 56 * 56  # pixels; every image here is larger


@dataclass(frozen=True)
class Task:
    """What one worker does over and over: which unit of work, and of what size.

    Attributes:
        unit: `step`, `rollout`, `hf_generate`, `scoring` or `scoring_naive`; for the labeler's worker `label`,
            `label_singly`, `label_padded` or `label_every`; for the laboratory's `lab_grpo`, `lab_sft`,
            `lab_sft_modules` or `gemm`.
        side: of the square images in pixels; a merged patch of 28 x 28 is one prompt token.
        micro_batch: size of a forward and backward pass, tokens for this project's and completions for the others; None
            is the worker's own choice.
        reports: that a labeler labels in a unit.
        copies: how often each of them stands there.
        ranks: that the laboratory's worker starts.
    """

    unit: str = "step"
    side: int = 672
    studies: int = 4
    group: int = 8
    new_tokens: int = 64
    micro_batch: int | None = None
    reports: int = 128
    copies: int = 1
    ranks: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


def images_of(folder: Path, side: int) -> list[Path]:
    """The images of one size that `benchmarks.model` wrote, in order.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted((folder / f"images-{side}").glob("*.png"))
    if not found:
        raise FileNotFoundError(f"{folder}: no images of side {side}; benchmarks.model.write_model makes them")
    return found


def word_overlap(completion: str, reference: str) -> float:
    """A reward that costs nothing: words shared with the reference, and a little for length so that groups are never
    all equal.
    """
    return len(set(completion.split()) & set(reference.split())) + 0.01 * len(completion)
