"""What a folder that is given as a checkpoint is, by its config.json's `model_type` or by what stands in place of one.
Recipes are read with it, so it needs neither torch nor a family.
"""

from __future__ import annotations

from pathlib import Path

from mrg_r1.files import parse_json

# a folder each, named as config.json names the family
_FAMILIES = Path(__file__).parent / "policy" / "families"

# What is asked for by mistake, or in hope. Of others the name has to do.
_OTHERS = {
    "gemma3_text": "text alone",
    "gemma3n": "another tower and decoder than Gemma 3's",
    "gemma4": "another tower and decoder than Gemma 3's",
    "internvl": "InternVL's own tower and projector",
    "internvl_chat": "InternVL's own tower and projector",
    "llama": "text alone",
    "llava": "LLaVA's own tower and projector",
    "llava_next": "LLaVA's own tower and projector",
    "llava_onevision": "LLaVA's own tower and projector",
    "qwen2": "text alone",
    "qwen2_vl": "another tower than Qwen2.5-VL's",
    "qwen3": "text alone",
    "qwen3_5": "linear attention",
    "qwen3_5_moe": "linear attention and a mixture of experts",
    "qwen3_vl_moe": "a mixture of experts",
}


def family_names() -> list[str]:
    """The model types that load."""
    return sorted(folder.parent.name for folder in _FAMILIES.glob("*/__init__.py"))


def other_model(model_type: object) -> str:
    """What to say of a `model_type` that is none of `family_names`."""
    what = _OTHERS.get(model_type) if isinstance(model_type, str) else None
    known = f" ({what})" if what is not None else ""
    return f"model_type {model_type!r}{known} is no family that loads; these do: {', '.join(family_names())}"


def no_checkpoint(directory: Path) -> str:
    """What to say of a folder without a config.json: an adapter's is often taken for its checkpoint's."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        return "no config.json there; give the directory of a checkpoint"
    try:
        base = parse_json(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # it does not say
        base = None
    of = f" of {base}; put {base}" if base else "; put the checkpoint that it was trained on"
    return (
        f"no config.json there, but adapter_config.json: a LoRA adapter{of} into policy.path and this folder into "
        "policy.adapter"
    )
