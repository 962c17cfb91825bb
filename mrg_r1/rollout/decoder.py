"""The decode step: one token for every row, over a prompt cache that a group shares and a static cache of its own.

Rows stand in a rectangle [S studies, M members]; places without a row carry a dummy. Everything that a step reads and
writes is a tensor of fixed shape, so that on a GPU a step is one CUDA graph, replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mrg_r1.kernels import calls as kernels
from mrg_r1.policy.language import LanguageModel
from mrg_r1.rollout.cache import LayerCache, SharedStates, Sight
from mrg_r1.rollout.sampling import sample_tokens
from mrg_r1.types import to_device

Embed = Callable[[Tensor], Tensor]  # [R] ids -> [R, H]
Logits = Callable[[Tensor], Tensor]  # [R, H] -> [R, V] float32, the distribution that is sampled and scored
# of the places, what may be left to compute for sharing to pay: the kernels copy nothing for it, torch does
_WORTH = {"kernels": 1.0, "torch": 0.9}
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
        self.language, self.embed, self.logits = language.for_few_tokens(), embed, logits
        self.uniforms, self.answers, self.eos, self.pad_id = uniforms, answers, eos, pad_id
        self.length = answers.token_ids.shape[1]
        studies, members = rows.shape
        self.caches = [LayerCache(keys, values, members, self.length) for keys, values in prompt_cache]
        keys = prompt_cache[0][0]
        self.worth = _WORTH["kernels" if self.caches[0].by_kernel else "torch"]
        self.key_heads, self.dtype, self.prompt = keys.shape[1], keys.dtype, keys.shape[2]
        self.prompt_bias = None
        if prompt_mask is not None:
            self.prompt_bias = torch.where(prompt_mask, 0.0, float("-inf")).to(self.dtype)
        self.rows = rows
        self.next_position = next_position
        places, device = rows.numel(), rows.device
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
            self.prompt_bias = None if self.prompt_bias is None else self.prompt_bias[studies]
            self.next_position = self.next_position[studies]
        taken = blocks.unsqueeze(2) * running.shape[1] + order.unsqueeze(1)  # [S', K, M'] of the places' own caches
        for cache in self.caches:
            cache.take(blocks if fewer else None, taken)
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
        sights = {
            window: Sight(members, width, self.step, *self._biases(window, width), shared)
            for window in {layer.window for layer in language.layers}
        }
        x = self.embed(tokens)
        for layer, cache in zip(language.layers, self.caches, strict=True):
            x = layer.finish(x, cache.attend(*layer.heads(x, cos, sin), sights[layer.window]))
        self._sample(language.norm(x), None if shared is None else shared.of_place)

    def _biases(self, window: int | None, width: int) -> tuple[Tensor | None, Tensor | None]:
        """What hides keys from the tokens that are fed: of prompts [S, P] or [1, P], of their own [width]."""
        prompt_bias, own_bias, device = self.prompt_bias, None, self.rows.device
        if self.rows.is_cuda:
            there = torch.arange(width, device=device) < self.step
            own_bias = torch.where(there, 0.0, float("-inf")).to(self.dtype)
        prompt = self.prompt
        if window is None or prompt + self.length <= window:
            return prompt_bias, own_bias
        # the fed token stands at prompt + step - 1 of its row, prompts ending on the right
        seen = torch.arange(prompt + width, device=device) > prompt + self.step - 1 - window
        within = torch.where(seen, 0.0, float("-inf")).to(self.dtype)
        of_prompt = within[None, :prompt] if prompt_bias is None else prompt_bias + within[:prompt]
        return of_prompt, within[prompt:] if own_bias is None else own_bias + within[prompt:]

    def _share(self, read: Tensor) -> None:
        """Let places of equal `read` [S * M] be computed once, and places that have ended not at all."""
        if self.apart and not bool(self.ended.any()):
            self.shared = None
            return
        going = (~self.ended).nonzero().squeeze(1)
        if self.apart:
            first, self.read = going, (~self.ended).cumsum(dim=0).sub_(1).clamp_min_(0)
        else:
            different, of_going = read[going].unique(return_inverse=True)
            self.read = torch.zeros_like(read).index_copy_(0, going, of_going)
            first = torch.full((len(different),), len(read)).scatter_reduce_(0, of_going, going, "amin")
            self.apart = len(first) == len(going)
        self.shared = SharedStates(first, self.read) if len(first) <= self.worth * len(read) else None

    def _sample(self, hidden: Tensor, of_place: Tensor | None) -> None:
        """A token for each place from the hidden states [U, H]: its own, or those that `of_place` [S * M] says."""
        logits = self.logits(hidden)  # [U, V]
        if self.own_uniforms is not None and kernels.ready(logits):
            self.tokens = kernels.sample(
                logits, self.own_uniforms, of_place, step=int(self.step), eos=self.eos, pad_id=self.pad_id,
                token_ids=self.token_ids, logp=self.logp, mask=self.mask, ended=self.ended,
            )  # fmt: skip
            self.step += 1
            self._share(self.read * logits.shape[1] + self.tokens)
            return
        log_probs = logits.log_softmax(dim=-1)
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
