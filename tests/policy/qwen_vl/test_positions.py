"""Positions of prompts with images against the model's own (docs/traps.md #9)."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import each_qwen


@each_qwen
def test_positions_are_those_of_the_model(policy, studies, build):
    """Trap 9: the hand-written positions against the model's own, padded and with two images."""
    prompts = build(policy)(studies)
    kinds = (prompts.input_ids == policy.image_token_id).int()
    positions, deltas = policy.base.model.get_rope_index(
        prompts.input_ids,
        kinds,
        image_grid_thw=prompts.images.tensors["image_grid_thw"],
        attention_mask=prompts.attention_mask,
    )
    kept = prompts.attention_mask.bool()
    assert torch.equal(prompts.positions[kept], positions[:, kept].t())
    assert torch.equal(prompts.next_position, prompts.attention_mask.sum(1) + deltas[:, 0])


@each_qwen
def test_a_cut_image_is_refused(policy, studies, build):
    prompts = build(policy)(studies[:1])
    cut = int((prompts.input_ids[0] == policy.image_token_id).nonzero()[4, 0])
    with pytest.raises(ValueError, match="the prompt was cut inside them"):
        policy.layout.positions(prompts.input_ids[:, :cut], prompts.attention_mask[:, :cut], prompts.images)


@each_qwen
def test_a_tokenizer_of_another_checkpoint_is_refused(policy):
    """transformers makes an empty tokenizer where its files are missing: prompts would be without images."""
    config = policy.base.config
    assert policy.family.prompt_layout(config, policy.tokenizer).image_token_id == config.image_token_id
    config.image_token_id += 1
    with pytest.raises(ValueError, match="config.json says"):
        policy.family.prompt_layout(config, policy.tokenizer)
