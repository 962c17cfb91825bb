"""A checkpoint's tensors are those of its model, by name and shape, or it is refused wherever it is loaded."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.doctor import checks
from mrg_r1.policy.export.export import export
from mrg_r1.policy.load import load_policy
from tests.policy.test_foreign_adapters import lora, written
from tests.policy.test_partition import Drawer


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_more(**more):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


INV_FREQ = "model__layers__0__self_attn__rotary_emb__inv_freq"
REFUSED = {
    "a PEFT state": (
        "tied",
        lambda t: {f"base_model.model.{k}": v for k, v in t.items()},
        r"base_model\.model\..*PEFT",
    ),
    "wrapped": ("tied", lambda t: {f"module.{k}": v for k, v in t.items()}, r"no place.*module\."),
    "no head": ("untied", without("lm_head"), r"no tensor lm_head\.weight"),
    "no tower": ("tied", without("visual."), r"no tensor model\.visual\.[\w.]+, .* more"),
    "no norm": ("tied", without("model.norm"), r"no tensor model\.language_model\.norm\.weight in"),
    "a stranger": ("tied", with_more(score__weight=torch.ones(2)), r"no place .*score\.weight"),
    "another layer": (
        "tied",
        lambda t: t | {k.replace("layers.1.", "layers.2."): v.clone() for k, v in t.items() if "layers.1." in k},
        r"no place .*layers\.2\.",
    ),
    "another shape": ("tied", lambda t: t | {"model.norm.weight": torch.ones(63)}, r"norm\.weight is \[63\]"),
    "a tied head of its own": (
        "tied",
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2},
        r"lm_head\.weight differs",
    ),
}
FINE = {
    "old frequencies": with_more(**{INV_FREQ: torch.ones(8)}),
    "tied head stored": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    "as it is": lambda t: t,
}


def changed(source, folder, change):
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("head", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_names_and_shapes_that_differ_are_refused_by_all(
    world,
    tiny_policy_directory,
    untied,
    tmp_path,
    head,
    change,
    message,
):
    whole = tiny_policy_directory if head == "tied" else untied
    checkpoint = changed(whole, tmp_path / "policy", change)
    for partition in (None, Drawer()):
        with pytest.raises(ValueError, match=message):
            load_policy(checkpoint, dtype=torch.float32, partition=partition)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={checkpoint}"])
    with pytest.raises(RecipeError, match=f"policy.path .*{message}"):
        checks._policy(recipe)  # of doctor, and of a launch before it loads anything
    written(whole, tmp_path / "run/adapter", lora())
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", policy=checkpoint, cold_start=None, merged=tmp_path / "merged", adapter=None, card=str)


@pytest.mark.parametrize("change", FINE.values(), ids=FINE.keys())
@pytest.mark.parametrize("partition", [None, Drawer()], ids=["whole", "parts"])
def test_what_old_files_carry_besides_is_fine(tiny_policy_directory, tmp_path, change, partition):
    checkpoint = changed(tiny_policy_directory, tmp_path / "policy", change)
    policy = load_policy(checkpoint, dtype=torch.float32, partition=partition)
    assert policy.base.lm_head.weight is policy.language_model.embed_tokens.weight
