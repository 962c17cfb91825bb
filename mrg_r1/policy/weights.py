"""A policy's weights and ids: what the passes over prompts and completions need, whoever runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mrg_r1.policy.endings import end_of_turn, eos_ids
from mrg_r1.policy.family import find_family
from mrg_r1.policy.language import LanguageModel
from mrg_r1.policy.partition import Partition, PartitionedLanguageModel
from mrg_r1.policy.shape import PolicyShape


class PolicyWeights(nn.Module):
    """The checkpoint's module with the ids that matter to sampling and scoring.

    `model` is a transformers module, with or without PEFT around it; with PEFT, the reference is the same module with
    its adapters off.

    Args:
        partition: who holds the weights in parts; None: every weight is whole on every rank.

    Raises:
        ValueError: the module's model type has no family, no EOS is known, or the tokenizer is another model's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        partition: Partition | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.recompute = False  # gradient checkpointing
        config = self.base.config
        self.family = find_family(config.model_type)
        self.layout = self.family.prompt_layout(config, tokenizer)
        self.image_token_id = self.layout.image_token_id
        rows = self.base.lm_head.out_features
        self.eos_ids = eos_ids(self.base.generation_config, config, tokenizer, rows=rows)
        # what a completion that is to be learned ends with
        turn = end_of_turn(tokenizer)
        self.end_id: int = next(one for one in (turn, tokenizer.eos_token_id, self.eos_ids[0]) if one is not None)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        banned = torch.zeros(rows, dtype=torch.bool)
        banned[sorted(self.family.banned_ids(config, tokenizer))] = True
        banned[len(tokenizer) :] = True  # rows of the head that no token owns (checkpoints pad the vocabulary)
        # what decoding leaves out of the text, so that no reward could see it; an EOS is how a report ends
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        unseen = (special | set(tokenizer.all_special_ids)) - {*self.eos_ids, self.end_id}
        banned[sorted(unseen)] = True
        self.register_buffer("banned", banned, persistent=False)
        self.banned: Tensor

    @property
    def base(self) -> Any:
        """The checkpoint's module inside PEFT, or the module itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @cached_property
    def shape(self) -> PolicyShape:
        """Its sizes."""
        return self.family.shape(self.base.config.to_dict())

    @property
    def language_model(self) -> Any:
        """The decoder's module: `embed_tokens`, `layers`, `norm`."""
        return self.base.model.language_model

    @property
    def adapts_vision(self) -> bool:
        """Whether LoRA is on the merger or the tower: features then change with every update, and are the reference's
        with adapters off only.
        """
        modules = self.family.vision_modules(self.base)
        return any(isinstance(one, LoraLayer) for module in modules for one in module.modules())

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    def train(self, mode: bool = True) -> Self:
        """Training mode without dropout: with it the first ratio of a rollout would not be 1 (docs/traps.md #3)."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        return self

    def gathered(self, *modules: nn.Module, written: bool = False) -> AbstractContextManager[None]:
        """Inside, the modules' weights can be read: under a partition all ranks bring them together here, in the same
        order.

        Args:
            written: the block changes them, alike on all ranks.
        """
        if self.partition is None:
            return nullcontext()
        return self.partition.gathered(
            [weight for module in modules for weight in module.parameters()], written=written
        )

    def read_language(self) -> LanguageModel:
        """The decoder's weights as they are now."""
        if self.partition is None:
            return LanguageModel.read(self.family, self.base)
        return PartitionedLanguageModel.read_parts(self.family, self.base, self.gathered)

    def embed(self, ids: Tensor) -> Tensor:
        """[...] token ids -> [..., H]."""
        embeddings: Tensor = self.language_model.embed_tokens(ids)
        return embeddings

    def next_token_logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits of the distribution that is sampled and scored, the one place where it is defined (docs/traps.md #2).

        Args:
            hidden: [..., H] the language model's normalised hidden states.
            head: the head's product where its weights are laid out otherwise.

        Returns:
            [..., vocabulary] float32, divided by the temperature, -inf at banned ids.
        """
        logits = (self.base.lm_head if head is None else head)(hidden).float()
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits.masked_fill_(self.banned, float("-inf"))  # in place: over a large vocabulary a copy costs

    def checkpoint_gradients(self) -> None:
        """Keep each layer's input only and compute the rest again in the backward pass."""
        self.recompute = True
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
