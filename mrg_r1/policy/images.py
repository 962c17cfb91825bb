"""Image features: sorted by study, and put into the prompts in place of their image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import Prompts, VisionFeatures


def encode_images(policy: PolicyWeights, prompts: Prompts) -> VisionFeatures:
    """Features of every image, once each, grouped by study.

    Gradients flow only where the tower's parameters want them (SFT of all parameters); under LoRA it runs without a
    graph.

    Returns:
        Per study [image tokens, H] or wider (`Family.encode_images`), images in prompt order.

    Raises:
        ValueError: a study's image tokens are not as many as its features (docs/traps.md #10).
    """
    features = policy.family.encode_images(policy.base, prompts.images, policy.gathered)
    per_study, start = [], 0
    for study, count in enumerate(prompts.images_per_study):
        joined = torch.cat(features[start : start + count])
        tokens = int((prompts.input_ids[study] == policy.image_token_id).sum())
        if tokens != len(joined):
            raise ValueError(
                f"study {prompts.study_ids[study]}: {tokens} image tokens in the prompt, {len(joined)} features "
                f"from its {count} image(s)"
            )
        per_study.append(joined)
        start += count
    return VisionFeatures(per_study)


def put_features(embeddings: Tensor, at_images: Tensor, features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Prompts with what their images say.

    Args:
        embeddings: [..., H] of prompt tokens.
        at_images: [...] bool, True at image tokens, of which there are n.
        features: [n, (1 + k) * H].

    Returns:
        [..., H] the embeddings, image tokens replaced by the first H of their features; and k tensors [..., H], zero
        elsewhere, to add after each of the first k layers.
    """
    places = at_images.unsqueeze(-1)
    first, *deeper = features.to(embeddings.dtype).split(embeddings.shape[-1], dim=1)
    added = tuple(torch.zeros_like(embeddings).masked_scatter(places, part) for part in deeper)
    return embeddings.masked_scatter(places, first), added
