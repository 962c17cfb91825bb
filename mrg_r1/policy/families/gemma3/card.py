"""How a program of plain transformers, as a model card shows it, makes what `generate` takes."""

from __future__ import annotations


def card_inputs(whole: str, min_pixels: int, max_pixels: int, prompt: list[str]) -> list[str]:
    """Lines of plain transformers for a model card (`Family.card_inputs`): every image is a square of as many tokens
    between two marks, whatever its size.
    """
    return [
        f'image_processor = AutoImageProcessor.from_pretrained({whole}, backend="pil")',
        "",
        *prompt,
        'seen = image_processor([Image.open(path).convert("RGB") for path in images], return_tensors="pt")',
        "begin, image_id, end = (getattr(model.config, f'{name}_token_id') for name in ('boi', 'image', 'eoi'))",
        "mark, ids = tokenizer.convert_ids_to_tokens(begin), []",
        'for piece in text.replace(mark, f"\\n\\n{mark}\\n\\n").split(mark):',
        "    # every image but none before the first piece: its tokens between two marks",
        "    ids += [begin, *[image_id] * model.config.mm_tokens_per_image, end] if ids else []",
        "    ids += tokenizer(piece, add_special_tokens=False).input_ids",
        "ids = torch.tensor([ids])",
        "inputs = {",
        '    "input_ids": ids,',
        '    "attention_mask": torch.ones_like(ids),',
        '    "token_type_ids": (ids == image_id).int(),',
        '    "pixel_values": seen["pixel_values"],',
        "}",
        'kinds = ("boi_token_id", "image_token_id", "eoi_token_id")',
    ]
