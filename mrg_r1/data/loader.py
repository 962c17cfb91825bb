"""From studies to prompts: the only place that calls the tokenizer, and what has a step's batch ready when the step
begins.

`data.order` says which studies a step takes, `data.workers` reads their images; any number of ranks sees the same
studies in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrg_r1.data.context import context_lines
from mrg_r1.data.order import StudyOrder
from mrg_r1.data.workers import ImageReader
from mrg_r1.types import ImageInputs, PromptLayout, Prompts, Study


class PromptError(ValueError):
    """A study that no prompt can be made of; the message names the study, what is wrong and the remedy."""


@dataclass(frozen=True)
class PromptWords:
    """What the prompt says around the images (the recipe's `prompt` and `data.context`)."""

    instruction: str
    show_view: bool = True
    context: tuple[str, ...] = ()
    max_tokens: int = 4096


def special_tokens(tokenizer: Any) -> list[str]:
    """What a tokenizer reads as one of its special tokens wherever it is spelled out in a text, and what its chat
    template writes around a user's words, whether it is marked as special or not.
    """
    content = [{"type": "image"}, {"type": "text", "text": ""}]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special or str(token) in turn]
    return sorted({*map(str, added), *tokenizer.all_special_tokens})


def check_instruction(instruction: str, special: Iterable[str]) -> None:
    """Refuse an instruction that has a special token spelled out in it.

    Args:
        special: `special_tokens` of the policy's tokenizer.

    Raises:
        PromptError: names the token.
    """
    found = next((token for token in special if token in instruction), None)
    if found is not None:
        raise PromptError(
            f"prompt.instruction contains {found}, a special token of the policy's tokenizer; take it out"
        )


def check_context(study: Study, fields: Sequence[str], special: Sequence[str]) -> None:
    """Refuse a context that has a special token spelled out in it: the tokenizer would read it as the token, an end of
    the user's turn, say, and what follows as somebody else's words.

    Args:
        fields: of the study that a prompt has (`data.context`).
        special: `special_tokens` of the policy's tokenizer.

    Raises:
        PromptError: names the study, the field and the token.
    """
    for field, line in context_lines(study, fields).items():
        found = next((token for token in special if token in line), None)
        if found is not None:
            raise PromptError(
                f"study {study.id}: its {field} contains {found}, a special token of the policy's tokenizer; "
                f"take it out of the text, or {field} out of data.context"
            )


class PromptBuilder:
    """Studies -> `Prompts`, left-padded.

    Args:
        tokenizer: the checkpoint's, with its chat template.
        image_processor: PIL images -> named tensors.
        layout: how the policy's family writes images into a prompt; `policy.layout`.
        workers: processes that read images; 0: the thread that builds.

    Raises:
        PromptError: an instruction that has a special token spelled out in it.
    """

    def __init__(
        self, *, tokenizer: Any, image_processor: Any, layout: PromptLayout, words: PromptWords, workers: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.images = ImageReader(image_processor, workers=workers)
        self.layout = layout
        self.words = words
        self._special = special_tokens(tokenizer)
        check_instruction(words.instruction, self._special)

    def messages(self, study: Study) -> list[dict[str, Any]]:
        """One user turn: each image after its view where known, then the study's context where asked, then the
        instruction. Words that follow one another are one part: a template may strip each of them.
        """
        content: list[dict[str, str]] = []
        for image in study.images:
            if self.words.show_view and image.view is not None:
                content.append({"type": "text", "text": f"{image.view.capitalize()} view: "})
            content.append({"type": "image"})
        check_context(study, self.words.context, self._special)
        lines = context_lines(study, self.words.context).values()
        content.append({"type": "text", "text": "".join([*lines, f"\n{self.words.instruction}"])})
        return [{"role": "user", "content": content}]

    def __call__(self, studies: Sequence[Study]) -> Prompts:
        """
        Raises:
            ImageError: an image that cannot be used.
            PromptError: a prompt longer than `max_tokens` (it is never cut), or a text that has a special token in it.
            WorkerError: an image worker died.
        """
        images = [self.layout.image_inputs(processed) for processed in self.images.read(studies)]
        rows = [self._ids(study, own) for study, own in zip(studies, images, strict=True)]
        length = max(len(ids) for ids in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        joined = ImageInputs.join(images)
        positions, next_position = self.layout.positions(input_ids, attention_mask, joined)
        return Prompts(
            study_ids=[study.id for study in studies],
            references=[study.report for study in studies],
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=positions,
            next_position=next_position,
            images=joined,
            images_per_study=[len(study.images) for study in studies],
        )

    def _ids(self, study: Study, images: ImageInputs) -> list[int]:
        """The prompt's ids, each image placeholder replaced by the ids of its image."""
        text = self.tokenizer.apply_chat_template(self.messages(study), tokenize=False, add_generation_prompt=True)
        placeholder, around = self.layout.placeholder, self.layout.around_image
        pieces = text.replace(placeholder, f"{around}{placeholder}{around}").split(placeholder)
        if len(pieces) != len(images) + 1:
            raise PromptError(
                f"study {study.id}: {len(images)} image(s), but the prompt has {len(pieces) - 1} image placeholders; "
                f"prompt.instruction must not contain {placeholder}"
            )
        ids: list[int] = []
        for piece, image in zip(pieces, [*self.layout.image_ids(images), []], strict=True):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] + image
        if len(ids) > self.words.max_tokens:
            raise PromptError(self._too_long(study, ids))
        return ids

    def _too_long(self, study: Study, ids: Sequence[int]) -> str:
        """What takes the room, and what to switch off."""
        lines = context_lines(study, self.words.context)
        parts = {
            field: len(self.tokenizer(line, add_special_tokens=False)["input_ids"]) for field, line in lines.items()
        }
        longest = max(parts, key=lambda field: parts[field], default=None)
        switch = "" if longest is None else f", take {longest} out of data.context"
        listed = "".join(f", {count} of {field}" for field, count in parts.items())
        return (
            f"study {study.id}: prompt of {len(ids)} tokens, prompt.max_tokens is {self.words.max_tokens} "
            f"({ids.count(self.layout.image_token_id)} of images{listed}); lower data.max_pixels{switch} or raise "
            "prompt.max_tokens (a prompt is never cut: that could cut an image)"
        )


class StudyLoader:
    """This rank's batches, each prepared by a thread, and by the builder's image workers, while the step before it
    runs.

    Args:
        seed, weights: of the order (`data.order`).
        batch_size: studies of a step over all ranks.
        step, position: where the loader begins: this step's batch is the one at this position of the stream. A run that
            goes on with another batch size begins at the studies that it has consumed, and neither repeats nor passes
            over one.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        build: PromptBuilder,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        weights: NDArray[np.float64] | None = None,
        step: int = 0,
        position: int = 0,
    ) -> None:
        self.studies = studies
        self.build = build
        self.order = StudyOrder(len(studies), seed=seed, weights=weights)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._start = position - step * batch_size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[Prompts]] = {}

    def position(self, step: int) -> int:
        """Studies that the steps before `step` have consumed, on all ranks; what a checkpoint keeps."""
        return self._start + step * self._batch_size

    @property
    def fingerprint(self) -> str:
        """Of the studies and their weights: positions of equal ones mean the same studies."""
        return self.order.fingerprint([study.id for study in self.studies])

    def studies_of(self, step: int) -> list[Study]:
        mine = self.order.share(
            self.position(step), batch_size=self._batch_size, rank=self._rank, world_size=self._world_size
        )
        return [self.studies[index] for index in mine]

    def occurrences_of(self, step: int) -> list[int]:
        """Of each of `studies_of(step)`, how often the batch has it further ahead, on all ranks: what keeps two groups
        of one study from the same random numbers, however many ranks there are.
        """
        whole = self.order.take(self.position(step), self._batch_size)
        own = self._batch_size // self._world_size
        first = self._rank * own
        return [whole[:place].count(whole[place]) for place in range(first, first + own)]

    def _prepare(self, step: int) -> Prompts:
        return replace(self.build(self.studies_of(step)), occurrences=self.occurrences_of(step))

    def batch(self, step: int) -> Prompts:
        """The prompts of `step`; those of the next step begin to be prepared."""
        for wanted in (step, step + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._worker.submit(self._prepare, wanted)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)


def prompts_ahead(build: Callable[[Sequence[Study]], Prompts], batches: Sequence[Sequence[Study]]) -> Iterator[Prompts]:
    """The prompts of batch after batch, each prepared by a thread while the one before it is in use; for
    evaluations.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as worker:
        ahead = [worker.submit(build, batch) for batch in batches[:1]]
        for number in range(len(batches)):
            prompts = ahead.pop().result()
            ahead += [worker.submit(build, batch) for batch in batches[number + 1 : number + 2]]
            yield prompts
