"""Recipes: what is refused, in which words, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mrg_r1.config.recipe import (
    RENAMED,
    Recipe,
    RecipeError,
    _leaves,
    check_recipe,
    describe_fields,
    dump_recipe,
    load_recipe,
    load_run,
)
from mrg_r1.reward.additive import FINDINGS

MINIMAL = {
    "output_dir": "run",
    "steps": 3,
    "data": {"manifest": "manifest.jsonl"},
    "policy": {"path": "policy"},
    "reward": {"labeler": "labeler"},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(path) in str(caught.value) or overrides
    return str(caught.value)


def test_defaults_are_the_papers_where_it_states_them(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.reward.weights == {"mccs": 0.75, "format": 0.25} and recipe.reward.margin == 0.5
    assert recipe.grpo.group_size == 8 and (recipe.grpo.clip_low, recipe.grpo.clip_high) == (0.2, 0.28)


def test_every_field_says_where_its_value_comes_from():
    for key, field in _leaves(Recipe, ""):
        assert re.search(r"\. (ours|yours|paper( \([^)]+\))?)$", field.description or ""), key
        assert key in describe_fields()


def test_overrides_reach_nested_keys_with_yaml_values(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "grpo.group_size=16",
            "optimizer.learning_rate=1e-4",
            "reward.weights={ccs: 1.0}",
            "data.context=[indication]",
        ],
    )
    assert recipe.grpo.group_size == 16 and recipe.optimizer.learning_rate == 1e-4
    assert recipe.reward.weights == {"ccs": 1.0} and recipe.data.context == ["indication"]


def test_a_margin_moves_in_a_straight_line_and_stays(recipe_file):
    constant = load_recipe(recipe_file, ["reward.margin=0.3"]).reward
    assert [constant.margin_at(step) for step in (0, 10, 1000)] == [0.3] * 3
    annealed = load_recipe(recipe_file, ["reward.margin=0.2", "reward.margin_end=0.6", "reward.margin_steps=4"]).reward
    assert [annealed.margin_at(step) for step in range(6)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6])


def test_resolved_recipe_loads_as_the_same_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["seed=7", "policy.adapter=somewhere"])
    again = tmp_path / "config.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.grup_size=4", "did you mean grpo.group_size?"),
        ("grop_size=4", "did you mean"),
        ("reward.margin_end=0.6", "an annealed margin needs both"),
        ("reward.margin=1", "reward.margin: Input should be less than 1"),
        ("reward.device=gpu", "reward.device"),
        ("reward.device=cuda", "reward.device"),
        ("reward.dtype=int8", "reward.dtype"),
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("grpo.group_size=1", "a group of one has no baseline"),
        ("rollout.top_p=0.9", "only top_p 1 and top_k 0 are sampled"),
        ("rollout.top_k=50", "only top_p 1 and top_k 0 are sampled"),
        ("rollout.temperature=0", "rollout.temperature: Input should be greater than 0 (got 0)"),
        ("reward.margin=1", "reward.margin: Input should be less than 1 (got 1)"),
        ("reward.weights={mccs: 0}", "no term has a weight"),
        ("grpo.ratio=sequence", "GSPO clips near 3e-4"),
        ("data.max_pixels=1000", "data.min_pixels 3136 is larger than data.max_pixels 1000"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps", "write key=value"),
        ("steps.more=3", "'steps' is a value, not a section"),
    ],
)
def test_bad_values_are_refused_with_field_and_remedy(recipe_file, override, words):
    assert words in refused(recipe_file, override)


def test_the_flash_attn_package_has_no_float32_kernels(recipe_file):
    words = refused(recipe_file, "policy.attention=flash_attn", "policy.dtype=float32")
    assert "set policy.dtype=bfloat16 or policy.attention=torch" in words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.threshold=0.4"], "only the term additive has one"),
        (["reward.weights={additive: 1.0}"], "reward.threshold is not set"),
        (["reward.weights={additive: 1.0}", "reward.threshold=1"], "reward.threshold 1: expected a number above 0"),
        (["reward.weights={additive: 1.0}", "reward.threshold=some"], "reward.threshold 'some': expected"),
        (["reward.weights={additive: 1.0}", "reward.threshold={Effusion: 0.3}"], "unknown observation Effusion"),
        (["reward.weights={additive: 1.0}", "reward.threshold={Edema: 0.3}"], "none for Enlarged Cardiomediastinum"),
    ],
)
def test_thresholds_that_cannot_be_are_refused_once_and_by_name(recipe_file, overrides, words):
    message = refused(recipe_file, *overrides)
    assert words in message and "1 problem(s)" in message


@pytest.mark.parametrize("threshold", [0.3, "auto", dict.fromkeys(FINDINGS, 0.2)])
def test_a_threshold_is_a_number_or_one_by_observation_or_auto(recipe_file, tmp_path, threshold):
    recipe = load_recipe(recipe_file, ["reward.weights={additive: 1.0}", f"reward.threshold={json.dumps(threshold)}"])
    assert recipe.reward.threshold == threshold
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_prefill_is_not_kept_where_lora_is_on_what_makes_its_features(recipe_file):
    for targets in ("language+merger", "all"):
        overrides = [f"policy.lora.targets={targets}", "rollout.reuse_prefill=true"]
        with pytest.raises(RecipeError, match=re.escape(f"rollout.reuse_prefill with policy.lora.targets {targets}: ")):
            load_recipe(recipe_file, overrides)
        assert load_recipe(recipe_file, overrides[:1]).policy.lora.targets == targets
    assert load_recipe(recipe_file, ["rollout.reuse_prefill=true"]).policy.lora.targets == "language"
    with pytest.raises(RecipeError, match=r"policy.lora.targets: .*'language', 'language\+merger' or 'all'.*'merger'"):
        load_recipe(recipe_file, ["policy.lora.targets=merger"])


def test_several_problems_are_listed_at_once(recipe_file):
    message = refused(recipe_file, "grpo.beta=-1", "stps=3")
    assert "2 problem(s)" in message and "grpo.beta" in message and "did you mean steps?" in message


@pytest.mark.parametrize(
    ("content", "words"), [("- a", "this is a list"), ("a: [", "not valid YAML"), ("", "this is a NoneType")]
)
def test_files_that_are_not_recipes_are_refused(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert words in refused(path)


def test_missing_recipe_names_the_folder_of_examples(tmp_path):
    assert "launch/recipes/" in refused(tmp_path / "none.yaml")


def make_world(tmp_path: Path) -> list[str]:
    (tmp_path / "manifest.jsonl").write_text("")
    (tmp_path / "labeler").mkdir()
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (policy / "model.safetensors").write_bytes(b"")
    return [f"data.manifest={tmp_path}/manifest.jsonl", f"reward.labeler={tmp_path}/labeler", f"policy.path={policy}"]


def test_check_accepts_a_world_that_is_whole(recipe_file, tmp_path):
    check_recipe(load_recipe(recipe_file, make_world(tmp_path)), world_size=2, task="grpo")


@pytest.mark.parametrize(
    ("override", "task", "words"),
    [
        ("grpo.studies_per_step=9", "grpo", "grpo.studies_per_step 9 does not divide over 2 ranks; take 8 or 10"),
        ("grpo.studies_per_step=1", "grpo", "take 2, or another number of ranks"),
        ("sft.batch_size=31", "sft", "sft.batch_size 31 does not divide over 2 ranks"),
        ("grpo.minibatches=5", "grpo", "does not divide the 32 completions of a rank"),
        (
            "data.manifest=nowhere.jsonl",
            "grpo",
            "data.manifest nowhere.jsonl: no such file; `mrg-r1 prepare` makes one",
        ),
        ("reward.labeler=nowhere", "grpo", "`mrg-r1 labeler train` makes one"),
        ("policy.path=nowhere", "grpo", "no config.json there"),
        ("policy.adapter=nowhere", "grpo", "no adapter_config.json there"),
        ("engine.deepspeed=nowhere.json", "grpo", "engine.deepspeed nowhere.json: no such file"),
    ],
)
def test_check_refuses_before_any_model_is_loaded(recipe_file, tmp_path, override, task, words):
    recipe = load_recipe(recipe_file, [*make_world(tmp_path), override])
    with pytest.raises(RecipeError, match=re.escape(words)):
        check_recipe(recipe, world_size=2, task=task)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda policy: (policy / "config.json").write_text('{"model_type": "llama"}'),
            "config.json says model_type 'llama'",
        ),
        (lambda policy: (policy / "config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda policy: (policy / "config.json").rename(policy / "adapter_config.json"),
            "adapter_config.json: a LoRA adapter; put the checkpoint",
        ),
        (lambda policy: (policy / "model.safetensors").rename(policy / "pytorch_model.bin"), "no *.safetensors there"),
    ],
)
def test_directories_that_are_not_checkpoints_are_refused(recipe_file, tmp_path, change, words):
    overrides = make_world(tmp_path)
    change(tmp_path / "policy")
    with pytest.raises(RecipeError, match=re.escape(words)):
        check_recipe(load_recipe(recipe_file, overrides), world_size=1, task="grpo")


def test_recipes_that_come_along_are_valid():
    recipes = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        load_recipe(path)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_that_has_another_name_today_is_refused_with_it(recipe_file, old, new):
    section, name = old.split(".")
    assert old in refused(recipe_file, f"{old}=cpu") and new in refused(recipe_file, f"{old}=null")
    recipe_file.write_text(yaml.safe_dump(MINIMAL | {section: {name: None}}))
    said = refused(recipe_file)
    assert old in said and new in said


def test_the_recipe_of_an_older_run_is_read(tmp_path):
    with pytest.raises(RecipeError, match="config.yaml"):
        load_run(tmp_path)
    old = {"judge": "second", "judge_tokenizer": None, "judge_device": "cuda:1", "every": 7}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL | {"evaluation": old}))
    evaluation = load_run(tmp_path).evaluation
    assert evaluation.held_out_labeler == Path("second") and evaluation.held_out_device == "cuda:1"
    assert evaluation.every == 7
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL | {"evaluation": {"jugde": None}}))
    with pytest.raises(RecipeError, match="evaluation.jugde"):
        load_run(tmp_path)


def test_a_reward_term_that_nobody_wrote_is_refused_by_its_field(recipe_file):
    with pytest.raises(RecipeError, match=r"reward\.weights: .*'mcss'"):
        load_recipe(recipe_file, ["reward.weights={mcss: 1.0}"])
    assert load_recipe(recipe_file, ["reward.weights={'mine:term': 1.0}"]).reward.weights == {"mine:term": 1.0}


def test_the_score_that_chooses_is_one_that_is_computed(recipe_file):
    with pytest.raises(RecipeError, match=r"evaluation\.select: "):
        load_recipe(recipe_file, ["evaluation.select=f1"])
    assert load_recipe(recipe_file, ["evaluation.select=chexbert_macro5"]).evaluation.select == "chexbert_macro5"
