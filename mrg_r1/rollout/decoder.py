"""The decode step: one token for every row, over a prompt cache that a group shares and a static cache of its own.

Rows stand in a rectangle [S studies, M members]; places without a row carry a dummy. Everything that a step reads and
writes is a tensor of fixed shape, so that on a GPU a step is one CUDA graph, replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mrg_r1.policy.language import LanguageModel
from mrg_r1.policy.layers import DecoderLayer
from mrg_r1.rollout.sampling import sample_tokens
from mrg_r1.types import to_device

Embed = Callable[[Tensor], Tensor]  # [R] ids -> [R, H]
Logits = Callable[[Tensor], Tensor]  # [R, H] -> [R, V] float32, the distribution that is sampled and scored
_WORTH = 0.9  # of the places, what may be left to compute for the copying to pay
_WIDTH_STEP = {"cpu": 1, "cuda": 128}  # own keys are read in multiples of this: a graph has one shape for many steps


@dataclass
class Answers:
    """What was sampled, by row; the last row is the dummies'."""

    token_ids: Tensor  # [R + 1, N] int64
    logp: Tensor  # [R + 1, N] float32
    mask: Tensor  # [R + 1, N] bool
    ended: Tensor  # [R + 1] bool

    @classmethod
    def empty(cls, rows: int, length: int, *, pad_id: int, device: torch.device) -> Answers:
        ended = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        ended[rows:] = True  # a slice: a single place would wait for the device
        return cls(
            token_ids=torch.full((rows + 1, length), pad_id, device=device),
            logp=torch.zeros(rows + 1, length, device=device),
            mask=torch.zeros(rows + 1, length, dtype=torch.bool, device=device),
            ended=ended,
        )


@dataclass(frozen=True)
class SharedStates:
    """Which places a step computes: the others have ended, or have read the same prompt and tokens as one of these."""

    places: Tensor  # [U] int64
    of_place: Tensor  # [S * M] int64, which of them stands for each place; any of them for one that has ended


class Decoder:
    """Samples token after token for a rectangle of rows.

    Args:
        language: with LoRA merged.
        embed: token ids to the embeddings that the first layer takes.
        logits: hidden states to the logits that are sampled from.
        prompt_cache: of each layer keys and values, each [S, key heads, P, D], prompts ending on the right.
        prompt_mask: [S, P] bool, False on padding; None where there is none.
        rows: [S, M] int64, the row of `answers` that each place writes; len(answers) - 1 in places without one.
        next_position: [S] int64, the position of the first completion token.
        uniforms: [R + 1, N] float64 in [0, 1), or None for the most probable token.
        eos: [E] int64.
        pad_id: written after a row's end.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        embed: Embed,
        logits: Logits,
        prompt_cache: list[tuple[Tensor, Tensor]],
        prompt_mask: Tensor | None,
        rows: Tensor,
        next_position: Tensor,
        uniforms: Tensor | None,
        eos: Tensor,
        pad_id: int,
        answers: Answers,
    ) -> None:
        self.language, self.embed, self.logits = language.for_few_tokens(rows.numel()), embed, logits
        self.uniforms, self.answers, self.eos, self.pad_id = uniforms, answers, eos, pad_id
        self.length = answers.token_ids.shape[1]
        # [S * key heads, D, P] and [S * key heads, P, D]: the layouts that the two products read
        self.prompt_keys = [keys.transpose(2, 3).flatten(0, 1).contiguous() for keys, _ in prompt_cache]
        self.prompt_values = [values.flatten(0, 1).contiguous() for _, values in prompt_cache]
        keys = prompt_cache[0][0]
        self.key_heads, head_size, self.dtype = keys.shape[1], keys.shape[3], keys.dtype
        self.prompt_bias = None
        if prompt_mask is not None:
            self.prompt_bias = torch.where(prompt_mask, 0.0, float("-inf")).to(self.dtype)
        self.rows = rows
        self.next_position = next_position
        places, device = rows.numel(), rows.device
        studies, members = rows.shape
        shape = (studies, self.key_heads, members, self.length, head_size)
        # a graph reads keys and values that nothing was written to yet, with a weight of 0: they must be finite
        empty = torch.zeros if rows.is_cuda else torch.empty
        self.own_keys = [empty(shape, dtype=self.dtype, device=device) for _ in prompt_cache]
        self.own_values = [empty(shape, dtype=self.dtype, device=device) for _ in prompt_cache]
        self.tokens = torch.zeros(places, dtype=torch.long, device=device)
        # of each place a number for what it has read: its study at first, then also what it wrote
        self.read = torch.arange(places, device=device) // members
        self.shared: SharedStates | None = None
        self.apart = False  # whether all places that go on have read different things, and so always will
        self._take_places()
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # the column that is written next
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_shape: tuple[int, int] | None = None

    def start(self, hidden: Tensor) -> None:
        """Sample the first tokens from the prompts' last hidden states [S, H]."""
        self._sample(hidden, self.read)

    def advance(self, written: int) -> None:
        """One more token for every row, `written` of which are there already."""
        unit = _WIDTH_STEP[self.rows.device.type]
        width = min(self.length, -(-written // unit) * unit)
        if self.graph is not None and self.graph_shape == (self.rows.numel(), width):
            self.graph.replay()
            return
        self._advance(width)
        if (
            self.rows.is_cuda
        ):  # the step just made was the warm-up that capturing needs; capturing itself computes nothing
            self.graph, self.graph_shape = torch.cuda.CUDAGraph(), (self.rows.numel(), width)
            with torch.cuda.graph(self.graph):
                self._advance(width)

    def running(self) -> Tensor:
        """[S, M] bool on the host, which waits for the device: the places whose row goes on."""
        return (~self.ended.view(self.rows.shape)).cpu()

    def finish(self) -> None:
        """Write what these places sampled to the answers' rows."""
        rows, answers = self.rows.flatten(), self.answers
        answers.token_ids[rows], answers.logp[rows], answers.mask[rows] = self.token_ids, self.logp, self.mask
        answers.ended[rows] = self.ended
        answers.ended[-1:] = True

    def _take_places(self) -> None:
        """Begin to write for the rows that have places now, where the answers stand."""
        rows, answers = self.rows.flatten(), self.answers
        self.token_ids, self.logp, self.mask = answers.token_ids[rows], answers.logp[rows], answers.mask[rows]
        self.ended = answers.ended[rows]
        self.own_uniforms = None if self.uniforms is None else self.uniforms[rows]

    def compact(self, running: Tensor) -> None:
        """Drop studies and members that have ended: the rectangle becomes as small as the rows that run allow.

        Args:
            running: as `running` gave it, so that what goes where is known on the host.
        """
        self.finish()
        members = int(running.sum(dim=1).max())
        studies = running.any(dim=1).nonzero().squeeze(1)
        # running members first, each kind in its order: keys that differ, for topk is not stable and a stable sort slow
        at = torch.arange(running.shape[1])
        order = (running[studies].int() * len(at) - at).topk(members, dim=1).indices
        device, fewer = self.rows.device, len(studies) < len(running)
        going = to_device(running[studies].gather(1, order), device)
        studies, order = to_device(studies, device), to_device(order, device)
        rows = self.rows[studies].gather(1, order)
        dummy = len(self.answers.ended) - 1
        self.rows = torch.where(going, rows, dummy)
        places = (studies.unsqueeze(1) * running.shape[1] + order).flatten()
        heads = torch.arange(self.key_heads, device=studies.device)
        blocks = studies.unsqueeze(1) * self.key_heads + heads  # [S', K] of the prompts' caches
        if fewer:
            self.prompt_keys = [keys[blocks.flatten()] for keys in self.prompt_keys]
            self.prompt_values = [values[blocks.flatten()] for values in self.prompt_values]
            self.prompt_bias = None if self.prompt_bias is None else self.prompt_bias[studies]
            self.next_position = self.next_position[studies]
        taken = blocks.unsqueeze(2) * running.shape[1] + order.unsqueeze(1)  # [S', K, M'] of the places' own caches
        self.own_keys = [_taken(keys, taken) for keys in self.own_keys]
        self.own_values = [_taken(values, taken) for values in self.own_values]
        self.tokens, self.read = self.tokens[places], self.read[places]
        self._take_places()
        if not self.rows.is_cuda:
            self._share(self.read)

    def _advance(self, width: int) -> None:
        """Feed the last tokens, sample the next ones; own keys are read up to `width`: on a CPU as many as there are,
        in a graph more, those to come masked.
        """
        language, members = self.language, self.rows.shape[1]
        position = (self.next_position + self.step - 1).repeat_interleave(members)  # of the tokens that are fed
        tokens, shared = self.tokens, self.shared
        if shared is not None:
            position, tokens = position[shared.places], tokens[shared.places]
        cos, sin = language.rotation(position)
        biases = {window: self._biases(window, width) for window in {layer.window for layer in language.layers}}
        x = self.embed(tokens)
        for number, layer in enumerate(language.layers):
            x = self._layer(number, layer, x, cos, sin, *biases[layer.window], width)
        self._sample(language.norm(x), None if shared is None else shared.of_place)

    def _biases(self, window: int | None, width: int) -> tuple[Tensor | None, Tensor | None]:
        """What hides keys from the tokens that are fed: of prompts [S, P] or [1, P], of their own [width]."""
        prompt_bias, own_bias, device = self.prompt_bias, None, self.rows.device
        if self.rows.is_cuda:
            there = torch.arange(width, device=device) < self.step
            own_bias = torch.where(there, 0.0, float("-inf")).to(self.dtype)
        prompt = self.prompt_keys[0].shape[2]
        if window is None or prompt + self.length <= window:
            return prompt_bias, own_bias
        # the fed token stands at prompt + step - 1 of its row, prompts ending on the right
        seen = torch.arange(prompt + width, device=device) > prompt + self.step - 1 - window
        within = torch.where(seen, 0.0, float("-inf")).to(self.dtype)
        of_prompt = within[None, :prompt] if prompt_bias is None else prompt_bias + within[:prompt]
        return of_prompt, within[prompt:] if own_bias is None else own_bias + within[prompt:]

    def _layer(
        self,
        number: int,
        layer: DecoderLayer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        prompt_bias: Tensor | None,
        own_bias: Tensor | None,
        width: int,
    ) -> Tensor:
        q, k, v = layer.heads(x, cos, sin)
        if self.shared is not None:
            q, k, v = (part.index_select(0, self.shared.of_place) for part in (q, k, v))
        studies, key_heads, (_, heads, size) = len(self.rows), self.key_heads, q.shape
        own_keys, own_values = self.own_keys[number], self.own_values[number]
        for cache, fresh in ((own_keys, k), (own_values, v)):
            if self.rows.is_cuda:  # a graph finds its column in a tensor
                cache.index_copy_(3, self.step - 1, self._by_study(fresh))
            else:
                cache[:, :, :, width - 1 : width].copy_(self._by_study(fresh))

        # query heads that share a key head are so many queries of it: [S, K, M, heads / K, D]
        q = self._by_study(q).contiguous().mul_(size**-0.5)
        # the prompt is read once a study
        to_prompt = torch.bmm(q.view(studies * key_heads, -1, size), self.prompt_keys[number])
        if prompt_bias is not None:
            to_prompt.view(studies, key_heads, -1, to_prompt.shape[2]).add_(prompt_bias[:, None, None])
        # [S, K, M, heads / K, width]
        to_own = torch.matmul(q, own_keys[:, :, :, :width].transpose(3, 4))
        if own_bias is not None:
            to_own.add_(own_bias)
        scores = torch.cat([to_prompt, to_own.view(*to_prompt.shape[:2], width)], dim=2)
        weights = scores.softmax(dim=2)  # float32 inside, whatever comes in and goes out
        seen = to_prompt.shape[2]
        attended = torch.matmul(weights[:, :, seen:].view(*q.shape[:4], width), own_values[:, :, :, :width])
        attended.view(studies * key_heads, -1, size).baddbmm_(weights[:, :, :seen], self.prompt_values[number])
        attended = attended.transpose(1, 2).reshape(-1, heads, size)
        return layer.finish(x, attended if self.shared is None else attended.index_select(0, self.shared.places))

    def _by_study(self, heads: Tensor) -> Tensor:
        """[S * M, n * K, D] -> [S, K, M, n, D], a view: members of a study side by side under each key head."""
        studies, members = self.rows.shape
        return heads.view(studies, members, self.key_heads, -1, heads.shape[2]).transpose(1, 2)

    def _share(self, read: Tensor) -> None:
        """Let places of equal `read` [S * M] be computed once, and places that have ended not at all."""
        going = (~self.ended).nonzero().squeeze(1)
        if self.apart:
            first, self.read = going, (~self.ended).cumsum(dim=0).sub_(1).clamp_min_(0)
        else:
            different, of_going = read[going].unique(return_inverse=True)
            self.read = torch.zeros_like(read).index_copy_(0, going, of_going)
            first = torch.full((len(different),), len(read)).scatter_reduce_(0, of_going, going, "amin")
            self.apart = len(first) == len(going)
        self.shared = SharedStates(first, self.read) if len(first) <= _WORTH * len(read) else None

    def _sample(self, hidden: Tensor, of_place: Tensor | None) -> None:
        """A token for each place from the hidden states [U, H]: its own, or those that `of_place` [S * M] says."""
        log_probs = self.logits(hidden).log_softmax(dim=-1)  # [U, V]
        if self.own_uniforms is not None:
            tokens = sample_tokens(log_probs, self.own_uniforms.index_select(1, self.step).squeeze(1), of_place)
        else:
            likeliest = log_probs.argmax(dim=-1)
            tokens = likeliest if of_place is None else likeliest[of_place]
        chosen = log_probs.gather(1, tokens.unsqueeze(1)) if of_place is None else log_probs[of_place, tokens][:, None]
        going = ~self.ended  # the EOS itself is a token that was chosen, and is scored (docs/traps.md #8)
        self.token_ids.index_copy_(1, self.step, torch.where(going, tokens, self.pad_id).unsqueeze(1))
        self.logp.index_copy_(1, self.step, chosen * going.unsqueeze(1))
        self.mask.index_copy_(1, self.step, going.unsqueeze(1))
        self.ended.logical_or_((tokens.unsqueeze(1) == self.eos).any(dim=1))
        self.tokens.copy_(tokens)
        self.step += 1
        if not self.rows.is_cuda:  # a graph's shapes are fixed, and a look at what is alike would wait for the device
            self._share(self.read * log_probs.shape[1] + tokens)


def _taken(cache: Tensor, places: Tensor) -> Tensor:
    """[S, K, M, N, D] -> [S', K, M', N, D]: whole blocks are copied, once."""
    return cache.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, *cache.shape[3:])
