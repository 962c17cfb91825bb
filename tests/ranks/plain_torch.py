"""GRPO on saved experience as one plain PyTorch process would do it, with nothing of `engine/`, `policy/`, `grpo/` or
`training/grpo.py`.

Transformers' own forward on whole rows [prompt | completion], PEFT's own LoRA, torch's AdamW and clipping, the files
read as docs/debugging.md describes them. Only the prompts' ids and pixels come from the package (`data/loader.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.data.study import read_manifest
from mrg_r1.policy.qwen_vl.positions import ImageTokens
from tests.grpo.paper_loss import paper_loss

BANNED = ["<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]


@dataclass
class Trace:
    """One entry a step, and the adapter before and after."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the step's last update, before clipping
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)


def read_step(folder: Path, step: int) -> dict[str, Any]:
    """studies [B]; ids, mask [B][G] lists of lists without padding; total [B, G]."""
    read: dict[str, Any] = {"studies": [], "ids": [], "total": [], "logp": [], "texts": []}
    for path in sorted(folder.glob(f"step_{step:06d}_rank*.json")):
        part, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        read["studies"] += part["studies"]
        read["texts"] += part["texts"]
        for b in range(len(part["studies"])):
            kept = tensors["mask"][b]
            read["ids"].append([tensors["token_ids"][b, g][kept[g]].tolist() for g in range(len(kept))])
            read["logp"].append([tensors["logp"][b, g][kept[g]].tolist() for g in range(len(kept))])
        read["total"] += tensors["total"].tolist()
    return read


class PlainGrpo:
    """A policy with LoRA and an optimizer, for the settings of a recipe (its plain dict)."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe
        path = recipe["policy"]["path"]
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        names = [
            name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "language_model" in name
        ]
        lora = recipe["policy"]["lora"]
        torch.manual_seed(recipe["seed"])
        self.model = get_peft_model(
            base, LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=names)
        ).eval()
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        optimizer = recipe["optimizer"]
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=optimizer["learning_rate"],
            betas=tuple(optimizer["betas"]),
            weight_decay=optimizer["weight_decay"],
        )
        self.banned = [self.tokenizer.convert_tokens_to_ids(token) for token in BANNED]
        data = recipe["data"]
        processor = Qwen2VLImageProcessorPil.from_pretrained(
            path, min_pixels=data["min_pixels"], max_pixels=data["max_pixels"]
        )
        words = PromptWords(instruction=recipe["prompt"]["instruction"], show_view=recipe["prompt"]["show_view"])
        # what a family says of positions is not used: they are the model's own business here
        layout = ImageTokens.read(base.config, self.tokenizer)
        self.build = PromptBuilder(tokenizer=self.tokenizer, image_processor=processor, layout=layout, words=words)
        self.studies = {study.id: study for study in read_manifest(Path(data["manifest"]))}

    def logp(self, study: str, completions: Sequence[list[int]]) -> list[Tensor]:
        """Log-probs [C_g] of each completion of a group, by the model's own forward."""
        prompt = self.build([self.studies[study]])
        own, width = prompt.input_ids.shape[1], max(map(len, completions))
        ids = torch.full((len(completions), own + width), self.tokenizer.pad_token_id)
        for row, completion in enumerate(completions):
            ids[row, :own] = prompt.input_ids[0]
            ids[row, own : own + len(completion)] = torch.tensor(completion)
        kept = torch.zeros_like(ids)
        for row, completion in enumerate(completions):
            kept[row, : own + len(completion)] = 1
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        logits = (
            self.model(
                input_ids=ids,
                attention_mask=kept,
                mm_token_type_ids=(ids == image).long(),
                pixel_values=prompt.images.tensors["pixel_values"].repeat(len(completions), 1),
                image_grid_thw=prompt.images.tensors["image_grid_thw"].repeat(len(completions), 1),
            ).logits
            / self.recipe["rollout"]["temperature"]
        )
        logits[..., self.banned] = float("-inf")
        logits[..., len(self.tokenizer) :] = float("-inf")
        logp = logits.log_softmax(-1)
        return [
            logp[row, own - 1 : own - 1 + len(completion)].gather(1, torch.tensor(completion)[:, None])[:, 0]
            for row, completion in enumerate(completions)
        ]

    def all_logp(self, step: dict[str, Any]) -> list[Tensor]:
        """Of every completion of a step, in its order."""
        return [
            row for study, group in zip(step["studies"], step["ids"], strict=True) for row in self.logp(study, group)
        ]

    def loss(
        self, logp: list[Tensor], old: list[Tensor], ref: list[Tensor], advantages: list[float], rows: list[int]
    ) -> Tensor:
        """Spec section 3 over `rows`; its value is held against `paper_loss`, which shares nothing with it."""
        grpo, sequences = self.recipe["grpo"], []
        for row in rows:
            ratio = (logp[row] - old[row]).exp()
            clipped = ratio.clamp(1 - grpo["clip_low"], 1 + grpo["clip_high"])
            gap = ref[row] - logp[row]
            sequences.append(
                -torch.minimum(ratio * advantages[row], clipped * advantages[row])
                + grpo["beta"] * (gap.exp() - gap - 1)
            )
        loss = (
            torch.cat(sequences).mean()
            if grpo["aggregation"] == "dapo"
            else torch.stack([one.mean() for one in sequences]).mean()
        )
        asked = {key: grpo[key] for key in ("aggregation", "clip_low", "clip_high", "beta", "ratio")}
        plain = [[values[row].tolist() for row in rows] for values in (logp, old, ref)]
        mask = [[True] * len(values) for values in plain[0]]
        signs = [advantages[row] for row in rows]
        paper = paper_loss(
            *plain, None, signs, mask, max_length=self.recipe["rollout"]["max_new_tokens"], tis_cap=None, **asked
        )
        assert abs(paper - loss.item()) < 1e-6
        return loss

    def step(self, number: int, saved: dict[str, Any]) -> tuple[float, float]:
        """All updates of a saved step: their mean loss, and the last one's gradient norm."""
        grpo, optimizer = self.recipe["grpo"], self.recipe["optimizer"]
        for group in self.optimizer.param_groups:  # a linear warm-up, then constant
            group["lr"] = optimizer["learning_rate"] * min(1.0, (number + 1) / max(1, optimizer["warmup_steps"]))
        advantages = []
        for rewards in saved["total"]:
            mean = sum(rewards) / len(rewards)
            std = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
            advantages += [(reward - mean) / (std + 1e-4) if std else 0.0 for reward in rewards]
        with torch.no_grad():
            with self.model.disable_adapter():
                reference = self.all_logp(saved)
            old = self.all_logp(saved)
        losses, norm = [], torch.zeros(())
        for _ in range(grpo["inner_iterations"]):
            for first in range(grpo["minibatches"]):
                self.optimizer.zero_grad()
                loss = self.loss(
                    self.all_logp(saved),
                    old,
                    reference,
                    advantages,
                    list(range(first, len(advantages), grpo["minibatches"])),
                )
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.trained.values(), optimizer["max_grad_norm"])
                self.optimizer.step()
                losses.append(loss.item())
        return sum(losses) / len(losses), norm.item()

    def adapter(self) -> dict[str, Tensor]:
        """Under the names of PEFT's file."""
        return {name.replace(".default.", "."): parameter.detach().clone() for name, parameter in self.trained.items()}


def plain_run(recipe: dict[str, Any], experience: Path, *, steps: int) -> Trace:
    """The first `steps` saved steps."""
    plain = PlainGrpo(recipe)
    trace = Trace(start=plain.adapter())
    for number in range(steps):
        loss, norm = plain.step(number, read_step(experience, number))
        trace.losses.append(loss)
        trace.norms.append(norm)
    trace.end = plain.adapter()
    return trace
