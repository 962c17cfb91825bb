"""Log-probs of completions under the policy: the teacher-forced pass behind old, reference and training log-probs.

A study's prompt is computed once for all of its completions that are in the pass (`group_attention.GroupAttention`);
`logprobs_plain.py` is the same by the checkpoint's own modules with the prompt once a completion, and what this is
tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrg_r1.kernels import calls as kernels
from mrg_r1.policy.language import PromptCache
from mrg_r1.policy.packing import pack_completions, pack_prompts, plan_micro_batches
from mrg_r1.policy.prefixes import PrefixTree
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Completions, Prompts, VisionFeatures, to_device

CHUNK_ELEMENTS = 2**26  # logits held at a time, 256 MiB in float32: 441 tokens of a vocabulary of 152,064


def completion_logprobs(
    policy: PolicyWeights,
    prompts: Prompts,
    vision: VisionFeatures,
    token_ids: Tensor,
    mask: Tensor,
    study_of_row: Tensor,
    states: PromptCache | None = None,
    *,
    entropies: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token given its study's prompt and the tokens before it.

    Args:
        prompts, vision: studies; those without a completion in `study_of_row` cost nothing.
        token_ids: [R, C] int64 completions, padded on the right.
        mask: [R, C] bool, True on real tokens (EOS included): a prefix of each row, which may be empty.
        study_of_row: [R] int64, the study in 0..B-1 that each completion belongs to.
        states: the prompts' states under these very weights, where they are at hand; None computes those that are
            needed.
        entropies: whether anybody reads them: over a large vocabulary they cost as much as the log-probs.

    Returns:
        logp [R, C] float32 and entropy [R, C] float32 (nats, detached; NaN without `entropies`), both 0 where masked,
        of the distribution that `PolicyWeights.next_token_logits` defines: the same one that the rollout samples from
        (docs/traps.md #2).

    Raises:
        ValueError: no token at all, under a partition.
    """
    lengths, study_list = torch.stack([mask.sum(dim=1), study_of_row]).tolist()  # the device is waited for once
    rows = sorted(
        (row for row, length in enumerate(lengths) if length), key=lambda row: (study_list[row], lengths[row])
    )
    if not rows:
        if policy.partition is not None:
            raise ValueError(
                "a pass without a token, over partitioned weights: the other ranks would wait for this one in "
                "each layer"
            )
        return torch.zeros(mask.shape, device=mask.device), torch.zeros(mask.shape, device=mask.device)
    studies = sorted({study_list[row] for row in rows})
    # under a partition the ranks run the same layers, also one whose completions end with their first token: it runs
    # that token in vain
    in_vain = max(lengths) == 1 and policy.partition is not None
    language = policy.read_language()
    tree = _tree(policy, token_ids, rows, lengths, study_list)
    with policy.gathered(policy.language_model.embed_tokens):
        prompt_tokens = None if states is not None else pack_prompts(policy, language, prompts, vision, studies)
        completion_tokens = None
        if max(lengths) > 1 or in_vain:
            begins = dict.fromkeys(rows, 0) if tree is None else dict(zip(rows, tree.begins, strict=True))
            inputs: dict[int, list[tuple[int, Tensor]]] = {study: [] for study in studies}
            for row, begin in begins.items():
                ids = token_ids[row, begin : max(lengths[row] - 1, in_vain)]
                inputs[study_list[row]].append((begin, ids))
            completion_tokens = pack_completions(policy, language, prompts, inputs)
    if prompt_tokens is not None:
        states = language.prompt_pass(prompt_tokens, recompute=policy.recompute)
    else:
        assert states is not None
        states = states.select(studies)

    columns = token_ids.shape[1]
    if tree is None:
        # A first token is predicted by the prompt's last. A product with a 0/1 matrix copies a study's state to each of
        # its completions, and its gradient adds them up in a fixed order, which indexing does not do on a GPU.
        slots = to_device(torch.tensor([studies.index(study_list[row]) for row in rows]), mask.device)
        hidden = torch.nn.functional.one_hot(slots, len(studies)).to(states.last.dtype) @ states.last
        if completion_tokens is not None:
            own = language.completion_pass(*completion_tokens, states, recompute=policy.recompute)
            hidden = hidden + 0.0 * own.sum() if in_vain else torch.cat([hidden, own])
        places = [torch.tensor([row * columns for row in rows])] + [
            torch.arange(1, lengths[row]) + row * columns for row in rows
        ]
        index = to_device(torch.cat(places), hidden.device)  # of each prediction in [R * C]
        logp, entropy = token_logprobs(policy, hidden, token_ids.flatten()[index], entropies=entropies)
    else:
        assert completion_tokens is not None
        own = language.completion_pass(*completion_tokens, states, tree=tree, recompute=policy.recompute)
        # not by indexing, whose gradient adds up in no fixed order with several threads
        hidden = torch.cat([states.last, own]).index_select(0, tree.parents)
        of_nodes = token_logprobs(policy, hidden, token_ids[rows].flatten()[tree.places], entropies=entropies)
        logp, entropy = (of_node.index_select(0, tree.predicted) for of_node in of_nodes)
        index = torch.cat([torch.arange(lengths[row]) + row * columns for row in rows])
    empty = torch.zeros(mask.numel(), device=hidden.device)
    return empty.index_copy(0, index, logp).view(mask.shape), empty.index_copy(0, index, entropy).view(mask.shape)


def _tree(
    policy: PolicyWeights, token_ids: Tensor, rows: Sequence[int], lengths: Sequence[int], study_of_row: Sequence[int]
) -> PrefixTree | None:
    """What the completions share, where the attention that can read it will be used."""
    # the head's dtype is the policy's; a family's norms may be wider
    if not kernels.ready(policy.base.lm_head.weight):
        return None
    studies = sorted({study_of_row[row] for row in rows})
    slots = [studies.index(study_of_row[row]) for row in rows]
    return PrefixTree.of(token_ids[rows], [lengths[row] for row in rows], slots)


def token_logprobs(
    policy: PolicyWeights, hidden: Tensor, ids: Tensor, *, entropies: bool = True
) -> tuple[Tensor, Tensor]:
    """[T, H] hidden states and [T] ids -> [T] log-probs (with gradient) and [T] entropies (without; NaN where nobody
    asks for them), a chunk of tokens at a time.
    """
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    with policy.gathered(policy.base.lm_head):
        logp, entropy = _TokenLogp.apply(hidden, ids, policy, gradient, entropies)
    return logp, entropy


class _TokenLogp(torch.autograd.Function):
    """Log-softmax through a frozen head that never holds more than a chunk of tokens times the vocabulary.

    The gradient of a log-prob with respect to its hidden state, (W[id] - sum_v p_v W[v]) / temperature, does not depend
    on what the loss will make of it: it is taken while the chunk's probabilities are there, so that the head is not run
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, ids: Tensor, policy: PolicyWeights, gradient: bool, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        head = policy.base.lm_head.weight
        logp = torch.empty(len(ids), device=hidden.device)
        entropy = torch.full((len(ids),), torch.nan, device=hidden.device)
        jacobian = torch.empty_like(hidden) if gradient else None
        for part in torch.arange(len(ids)).split(max(1, CHUNK_ELEMENTS // len(head))):
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            log_probs = policy.next_token_logits(hidden[chunk]).log_softmax(dim=-1)
            logp[chunk] = log_probs.gather(1, ids[chunk].unsqueeze(1)).squeeze(1)
            if not (gradient or entropies):
                continue
            probs = log_probs.exp()
            if entropies:
                entropy[chunk] = -torch.linalg.vecdot(probs, log_probs.masked_fill_(policy.banned, 0.0))
            if jacobian is not None:
                expected = probs.to(head.dtype) @ head
                torch.sub(head[ids[chunk]], expected, out=jacobian[chunk]).div_(policy.temperature)
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return jacobian * grad.unsqueeze(1).to(jacobian.dtype), None, None, None, None


@torch.no_grad()
def group_logprobs(
    policy: PolicyWeights, prompts: Prompts, vision: VisionFeatures, completions: Completions, *, token_budget: int
) -> Tensor:
    """[B, G, C] float32 log-probs without gradient, in passes of at most `token_budget` tokens; for the reference and
    the old policy.
    """
    studies, group, length = completions.token_ids.shape
    ids, mask = completions.token_ids.view(-1, length), completions.mask.view(-1, length)
    study_of_row = torch.arange(studies, device=ids.device).repeat_interleave(group)
    logp = torch.zeros(mask.shape, device=ids.device)
    plan = micro_batches(prompts, mask, study_of_row, token_budget=token_budget)
    if policy.partition is not None:  # ranks meet in each pass
        plan = micro_batches(
            prompts, mask, study_of_row, token_budget=token_budget, at_least=policy.partition.most(len(plan))
        )
    for rows in plan:
        arguments = ids[rows], mask[rows], study_of_row[rows]
        logp[rows] = completion_logprobs(policy, prompts, vision, *arguments, entropies=False)[0]
    return logp.view(studies, group, length)


def micro_batches(
    prompts: Prompts, mask: Tensor, study_of_row: Tensor, *, token_budget: int, at_least: int = 1
) -> list[Tensor]:
    """Rows of [R, C] `mask` cut into passes by `plan_micro_batches`; each [rows of the pass] int64."""
    lengths, study_list = torch.stack([mask.sum(dim=1), study_of_row]).tolist()  # the device is waited for once
    plan = plan_micro_batches(prompts.lengths, lengths, study_list, token_budget=token_budget, at_least=at_least)
    return [to_device(torch.tensor(rows), mask.device) for rows in plan]
