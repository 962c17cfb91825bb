"""A group's attention to its prompt and to itself: the prompt's keys and values stand once, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mrg_r1.kernels import attention as compiled
from mrg_r1.kernels import calls as kernels
from mrg_r1.policy.attention import SeqLens, attend, attend_backward
from mrg_r1.policy.prefixes import PrefixTree


class GroupAttention(torch.autograd.Function):
    """Completion tokens see their study's prompt, all of it, and their own completion, causally.

    Two attentions merged by log-sum-exp: the prompt's keys and values stand once, whatever the size of the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        groups: SeqLens,
        prompts: SeqLens,
        completions: SeqLens,
    ) -> Tensor:
        """q [T, heads, D], k and v [T, key heads, D] of completion tokens; prompt_k and prompt_v [prompt tokens, key
        heads, D].
        """
        out_1, lse_1 = attend(q, prompt_k, prompt_v, groups, prompts, causal=False)
        out_2, lse_2 = attend(q, k, v, completions, completions, causal=True)
        lse = torch.logaddexp(lse_1, lse_2)
        out = merge_parts(out_1, lse_1 - lse, out_2, lse_2 - lse)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, lse)
        ctx.lens = groups, prompts, completions
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prompt_k, prompt_v, out, lse = ctx.saved_tensors
        groups, prompts, completions = ctx.lens
        dq_1, d_prompt_k, d_prompt_v = attend_backward(
            grad, q, prompt_k, prompt_v, out, lse, groups, prompts, causal=False
        )
        dq_2, dk, dv = attend_backward(grad, q, k, v, out, lse, completions, completions, causal=True)
        return dq_1.add_(dq_2), dk, dv, d_prompt_k, d_prompt_v, None, None, None


class PathAttention(torch.autograd.Function):
    """What `GroupAttention` computes, by the kernel that takes all of a pass, completions that share tokens too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, paths: compiled.Paths
    ) -> Tensor:
        """As `GroupAttention`; float32 on a CPU."""
        out, lse = compiled.group_attention(q, k, v, prompt_k, prompt_v, paths)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, lse)
        ctx.paths = paths
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prompt_k, prompt_v, out, lse = ctx.saved_tensors
        return *compiled.group_attention_backward(grad, q, k, v, prompt_k, prompt_v, out, lse, ctx.paths), None


@dataclass(frozen=True)
class GroupLens:
    """What belongs together in a pass over completions, for all of its layers."""

    groups: SeqLens  # the completions' axis, a sequence a study
    prompts: SeqLens  # the prompts' axis, a sequence a study
    completions: SeqLens  # the completions' axis, a sequence a completion
    tree: PrefixTree | None = None  # where completions share tokens: then only the kernel can read the axis

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest completion."""
        return max(
            prompt + max(group, default=0) for prompt, group in zip(self.prompts.lengths, self.members, strict=True)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        """`GroupAttention` of these tokens, by the kernel where it is there: [T, heads, D]."""
        if kernels.ready(q, k, v, prompt_k, prompt_v):
            by_paths: Tensor = PathAttention.apply(q, k, v, prompt_k, prompt_v, self._paths)
            return by_paths
        assert self.tree is None, "flash attention cannot read a tree"
        result: Tensor = GroupAttention.apply(q, k, v, prompt_k, prompt_v, self.groups, self.prompts, self.completions)
        return result

    def spread(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Each [T, heads, D] with what completions share once for each of them, as `members` has them."""
        if self.tree is None:
            return tokens
        return tuple(part.index_select(0, self.tree.nodes[0]) for part in tokens)

    def own(self, tokens: Tensor) -> Tensor:
        """[T, heads, D] again of what was `spread`."""
        return tokens if self.tree is None else tokens.index_select(0, self.tree.nodes[1].nonzero().squeeze(1))

    @cached_property
    def members(self) -> list[list[int]]:
        """Of each study the lengths of its completions."""
        if self.tree is not None:
            return self.tree.members
        lengths, studies = iter(self.completions.lengths), []
        for tokens in self.groups.lengths:
            group: list[int] = []
            while sum(group) < tokens:
                group.append(next(lengths))
            studies.append(group)
        return studies

    @cached_property
    def _paths(self) -> compiled.Paths:
        lengths = torch.tensor([length for group in self.members for length in group], dtype=torch.long)
        begins = torch.zeros_like(lengths)
        tokens = torch.arange(int(lengths.sum()))
        starts = F.pad(lengths.cumsum(0), (1, 0))
        if self.tree is not None:
            tokens, own = self.tree.nodes
            begins = lengths - torch.segment_reduce(own.double(), "sum", lengths=lengths).long()
        completions = torch.tensor([0, *accumulate(len(group) for group in self.members)])
        axes = self.groups.total, self.prompts.total
        return compiled.Paths(completions, torch.tensor(self.prompts.starts), starts, begins, tokens, axes)


def merge_parts(first: Tensor, first_log_weight: Tensor, second: Tensor, second_log_weight: Tensor) -> Tensor:
    """Two outputs [T, heads, D] over parts of the keys as one, weighted by exp of [heads, T]; summed in float32."""
    first_weight, second_weight = (weight.t().exp().unsqueeze(-1) for weight in (first_log_weight, second_log_weight))
    return (first * first_weight).addcmul_(second.float(), second_weight).to(first.dtype)
