"""Doctor and a launch refuse what the policy would read, or learn, as something else than it says, before it is
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mrg_r1 import cli
from mrg_r1.config.recipe import Recipe, RecipeError, load_recipe
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.doctor import texts
from mrg_r1.doctor.texts import check_targets, check_texts, text_to_learn
from mrg_r1.policy.load import load_tokenizer
from mrg_r1.training import run as run_module
from mrg_r1.training.run import open_run
from mrg_r1.types import Study
from tests.conftest import OneRank
from tests.world import World

ROOM = "rollout.max_new_tokens=200"
CONTEXT = "data.context=[indication]"
Studies = list[Study]


def with_report(studies: Studies) -> Studies:
    """The last training study says an end."""
    return [replace(s, report="Clear.<|im_end|> No more.") if s is last_of(studies) else s for s in studies]


def with_indication(studies: Studies) -> Studies:
    return [replace(s, indication="Cough <|image_pad|>.") if s is last_of(studies) else s for s in studies]


def with_a_long_report(studies: Studies) -> Studies:
    return [replace(s, report="The heart is enlarged. " * 90) if s is last_of(studies) else s for s in studies]


def real(studies: Studies) -> Studies:
    """The last training study is no phantom, and has no labels."""
    return [replace(s, rendered=False, said=None, drawn=None) if s is last_of(studies) else s for s in studies]


def last_of(studies: Studies) -> Study:
    return [study for study in studies if study.split == "train"][-1]


REFUSED: dict[str, tuple[Callable[[Studies], Studies], list[str], list[str]]] = {
    "report": (with_report, [], ["{id}: its report contains <|im_end|>"]),
    "indication": (with_indication, [CONTEXT], ["{id}: its indication contains <|image_pad|>", "out of data.context"]),
    "instruction": (list, ["prompt.instruction='Write.<|im_end|>'"], ["prompt.instruction contains <|im_end|>"]),
    "length": (with_a_long_report, [], ["{id}: a target of", "rollout.max_new_tokens is 200"]),
    "thoughts": (real, ["prompt.mode=think"], ["{id}: SFT in think mode needs", "prompt.mode=plain"]),
}


@pytest.fixture
def changed(world: World, tmp_path: Path) -> Callable[[Callable[[Studies], Studies]], tuple[str, str]]:
    """Writes the world's manifest, changed; an override that names it, and the id of its last training study."""

    def write(change: Callable[[Studies], Studies]) -> tuple[str, str]:
        studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
        write_manifest(tmp_path / "manifest.jsonl", change(studies))
        return f"data.manifest={tmp_path / 'manifest.jsonl'}", last_of(studies).id

    return write


@pytest.mark.parametrize(("change", "overrides", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_texts_that_sft_would_learn_wrongly_are_refused_by_doctor_and_before_the_policy_is_loaded(
    world: World,
    tmp_path: Path,
    changed: Callable[[Callable[[Studies], Studies]], tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Studies], Studies],
    overrides: list[str],
    said: list[str],
) -> None:
    manifest, study = changed(change)
    path, arguments = world.recipe(tmp_path / "run"), [ROOM, manifest, *overrides]
    assert cli.main(["doctor", str(path), *arguments, "--task", "sft", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (failure,) = [one for one in findings if one["state"] == "failure"]
    assert failure["name"] == "texts" and [part for part in said if part.format(id=study) not in failure["text"]] == []

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded before the texts were looked at")

    monkeypatch.setattr(run_module, "load_policy", refuse)
    monkeypatch.setattr(run_module.rewards, "start_service", refuse)
    with pytest.raises(RecipeError) as caught:
        open_run(load_recipe(path, arguments), OneRank(), task="sft")
    assert [part for part in said if part.format(id=study) not in str(caught.value)] == []


def test_what_only_sft_learns_is_grpos_to_read(
    world: World, tmp_path: Path, changed: Callable[[Callable[[Studies], Studies]], tuple[str, str]]
) -> None:
    """A reference is the labeler's to read, however long it is; words of a context that no prompt has are nobody's."""
    for change in (with_report, with_a_long_report, real, with_indication):
        manifest, _ = changed(change)
        recipe = load_recipe(world.recipe(tmp_path / "run"), [manifest])
        studies = {"train": read_manifest(recipe.data.manifest, split="train"), "val": [], "test": []}
        assert "no special token" in check_texts(recipe, studies, task="grpo")


@pytest.fixture
def sft(world: World, tmp_path: Path) -> Recipe:
    return load_recipe(world.recipe(tmp_path / "run"), [ROOM])


def test_lengths_are_those_of_one_text_at_a_time(sft: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_AT_ONCE", 3)
    tokenizer = load_tokenizer(sft.policy.path)
    studies = read_manifest(sft.data.manifest, split="train")
    lengths = [len(tokenizer(text_to_learn(study, sft))["input_ids"]) + 1 for study in studies]
    assert check_targets(sft, studies, tokenizer) == max(lengths) and len(set(lengths)) > 3
    exact = sft.model_copy(update={"rollout": sft.rollout.model_copy(update={"max_new_tokens": max(lengths)})})
    assert check_targets(exact, studies, tokenizer) == max(lengths)
    limit = sorted(lengths)[-4] - 1
    short = sft.model_copy(update={"rollout": sft.rollout.model_copy(update={"max_new_tokens": limit})})
    longest, count = studies[lengths.index(max(lengths))].id, sum(length > limit for length in lengths)
    with pytest.raises(RecipeError, match=f"study {longest}: a target of {max(lengths)} tokens") as caught:
        check_targets(short, studies, tokenizer)
    assert f"the longest of {count} of 16 reports that are too long" in str(caught.value) and count >= 4
    assert f"rollout.max_new_tokens is {limit}" in str(caught.value)
