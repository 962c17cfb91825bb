"""The vision tower, once an image a step, and the prompt as the language model reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrg_r1.types import Prompts, VisionFeatures

if TYPE_CHECKING:
    from mrg_r1.policy.load import Policy


def encode_images(policy: Policy, prompts: Prompts) -> VisionFeatures:
    """Features of every image, grouped by study.

    Gradients flow only where the tower's parameters want them (SFT of all parameters); under LoRA it runs without a graph.

    Returns:
        Per study [image tokens, H], images in prompt order.

    Raises:
        ValueError: a study's image tokens are not as many as its features (trap 10).
    """
    visual = policy.base.model.visual
    trained = any(parameter.requires_grad for parameter in visual.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features = policy.base.get_image_features(prompts.pixel_values, prompts.image_grid_thw, return_dict=True).pooler_output
    per_study, start = [], 0
    for study, count in enumerate(prompts.images_per_study):
        joined = torch.cat(list(features[start : start + count]))
        tokens = int((prompts.input_ids[study] == policy.image_token_id).sum())
        if tokens != len(joined):
            raise ValueError(
                f"study {prompts.study_ids[study]}: {tokens} image tokens in the prompt, {len(joined)} features from its {count} image(s)"
            )
        per_study.append(joined)
        start += count
    return VisionFeatures(per_study)


def embed_prompts(policy: Policy, prompts: Prompts, vision: VisionFeatures) -> Tensor:
    """[B, P, H]: token embeddings with the image tokens replaced by the image features."""
    embeddings = policy.language_model.embed_tokens(prompts.input_ids)
    at_images = (prompts.input_ids == policy.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(at_images, torch.cat(vision.per_study).to(embeddings.dtype))
