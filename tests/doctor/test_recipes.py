"""The recipes that come along: they load, divide over the ranks that they name, and those for a 4B, 7B or 8B policy fit
one card of 80 GB.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mrg_r1.config.recipe import check_numbers, load_recipe
from mrg_r1.doctor.checks import task_of
from mrg_r1.doctor.memory import predict, workload_of
from mrg_r1.policy.family import shape_of
from tests.doctor.test_memory import EIGHT_B, FOUR_B, SEVEN_B

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))
LARGE = [path for path in RECIPES if re.search("_[478]b", path.name)]
BERT_BASE = 4 * 108_600_000  # bytes of CheXbert in float32, a little rounded up
CARD = 80 * 10**9


def documented_launches(path: Path) -> list[tuple[str, Path, list[str]]]:
    """The launches in a recipe's header: what names the GPUs, the recipe and its overrides."""
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if re.match(r"#\s+deepspeed ", line)]
    found = []
    for line in lines:
        words = shlex.split(line)
        place = words.index("--include") if "--include" in words else words.index("--num_gpus")
        recipe = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
        found.append((words[place + 1], Path(words[recipe]), words[recipe + 1 :]))
    return found


def ranks_of(gpus: str) -> int:
    return int(gpus) if gpus.isdecimal() else len(gpus.removeprefix("localhost:").split(","))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_divides_over_one_rank(path: Path, tmp_path: Path) -> None:
    paths = [
        f"output_dir={tmp_path / 'run'}",
        f"policy.path={tmp_path}",
        f"data.manifest={tmp_path / 'manifest.jsonl'}",
    ]
    recipe = load_recipe(path, paths)
    assert task_of(recipe) == ("grpo" if "sft" not in path.stem and "control" not in path.stem else "sft")
    check_numbers(recipe, world_size=1, task=task_of(recipe))
    assert recipe.engine.deepspeed.is_file()


def test_there_are_six_recipes_for_a_large_policy() -> None:
    names = ["iu_7b", "iu_7b_sft", "medgemma_4b", "mimic_7b", "mimic_7b_sft", "qwen3_vl_8b"]
    assert [path.stem for path in LARGE] == names


@pytest.mark.parametrize("path", [path for path in LARGE if "sft" not in path.stem], ids=lambda path: path.stem)
def test_the_documented_launches_divide_over_their_ranks(path: Path) -> None:
    launches = documented_launches(path)
    assert sorted(ranks_of(gpus) for gpus, _, _ in launches) == [1, 1, 1, 7, 7, 7]
    for gpus, recipe_file, overrides in launches:
        recipe = load_recipe(recipe_file, overrides)
        check_numbers(recipe, world_size=ranks_of(gpus), task=task_of(recipe))
        assert recipe.reward.device == ("cuda:7" if ranks_of(gpus) == 7 else "cuda:0")


@pytest.mark.parametrize("ranks", [1, 7])
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_fits_a_card_of_80_gb(path: Path, ranks: int, tmp_path: Path) -> None:
    config = {"_8b": EIGHT_B, "_4b": FOUR_B}.get(path.stem[-3:], SEVEN_B)
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(path, [f"policy.path={tmp_path}"])
    beside = BERT_BASE if ranks == 1 else 0  # seven and one: the labeler has a card of its own
    images = 1 if "mimic" in path.stem else 2
    shape = shape_of(recipe.policy.path)
    work = workload_of(
        recipe, shape, task=task_of(recipe), world_size=ranks, device="cuda", images=images, labeler_bytes=beside
    )
    prediction = predict(shape, work)
    assert 20 * 10**9 < prediction.peak < CARD, prediction.phases[prediction.peak_phase]


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_says_where_each_value_comes_from(path: Path) -> None:
    values = [line for line in path.read_text().splitlines() if re.match(r"\s*[a-z_]+:\s*[^\s#]", line)]
    assert len(values) > 15 and not [line for line in values if not re.search(r"# (paper|ours|yours)\b", line)]


def test_the_cold_start_leaves_what_grpo_starts_from() -> None:
    for name in ("iu_7b", "mimic_7b"):
        cold, warm = (load_recipe(Path(f"launch/recipes/{name}{part}.yaml")) for part in ("_sft", ""))
        assert warm.policy.adapter == cold.output_dir / "adapter"
        assert (warm.policy.path, warm.data.manifest, warm.prompt, warm.reward.labeler) == (
            cold.policy.path, cold.data.manifest, cold.prompt, cold.reward.labeler,
        )  # fmt: skip
