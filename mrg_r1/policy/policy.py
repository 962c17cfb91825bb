"""The policy: what a run samples from, scores with and trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mrg_r1.policy.images import encode_again, encode_images
from mrg_r1.policy.language import LanguageModel, PromptCache
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.policy.logprobs_trained import trained_logprobs
from mrg_r1.policy.packing import pack_prompts
from mrg_r1.policy.partition import Partition
from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Prompts, VisionFeatures


class Policy(PolicyWeights):
    """The language model that writes reports, with its passes.

    `forward` is the scoring pass, so that DeepSpeed's engine wraps what is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        partition: Partition | None = None,
    ) -> None:
        super().__init__(model, tokenizer=tokenizer, temperature=temperature, partition=partition)
        self._sampler: LanguageModel | None = None

    @contextmanager
    def whole_decoder(self, *, images: bool = False) -> Iterator[None]:
        """Inside, a rank samples, and with `images` encodes them, as often and as long as it likes, without the others
        (docs/traps.md #18).

        Under a partition, entering brings together what that takes: a whole decoder with LoRA merged in, the
        embeddings, the head. The policy must not change inside. Without a partition it does nothing.
        """
        if self.partition is None or self._sampler is not None:
            yield
            return
        vision = self.family.vision_modules(self.base) if images else []
        with self.gathered(self.language_model.embed_tokens, self.base.lm_head, *vision):
            with torch.no_grad():
                self._sampler = self.read_language().merged()
            try:
                yield
            finally:
                self._sampler = None

    @contextmanager
    def sampler(self) -> Iterator[LanguageModel]:
        """The decoder with LoRA merged into fresh matrices, and what a rollout reads besides it."""
        with self.whole_decoder():
            yield self.read_language().merged() if self._sampler is None else self._sampler

    def encode_images(self, prompts: Prompts, *, again: VisionFeatures | None = None) -> VisionFeatures:
        """Run the vision tower once for each image of the batch; see `images.encode_images`."""
        return encode_images(self, prompts, again=again)

    def forward(
        self,
        prompts: Prompts,
        vision: VisionFeatures,
        token_ids: Tensor,
        mask: Tensor,
        study_of_row: Tensor,
        states: PromptCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of completions; see `logprobs.completion_logprobs`.

        Features without a graph are made again, with one, where LoRA is on what makes them: those of a rollout are of
        the weights before the first update.
        """
        if self.base.lm_head.weight.requires_grad:  # every parameter is trained, not LoRA
            return trained_logprobs(self, prompts, vision, token_ids, mask, study_of_row)
        without_graph = torch.is_grad_enabled() and not any(one.requires_grad for one in vision.per_study)
        if without_graph and self.adapts_vision:
            assert states is None, "prompt states of features that change: the recipe refuses rollout.reuse_prefill"
            vision = encode_again(self, prompts, vision, study_of_row.unique().tolist())
        return completion_logprobs(self, prompts, vision, token_ids, mask, study_of_row, states)

    def prompt_cache(self, prompts: Prompts, vision: VisionFeatures) -> PromptCache:
        """Keys, values and last states of the prompts, with their graph where gradients are enabled."""
        language = self.read_language()
        return language.prompt_pass(pack_prompts(self, language, prompts, vision), recompute=self.recompute)
