"""What a run has learned leaves whole: plain transformers and plain PEFT compute what the policy with its adapters
computes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mrg_r1.policy import checkpoint_files
from mrg_r1.policy.checkpoint_files import read_layout
from mrg_r1.policy.export import export
from mrg_r1.policy.family import family_of
from mrg_r1.policy.load import load_image_processor, load_policy
from mrg_r1.policy.lora import load_adapter, merge_adapter, save_adapter
from mrg_r1.policy.qwen_vl.checkpoint import LORA_TARGETS
from tests.conftest import each_family, each_family_once, each_qwen, inputs_of_modules

GATE = "base_model.model.model.language_model.layers.1.mlp.gate_proj"


def write_adapter(checkpoint, directory, *, rank, alpha, seed, targets=LORA_TARGETS, dtype=torch.float32, **settings):
    """An adapter as a run leaves it, but far from zero: PEFT's own start adds nothing, and tests of it would be
    vacuous.
    """
    policy = load_policy(checkpoint, dtype=dtype)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **settings)
    policy.model = get_peft_model(policy.model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_adapter(policy, directory)
    return directory


@pytest.fixture
def run(tiny_policy_directory, tmp_path):
    """RUN with an adapter of rank 4; its best step is 30."""
    folder = tmp_path / "run"
    write_adapter(tiny_policy_directory, folder / "adapter", rank=4, alpha=8, seed=1)
    (folder / "summary.json").write_text(json.dumps({"best": {"step": 30, "score": 0.8}}))
    return folder


def cold_start(checkpoint, tmp_path, **settings):
    return write_adapter(checkpoint, tmp_path / "sft/adapter", **{"rank": 6, "alpha": 3, "seed": 2, **settings})


def export_run(run, policy, *, cold=None, merged=None, adapter=None):
    export.export(
        run, policy=policy, cold_start=cold, merged=merged, adapter=adapter, card=lambda record: record["kind"]
    )


@torch.no_grad()
def logits(model, prompts):
    """[P, vocabulary] of the first study by the public forward."""
    one = prompts.select([0])
    return model(**inputs_of_modules(model.config.image_token_id, one.images, one.input_ids)).logits[0]


def policy_of_run(run, checkpoint, cold=None, dtype=torch.float32):
    """The policy as evaluation puts it together."""
    policy = load_policy(checkpoint, dtype=dtype)
    if cold is not None:
        merge_adapter(policy, cold)
    load_adapter(policy, run / "adapter")
    return policy


def one_study(policy, studies, build):
    return build(policy)([studies[1]])  # two images of unequal size


COLD_STARTS = {
    "vision tower too": {"targets": r".*(self_attn\.v_proj|blocks\.\d\.mlp\.gate_proj)"},
    "none": None,
    "same modules": {},
    "fewer modules": {"targets": ["q_proj", "down_proj"], "exclude_modules": r".*visual.*"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.mlp.up_proj": 2, "k_proj": 3}, "alpha_pattern": {"k_proj": 12}},
}


@each_family_once("settings", list(COLD_STARTS.values()), ids=COLD_STARTS)
def test_plain_transformers_and_plain_peft_give_the_policys_logits(
    run, tiny_policy_directory, tmp_path, studies, build, settings
):
    base = tiny_policy_directory
    cold = None if settings is None else cold_start(base, tmp_path, **settings)
    export_run(run, base, cold=cold, merged=tmp_path / "out/merged", adapter=tmp_path / "out/adapter")
    policy = policy_of_run(run, base, cold)
    prompts = one_study(policy, studies, build)
    expected = logits(policy.model, prompts)

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/merged")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged, prompts), expected, atol=1e-5, rtol=0)

    plain = AutoModelForImageTextToText.from_pretrained(base)
    assert (logits(plain, prompts) - expected).abs().max() > 0.1
    adapted = PeftModel.from_pretrained(plain, tmp_path / "out/adapter")
    torch.testing.assert_close(logits(adapted, prompts), expected, atol=1e-5, rtol=0)


@each_qwen
@pytest.mark.parametrize("targets", ["language+merger", "all"])
def test_merger_and_tower_leave_with_the_decoder(tiny_policy_directory, tmp_path, studies, build, targets):
    """As PEFT gives it on transformers' modules: images at more than one place of the tower."""
    base, run = tiny_policy_directory, tmp_path / "run"
    pattern = family_of(base).lora_targets[targets]
    write_adapter(base, run / "adapter", rank=4, alpha=8, seed=1, targets=pattern)
    cold = cold_start(base, tmp_path, targets=pattern)
    policy = policy_of_run(run, base, cold)
    prompts = one_study(policy, studies, build)
    expected = logits(policy.model, prompts)
    export_run(run, base, cold=cold, merged=tmp_path / "out/merged", adapter=tmp_path / "out/adapter")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/merged")
    torch.testing.assert_close(logits(merged, prompts), expected, atol=1e-5, rtol=0)
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "out/adapter")
    torch.testing.assert_close(logits(adapted, prompts), expected, atol=1e-5, rtol=0)
    source, result = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out/merged"))
    changed = {name for name in source if ".visual." in f".{name}" and not torch.equal(source[name], result[name])}
    assert all(".merger." in name or "deepstack" in name or targets == "all" for name in changed)
    assert not any("patch_embed" in name or "pos_embed" in name for name in changed) and len(changed) >= 2
    assert json.loads((tmp_path / "out/merged/mrg_r1_export.json").read_text())["adapter"]["targets"] == targets


def test_the_merged_checkpoint_is_a_policy_with_its_tokenizer_and_processor(
    run, tiny_policy_directory, tmp_path, studies, build
):
    export_run(run, tiny_policy_directory, merged=tmp_path / "merged")
    merged = load_policy(tmp_path / "merged", dtype=torch.float32)
    load_image_processor(tmp_path / "merged", min_pixels=3136, max_pixels=12544)
    text = "The heart is enlarged."
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == merged.tokenizer(text)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    ):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_policy_directory / name).read_bytes()


def test_only_what_lora_stands_on_changes(run, tiny_policy_directory, tmp_path):
    """The tied embedding, norms, biases and the vision tower keep their bytes; names and shapes are those of the
    source.
    """
    export_run(run, tiny_policy_directory, merged=tmp_path / "merged")
    source, merged = (
        load_file(tiny_policy_directory / "model.safetensors"),
        load_file(tmp_path / "merged/model.safetensors"),
    )
    assert source.keys() == merged.keys() and "lm_head.weight" not in merged
    changed = {
        name for name in source if not torch.equal(source[name].view(torch.uint8), merged[name].view(torch.uint8))
    }
    assert changed == {name for name in source if name.startswith("model.layers") and name.endswith("_proj.weight")}


def test_the_record_says_what_was_merged(run, tiny_policy_directory, tmp_path):
    cold = cold_start(tiny_policy_directory, tmp_path)
    export_run(run, tiny_policy_directory, cold=cold, merged=tmp_path / "merged", adapter=tmp_path / "adapter")
    record = json.loads((tmp_path / "merged/mrg_r1_export.json").read_text())
    assert record["step"] == 30 and record["run"] == str(run) and record["kind"] == "merged"
    digest = hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    of_run = {"path": str(run / "adapter"), "sha256": digest, "rank": 4, "alpha": 8, "modules": 14}
    assert record["adapter"] == of_run | {"targets": "language"}
    assert record["cold_start"]["rank"] == 6 and record["versions"]["peft"]
    (run / "summary.json").unlink()  # of a run that goes on
    export_run(run, tiny_policy_directory, adapter=tmp_path / "again")
    assert json.loads((tmp_path / "again/mrg_r1_export.json").read_text())["step"] is None


def test_without_a_cold_start_the_adapter_is_the_runs_own(run, tiny_policy_directory, tmp_path):
    export_run(run, tiny_policy_directory, adapter=tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_policy_directory)


@pytest.fixture
def sharded(tiny_policy_directory, tmp_path):
    """The tiny checkpoint in several files, with the stored names and the tokenizer of the original."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_policy_directory, folder)
    (folder / "model.safetensors").unlink()
    model = AutoModelForImageTextToText.from_pretrained(tiny_policy_directory)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@each_family
def test_a_checkpoint_in_parts_stays_in_parts(run, sharded, tmp_path, studies, build):
    export_run(run, sharded, merged=tmp_path / "merged")
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    source = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"] == source["weight_map"]
        and index["metadata"]["total_size"] == source["metadata"]["total_size"]
    )
    assert len(set(index["weight_map"].values())) > 3
    policy = policy_of_run(run, sharded)
    prompts = one_study(policy, studies, build)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, prompts), logits(policy.model, prompts), atol=1e-5, rtol=0)


def test_one_large_file_is_written_in_parts(run, tiny_policy_directory, tmp_path, monkeypatch):
    export_run(run, tiny_policy_directory, merged=tmp_path / "whole")
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", 400_000)
    export_run(run, tiny_policy_directory, merged=tmp_path / "parts")
    layout = read_layout(tmp_path / "parts")
    assert len(layout) > 3 and all(sum(tensor.size for tensor in tensors) <= 400_000 for tensors in layout.values())
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    parts = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts").state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.fixture
def bf16(tiny_policy_directory, tmp_path):
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_policy_directory, folder)
    AutoModelForImageTextToText.from_pretrained(tiny_policy_directory).bfloat16().save_pretrained(folder)
    return folder


def test_bf16_weights_are_rounded_once(bf16, tmp_path, studies, build):
    """The sum in float32, rounded; the policy in bf16 rounds after each adapter and each product, so logits are near,
    not equal.
    """
    write_adapter(bf16, tmp_path / "run/adapter", rank=4, alpha=8, seed=1, dtype=torch.bfloat16)
    cold = cold_start(bf16, tmp_path, dtype=torch.bfloat16)
    export_run(tmp_path / "run", bf16, cold=cold, merged=tmp_path / "merged", adapter=tmp_path / "adapter")
    source, merged = load_file(bf16 / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    exact = source["model.layers.1.mlp.gate_proj.weight"].double()
    for directory, scale in ((cold, 0.5), (tmp_path / "run/adapter", 2.0)):
        low = load_file(directory / "adapter_model.safetensors")
        exact += scale * low[f"{GATE}.lora_B.weight"].double() @ low[f"{GATE}.lora_A.weight"].double()
    found = merged["model.layers.1.mlp.gate_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-8).all()  # half a unit in the last place of bf16

    policy = policy_of_run(tmp_path / "run", bf16, cold, dtype=torch.bfloat16)
    prompts = one_study(policy, studies, build)
    expected = logits(policy.model, prompts).float()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    apart = (logits(plain, prompts).float() - expected).abs()
    learned = (logits(load_policy(bf16, dtype=torch.bfloat16).model, prompts).float() - expected).abs()
    assert apart.mean() < 0.03 * learned.mean()


def test_an_export_that_is_interrupted_leaves_nothing(run, sharded, tmp_path, monkeypatch):
    def stopped(items, title):
        for number, item in enumerate(items):
            if number == len(items) // 2:
                assert list(tmp_path.glob("out/.merged.tmp/*.safetensors"))
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(checkpoint_files, "progress", stopped)
        export_run(run, sharded, merged=tmp_path / "out/merged")
    assert not list((tmp_path / "out").iterdir())
    export_run(run, sharded, merged=tmp_path / "out/merged")


def test_what_a_killed_export_left_is_named(run, tiny_policy_directory, tmp_path):
    (tmp_path / ".merged.tmp").mkdir()
    with pytest.raises(FileExistsError, match=r"\.merged\.tmp"):
        export_run(run, tiny_policy_directory, merged=tmp_path / "merged")
    assert (tmp_path / ".merged.tmp").is_dir()


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_folder_that_exists_is_refused(run, tiny_policy_directory, tmp_path, kind):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        export_run(run, tiny_policy_directory, **{kind: tmp_path / "there"})


def test_one_folder_for_both_is_refused(run, tiny_policy_directory, tmp_path):
    with pytest.raises(ValueError, match="out"):
        export_run(run, tiny_policy_directory, merged=tmp_path / "out", adapter=tmp_path / "run/../out")


def test_a_run_without_an_adapter_is_refused(tiny_policy_directory, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run.*adapter/"):
        export_run(tmp_path / "run", tiny_policy_directory, merged=tmp_path / "out")
    shutil.copytree(tiny_policy_directory, tmp_path / "run/policy")
    with pytest.raises(ValueError, match="run/policy"):
        export_run(tmp_path / "run", tiny_policy_directory, merged=tmp_path / "out")


def change_tensors(directory, change):
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(change(dict(tensors)), directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # what PEFT wrote before transformers 4.52; PEFT itself passes over such names with a warning, so that the
        # policy never had them
        (
            lambda t: {name.replace("language_model.", ""): x for name, x in t.items()},
            "model.layers.0.mlp.down_proj",
        ),
        (
            lambda t: t | {f"{GATE}.lora_A.weight": torch.ones(4, 65)},
            r"gate_proj .*\[192, 65\].*\[192, 64\]",
        ),
        (lambda t: t | {f"{GATE}.lora_A.weight": torch.ones(5, 64)}, "gate_proj.*rank"),
        (lambda t: {name: x for name, x in t.items() if name != f"{GATE}.lora_B.weight"}, "gate_proj.*lora_A"),
        (
            lambda t: t | {f"{GATE}.lora_magnitude_vector": torch.ones(192)},
            "lora_magnitude_vector",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(run, tiny_policy_directory, tmp_path, change, message):
    change_tensors(run / "adapter", change)
    with pytest.raises(ValueError, match=message):
        export_run(run, tiny_policy_directory, adapter=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_leaves_no_checkpoint(run, tiny_policy_directory, tmp_path):
    change_tensors(run / "adapter", lambda t: t | {f"{GATE}.lora_A.weight": torch.full((4, 64), torch.nan)})
    with pytest.raises(ValueError, match=r"lora_A of .*layers.1.mlp.gate_proj is not finite"):
        export_run(run, tiny_policy_directory, merged=tmp_path / "out/merged")
    sizes = {"A": (4, 64), "B": (192, 4)}
    large = {f"{GATE}.lora_{half}.weight": torch.full(size, 3e38) for half, size in sizes.items()}
    change_tensors(run / "adapter", lambda t: t | large)
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate_proj.weight"):
        export_run(run, tiny_policy_directory, merged=tmp_path / "out/merged")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": ...}, "lora_alpha"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(run, tiny_policy_directory, tmp_path, settings, message):
    path = run / "adapter/adapter_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    with pytest.raises(ValueError, match=message):
        export_run(run, tiny_policy_directory, merged=tmp_path / "out")


def test_an_adapter_as_a_pickle_is_refused(run, tiny_policy_directory, tmp_path):
    (run / "adapter/adapter_model.safetensors").rename(run / "adapter/adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        export_run(run, tiny_policy_directory, merged=tmp_path / "out")


def test_files_that_are_not_safetensors_are_named(run, sharded, tmp_path):
    shard = next(sharded.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model-00002-of-"):
        export_run(run, sharded, merged=tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-"):
        export_run(run, sharded, merged=tmp_path / "out")
    for path in [*sharded.glob("model*.safetensors"), sharded / "model.safetensors.index.json"]:
        path.unlink()
    (sharded / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"\*\.bin"):
        export_run(run, sharded, merged=tmp_path / "out")
    (run / "adapter/adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        export_run(run, sharded, merged=tmp_path / "out")


def test_pickles_and_code_beside_the_weights_stay_behind(run, tiny_policy_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_policy_directory, source)
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "LICENSE", "merges.txt"):
        (source / name).write_text("x")
    export_run(run, source, merged=tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "merges.txt"} <= there and not {"pytorch_model.bin", "modeling.py"} & there
    assert (tmp_path / "out/README.md").read_text() == "merged", "our card, not the source's"


def test_quantised_weights_are_refused(run, tiny_policy_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_policy_directory, source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate_proj.weight.* I8"):
        export_run(run, source, merged=tmp_path / "out")


def test_a_disk_too_small_is_refused_before_writing(run, tiny_policy_directory, tmp_path, monkeypatch):
    """Both outputs share the disk: each alone would fit."""
    weights = (tiny_policy_directory / "model.safetensors").stat().st_size
    cold = cold_start(tiny_policy_directory, tmp_path)
    free = weights + 16 * 1024**2 + 100_000  # beside the merged checkpoint room for its small files only
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ValueError, match="GB.* GB"):
        export_run(run, tiny_policy_directory, cold=cold, merged=tmp_path / "out/m", adapter=tmp_path / "out/a")
    assert not (tmp_path / "out").exists()
    export_run(run, tiny_policy_directory, cold=cold, merged=tmp_path / "out/m")
