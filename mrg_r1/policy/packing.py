"""Studies and their completions on one packed axis: each prompt once, no padding, and where each token's prediction comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrg_r1.policy.attention import Layout, Runs
from mrg_r1.policy.language import LanguageModel
from mrg_r1.types import Prompts, VisionFeatures

if TYPE_CHECKING:
    from mrg_r1.policy.load import Policy


@dataclass(frozen=True)
class Packed:
    """All prompts, then all completion tokens but each one's last, which predicts nothing that is scored."""

    embeddings: Tensor  # [T, H]
    layout: Layout


def pack(
    policy: Policy,
    language: LanguageModel,
    prompts: Prompts,
    vision: VisionFeatures,
    completions: Mapping[int, Sequence[Tensor]] | None = None,
) -> Packed:
    """
    Args:
        prompts, vision: B studies.
        completions: the studies to pack, in this order, each with id tensors [length - 1]; None packs every prompt (a prefill).
    """
    device, width = prompts.input_ids.device, prompts.input_ids.shape[1]
    groups = dict.fromkeys(range(len(prompts)), ()) if completions is None else completions
    all_lengths = prompts.attention_mask.sum(dim=1).tolist()
    lengths = [all_lengths[b] for b in groups]
    prompt_ids = torch.cat([prompts.input_ids[b, width - all_lengths[b] :] for b in groups])
    own = [ids for group in groups.values() for ids in group]
    positions = [prompts.position_ids[:, b, width - all_lengths[b] :] for b in groups]
    longest = torch.arange(max((len(ids) for ids in own), default=0), device=device)
    for b, group in groups.items():  # text goes on after the prompt
        positions += [(prompts.next_position[b] + longest[: len(ids)]).expand(3, -1) for ids in group]
    embeddings = policy.language_model.embed_tokens(torch.cat([prompt_ids, *own]))
    at_images = torch.zeros(len(embeddings), 1, dtype=torch.bool, device=device)
    at_images[: len(prompt_ids), 0] = prompt_ids == policy.image_token_id
    features = torch.cat([vision.per_study[b] for b in groups])
    embeddings = embeddings.masked_scatter(at_images, features.to(embeddings.dtype))
    cos, sin = language.rotation(torch.cat(positions, dim=1))
    layout = Layout(
        prompts=Runs(tuple(lengths), device),
        groups=Runs(tuple(sum(len(ids) for ids in group) for group in groups.values()), device),
        completions=Runs(tuple(len(ids) for ids in own), device),
        cos=cos,
        sin=sin,
    )
    return Packed(embeddings, layout)


def plan_micro_batches(
    prompt_lengths: Sequence[int], lengths: Sequence[int], study_of_row: Sequence[int], *, token_budget: int, at_least: int = 1
) -> list[list[int]]:
    """Cut completions into forward passes of at most `token_budget` tokens, longest first, a study's completions together.

    A prompt counts once in each pass that needs it, so a study is only cut where it does not fit by itself. Longest first: what does
    not fit into memory shows in the first pass and not hours later.

    Args:
        prompt_lengths: tokens of each study's prompt.
        lengths: tokens of each completion.
        study_of_row: the study of each completion.
        at_least: passes to make at least (ranks must make equally many); there must be as many completions.

    Returns:
        Lists of rows, every row once; a pass of one completion may exceed the budget.
    """
    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        groups.setdefault(study_of_row[row], []).append(row)
    pieces: list[tuple[int, list[int]]] = []  # (tokens, rows), each of one study
    for study, rows in groups.items():
        piece, tokens = [rows[0]], prompt_lengths[study] + lengths[rows[0]]
        for row in rows[1:]:
            if tokens + lengths[row] > token_budget:
                pieces.append((tokens, piece))
                piece, tokens = [], prompt_lengths[study]
            piece.append(row)
            tokens += lengths[row]
        pieces.append((tokens, piece))
    batches: list[tuple[int, list[int]]] = []
    for tokens, rows in sorted(pieces, key=lambda piece: -piece[0]):  # first fit, largest first
        for number, (used, taken) in enumerate(batches):
            if used + tokens <= token_budget:
                batches[number] = (used + tokens, taken + rows)
                break
        else:
            batches.append((tokens, rows))
    while len(batches) < at_least:
        largest = max((batch for batch in batches if len(batch[1]) > 1), key=lambda batch: batch[0])
        batches.remove(largest)
        half = len(largest[1]) // 2
        for rows in (largest[1][:half], largest[1][half:]):
            studies = {study_of_row[row] for row in rows}
            batches.append((sum(prompt_lengths[study] for study in studies) + sum(lengths[row] for row in rows), rows))
    return [rows for _, rows in sorted(batches, key=lambda batch: -batch[0])]
