"""The seam: families are found by their names, and a second one needs nothing but its own folder."""

from __future__ import annotations

import json

import pytest
import torch

from mrg_r1.policy import weights
from mrg_r1.policy.family import family_names, family_of, find_family, shape_of
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.policy import Policy
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import with_lora
from tests.policy.families.another import ANOTHER, random_model


def test_a_checkpoint_names_its_family(tiny_policy_directory):
    assert "qwen2_5_vl" in family_names()
    assert family_of(tiny_policy_directory) is find_family("qwen2_5_vl")
    assert shape_of(tiny_policy_directory).layers == 2


@pytest.mark.parametrize(
    ("config", "named"), [('{"model_type": "gemma3"}', "'gemma3'"), ("{}", "None"), ("{", "config.json"), (None, "no")]
)
def test_a_checkpoint_of_no_family_is_refused_with_its_type_and_those_that_load(tmp_path, config, named):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError) as caught:
        load_policy(tmp_path, dtype=torch.float32)
    assert str(tmp_path) in str(caught.value) and named in str(caught.value)
    if config is not None and json_of(config) is not None:
        assert "qwen2_5_vl" in str(caught.value)


def json_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.fixture
def another(policy, monkeypatch) -> Policy:
    """A policy of a family that no line outside tests knows, with LoRA."""
    monkeypatch.setattr(weights, "find_family", lambda model_type: {"qwen3_vl": ANOTHER}[model_type])
    model = random_model(policy.base.config)
    model.generation_config = policy.base.generation_config
    return with_lora(Policy(model, tokenizer=policy.tokenizer).eval())


def test_another_family_scores_as_its_own_modules_do(another, studies, build):
    prompts = build(another)(studies)
    vision = another.encode_images(prompts)
    assert {features.shape[1] for features in vision.per_study} == {3 * 48}  # embeddings, and for two layers
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 300, (6, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6, 7, 2])[:, None]
    rows = torch.tensor([0, 0, 1, 2, 3, 3])
    trained = [parameter for parameter in another.parameters() if parameter.requires_grad]
    results = []
    for score in (completion_logprobs, completion_logprobs_plain):
        logp, entropy = score(another, prompts, vision, ids, mask, rows)
        results.append([logp, entropy, *torch.autograd.grad(logp.sum(), trained)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    flat = vision.select(range(4))
    flat.per_study = [features[:, :48] for features in flat.per_study]
    without = completion_logprobs(another, prompts, flat, ids, mask, rows)[0]
    assert (without - results[0][0]).abs().max() > 1e-3  # what is added after the first layers matters


def test_another_familys_modules_are_fed_as_transformers_feeds_them(another, studies, build):
    prompts = build(another)(studies[1:2])  # two images of unequal size
    images = prompts.images.tensors
    ids = torch.randint(20, 300, (1, 5), generator=torch.Generator().manual_seed(1))
    whole = torch.cat([prompts.input_ids, ids], dim=1)
    with torch.no_grad():
        logits = another.base(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            mm_token_type_ids=(whole == another.image_token_id).int(),
            pixel_values=images["pixel_values"],
            image_grid_thw=images["image_grid_thw"],
        ).logits[:, -6:-1]
        wanted = logits.float().masked_fill(another.banned, float("-inf")).log_softmax(-1).gather(2, ids[..., None])
        found, _ = another(prompts, another.encode_images(prompts), ids, torch.ones_like(ids).bool(), torch.tensor([0]))
    torch.testing.assert_close(found, wanted[..., 0], atol=2e-5, rtol=1e-4)


def test_another_family_samples_what_it_scores(another, studies, build):
    prompts = build(another)(studies)
    vision = another.encode_images(prompts)
    done = rollout(another, prompts, vision, Sampling(group_size=3, max_new_tokens=9, seed=0, step=0))
    rows = torch.arange(4).repeat_interleave(3)
    with torch.no_grad():
        logp, _ = another(prompts, vision, done.token_ids.flatten(0, 1), done.mask.flatten(0, 1), rows)
    torch.testing.assert_close(logp.view_as(done.logp), done.logp, atol=1e-4, rtol=1e-4)
