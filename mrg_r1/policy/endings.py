"""What ends a report: the ids that stop a completion, and the one that a report to be learned ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mrg_r1.files import parse_json
from mrg_r1.policy.family import reading

_FILE = "generation_config.json"


def read_generation(directory: Path) -> GenerationConfig | None:
    """The generation_config.json of a checkpoint directory; None where it has none.

    Raises:
        ValueError: no such configuration.
    """
    if not (directory / _FILE).is_file():
        return None
    with reading(directory / _FILE):
        return GenerationConfig.from_pretrained(directory, local_files_only=True)


def eos_ids(
    generation: GenerationConfig | None, config: Any, tokenizer: PreTrainedTokenizerBase, *, rows: int
) -> list[int]:
    """Every id that ends a completion: a checkpoint may name several, one of which is also the pad id, and may leave
    out the one that its own chat template ends a turn with (docs/traps.md #8).

    Args:
        rows: of the head; an id beyond them is never sampled, and is left out.

    Raises:
        ValueError: neither the generation config, the tokenizer nor the config names one; or what one of them names is
            no id.
    """
    named = {
        _FILE: None if generation is None else generation.eos_token_id,
        "tokenizer_config.json": tokenizer.eos_token_id,
        "config.json": config.text_config.eos_token_id,
        "the chat template": end_of_turn(tokenizer),
    }
    found: set[int] = set()
    for file, value in named.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(one, int) or isinstance(one, bool) or one < 0:
                raise ValueError(f"{file}: eos_token_id is {value!r}; write the id of a token, or a list of ids")
            found.add(one)
    if not any(one < rows for one in found):
        raise ValueError(
            "the checkpoint names no eos_token_id (generation_config.json, tokenizer_config.json or config.json)"
        )
    return sorted(one for one in found if one < rows)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template writes right after what an assistant said; None where it writes none, or
    takes no assistant's turn.
    """
    asked, said = "What?", "All clear"
    turns = [("user", asked), ("assistant", said), ("user", "Why?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    for count in (2, 3):  # a template may leave the end out after the last turn
        try:
            text = str(tokenizer.apply_chat_template(messages[:count], tokenize=False))
        except (TemplateError, TypeError, ValueError):  # no turn of an assistant; `ImageTokens.read` looks at a user's
            return None
        before, _, after = text.rpartition(said)
        ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if before else []
        opening = [one for one in tokenizer(before.partition(asked)[0])["input_ids"] if one in _added(tokenizer)]
        if ids and ids[0] in _added(tokenizer) and ids[0] not in opening[-1:]:  # what opens a turn ends none
            return int(ids[0])
    return None


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return added


def write_generation(source: Path, folder: Path, ids: list[int], *, pad: int) -> None:
    """Write the generation_config.json of `source` into `folder`, naming every id that ends a completion, so that
    other programs stop where a run did; its bytes as they are where it does.
    """
    file = source / _FILE
    stated: dict[str, Any] = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {"pad_token_id": pad}
    named = stated.get("eos_token_id")
    if set(named if isinstance(named, list) else [named]) >= set(ids):
        text = file.read_text(encoding="utf-8")
    else:
        text = json.dumps(stated | {"eos_token_id": ids}, indent=2) + "\n"
    (folder / _FILE).write_text(text, encoding="utf-8")
