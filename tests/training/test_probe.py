"""A probe of real starts: its samples are a rollout's, nothing is learned or left, bad input is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mrg_r1.training.probe as probing
from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.policy.load import load_tokenizer
from mrg_r1.reward.compute import RewardError
from mrg_r1.training.probe import probe
from tests.cli.command import refused, run
from tests.conftest import each_family

pytestmark = pytest.mark.usefixtures("inline_rewards")


@pytest.fixture
def recipe(world, tmp_path):
    """Overrides to a recipe of the world."""

    def make(*overrides):
        return load_recipe(world.recipe(tmp_path / "run"), overrides)

    return make


def test_a_probe_samples_what_a_step_would_and_leaves_nothing(recipe, tmp_path, monkeypatch, world):
    seen = []
    inner = probing.rollout

    def recording(policy, prompts, *rest, **options):
        done = inner(policy, prompts, *rest, **options)
        seen.append((prompts.study_ids, done))
        return done

    monkeypatch.setattr(probing, "rollout", recording)
    result = probe(recipe("grpo.beta=0.1"), studies=6)
    val = [study.id for study in read_manifest(world.folder / "phantoms/manifest.jsonl", split="val")]
    assert [ids for ids, _ in seen] == [val[:4], val[4:6]]  # batches as large as a step
    assert (result["studies"], result["group_size"]) == (6, 3)
    assert result["reports"]["tokens_sampled"] == pytest.approx(
        float(torch.cat([done.lengths.flatten() for _, done in seen]).double().mean())
    )
    assert result["reward"]["best"] >= result["reward"]["sampled"] and result["reward"]["constant"] is not None
    seconds = result["step"]["seconds"]
    assert {"vision", "rollout", "reward", "reference", "update"} == seconds.keys() and min(seconds.values()) > 0
    assert result["step"]["memory_gib"] > 0.01
    assert not (tmp_path / "run").exists() and json.loads(json.dumps(result)) == result


def test_the_update_that_is_timed_changes_no_sample(recipe):
    """With it and without it the numbers are the same; it is the first batch's, and the second is sampled after it."""
    learned = probe(recipe("rollout.reuse_prefill=true"), studies=8)
    plain = probe(recipe(), studies=8, updates=False)
    assert "update" in learned["step"]["seconds"] and "update" not in plain["step"]["seconds"]
    for result in (learned, plain):
        del result["step"]
    assert learned == plain


@pytest.mark.parametrize("targets", ["language+merger", "all"])
def test_what_lora_is_on_is_learned_in_the_update_that_is_timed(recipe, monkeypatch, targets):
    """And changes no sample: LoRA adds nothing at its start."""
    learned, inner = [], probing._Unlearning.backward

    def backward(self, loss_share, *, last):
        inner(self, loss_share, last=last)
        learned.extend(n for n, one in self.policy.named_parameters() if one.grad is not None and one.grad.any())

    monkeypatch.setattr(probing._Unlearning, "backward", backward)
    found, plain = (
        probe(recipe(*more), studies=8, updates=bool(more)) for more in ([f"policy.lora.targets={targets}"], [])
    )
    assert any("merger" in name for name in learned) and any("blocks" in name for name in learned) == (targets == "all")
    for result in (found, plain):
        del result["step"]
    assert found == plain


def test_more_studies_than_there_are_is_all_of_them(recipe):
    assert probe(recipe(), studies=100, updates=False)["studies"] == 8
    one = probe(recipe(), studies=1, updates=False)
    assert one["studies"] == 1 and one["reward"]["best_for_another_study"] is None


@each_family
def test_a_policy_that_always_writes_one_report_is_named_so(recipe, tiny_policy_directory, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy_directory, folder)
    word = load_tokenizer(folder)("heart", add_special_tokens=False)["input_ids"][0]
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():  # every layer adds nothing, and every token is the same but in length
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".visual." not in name:
            weight.zero_()
        elif name.endswith("embed_tokens.weight"):  # the head too: they are tied
            weight.fill_(1.0)
            weight[word] = 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    squares = "data.max_pixels=12544"  # as Gemma 3 makes of all images
    result = probe(recipe(f"policy.path={folder}", squares), studies=4)
    assert result["outlook"] == "nothing" and result["zero_signal"] == 1
    assert result["verdict"][0].startswith("the policy always writes one report: all 12 samples are the same")
    assert (result["reports"]["different_sampled"], result["reports"]["different_greedy"]) == (1, 1)


def test_no_validation_studies_is_said_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(probing, "open_policy", lambda *rest: pytest.fail("a policy was loaded"))
    with pytest.raises(RecipeError, match="data.val_split 'nowhere'.*data.val_split=NAME"):
        probe(recipe("data.val_split=nowhere"), studies=4)
    with pytest.raises(RecipeError, match="policy.path"):
        probe(recipe("policy.path=nowhere"), studies=4)


def test_a_control_is_probed_as_the_recipe_that_it_is_a_control_of(recipe):
    control = probe(recipe("control=sft", "sft.max_cpu_seconds=3"), studies=4, updates=False)
    plain = probe(recipe(), studies=4, updates=False)
    assert control["reward"] == plain["reward"]


# --- the command


def test_the_command_prints_a_table_and_a_verdict(capsys, world, tmp_path):
    path, out = world.recipe(tmp_path / "run"), tmp_path / "probe.json"
    arguments = ("rollout.temperature=1.5", "--studies", 4, "--group-size", 5, "--no-update", "--json", out)
    code, text, _ = run(capsys, "probe", path, *arguments)
    assert code == 0 and "RL has" in text and "best of 5" in text
    assert "Cardiomegaly" in text and "without any update" in text
    content = json.loads(out.read_text())
    assert (content["group_size"], content["temperature"]) == (5, 1.5)
    assert " ".join(content["verdict"][0].split()) in " ".join(text.split())


def test_a_bad_recipe_is_refused_by_the_command(capsys, world, tmp_path):
    assert "grpo.group_size" in refused(capsys, "probe", world.recipe(tmp_path / "run"), "grpo.group=3")
    assert "group of one" in refused(capsys, "probe", world.recipe(tmp_path / "run"), "--group-size", 1)
    assert "no such recipe" in refused(capsys, "probe", tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"output_dir": "x"}))
    assert "data" in refused(capsys, "probe", tmp_path / "bad.yaml")
    assert "val_split" in refused(capsys, "probe", world.recipe(tmp_path / "run"), "data.val_split=nowhere")


def test_what_cannot_be_sampled_from_is_refused_by_the_command(capsys, world, tmp_path):
    shutil.copytree(world.folder / "policy", tmp_path / "policy")
    tensors = load_file(tmp_path / "policy/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "visual." not in name}
    save_file(kept, tmp_path / "policy/model.safetensors", metadata={"format": "pt"})
    path = world.recipe(tmp_path / "run")
    said = refused(capsys, "probe", path, f"policy.path={tmp_path / 'policy'}", "--studies", 4, "--no-update")
    assert "no tensor model.visual." in " ".join(said.split())
    assert "prompt.instruction contains" in refused(capsys, "probe", path, "prompt.instruction=Write.<|im_end|>")


def test_rewards_that_fail_are_named_by_the_command(capsys, world, tmp_path, monkeypatch):
    def fail(*rest):
        raise RewardError("the labeler failed: out of memory")

    monkeypatch.setattr(probing, "_score", fail)
    assert "no rewards: the labeler failed" in refused(capsys, "probe", world.recipe(tmp_path / "run"))
