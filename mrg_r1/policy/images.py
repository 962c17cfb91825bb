"""Image features: sorted by study, and put into the prompts in place of their image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrg_r1.policy.weights import PolicyWeights
from mrg_r1.types import ImageInputs, Prompts, VisionFeatures


def encode_images(policy: PolicyWeights, prompts: Prompts, *, again: VisionFeatures | None = None) -> VisionFeatures:
    """Features of every image, once each, grouped by study.

    Gradients flow only where they are enabled and the weights of tower or merger want them (SFT of all parameters, LoRA
    on them); the tower runs without a graph where LoRA is on its merger alone, and what it had is kept.

    Args:
        again: features of the same prompts, whose `before_merger` stands for the tower where it was kept.

    Returns:
        Per study [image tokens, H] or wider (`Family.merge`), images in prompt order.

    Raises:
        ValueError: a study's image tokens are not as many as its features (docs/traps.md #10).
    """
    kept = None if again is None or again.before_merger is None else sum(again.before_merger, [])
    seen, features = _see_and_merge(policy, prompts.images, kept)
    per_study, before_merger, start = [], [], 0
    counts = (prompts.input_ids == policy.image_token_id).sum(dim=1).tolist()  # image tokens of each study
    for study, count in enumerate(prompts.images_per_study):
        joined = torch.cat(features[start : start + count])
        if counts[study] != len(joined):
            raise ValueError(
                f"study {prompts.study_ids[study]}: {counts[study]} image tokens in the prompt, {len(joined)} features "
                f"from its {count} image(s)"
            )
        per_study.append(joined)
        before_merger.append(seen[start : start + count])
        start += count
    mergers, tower = _wanting(policy)
    return VisionFeatures(per_study, before_merger if mergers and not tower else None)


def image_features(policy: PolicyWeights, images: ImageInputs) -> list[Tensor]:
    """[image tokens, H], or wider, of each image; with a graph as in `encode_images`."""
    return _see_and_merge(policy, images, None)[1]


def encode_again(
    policy: PolicyWeights, prompts: Prompts, vision: VisionFeatures, studies: Sequence[int]
) -> VisionFeatures:
    """The features of `studies` under the weights as they are now, with their graph; those of the others as they
    were.
    """
    some = encode_images(policy, prompts.select(studies), again=vision.select(studies))
    per_study = list(vision.per_study)
    for place, study in enumerate(studies):
        per_study[study] = some.per_study[place]
    return VisionFeatures(per_study, vision.before_merger)


def _see_and_merge(
    policy: PolicyWeights, images: ImageInputs, seen: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """What the tower has before its merger, and the features. Under a partition a module's weights are there only while
    it runs, so that a graph wants it run again.
    """
    base, gathered, graph = policy.base, policy.gathered, torch.is_grad_enabled()
    again = policy.recompute or policy.partition is not None
    mergers, tower = _wanting(policy)
    if seen is None:
        with torch.set_grad_enabled(graph and tower):
            seen = policy.family.see(base, images, gathered, again and torch.is_grad_enabled())
    with torch.set_grad_enabled(graph and (mergers or tower)):
        return seen, policy.family.merge(base, images, seen, gathered, again and torch.is_grad_enabled())


def _wanting(policy: PolicyWeights) -> tuple[bool, bool]:
    """Whether the mergers' weights want gradients, and whether the rest of the tower's do."""
    of_mergers = {one for module in policy.family.mergers(policy.base) for one in module.parameters()}
    of_vision = {one for module in policy.family.vision_modules(policy.base) for one in module.parameters()}
    return (
        any(one.requires_grad for one in of_mergers),
        any(one.requires_grad for one in of_vision - of_mergers),
    )


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
