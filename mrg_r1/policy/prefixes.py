"""What a study's completions have in common at their beginning, computed once.

A token's states follow from its prompt and the tokens before it. Two completions of a study that begin alike share them
for as long as they are alike: a group is a tree of tokens, and a pass runs over its nodes. Sampled from a policy that
has learned a field's phrases, half of a group's tokens and more are such repetitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

_WORTH = 0.9  # of the tokens, what may be left for the bookkeeping to pay


@dataclass(frozen=True)
class PrefixTree:
    """The completions of a pass, R of them, as one tree for each of S studies; every tensor lies on the CPU.

    Each node belongs to the last completion that goes through it. Nodes are numbered completion by completion and along
    each, twice: those that are predicted, and those that are read, which are all but a completion's last.

    Attributes:
        lengths: tokens of each completion.
        studies: of each completion its study, 0 .. S - 1, ascending.
        owner: [R, C] int64, the completion that a token's node belongs to; not shorter than the one that shares it.
    """

    lengths: tuple[int, ...]
    studies: tuple[int, ...]
    owner: Tensor

    @classmethod
    def of(cls, ids: Tensor, lengths: Sequence[int], studies: Sequence[int]) -> Self | None:
        """
        Args:
            ids: [R, C] int64 on the CPU, completions in their studies' order, those of a study shortest first.

        Returns:
            None where too little is shared.
        """
        rows, columns = ids.shape
        tokens, node = torch.tensor(lengths), torch.tensor(studies)
        owner = torch.arange(rows).unsqueeze(1).repeat(1, columns)
        vocabulary = int(ids.max()) + 1
        for depth in range(max(lengths)):
            going = (tokens > depth).nonzero().squeeze(1)
            nodes, of_row = (node[going] * vocabulary + ids[going, depth]).unique(return_inverse=True)
            if len(nodes) == len(going):  # nothing is shared from here on
                break
            last = torch.zeros(len(nodes), dtype=torch.long).scatter_reduce_(0, of_row, going, "amax")
            owner[going, depth] = last[of_row]
            node[going] = of_row
        tree = cls(tuple(lengths), tuple(studies), owner)
        return tree if int(tree._fresh.sum()) <= _WORTH * sum(lengths) else None

    @cached_property
    def begins(self) -> list[int]:
        """Of each completion, at which of its tokens its own nodes begin."""
        there = self._steps < self._tokens
        starts: list[int] = (there & ~self._fresh).sum(dim=1).tolist()
        return starts

    @cached_property
    def predicted(self) -> Tensor:
        """[all tokens] int64, completion by completion, the node of each among those that are predicted."""
        return self._numbers(self._fresh)[self._steps < self._tokens]

    @cached_property
    def places(self) -> Tensor:
        """[predicted nodes] int64, where the token of each stands in [R * C]."""
        return self._fresh.flatten().nonzero().squeeze(1)

    @cached_property
    def parents(self) -> Tensor:
        """[predicted nodes] int64: what each is predicted from, the S prompts' last tokens counted before the nodes
        that are read.
        """
        before = torch.empty_like(self.owner)
        before[:, 0] = torch.tensor(self.studies)
        before[:, 1:] = self._numbers(self._read)[:, :-1] + self.studies[-1] + 1
        return before[self._fresh]

    @cached_property
    def members(self) -> list[list[int]]:
        """Of each study the tokens that are read of each completion that has nodes of its own."""
        groups: list[list[int]] = [[] for _ in range(self.studies[-1] + 1)]
        for study, length, begin in zip(self.studies, self.lengths, self.begins, strict=True):
            if begin < length - 1:
                groups[study].append(length - 1)
        return groups

    @cached_property
    def nodes(self) -> tuple[Tensor, Tensor]:
        """Of each token of `members` [T]: its node among those that are read, int64, and whether that is its
        completion's own, bool.
        """
        there = (self._steps < self._tokens - 1) & (self._read.any(dim=1, keepdim=True))
        return self._numbers(self._read)[there], self._fresh[there]

    @cached_property
    def _steps(self) -> Tensor:
        return torch.arange(self.owner.shape[1])

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.tensor(self.lengths).unsqueeze(1)

    @cached_property
    def _fresh(self) -> Tensor:
        """[R, C] bool: tokens whose node is the completion's own."""
        own = self.owner == torch.arange(len(self.owner)).unsqueeze(1)
        return own & (self._steps < self._tokens)

    @cached_property
    def _read(self) -> Tensor:
        """[R, C] bool: those of them that something is predicted from."""
        return self._fresh & (self._steps < self._tokens - 1)

    def _numbers(self, fresh: Tensor) -> Tensor:
        """[R, C] int64: the number of each token's node, counting those that are `fresh`."""
        numbers = fresh.flatten().cumsum(0).view(fresh.shape) - 1
        return numbers.gather(0, self.owner)
