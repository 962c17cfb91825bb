"""docs/gpus.md: its tables hold what the formula says of the recipes, to the last digit that they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrg_r1.config.recipe import load_recipe
from mrg_r1.doctor.checks import task_of
from mrg_r1.doctor.memory import predict, workload_of
from mrg_r1.policy.family import shape_of
from tests.doctor.test_memory import EIGHT_B, FOUR_B, SEVEN_B
from tests.doctor.test_recipes import BERT_BASE
from tests.test_docs import fences, table

PAGE = Path("docs/gpus.md")
RECIPES = {"iu_7b": SEVEN_B, "qwen3_vl_8b": EIGHT_B, "medgemma_4b": FOUR_B}
STAGE_3 = "engine.deepspeed=ds_configs/zero3.json"
OFFLOADED = "engine.deepspeed=ds_configs/zero3_offload.json"
GROUPS, TOKENS = (4, 8, 16, 32), (512, 1024)


def small() -> list[str]:
    """The settings that the page calls small, read from it."""
    [fence] = [fence for fence in fences(PAGE) if fence["kind"] == "text"]
    return str(fence["body"]).split()


def peak(name: str, directory: Path, overrides: list[str], *, ranks: int = 1, beside: int = 0) -> str:
    (directory / "config.json").write_text(json.dumps(RECIPES[name]))
    path = Path(f"launch/recipes/{name}.yaml")
    recipe = load_recipe(path, [f"policy.path={directory}", "grpo.studies_per_step=32", *overrides])
    work = workload_of(
        recipe,
        shape_of(directory),
        task=task_of(recipe),
        world_size=ranks,
        device="cuda",
        images=2,
        labeler_bytes=beside,
    )
    return f"{predict(shape_of(directory), work).peak / 1e9:.1f}"


def columns(name: str, directory: Path, overrides: list[str]) -> list[str]:
    """As the recipe is; small; small and cut over 2, 4 and 8 cards; small and offloaded."""
    cut = [*overrides, *small(), STAGE_3]
    return [
        peak(name, directory, overrides, beside=BERT_BASE),
        peak(name, directory, [*overrides, *small()], beside=BERT_BASE),
        *(peak(name, directory, cut, ranks=ranks) for ranks in (2, 4, 8)),
        peak(name, directory, [*overrides, *small(), OFFLOADED]),
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_cards_says_what_the_formula_says(name: str, tmp_path: Path) -> None:
    expected = [
        [
            str(tokens),
            str(size),
            *columns(name, tmp_path, [f"grpo.group_size={size}", f"rollout.max_new_tokens={tokens}"]),
        ]
        for tokens in TOKENS
        for size in GROUPS
    ]
    assert table("gpus.md", f"### `{name}.yaml`") == expected


def test_what_each_setting_saves_is_what_the_formula_says(tmp_path: Path) -> None:
    rows = table("gpus.md", "## What each setting saves")
    settings = ["", *small(), "reward.device=cpu"]
    assert [row[0].strip("`") for row in rows[1:]] == settings[1:]
    for row, setting in zip(rows, settings, strict=True):
        beside = 0 if setting.startswith("reward") else BERT_BASE
        assert row[1:] == phases("iu_7b", tmp_path, [setting] if setting else [], beside=beside)


def phases(name: str, directory: Path, overrides: list[str], *, beside: int) -> list[str]:
    (directory / "config.json").write_text(json.dumps(RECIPES[name]))
    recipe = load_recipe(Path(f"launch/recipes/{name}.yaml"), [f"policy.path={directory}", *overrides])
    shape = shape_of(directory)
    work = workload_of(recipe, shape, task=task_of(recipe), world_size=1, device="cuda", images=2, labeler_bytes=beside)
    found = predict(shape, work).phases
    return [f"{sum(found[phase].values()) / 1e9:.1f}" for phase in ("rollout", "update", "evaluation")]
