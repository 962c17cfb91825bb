"""Studies and their completions on packed axes without padding, and the cutting of completions into passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mrg_r1.policy.attention import SeqLens
from mrg_r1.policy.images import put_features
from mrg_r1.policy.language import LanguageModel, Packed
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Prompts, VisionFeatures


def pack_prompts(
    policy: PolicyWeights,
    language: LanguageModel,
    prompts: Prompts,
    vision: VisionFeatures,
    studies: Sequence[int] | None = None,
) -> Packed:
    """Prompts of the `studies` (None: of all) behind one another, without their padding, images put in."""
    chosen = range(len(prompts)) if studies is None else studies
    width, lengths = prompts.input_ids.shape[1], prompts.lengths
    ids = torch.cat([prompts.input_ids[b, width - lengths[b] :] for b in chosen])
    positions = torch.cat([prompts.positions[b, width - lengths[b] :] for b in chosen])
    features = torch.cat([vision.per_study[b] for b in chosen])
    embeddings, added = put_features(policy.embed(ids), ids == policy.image_token_id, features)
    seq_lens = SeqLens(tuple(lengths[b] for b in chosen), ids.device)
    images = None if policy.family.image_numbers is None else policy.family.image_numbers(positions)
    return Packed(embeddings, *language.rotation(positions), seq_lens, added, images)


def pack_completions(
    policy: PolicyWeights,
    language: LanguageModel,
    prompts: Prompts,
    completions: Mapping[int, Sequence[tuple[int, Tensor]]],
) -> tuple[Packed, SeqLens]:
    """Completion tokens behind one another; their positions go on where their prompt ended.

    Args:
        completions: study -> (tokens before these, ids [...]) of each completion. The last token predicts nothing that
            is scored, so it is never an input.

    Returns:
        The packed tokens, a sequence a completion, and the same axis with a sequence a study.
    """
    own = [ids for group in completions.values() for _, ids in group]
    device = prompts.input_ids.device
    steps = torch.arange(max(first + len(ids) for group in completions.values() for first, ids in group), device=device)
    positions = torch.cat(
        [
            prompts.next_position[b] + steps[first : first + len(ids)]
            for b, group in completions.items()
            for first, ids in group
        ]
    )
    groups = SeqLens(tuple(sum(len(ids) for _, ids in group) for group in completions.values()), device)
    seq_lens = SeqLens(tuple(len(ids) for ids in own), device)
    return Packed(policy.embed(torch.cat(own)), *language.rotation(positions), seq_lens), groups


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    study_of_row: Sequence[int],
    *,
    token_budget: int,
    at_least: int = 1,
) -> list[list[int]]:
    """Cut completions into forward passes of at most `token_budget` tokens, longest first, a study's completions
    together.

    A prompt counts once in each pass that needs it, so a study is only cut where it does not fit by itself. Longest
    first: what does not fit into memory shows in the first pass and not hours later.

    Args:
        prompt_lengths: tokens of each study's prompt.
        lengths: tokens of each completion.
        study_of_row: the study of each completion.
        at_least: passes to make at least (ranks must make equally many); there must be as many completions.

    Returns:
        Lists of rows, every row once; a pass of one completion may exceed the budget.
    """

    def tokens_of(rows: Sequence[int]) -> int:
        return sum(prompt_lengths[study] for study in {study_of_row[row] for row in rows}) + sum(
            lengths[row] for row in rows
        )

    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        groups.setdefault(study_of_row[row], []).append(row)
    pieces: list[list[int]] = []  # rows of one study that fit together
    for study, rows in groups.items():
        pieces.append([])
        room = token_budget - prompt_lengths[study]
        for row in rows:
            if pieces[-1] and lengths[row] > room:
                pieces.append([])
                room = token_budget - prompt_lengths[study]
            pieces[-1].append(row)
            room -= lengths[row]
    batches: list[list[int]] = []
    sizes: list[int] = []  # tokens of each
    for piece in sorted(pieces, key=tokens_of, reverse=True):  # first fit, largest first
        study, own = study_of_row[piece[0]], sum(lengths[row] for row in piece)
        for number, batch in enumerate(batches):
            if sizes[number] + own > token_budget:
                continue
            there = any(study_of_row[row] == study for row in batch)
            more = own if there else own + prompt_lengths[study]
            if sizes[number] + more <= token_budget:
                batch += piece
                sizes[number] += more
                break
        else:
            batches.append(piece)
            sizes.append(own + prompt_lengths[study])
    while len(batches) < at_least:
        largest = max((batch for batch in batches if len(batch) > 1), key=tokens_of)
        batches.remove(largest)
        half = len(largest) // 2
        batches += [largest[:half], largest[half:]]
    return sorted(batches, key=tokens_of, reverse=True)
