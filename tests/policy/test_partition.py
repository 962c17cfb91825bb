"""A policy whose weights are there only where it says that it reads them; in one process, so that a forgotten place
shows at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.policy.lora import merge_adapter, reference, save_adapter
from mrg_r1.rollout.decode import greedy, rollout
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import each_family, with_lora


class Drawer:
    """A partition over one rank: weights lie in a drawer, and parameters are empty outside of `gathered`."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.kept: dict[nn.Parameter, torch.Tensor] = {}
        self.opened = 0

    def place(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter not in self.kept:
                self.kept[parameter] = parameter.data
                parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], *, written: bool = False) -> Iterator[None]:
        absent = [parameter for parameter in parameters if parameter in self.kept and parameter.numel() == 0]
        self.opened += bool(absent)
        for parameter in absent:
            parameter.data = self.kept[parameter].clone()
        try:
            yield
        finally:
            for parameter in absent:
                if written:
                    self.kept[parameter] = parameter.data
                parameter.data = parameter.data.new_empty(0)

    def most(self, count: int) -> int:
        return count + 1  # as if another rank needed one pass more


@pytest.fixture
def pair(tiny_policy_directory):
    """The same policy with LoRA, whole and in the drawer."""
    return tuple(
        with_lora(load_policy(tiny_policy_directory, dtype=torch.float32, partition=partition))
        for partition in (None, Drawer())
    )


@each_family
@pytest.mark.parametrize("alike", [False, True])
def test_scores_gradients_and_samples_are_those_of_the_whole_policy(pair, studies, build, alike):
    """Also where completions begin alike and share what they begin with."""
    results = []
    for policy in pair:
        prompts = build(policy)(studies)
        vision = policy.encode_images(prompts)
        done = rollout(
            policy, prompts, vision, Sampling(group_size=3, max_new_tokens=9, seed=0, step=0, cache_tokens=200)
        )
        if alike:
            done.token_ids[:, :, :5] = 8
        with reference(policy):
            base = group_logprobs(policy, prompts, vision, done, token_budget=200)
        ids, mask = done.token_ids.flatten(0, 1), done.mask.flatten(0, 1)
        logp, entropy = policy(prompts, vision, ids, mask, torch.arange(4).repeat_interleave(3))
        logp.sum().backward()
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        report = greedy(policy, prompts, vision, max_new_tokens=5).token_ids
        results.append([*vision.per_study, done.token_ids, done.logp, base, logp, entropy, report, *gradients])
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)
    assert all(parameter.numel() == 0 for parameter in pair[1].partition.kept)


@each_family
def test_a_held_policy_samples_without_asking_for_weights(pair, studies, build):
    """Trap 18: what a rank does inside is nobody else's business; outside, weights are away again."""
    policy = pair[1]
    prompts = build(policy)(studies[:2])
    with policy.whole_decoder(images=True):
        before = policy.partition.opened
        vision = policy.encode_images(prompts)
        rollout(policy, prompts, vision, Sampling(group_size=2, max_new_tokens=4, seed=0, step=0))
        greedy(policy, prompts, vision, max_new_tokens=4)
        assert policy.partition.opened == before
    assert all(parameter.numel() == 0 for parameter in policy.partition.kept)


@each_family
def test_an_adapter_is_merged_into_absent_weights(pair, tiny_policy_directory, tmp_path):
    save_adapter(pair[1], tmp_path / "adapter")
    policies = [
        load_policy(tiny_policy_directory, dtype=torch.float32, partition=partition) for partition in (None, Drawer())
    ]
    for policy in policies:
        merge_adapter(policy, tmp_path / "adapter")
    whole, cut = policies
    with cut.gathered(cut):
        found, wanted = dict(cut.named_parameters()), dict(whole.named_parameters())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_family
def test_names_of_published_checkpoints_and_shards_are_read(policy, tiny_policy_directory, tmp_path):
    """Published files keep an older tree's names and come in shards behind an index."""
    copy = tmp_path / "published"
    copy.mkdir()
    for path in tiny_policy_directory.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    older = {"model.visual.": "visual.", "model.language_model.": "model."}
    if tiny_policy_directory.name == "gemma3":
        older = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
    weights = {}
    for name, parameter in policy.base.named_parameters():
        now = next((prefix for prefix in older if name.startswith(prefix)), "")
        weights[older.get(now, "") + name.removeprefix(now)] = parameter.data.contiguous()
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load_policy(copy, dtype=torch.float32, partition=Drawer())
    with found.gathered(found):
        assert all(
            torch.equal(value, dict(policy.named_parameters())[name]) for name, value in found.named_parameters()
        )
    assert all(torch.equal(value, dict(policy.named_buffers())[name]) for name, value in found.named_buffers())
    assert found.base.lm_head.weight is found.language_model.embed_tokens.weight
    assert found.eos_ids == policy.eos_ids


@pytest.mark.parametrize(
    ("change", "message"), [("drop", "no tensor model.language_model.norm.weight"), ("cut", r"is \[63\], config")]
)
def test_a_checkpoint_that_lacks_something_is_refused(tiny_policy_directory, tmp_path, change, message):
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in tiny_policy_directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("model.norm.weight"))
    weights[name] = weights[name][:63]
    if change == "drop":
        del weights[name]
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_policy(copy, dtype=torch.float32, partition=Drawer())
