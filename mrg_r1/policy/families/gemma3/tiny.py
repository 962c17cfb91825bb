"""A tiny random Gemma 3 with its own tokenizer and image processor: for the demo, for tests, without a network.

The directory it writes has the layout of a published checkpoint, so that everything else treats both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mrg_r1.files import folder_filled
from mrg_r1.policy.byte_pairs import learn_byte_pairs

SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
_PATCH, _POOLED = 14, 2  # pixels of a patch's side, patches of a token's
WINDOW = 32  # tokens: shorter than any prompt with an image and its words

# As the published one writes: BOS, the model's own name for the assistant, each part stripped.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def create_tiny_policy(
    output: Path,
    texts: Sequence[str],
    *,
    vocabulary: int = 1024,
    image_side: int = 112,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> None:
    """Write a random policy of one to two million parameters.

    Args:
        output: directory to write; made if absent.
        texts: what the byte-level BPE is learned from: reports, prompts, think texts.
        vocabulary: tokens at most, special ones included.
        image_side: pixels; an image is a square of this side, rounded down to a multiple of 28.
        hidden: width of the language model, a multiple of 32; the vision tower has half of it.
        layers: layers of the language model; the last but one sees everything, the others a window.

    Raises:
        ValueError: no texts, an image smaller than a token, or a width that four heads cannot share.
    """
    unit = _PATCH * _POOLED
    if hidden % 32 or image_side < unit:
        raise ValueError(
            f"create_tiny_policy: hidden {hidden}, image_side {image_side}; the width must be a multiple of 32 (4 "
            f"heads) and an image's side {unit} or more"
        )
    side = image_side // unit * unit
    tokenizer = _learn_tokenizer(texts, vocabulary)
    model = _random_model(tokenizer, side=side, hidden=hidden, layers=layers, seed=seed)
    # What published checkpoints carry: a near-greedy generation config, and two ids that end a report.
    model.generation_config.update(
        do_sample=True, temperature=1e-6, top_k=1, repetition_penalty=1.05, eos_token_id=[1, 4], pad_token_id=0,
        bos_token_id=2,
    )  # fmt: skip
    half = [0.5, 0.5, 0.5]
    processor = Gemma3ImageProcessorPil(
        size={"height": side, "width": side}, image_mean=half, image_std=half, do_pan_and_scan=None
    )
    with folder_filled(output) as fresh:
        for part in (model, tokenizer, processor):
            part.save_pretrained(fresh)


def _learn_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=learn_byte_pairs(texts, vocabulary, SPECIAL_TOKENS),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _random_model(
    tokenizer: PreTrainedTokenizerFast, *, side: int, hidden: int, layers: int, seed: int
) -> Gemma3ForConditionalGeneration:
    heads, head_size = 4, 3 * hidden // 8  # wider than the model's width over its heads, as the published ones are
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": head_size,
            "query_pre_attn_scalar": head_size + 16,  # the published 27B's is not the size of a head either
            "sliding_window": WINDOW,
            "layer_types": [
                "full_attention" if number == layers - 2 else "sliding_attention" for number in range(layers)
            ],
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
            "bos_token_id": ids["<bos>"],
            "eos_token_id": ids["<eos>"],
            "pad_token_id": ids["<pad>"],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": hidden // 2,
            "intermediate_size": hidden,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "image_size": side,
            "patch_size": _PATCH,
            "vision_use_head": False,
        },
        mm_tokens_per_image=(side // (_PATCH * _POOLED)) ** 2,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        # transformers begins with zeros there: nothing of an image would reach the decoder, and nothing its gradient
        projection = model.model.multi_modal_projector.mm_input_projection_weight
        torch.nn.init.normal_(projection, std=config.vision_config.hidden_size**-0.5)
        return model
