"""The seam between what every policy does and what one model family's checkpoints are.

A family is a folder `families/<model_type>`, named as `config.json` names it, whose `FAMILY` is a `Family`. It is found
here, by that name, and imported by nobody else: to add one is to add a folder.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoConfig

from mrg_r1.files import parse_json
from mrg_r1.model_types import family_names, no_checkpoint, other_model
from mrg_r1.policy.layers import DecoderLayer, Norm
from mrg_r1.policy.shape import PolicyShape
from mrg_r1.types import ImageInputs, PromptLayout

Gathered = Callable[[nn.Module], AbstractContextManager[None]]  # a block inside which a module's weights can be read
Rotation = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions -> cos and sin, see Family.rotation


class CreateTiny(Protocol):
    def __call__(
        self,
        output: Path,
        texts: Sequence[str],
        *,
        vocabulary: int = ...,
        image_side: int = ...,
        hidden: int = ...,
        layers: int = ...,
        seed: int = ...,
    ) -> None: ...


@dataclass(frozen=True)
class Family:
    """What the rest of the project asks of a model family.

    `model` is always transformers' module of the checkpoint, without PEFT: the decoder is `model.model.language_model`,
    with `embed_tokens` (called, so that it may scale), `layers` and `norm`; the head is `model.lm_head`; LoRA wraps
    linear layers inside `layers`, and of the vision modules where `lora_targets` says so. `config` is `model.config`.
    Letters of shapes: T packed tokens, R rows of a padded batch, P prompt tokens, H the width of the decoder, D the
    size of a head (any, H need not be heads * D).

    The decoder is read anew after each update, so readings are cheap; weights under ZeRO-3 are there only inside the
    blocks in which a reading is called.

    Outside the seam stands the attention: a layer sees all tokens before, or those within its `window`; image tokens
    see no later ones, or with `image_numbers` the later ones of their own image (`masks.py`).
    """

    # The checkpoint directory.
    # (directory, its config, dtype, device) -> parameters on the meta device, buffers computed on the given one: what
    # loading fills, part by part. Called by `completeness.empty_model` alone.
    empty_model: Callable[[Path, Any, torch.dtype, torch.device], nn.Module]
    # Modules that together hold every parameter; one is whole in memory at a time while loading.
    parts: Callable[[Any], list[nn.Module]]
    # The name in the module tree of a tensor as files store it: published ones may keep the names of an older tree.
    module_name: Callable[[str], str]
    # How names of tensors begin in the family's published checkpoints, which other programs load; more are read here.
    published: tuple[str, ...]
    # By `policy.lora.targets`, a pattern for PEFT: linear layers by full name. `language`, the decoder's, is there
    # always; `language+merger` and `all`, which has the tower's too, where the family's tower reads LoRA.
    lora_targets: Mapping[str, str]
    # (config, tokenizer) -> ids that stand for pixels, out of sampling and scoring alike (docs/traps.md #11).
    banned_ids: Callable[[Any, Any], set[int]]

    # Prompts.
    # (directory, min_pixels, max_pixels) -> PIL images to named tensors, the area of an image within the two limits.
    image_processor: Callable[[Path, int, int], Any]
    # (config, tokenizer) -> how images and text stand in a prompt, and the positions of its tokens [B, P, ...].
    prompt_layout: Callable[[Any, Any], PromptLayout]

    # (the folder's name in a program, min_pixels, max_pixels, lines that make `text`, a prompt by the chat template) ->
    # lines of plain transformers that make `inputs`, which `generate` takes, and `kinds`, by which the model's config
    # names `banned_ids`: how the card beside an export says to write a report.
    card_inputs: Callable[[str, int, int, list[str]], list[str]]

    # The vision tower.
    vision_modules: Callable[[Any], list[nn.Module]]  # what `see` and `merge` read
    mergers: Callable[[Any], list[nn.Module]]  # what `merge` reads: between the tower and the decoder
    # (model, images, gathered, recompute) -> what the tower has of each image before its merger, whatever that is.
    see: Callable[[Any, ImageInputs, Gathered, bool], list[Tensor]]
    # (model, images, what `see` gave, gathered, recompute) -> features of each image, [image tokens, H], or
    # [image tokens, (1 + n) * H]: the first H are the tokens' embeddings, the other n are added to their rows after
    # each of the first n layers (DeepStack).
    merge: Callable[[Any, ImageInputs, Sequence[Tensor], Gathered, bool], list[Tensor]]

    # The decoder.
    # (one of `layers`, config) -> the layer as raw tensors: q/k norms in its `heads`, further norms in its `finish`.
    read_layer: Callable[[Any, Any], DecoderLayer]
    read_norm: Callable[[Any, Any], Norm]  # (`norm`, config): the last norm, before the head
    # model -> a function of positions, [T, ...] as `prompt_layout` made them or [T] of text, which all axes share, to
    # what `DecoderLayer.heads` takes as cos and sin, float32; [T, 1, D / 2] where all layers rotate alike.
    rotation: Callable[[Any], Rotation]
    # (model, embeddings [R, L, H], attention_mask [R, L], positions of prompts [R, P, ...], of completions [R, L - P],
    # what is added to the prompts after the first layers, each [R, P, H]) -> normalised hidden states [R, L, H], by the
    # checkpoint's own modules: what the raw passes are tested against.
    run_modules: Callable[[Any, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]

    # Positions [T, ...] of prompts -> [T] int64, 1, 2, ... at the tokens of each image of a prompt, which see one
    # another in both directions, and 0 at text; None: tokens see what came before them.
    image_numbers: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)

    # Sizes for the memory formula, from a config.json. Raises ValueError where a number is missing or contradicts
    # another, and where the model asks for what the passes here do not compute: whatever loads a checkpoint calls it.
    shape: Callable[[Mapping[str, Any]], PolicyShape]
    # Writes a random policy of one to two million parameters in a checkpoint's layout, tokenizer learned from texts.
    create_tiny: CreateTiny


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: none of that name; says which there are.
    """
    if model_type not in family_names():
        raise ValueError(other_model(model_type))
    family: Family = importlib.import_module(f"mrg_r1.policy.families.{model_type}").FAMILY
    return family


def lora_pattern(family: Family, targets: str) -> str:
    """The pattern of the linear layers that `policy.lora.targets` names.

    Raises:
        ValueError: the family has none of that name; says which it has.
    """
    if targets not in family.lora_targets:
        raise ValueError(
            f"policy.lora.targets {targets}: this policy's family has LoRA on {', '.join(family.lora_targets)} only; "
            "name one of these"
        )
    return family.lora_targets[targets]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory.

    Raises:
        ValueError: not there, or not JSON.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory}: {no_checkpoint(directory)}")
    with reading(file):
        config: Any = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{file}: {json.dumps(config)[:40]} is no object of settings; fetch the checkpoint again")
    return config


def load_config(directory: Path) -> Any:
    """The config.json of a checkpoint directory as transformers reads it.

    Raises:
        ValueError: a value of the wrong kind, named.
    """
    with reading(directory / "config.json"):
        return AutoConfig.from_pretrained(directory, local_files_only=True)


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """What transformers raises inside, of whatever kind, is a fault of this file, or of this folder's.

    Raises:
        ValueError: names it.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself, others whatever an odd value leads to
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{file}: cannot be read ({what}); mend it, or fetch the checkpoint again") from error


def require_place_of_image(tokenizer: Any, placeholder: str) -> str:
    """What a chat template writes of a user's image and words.

    Raises:
        ValueError: it leaves out either: the template is that of the text model below, say.
    """
    words = "What is seen?"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the chat template cannot write a user's image and words ({error}); take the vision model's template"
        ) from error
    if text.count(placeholder) != 1 or words not in text:
        raise ValueError(
            f"the chat template writes {text.count(placeholder)} {placeholder} for a user's image, and "
            f"{'its' if words in text else 'not its'} words: it is of another model; take the vision model's template "
            "(chat_template.jinja, chat_template.json)"
        )
    return text


def family_of(directory: Path) -> Family:
    """The family of a checkpoint directory.

    Raises:
        ValueError: no config.json, or a model type without a family; names the directory.
    """
    config = read_config(directory)
    try:
        return find_family(config.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{directory}: config.json says {error}") from error


def shape_of(directory: Path) -> PolicyShape:
    """The sizes of a checkpoint directory's model, by its config.json alone.

    Raises:
        ValueError: as `family_of`, a number is missing or contradicts another, or the model is one that the passes here
            do not compute; names the directory.
    """
    family = family_of(directory)
    try:
        return family.shape(read_config(directory))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{directory}: {error}") from error
