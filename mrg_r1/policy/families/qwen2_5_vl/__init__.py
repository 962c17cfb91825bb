"""Qwen2.5-VL (arXiv 2502.13923), and every checkpoint of its class."""

from mrg_r1.policy.families.qwen2_5_vl import checkpoint, decoder, shape, tiny, vision
from mrg_r1.policy.family import Family
from mrg_r1.policy.qwen_vl.card import card_inputs
from mrg_r1.policy.qwen_vl.checkpoint import banned_ids, image_processor, lora_targets, module_name
from mrg_r1.policy.qwen_vl.decoder import read_norm
from mrg_r1.policy.qwen_vl.positions import ImageTokens

FAMILY = Family(
    empty_model=checkpoint.empty_model,
    parts=checkpoint.parts,
    module_name=module_name,
    published=("model.", "visual.", "lm_head."),
    lora_targets=lora_targets(
        merger=r"merger\.mlp\.(0|2)", tower=r"(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))"
    ),
    banned_ids=banned_ids,
    image_processor=image_processor,
    prompt_layout=ImageTokens.read,
    card_inputs=card_inputs,
    vision_modules=vision.modules,
    mergers=vision.mergers,
    see=vision.see,
    merge=vision.merge,
    read_layer=decoder.read_layer,
    read_norm=read_norm,
    rotation=decoder.rotation,
    run_modules=decoder.run_modules,
    shape=shape.shape_of_config,
    create_tiny=tiny.create_tiny_policy,
)
