"""Attention of layers that see less or more than all tokens before: a sliding window, and images whose tokens see one
another in both directions (Gemma 3, arXiv 2503.19786, section 2).

Who asks for neither never comes here. The masks are whole, a sequence at a time, and torch's own attention takes them;
distances are counted in tokens, so they are those of the prompts' positions only where every token advances by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mrg_r1.policy.attention import PackedAttention, SeqLens


@dataclass(frozen=True)
class PromptSight:
    """What the tokens of sequences on a packed axis see of their own sequence; made once for all layers."""

    seq_lens: SeqLens
    images: Tensor | None = None  # [T] int64, the number of a token's image, 0 of text; None: nothing but causal
    _masks: dict[int | None, list[Tensor]] = field(default_factory=dict, repr=False)  # by window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Each sequence to itself: q [T, heads, D], k and v [T, key heads, D] -> [T, heads, D].

        Args:
            window: a token sees those less than so many tokens before it, and of its own image later ones; None: all.
        """
        if self.images is None and (window is None or self.seq_lens.longest <= window):
            attended: Tensor = PackedAttention.apply(q, k, v, self.seq_lens, self.seq_lens, True)
            return attended
        lengths = list(self.seq_lens.lengths)
        parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), self._of(window), strict=True)
        return torch.cat(
            [_masked(own_q[None], own_k[None], own_v[None], mask)[0] for own_q, own_k, own_v, mask in parts]
        )

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """The last token of each sequence to what it sees: q [sequences, heads, D], k and v as in `attend` ->
        [sequences, heads, D]. Nothing comes after it, so that an image's two directions do not matter.
        """
        lens = self.seq_lens
        if window is not None and lens.longest > window:
            lens = SeqLens(tuple(min(length, window) for length in lens.lengths), lens.device)
            seen = list(zip(self.seq_lens.starts[1:], lens.lengths, strict=True))
            k, v = (torch.cat([tensor[end - length : end] for end, length in seen]) for tensor in (k, v))
        attended: Tensor = PackedAttention.apply(q, k, v, lens.ones, lens, False)
        return attended

    def _of(self, window: int | None) -> list[Tensor]:
        """[L, L] bool of each sequence, True where a query (row) sees a key."""
        if window not in self._masks:
            made = []
            for number, length in enumerate(self.seq_lens.lengths):
                steps = torch.arange(length, device=self.seq_lens.device)
                distance = steps[:, None] - steps
                mask = distance >= 0
                if self.images is not None:
                    own = self.images[self.seq_lens.starts[number] : self.seq_lens.starts[number + 1]]
                    mask |= (own[:, None] == own) & (own > 0)
                made.append(mask if window is None else mask & (distance < window))
            self._masks[window] = made
        return self._masks[window]


def attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    members: Sequence[Sequence[int]],
    prompts: SeqLens,
    window: int,
) -> Tensor:
    """Completion tokens to their study's prompt and to their own completion, both as far as the window reaches.

    Args:
        q: [T, heads, D]; k, v: [T, key heads, D]; prompt_k, prompt_v: [prompt tokens, key heads, D].
        members: of each study the lengths of its completions, which lie behind one another in T.

    Returns:
        [T, heads, D].
    """
    outs, first = [], 0
    for study, lengths in enumerate(members):
        if not sum(lengths):
            continue
        own = slice(first, first := first + sum(lengths))
        end, kept = prompts.starts[study + 1], min(prompts.lengths[study], window - 1)
        queries, keys, values = (
            pad_sequence(tensor[own].split(list(lengths)), batch_first=True) for tensor in (q, k, v)
        )
        seen = [tensor[end - kept : end].expand(len(lengths), -1, -1, -1) for tensor in (prompt_k, prompt_v)]
        steps = torch.arange(-kept, keys.shape[1], device=q.device)  # 0 is a completion's first token
        distance = steps[kept:, None] - steps
        mask = (distance >= 0) & (distance < window)
        attended = _masked(queries, torch.cat([seen[0], keys], dim=1), torch.cat([seen[1], values], dim=1), mask)
        outs += [attended[member, :length] for member, length in enumerate(lengths)]
    return torch.cat(outs)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, Lq, heads, D] of queries to [B, Lk, key heads, D] where [Lq, Lk] bool says so -> [B, Lq, heads, D]."""
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
