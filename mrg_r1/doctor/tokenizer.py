"""A recipe's tokenizer and image processor: whether they are the policy's, and what a report ends with."""

from __future__ import annotations

from mrg_r1.config.recipe import Recipe
from mrg_r1.doctor.finding import Finding


def tokenizer_finding(recipe: Recipe) -> Finding:
    """Whether words and images can be made a prompt of this policy, and a report be ended."""
    from mrg_r1.policy.endings import end_of_turn, eos_ids, read_generation
    from mrg_r1.policy.family import load_config, shape_of
    from mrg_r1.policy.load import load_image_processor, load_prompt_layout, load_tokenizer

    path = recipe.policy.path
    try:
        words = load_tokenizer(path)
        load_prompt_layout(path, words)
        rows = shape_of(path).vocabulary
        ends = eos_ids(read_generation(path), load_config(path), words, rows=rows)
        load_image_processor(path, min_pixels=recipe.data.min_pixels, max_pixels=recipe.data.max_pixels)
    except (ValueError, OSError) as error:
        return Finding("tokenizer", "failure", f"policy.path {path}: {error}")
    text = f"{len(words)} entries, chat template and image processor there; a report ends at "
    text += " or ".join(words.convert_ids_to_tokens(ends))
    if end_of_turn(words) is None:
        return Finding(
            "tokenizer",
            "warning",
            f"{text}; the chat template ends an assistant's turn with no token of its own",
            "if its turns end with a token, add that to eos_token_id in generation_config.json: it may be sampled on "
            "and on",
        )
    return Finding("tokenizer", "ok", text)
