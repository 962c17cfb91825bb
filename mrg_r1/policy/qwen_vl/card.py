"""How a program of plain transformers, as a model card shows it, makes what `generate` takes."""

from __future__ import annotations


def card_inputs(whole: str, min_pixels: int, max_pixels: int, prompt: list[str]) -> list[str]:
    """Lines of plain transformers for a model card (`Family.card_inputs`): an image is as many tokens as its size asks
    for.
    """
    return [
        "image_processor = AutoImageProcessor.from_pretrained(",
        f'    {whole}, backend="pil", min_pixels={min_pixels}, max_pixels={max_pixels}',
        ")",
        "",
        *prompt,
        'seen = image_processor([Image.open(path).convert("RGB") for path in images], return_tensors="pt")',
        "image_id, grids, ids = model.config.image_token_id, iter(seen.image_grid_thw), []",
        "for token in tokenizer(text, add_special_tokens=False).input_ids:",
        "    # one placeholder an image becomes as many as the image has patches after merging",
        "    count = int(next(grids).prod()) // image_processor.merge_size**2 if token == image_id else 1",
        "    ids += [token] * count",
        "ids = torch.tensor([ids])",
        "inputs = {",
        '    "input_ids": ids,',
        '    "attention_mask": torch.ones_like(ids),',
        '    "mm_token_type_ids": (ids == image_id).int(),',
        "    **seen,",
        "}",
        'kinds = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")',
    ]
