"""The code on a card that loads the weights and writes a report, as the run's own evaluation writes it: the same words,
the same size of images, greedy.
"""

from __future__ import annotations

from typing import Literal

from mrg_r1.data.context import TITLES
from mrg_r1.policy.family import find_family
from mrg_r1.tracking.card.facts import CardFacts

Kind = Literal["adapter", "merged"]


def loading_code(facts: CardFacts, kind: Kind) -> str:
    """A program for plain transformers, of an adapter with PEFT, without torchvision and without this project."""
    recipe, base = facts.recipe, facts.base
    whole = "base" if kind == "adapter" else "folder"
    think = recipe["prompt"]["mode"] == "think"
    limits = recipe["data"]["min_pixels"], recipe["data"]["max_pixels"]
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
        *find_family(base.model_type).card_inputs(whole, *limits, _prompt(facts)),
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
