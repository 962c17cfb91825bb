"""The code on a card that loads the weights and writes a report, as the run's own evaluation writes it: the same words,
the same size of images, greedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mrg_r1.data.context import TITLES
from mrg_r1.tracking.card.facts import CardFacts

Kind = Literal["adapter", "merged"]


def loading_code(facts: CardFacts, kind: Kind) -> str:
    """A program for plain transformers, of an adapter with PEFT, without torchvision and without this project."""
    recipe, base = facts.recipe, facts.base
    whole = "base" if kind == "adapter" else "folder"
    think = recipe["prompt"]["mode"] == "think"
    squares = base.model_type == "gemma3"  # what its images become
    lines = [
        *(["import re", ""] if think else []),
        "import torch",
        *(["from peft import PeftModel"] if kind == "adapter" else []),
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, AutoTokenizer, {base.model_class}",
        "",
        'folder = "."  # this folder',
    ]
    if kind == "adapter":
        where = base.name or "the base checkpoint"
        lines.append(f"base = {where!r}  # its id on the hub, or its folder")
    lines += [
        'images = ["frontal.png"]  # radiographs of one study, in the order of the prompt',
        *(['views = ["frontal"]  # of each image: frontal or lateral'] if recipe["prompt"]["show_view"] else []),
        *(f'{field} = ""  # of the study; "" where there is none' for field in recipe["data"]["context"]),
        f"instruction = {facts.instruction!r}",
        "",
        f"model = {base.model_class}.from_pretrained({whole}, dtype=torch.{recipe['policy']['dtype']})",
        *(["model = PeftModel.from_pretrained(model, folder)"] if kind == "adapter" else []),
        'model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()',
        f"tokenizer = AutoTokenizer.from_pretrained({whole})",
        *(_squares(whole, _prompt(facts)) if squares else _patches(whole, recipe["data"], _prompt(facts))),
        "written = model.generate(",
        "    **{name: tensor.to(model.device) for name, tensor in inputs.items()},",
        "    do_sample=False,",
        "    repetition_penalty=1.0,  # published checkpoints have another, which the run did not use",
        "    suppress_tokens=[getattr(model.config, kind) for kind in kinds],  # no text, and banned in the run",
        f"    max_new_tokens={recipe['rollout']['max_new_tokens']},",
        ")",
        "report = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()",
        *(
            [
                'found = re.search("<report>(.*)</report>", report, re.DOTALL)  # what stands before it is thought',
                'report = "" if found is None else found[1].strip()',
            ]
            if think
            else []
        ),
        "print(report)",
    ]
    return "\n".join(lines)


def _patches(whole: str, data: Mapping[str, Any], prompt: list[str]) -> list[str]:
    """The lines that make `inputs` where an image is as many tokens as its size asks for, and `kinds`."""
    return [
        "image_processor = AutoImageProcessor.from_pretrained(",
        f'    {whole}, backend="pil", min_pixels={data["min_pixels"]}, max_pixels={data["max_pixels"]}',
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


def _squares(whole: str, prompt: list[str]) -> list[str]:
    """The same where every image is a square of as many tokens between two marks (Gemma 3)."""
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


def _prompt(facts: CardFacts) -> list[str]:
    """The lines that make `text` of one user's turn: images after their views, the context, the instruction."""
    lines = ["content = []"]
    if facts.recipe["prompt"]["show_view"]:
        lines += [
            "for view in views:",
            '    content += [{"type": "text", "text": f"{view.capitalize()} view: "}, {"type": "image"}]',
        ]
    else:
        lines += ['content += [{"type": "image"} for _ in images]']
    lines.append('words = ""')
    for field in facts.recipe["data"]["context"]:
        lines += [f"if {field}:", f'    words += f"\\n{TITLES[field]}: {{{field}}}"']
    lines += [
        'content.append({"type": "text", "text": f"{words}\\n{instruction}"})',
        "text = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True',
        ")",
    ]
    return lines
