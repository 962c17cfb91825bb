"""A Qwen2.5-VL checkpoint directory as a policy, its tokenizer and its image processor.

No network, no remote code, no pickle: safetensors from a local directory. The image processor is the PIL one, which
needs no torchvision and gives the same pixels on every machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mrg_r1.policy.families.qwen2_5_vl.positions import RotaryPositions
from mrg_r1.policy.families.qwen2_5_vl.vision import encode_images
from mrg_r1.policy.language import LanguageModel, PromptCache
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.packing import pack_prompts
from mrg_r1.policy.partition import Partition, PartitionedLanguageModel, load_parts
from mrg_r1.types import Prompts, VisionFeatures

# Ids that stand for pixels. A sampled one would make the next forward look for an image that is not there
# (docs/traps.md #11).
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")


class Policy(nn.Module):
    """The language model that writes reports, with the ids that matter to sampling and scoring.

    `forward` is the scoring pass, so that DeepSpeed's engine wraps what is trained. `model` is a transformers module,
    with or without PEFT around it; with PEFT, the reference is the same module with its adapters off.
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
        self.partition = partition  # None: every weight is whole on every rank
        self._sampler: LanguageModel | None = None
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.recompute = False  # gradient checkpointing
        config = self.base.config
        self.image_token_id: int = config.image_token_id
        self.positions = RotaryPositions(config.image_token_id, config.vision_config.spatial_merge_size)
        self.eos_ids = eos_ids(self.base, tokenizer)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        banned = torch.zeros(self.base.lm_head.out_features, dtype=torch.bool)
        banned[sorted(banned_ids(self.base, tokenizer))] = True
        banned[len(tokenizer) :] = True  # rows of the head that no token owns (checkpoints pad the vocabulary)
        self.register_buffer("banned", banned, persistent=False)
        self.banned: Tensor

    @property
    def base(self) -> Any:
        """The Qwen2.5-VL module inside PEFT, or the module itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def language_model(self) -> Any:
        return self.base.model.language_model

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    def train(self, mode: bool = True) -> Policy:
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
        return LanguageModel.read(self) if self.partition is None else PartitionedLanguageModel.read(self)

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
        language, visual = self.language_model, self.base.model.visual
        with self.gathered(language.embed_tokens, self.base.lm_head, *([visual] if images else [])):
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

    def encode_images(self, prompts: Prompts) -> VisionFeatures:
        """Run the vision tower once for each image of the batch."""
        return encode_images(self, prompts)

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the distribution that is sampled and scored, the one place where it is defined (docs/traps.md #2).

        Args:
            hidden: [..., H] the language model's normalised hidden states.

        Returns:
            [..., vocabulary] float32, divided by the temperature, -inf at banned ids.
        """
        logits: Tensor = self.base.lm_head(hidden).float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.masked_fill(self.banned, float("-inf"))

    def forward(
        self,
        prompts: Prompts,
        vision: VisionFeatures,
        token_ids: Tensor,
        mask: Tensor,
        study_of_row: Tensor,
        states: PromptCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of completions; see `logprobs.completion_logprobs`."""
        if self.base.lm_head.weight.requires_grad:  # every parameter is trained, not LoRA
            return completion_logprobs_plain(self, prompts, vision, token_ids, mask, study_of_row)
        return completion_logprobs(self, prompts, vision, token_ids, mask, study_of_row, states)

    def prompt_cache(self, prompts: Prompts, vision: VisionFeatures) -> PromptCache:
        """Keys, values and last states of the prompts, with their graph where gradients are enabled."""
        language = self.read_language()
        return language.prompt_pass(pack_prompts(self, language, prompts, vision), recompute=self.recompute)

    def checkpoint_gradients(self) -> None:
        """Keep each layer's input only and compute the rest again in the backward pass."""
        self.recompute = True
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_policy(
    path: Path, *, dtype: torch.dtype, temperature: float = 1.0, partition: Partition | None = None
) -> Policy:
    """Load a checkpoint directory in evaluation mode, every parameter frozen.

    Args:
        partition: load this rank's part of the weights only; all ranks call this then.

    Raises:
        ValueError: the tokenizer lacks the image token, or no EOS is known.
    """
    tokenizer = load_tokenizer(path)
    if partition is not None:
        parts = load_parts(path, dtype=dtype, partition=partition)
        return Policy(parts, tokenizer=tokenizer, temperature=temperature, partition=partition).eval()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
    model.requires_grad_(False)
    return Policy(model, tokenizer=tokenizer, temperature=temperature).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with its chat template wherever the checkpoint keeps it.

    Raises:
        ValueError: no chat template in the directory.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.chat_template is None:  # older checkpoints keep it with the processor
        file = path / "chat_template.json"
        if not file.is_file():
            raise ValueError(
                f"{path}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
            )
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def load_image_processor(path: Path, *, min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """The checkpoint's image processor with the recipe's limits on the image area in pixels."""
    return Qwen2VLImageProcessorPil.from_pretrained(
        path, min_pixels=min_pixels, max_pixels=max_pixels, local_files_only=True
    )


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: a checkpoint may name several, one of which is also the pad id (docs/traps.md
    #8).

    Raises:
        ValueError: neither the generation config, the tokenizer nor the config names one.
    """
    found: set[int] = set()
    for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id, model.config.text_config.eos_token_id):
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    if not found:
        raise ValueError(
            "the checkpoint names no eos_token_id (generation_config.json, tokenizer_config.json or config.json)"
        )
    return sorted(found)


def banned_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of image, video and vision tokens, out of sampling and scoring alike."""
    config = model.config
    named = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    vocabulary = tokenizer.get_vocab()
    return {token for token in named if token is not None} | {
        vocabulary[token] for token in _VISION_TOKENS if token in vocabulary
    }


def save_policy(policy: Policy, directory: Path, *, source: Path) -> None:
    """Write the policy as a checkpoint directory of the layout that `load_policy` reads; tokenizer and processor come
    from `source`.
    """
    policy.base.save_pretrained(directory, safe_serialization=True)
    policy.tokenizer.save_pretrained(directory)
    shutil.copy(source / "preprocessor_config.json", directory)
