"""A checkpoint's tensors are those of its model, by name and shape, or it is refused wherever it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.doctor import checks
from mrg_r1.policy.export.export import export
from mrg_r1.policy.family import family_of, find_family
from mrg_r1.policy.load import load_policy
from tests.conftest import FAMILIES, QWEN, each_family_slowly
from tests.policy.test_foreign_adapters import lora, written
from tests.policy.test_partition import Drawer


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def in_fp8(tensors, module):
    scale, weight = f"{module}.weight_scale_inv", f"{module}.weight"
    return tensors | {weight: tensors[weight].to(torch.float8_e4m3fn), scale: torch.ones(1, 1)}


def in_gptq(tensors, module):
    packed = {name: torch.zeros(8, 64, dtype=torch.int32) for name in ("qweight", "qzeros", "g_idx")}
    packed["scales"] = torch.ones(8, 64)
    return without(f"{module}.weight")(tensors) | {f"{module}.{name}": tensor for name, tensor in packed.items()}


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
    "no tower": ("tied", without("visual."), r"no tensor model\.vis\w+\.[\w.]+, .* more"),
    "no norm": ("tied", without("model.norm"), r"no tensor model\.language_model\.norm\.weight in"),
    "a stranger": ("tied", with_more(score__weight=torch.ones(2)), r"no place .*score\.weight"),
    "another layer": (
        "tied",
        lambda t: t | {k.replace("layers.1.", "layers.9."): v.clone() for k, v in t.items() if "layers.1." in k},
        r"no place .*layers\.9\.",
    ),
    "another shape": ("tied", lambda t: t | {"model.norm.weight": torch.ones(63)}, r"norm\.weight is \[63\]"),
    "a tied head of its own": (
        "tied",
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2},
        r"lm_head\.weight differs",
    ),
    "a quantised weight": (
        "tied",
        lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)},
        r"norm\.weight is stored as I8, a quantised weight",
    ),
    "FP8 with scales": (
        "tied",
        lambda t: in_fp8(t, "model.layers.0.self_attn.q_proj"),
        r"no place .*q_proj\.weight_scale_inv; config.json says it is quantised \(fp8\)",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "GPTQ": (
        "tied",
        lambda t: in_gptq(t, "model.layers.0.self_attn.q_proj"),
        r"no tensor .*q_proj\.weight .*q_proj\.g_idx.* and 1 more; config.json says it is quantised \(gptq\)",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ),
    "one tensor by two names": (
        "tied",
        lambda t: t | {"model.language_model.norm.weight": t["model.norm.weight"] + 1},
        r"norm\.weight of model\.safetensors are the same",
    ),
}
FINE = {
    "old frequencies": with_more(**{INV_FREQ: torch.ones(8)}),
    "tied head stored": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    "as it is": lambda t: t,
}


def changed(source, folder, change, stated=None):
    """The checkpoint with `change` made to its tensors, which that knows by Qwen2.5-VL's published names."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | (stated or {})
    (folder / "config.json").write_text(json.dumps(config))
    stored, family = load_file(folder / "model.safetensors"), family_of(folder)
    tensors = {family.module_name(name): tensor for name, tensor in stored.items()}
    tensors = change(renamed(tensors, LAYOUTS["before 4.52"] | {"model.vision_tower.": "visual."}))
    if family is find_family("gemma3"):
        tensors = renamed(tensors, FROM_QWENS_NAMES)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@each_family_slowly
@pytest.mark.parametrize(
    ("head", "change", "message", "stated"), [(*row, {})[:4] for row in REFUSED.values()], ids=REFUSED.keys()
)
def test_names_and_shapes_that_differ_are_refused_by_all(
    world,
    tiny_policy_directory,
    untied,
    tmp_path,
    head,
    change,
    message,
    stated,
):
    whole = tiny_policy_directory if head == "tied" else untied
    checkpoint = changed(whole, tmp_path / "policy", change, stated)
    for partition in (None, Drawer()):
        with pytest.raises(ValueError, match=message):
            load_policy(checkpoint, dtype=torch.float32, partition=partition)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={checkpoint}"])
    with pytest.raises(RecipeError, match=f"policy.path .*{message}"):
        checks._policy(recipe)  # of doctor, and of a launch before it loads anything
    written(whole, tmp_path / "run/adapter", lora())
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", policy=checkpoint, cold_start=None, merged=tmp_path / "merged", adapter=None, card=str)


@each_family_slowly
@pytest.mark.parametrize("change", FINE.values(), ids=FINE.keys())
@pytest.mark.parametrize("partition", [None, Drawer()], ids=["whole", "parts"])
def test_what_old_files_carry_besides_is_fine(tiny_policy_directory, tmp_path, change, partition):
    checkpoint = changed(tiny_policy_directory, tmp_path / "policy", change)
    policy = load_policy(checkpoint, dtype=torch.float32, partition=partition)
    assert policy.base.lm_head.weight is policy.language_model.embed_tokens.weight


# What tensors are called, given their names in transformers 5's module tree.
LAYOUTS = {
    "the tree": {},
    "before 4.52": {"model.language_model.": "model.", "model.visual.": "visual."},
    "language anew": {"model.visual.": "visual."},
    "vision anew": {"model.language_model.": "model."},
    "LLaVA's": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
    },
    "the base model's": {"model.language_model.": "language_model.", "model.visual.": "visual."},
}
FROM_QWENS_NAMES = {  # to Gemma 3's
    "visual.": "model.vision_tower.",
    "model.language_model.": "model.language_model.",
    "model.multi_modal_projector.": "model.multi_modal_projector.",
    "model.": "language_model.model.",
}
GEMMA_LAYOUTS = {
    "the tree": {},
    "published": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "4's tree": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "the base model's": {
        "model.language_model.": "language_model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
}
each_layout = pytest.mark.parametrize(
    ("tiny_policy_directory", "layout"),
    [
        pytest.param(family, layout, id=f"{family}-{name}")
        for family in FAMILIES
        for name, layout in (LAYOUTS if family in QWEN else GEMMA_LAYOUTS).items()
    ],
    indirect=["tiny_policy_directory"],
)


def renamed(tensors, layout):
    def name(tensor):
        prefix = next((prefix for prefix in layout if tensor.startswith(prefix)), "")
        return layout.get(prefix, "") + tensor.removeprefix(prefix)

    return {name(tensor): value for tensor, value in tensors.items()}


def head_of_its_own(source, folder):
    """The checkpoint with a head that is not the embedding, and its tensors by the names in the module tree."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    stored = load_file(folder / "model.safetensors")
    tensors = {family_of(folder).module_name(name): tensor for name, tensor in stored.items()}
    generator = torch.Generator().manual_seed(5)
    embedding = tensors["model.language_model.embed_tokens.weight"]
    return tensors | {"lm_head.weight": torch.randn(embedding.shape, generator=generator)}


def in_parts(folder, tensors, *, index, kept=(1, 2, 3)):
    """The weights in three files, with the index that names them or without; some left out."""
    names, weight_map = list(tensors), {}
    (folder / "model.safetensors").unlink()
    for number in (1, 2, 3):
        file = f"model-{number:05d}-of-00003.safetensors"
        part = names[number - 1 :: 3]
        weight_map |= dict.fromkeys(part, file)
        if number in kept:
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    if index:  # some writers leave `metadata` out
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@each_layout
@pytest.mark.parametrize("files", ["one", "parts", "parts without an index"])
def test_every_tensor_is_the_files_own_in_every_layout(tiny_policy_directory, tmp_path, layout, files):
    """transformers places the old names of Qwen2.5-VL and not those of Qwen3-VL, whose model it then fills itself."""
    folder = tmp_path / "policy"
    tensors = head_of_its_own(tiny_policy_directory, folder)
    save_file(renamed(tensors, layout), folder / "model.safetensors", metadata={"format": "pt"})
    if files != "one":
        in_parts(folder, renamed(tensors, layout), index=files == "parts")
    for partition in (None, Drawer()):
        found = load_policy(folder, dtype=torch.float32, partition=partition)
        if partition is None:
            state = found.base.state_dict()
            assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


@each_layout
def test_plain_transformers_loads_the_export_of_every_layout(tiny_policy_directory, tmp_path, layout):
    folder = tmp_path / "policy"
    tensors = head_of_its_own(tiny_policy_directory, folder)
    save_file(renamed(tensors, layout), folder / "model.safetensors", metadata={"format": "pt"})
    written(folder, tmp_path / "run/adapter", lora(), source=tiny_policy_directory)
    export(
        tmp_path / "run",
        policy=folder,
        cold_start=None,
        merged=tmp_path / "merged",
        adapter=None,
        card=lambda record: "",
    )
    state = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    same = [name for name in tensors if torch.equal(state[name], tensors[name])]
    changed = [name for name in tensors if name not in same]
    assert state.keys() == tensors.keys() and all("language_model.layers" in name for name in changed)
    assert all(name in same or (state[name] - tensors[name]).abs().max() < 1 for name in tensors)


def stale_whole_file(folder, tensors):
    in_parts(folder, tensors, index=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def twice_in_parts(folder, tensors):
    in_parts(folder, tensors, index=True)
    part = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(part) | {"lm_head.weight": tensors["lm_head.weight"] + 1}, part, metadata={"format": "pt"})


def odd_index(content):
    def write(folder, tensors):
        in_parts(folder, tensors, index=False)
        (folder / "model.safetensors.index.json").write_text(content)

    return write


PARTS = {
    "a part is missing": (lambda f, t: in_parts(f, t, index=True, kept=(1, 3)), "model-00002-of-00003.*no such file"),
    "a part is missing, no index": (
        lambda f, t: in_parts(f, t, index=False, kept=(1, 3)),
        "no model.safetensors.index.json, and model-00002-of-00003.safetensors is missing",
    ),
    "a whole file besides": (stale_whole_file, "names model-00001-of-00003.safetensors: two sets of weights"),
    "a tensor in two parts": (twice_in_parts, "lm_head.weight of model-0000.* are the same tensor"),
    "no map": (odd_index("[]"), "index.json: weight_map is null"),
    "an empty map": (odd_index('{"weight_map": {}}'), "index.json: weight_map is {}"),
    "no names": (odd_index('{"weight_map": {"lm_head.weight": 3}}'), "index.json: weight_map is"),
    "another folder": (odd_index('{"weight_map": {"a": "../b.safetensors"}}'), "index.json: weight_map is"),
    "not JSON": (odd_index("{"), "index.json: not JSON"),
    "only a pointer": (
        lambda f, t: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors: only Git LFS's pointer",
    ),
    "an adapter besides": (
        lambda f, t: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json beside the weights",
    ),
}


@pytest.mark.parametrize(("write", "message"), PARTS.values(), ids=PARTS.keys())
def test_files_that_do_not_make_one_checkpoint_are_refused(tiny_policy_directory, tmp_path, world, write, message):
    folder = tmp_path / "policy"
    tensors = head_of_its_own(tiny_policy_directory, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder, tensors)
    with pytest.raises(ValueError, match=message):
        load_policy(folder, dtype=torch.float32)
    recipe = load_recipe(world.recipe(tmp_path / "run"), [f"policy.path={folder}"])
    with pytest.raises(RecipeError, match=f"policy.path .*{message}"):
        checks._policy(recipe)
