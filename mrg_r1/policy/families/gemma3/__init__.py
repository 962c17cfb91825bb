"""Gemma 3 (arXiv 2503.19786) with its vision tower, MedGemma among them (arXiv 2507.05201)."""

from mrg_r1.policy.families.gemma3 import card, checkpoint, decoder, images, shape, tiny, vision
from mrg_r1.policy.family import Family

FAMILY = Family(
    empty_model=checkpoint.empty_model,
    parts=checkpoint.parts,
    module_name=checkpoint.module_name,
    published=checkpoint.PUBLISHED,
    lora_targets={"language": checkpoint.LORA_TARGETS},
    banned_ids=images.banned_ids,
    image_processor=images.image_processor,
    prompt_layout=images.ImageTokens.read,
    card_inputs=card.card_inputs,
    image_numbers=images.image_numbers,
    vision_modules=vision.modules,
    mergers=vision.mergers,
    see=vision.see,
    merge=vision.merge,
    read_layer=decoder.read_layer,
    read_norm=decoder.read_norm,
    rotation=decoder.Rotation.read,
    run_modules=decoder.run_modules,
    shape=shape.shape_of_config,
    create_tiny=tiny.create_tiny_policy,
)
