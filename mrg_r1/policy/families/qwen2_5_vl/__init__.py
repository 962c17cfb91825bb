"""Qwen2.5-VL (arXiv 2502.13923), and every checkpoint of its class."""

from mrg_r1.policy.families.qwen2_5_vl import checkpoint, decoder, positions, shape, tiny, vision
from mrg_r1.policy.family import Family

FAMILY = Family(
    load_model=checkpoint.load_model,
    empty_model=checkpoint.empty_model,
    parts=checkpoint.parts,
    module_name=checkpoint.module_name,
    lora_targets=checkpoint.LORA_TARGETS,
    banned_ids=checkpoint.banned_ids,
    image_processor=checkpoint.image_processor,
    prompt_layout=positions.ImageTokens.read,
    vision_modules=vision.modules,
    encode_images=vision.encode_images,
    read_layer=decoder.read_layer,
    read_norm=decoder.read_norm,
    rotation=decoder.MultimodalRotation.read,
    run_modules=decoder.run_modules,
    shape=shape.shape_of_config,
    create_tiny=tiny.create_tiny_policy,
)
