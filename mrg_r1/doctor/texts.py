"""A recipe's texts beside its policy's tokenizer: instruction, contexts and reports to be learned, looked at before a
policy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.console import progress
from mrg_r1.data.loader import check_context, check_instruction, special_tokens
from mrg_r1.doctor.inputs import studies_to_learn
from mrg_r1.labels.observations import NO_FINDING
from mrg_r1.phantom.wording import think_text
from mrg_r1.policy.endings import eos_ids, read_generation
from mrg_r1.policy.family import family_of, load_config, shape_of
from mrg_r1.policy.load import load_tokenizer
from mrg_r1.report_format import has_tag, target_text
from mrg_r1.types import Study

_AT_ONCE = 1000  # reports that are tokenised together
_SHOWN_FROM = 20_000  # reports: fewer take a moment


def check_texts(recipe: Recipe, splits: Mapping[str, Sequence[Study]], *, task: str) -> str:
    """Refuse what the policy would read, or learn, as something else than it says.

    Raises:
        PromptError: an instruction or a context that has a special token spelled out in it.
        RecipeError: as `check_reports` and `check_targets`, of SFT.
    """
    tokenizer = load_tokenizer(recipe.policy.path)
    check_prompts(recipe, (study for part in splits.values() for study in part), tokenizer)
    said = "no special token in the instruction" + (" and the studies' context" if recipe.data.context else "")
    if task != "sft":
        return said
    learned = studies_to_learn(splits["train"], task=task)
    check_reports(learned, mode=recipe.prompt.mode, unsafe=unsafe_tokens(recipe.policy.path, tokenizer))
    longest = check_targets(recipe, learned, tokenizer)
    limit = recipe.rollout.max_new_tokens
    return f"{said}, nor in {len(learned)} reports to learn; the longest has {longest} tokens of {limit}"


def check_prompts(recipe: Recipe, studies: Iterable[Study], tokenizer: Any) -> None:
    """Refuse an instruction, and a study's context, that has a special token spelled out in it.

    Raises:
        PromptError: names the field, or the study and the field, and the token.
    """
    special = special_tokens(tokenizer)
    check_instruction(recipe.prompt.words, special)
    for study in studies:
        check_context(study, recipe.data.context, special)


def unsafe_tokens(path: Path, tokenizer: Any) -> list[str]:
    """What a report to be learned must not have spelled out in it: special tokens, what ends a completion, and what is
    never sampled, an image's place say (added tokens need not be special to be read as such).
    """
    config = load_config(path)
    ends = eos_ids(read_generation(path), config, tokenizer, rows=shape_of(path).vocabulary)
    added = tokenizer.added_tokens_decoder
    banned = [str(added[token]) for token in family_of(path).banned_ids(config, tokenizer) if token in added]
    return sorted({*special_tokens(tokenizer), *tokenizer.convert_ids_to_tokens(ends), *banned})


def check_reports(studies: Iterable[Study], *, mode: str, unsafe: Sequence[str]) -> None:
    """Refuse reports to be learned that have a special token, or in think mode a tag of the format, spelled out.

    The tokenizer would read the token as itself: an end in mid-report would be learned, or an image's place, whose
    probability is zero and its loss infinite. Reports that only serve as references need no such check: labelers and
    metrics have other tokenizers, and the policy never reads them.

    Args:
        unsafe: the tokens (`unsafe_tokens`).

    Raises:
        RecipeError: names the study and the token.
    """
    for study in studies:
        report = study.report or ""
        found = next((token for token in unsafe if token in report), None)
        if found is not None:
            raise RecipeError(
                f"study {study.id}: its report contains {found}, a special token of the policy's tokenizer; take it "
                "out of the text"
            )
        if mode == "think" and has_tag(report):
            raise RecipeError(
                f"study {study.id}: its report contains a tag of think mode (<think>, <report>), and would break the "
                "format that is to be learned; take it out of the text"
            )


def check_targets(recipe: Recipe, studies: Sequence[Study], tokenizer: Any) -> int:
    """Refuse what cannot be learned whole, of all studies at once: a run meets some of them hours later.

    Returns:
        Tokens of the longest, with its end.

    Raises:
        RecipeError: think mode and a study without labels to think of; or targets longer than a completion may be:
            names the longest's study, and says how many there are.
    """
    lengths: list[int] = []
    starts = range(0, len(studies), _AT_ONCE)
    for start in progress(starts, "reading the reports to learn", quiet=len(studies) < _SHOWN_FROM):
        texts = [text_to_learn(study, recipe) for study in studies[start : start + _AT_ONCE]]
        lengths += [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest, limit = max(lengths), recipe.rollout.max_new_tokens
    if longest > limit:
        study, count = studies[lengths.index(longest)], sum(length > limit for length in lengths)
        among = f"{count} of {len(studies)} reports" if count > 1 else ""
        raise RecipeError(too_long(study, longest, limit, among=among))
    return longest


def text_to_learn(study: Study, recipe: Recipe) -> str:
    """What SFT has the policy write of a study, without the token that ends it.

    Raises:
        RecipeError: think mode on a study without labels to think of.
    """
    assert study.report is not None  # `studies_to_learn`
    think = None
    if recipe.prompt.mode == "think":
        if not study.rendered or study.said is None:
            raise RecipeError(
                f"study {study.id}: SFT in think mode needs a rendered study with said labels, from which the "
                "think text is made; real data has no think text: use prompt.mode=plain, or let GRPO's prompt and "
                "format reward alone bring the think block"
            )
        think = think_text(study.said, range(NO_FINDING))
    return target_text(study.report, think, recipe.prompt.mode)


def too_long(study: Study, tokens: int, limit: int, *, among: str = "") -> str:
    """What is wrong with a target, the longest of so many that are too long."""
    longest = f", the longest of {among} that are too long" if among else ""
    return (
        f"study {study.id}: a target of {tokens} tokens{longest}; rollout.max_new_tokens is {limit}: raise it, or take "
        "them out (a cut target would teach the policy not to end)"
    )
