"""The whole path of a CUDA rank, phase by phase, at the shapes of published 4B to 8B checkpoints in bfloat16, without a
card: `fake_cuda.py` says how, and what it can see. Numbers are made up here; tests/gpu compares those, on a card.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mrg_r1.policy.attention as attention
from mrg_r1.data.loader import PromptBuilder, PromptWords
from mrg_r1.grpo.loss import LossConfig, grpo_loss
from mrg_r1.policy.attention import PackedAttention, SeqLens, attend
from mrg_r1.policy.completeness import empty_model
from mrg_r1.policy.family import find_family
from mrg_r1.policy.layers import Norm
from mrg_r1.policy.load import load_image_processor
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.policy.logprobs_trained import trained_logprobs
from mrg_r1.policy.lora import add_lora, reference
from mrg_r1.policy.policy import Policy
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.decoder import Decoder
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import FAMILIES, make_study
from tests.conftest import TEXTS as WORDS
from tests.policy import fake_cuda
from tests.policy.fake_cuda import FakeCuda

# Widths, heads and vocabularies as published, few layers: the tiny checkpoint's config with these in place.
SHAPES = {
    "qwen2_5_vl": {  # Qwen2.5-VL-7B
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 2,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {  # Qwen3-VL-8B
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "tie_word_embeddings": False,
    },
    "gemma3": {  # MedGemma 4B; the window stays the tiny one's, so that these prompts are longer than it
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "vocab_size": 262208,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 3,
            "image_size": 896,
        },
        "mm_tokens_per_image": 256,
    },
}

# Each place of a phase at which the host waits for the device, and how often. Waits of a card that has nothing to do
# meanwhile are lost time, so there is none within a layer or a decode step; what stays is asked for once a phase or
# once a pass, and is needed:
IMAGE_TOKENS = ("policy/images.py:encode_images", ".tolist()")  # are they as many as the features (docs/traps.md #10)
WHO_RUNS = ("rollout/decoder.py:Decoder.running", "copy to cpu")  # every 16 tokens: rows that have ended cost no more
TEXTS = ("rollout/decode.py:_decode.read", ".tolist()")  # all at once: for the labeler, and at the end
LONGEST = ("rollout/decode.py:_decode", ".int()")  # how far the completions are cut
PASSES = ("policy/logprobs.py:micro_batches", ".tolist()")  # lengths and studies, to cut passes
SEEN_AGAIN = {  # studies of a pass whose features are made anew
    ("policy/policy.py:Policy.forward", "_unique2"): 1,
    ("policy/policy.py:Policy.forward", ".tolist()"): 1,
}
LENGTHS = ("policy/logprobs.py:completion_logprobs", ".tolist()")  # of the pass: kernels are told where sequences start
LENGTHS_OF_ALL = ("policy/logprobs_trained.py:trained_logprobs", ".tolist()")  # likewise

GROUP = 4


@pytest.fixture
def wide(request, tmp_path):
    """A checkpoint directory without weights: a family's published widths, a small tokenizer."""
    family = request.param
    folder = tmp_path / family
    find_family(family).create_tiny(folder, WORDS * 20, vocabulary=400, image_side=512, hidden=64, layers=2, seed=0)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in SHAPES[family].items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if (side := config["vision_config"].get("image_size")) is not None:  # every image is a square of that side
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        processor["size"] = {"height": side, "width": side}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def policy_of(folder, *, lora):
    """On the meta device, frozen but for LoRA on these targets, or all of it trained."""
    model = empty_model(folder, torch.bfloat16)
    policy = Policy(model.requires_grad_(not lora), tokenizer=AutoTokenizer.from_pretrained(folder), temperature=0.7)
    if lora:
        add_lora(policy, rank=32, alpha=64, seed=0, targets=lora)
    return policy


def prompts_of(folder, policy, studies):
    processor = load_image_processor(folder, min_pixels=56 * 56, max_pixels=896 * 896)
    words = PromptWords(instruction="Write the findings of this chest X-ray.")
    return PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=words)(
        studies
    )


def some_end(eos):
    """Of the places that sample a first half always draws an EOS: rows end early, and the rectangle is made smaller."""

    def chosen(operator: Any, shape: torch.Size) -> torch.Tensor | None:
        if operator is not torch.ops.aten.searchsorted.Tensor:
            return None
        tokens = torch.full(tuple(shape), 100)
        tokens[: (shape[0] + 1) // 2] = eos
        return tokens

    return chosen


# Beside the plain recipe: what is documented for a small card, and LoRA beyond the decoder.
SMALL = "gradient_checkpointing and reuse_prefill"
QUICK = {("qwen2_5_vl", None), ("qwen2_5_vl", SMALL), ("qwen2_5_vl", "all"), ("gemma3", None)}
SETTINGS = [
    pytest.param(family, setting, marks=[] if (family, setting) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for setting in (None, SMALL, *list(find_family(family).lora_targets)[1:])
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wide", "setting"), SETTINGS, indirect=["wide"])
def test_every_phase_runs_on_cuda_and_waits_only_where_it_must(wide, setting, tmp_path, monkeypatch):
    sides = {"a": [(512, 512)], "b": [(512, 320), (448, 512)], "c": [(320, 512)]}
    policy = policy_of(wide, lora="language" if setting in (None, SMALL) else setting)
    policy.recompute = setting == SMALL
    prompts = prompts_of(wide, policy, [make_study(tmp_path, name, some) for name, some in sides.items()])
    cuda = FakeCuda()
    cuda.chosen = some_end(policy.eos_ids[0])

    def advance(decoder: Decoder, written: int) -> None:
        """The step that a graph would be captured of, which a wait would make impossible."""
        with cuda.waiting({}):
            decoder._advance(min(decoder.length, -(-written // 128) * 128))

    monkeypatch.setattr(Decoder, "advance", advance)
    with cuda:
        cuda.move(policy)
        cuda.fake(prompts)
        with cuda.waiting({}):
            prompts = prompts.to("cuda")
        with cuda.waiting({IMAGE_TOKENS: 1}), torch.no_grad():
            vision = policy.encode_images(prompts)
        for features in vision.per_study:
            features.trained = False  # they have no graph
        with cuda.waiting({}):
            states = policy.prompt_cache(prompts, vision) if setting == SMALL else None
        with cuda.waiting({WHO_RUNS: 1, TEXTS: 2, LONGEST: 1}):
            sampling = Sampling(group_size=GROUP, max_new_tokens=20, seed=0, step=0)
            done = rollout(policy, prompts, vision, sampling, states=states, on_ended=lambda texts: None)
        assert done.token_ids.shape == (3, GROUP, 20) and done.logp.dtype == torch.float32
        with cuda.waiting({PASSES: 1, LENGTHS: 1}), reference(policy):
            reference_logp = group_logprobs(policy, prompts, vision, done, token_budget=8192)
        ids, mask, sampled = (tensor.view(-1, 20) for tensor in (done.token_ids, done.mask, done.logp))
        study_of_row = torch.arange(3, device="cuda").repeat_interleave(GROUP)
        leaves = None if states is None else states.leaves()
        again = SEEN_AGAIN | {IMAGE_TOKENS: 1} if policy.adapts_vision else {}
        with cuda.waiting({LENGTHS: 1, **again}):  # the second pass of the policy
            logp, entropy = policy(prompts, vision, ids, mask, study_of_row, leaves)
        if states is not None:
            with cuda.waiting({LENGTHS: 1}):  # of some studies, as an update cut into passes takes them
                policy(prompts, vision, ids[GROUP:], mask[GROUP:], study_of_row[GROUP:], leaves)
            for leaf in leaves._tensors():
                leaf.grad = torch.empty_like(leaf)
            with cuda.waiting({}):
                states.continuation(leaves)
        assert (cuda.backwards["checkpoint"] > 0) == policy.recompute
        activation = "_Geglu" if wide.name == "gemma3" else "_Swiglu"
        assert {"_TokenLogp", "GroupAttention", "PackedAttention", "_LoraLinear", activation} <= set(cuda.backwards)
        config = LossConfig(aggregation="grpo", max_length=20, clip_low=0.2, clip_high=0.28, beta=0.02)
        with cuda.waiting({}), torch.no_grad():
            loss, metrics = grpo_loss(
                logp=logp,
                old_logp=None,
                reference_logp=reference_logp.view(-1, 20),
                advantages=torch.empty(len(ids), device="cuda"),
                mask=mask,
                denominator=12.0,
                config=config,
                sampled_logp=sampled,
            )
        assert {tensor.device.type for tensor in (logp, entropy, loss, reference_logp)} == {"cuda"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wide", "recompute"),
    [
        pytest.param(family, recompute, marks=pytest.mark.slow if recompute and number else [])
        for number, family in enumerate(FAMILIES)
        for recompute in (False, True)
    ],
    indirect=["wide"],
)
def test_training_every_weight_runs_on_cuda_and_waits_only_where_it_must(wide, recompute, tmp_path):
    policy = policy_of(wide, lora=None)
    policy.recompute = recompute
    prompts = prompts_of(
        wide, policy, [make_study(tmp_path, "a", [(512, 512)]), make_study(tmp_path, "b", [(512, 320)])]
    )
    cuda = FakeCuda()
    with cuda:
        cuda.move(policy)
        cuda.fake(prompts)
        prompts = prompts.to("cuda")
        with cuda.waiting({IMAGE_TOKENS: 1}):
            vision = policy.encode_images(prompts)
        assert "PackedAttention" in cuda.backwards, "the tower's"
        ids = torch.full((2, 30), 100, device="cuda")
        mask = torch.arange(30, device="cuda") < torch.full((2, 1), 20, device="cuda")
        with cuda.waiting({LENGTHS_OF_ALL: 1}):
            logp, _ = trained_logprobs(policy, prompts, vision, ids, mask, torch.arange(2, device="cuda"))
    assert logp.device.type == "cuda" and cuda.backwards["_TargetLogp"] == 1
    assert (cuda.backwards["checkpoint"] > 0) == recompute


def heads_of(tokens, count, dtype=torch.bfloat16):
    return torch.empty(tokens, count, 128, device="cuda", dtype=dtype)


def packed(dtype=torch.bfloat16):
    lens = SeqLens((5, 7), torch.device("cuda"))
    return (heads_of(12, 28), heads_of(12, 4, dtype), heads_of(12, 4, dtype), lens, lens)


def test_tensors_of_two_devices_are_refused(monkeypatch):
    starts = property(lambda lens: torch.tensor(lens.starts, dtype=torch.int32))
    with FakeCuda():
        monkeypatch.setattr(SeqLens, "cu_seqlens", starts)  # as if somebody had forgotten the device
        with pytest.raises(RuntimeError, match="cuda:0 and cpu|cpu and cuda:0|two devices"):
            attend(*packed(), causal=True)


@pytest.mark.parametrize("keys", [torch.float32, torch.float16])
def test_tensors_of_two_dtypes_are_refused(keys):
    with FakeCuda():
        with pytest.raises(AssertionError, match="_flash_attention_forward"):
            attend(*packed(keys), causal=True)
        with pytest.raises(AssertionError, match=r"mm of torch\.bfloat16 and torch\.float"):
            torch.nn.functional.linear(heads_of(3, 4), heads_of(5, 1, keys)[:, 0])
        with pytest.raises(AssertionError, match="rms_norm of"):
            Norm(heads_of(1, 1, keys)[0, 0], 1e-6)(heads_of(3, 4))


def test_a_gradient_that_is_not_like_its_argument_is_refused(monkeypatch):
    inner = attention.attend_backward
    wider = lambda *arguments, **more: tuple(part.float() for part in inner(*arguments, **more))  # noqa: E731
    monkeypatch.setattr(attention, "attend_backward", wider)
    with FakeCuda(), pytest.raises(AssertionError, match="PackedAttention: argument 0 is .*bfloat16.*float32"):
        PackedAttention.apply(*packed(), True)


def test_an_operator_of_cpus_is_refused():
    with FakeCuda(), pytest.raises(AssertionError, match="is for a CPU"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[heads_of(3, 4).unsqueeze(0)] * 3, 0.0, True)


@pytest.mark.parametrize(
    "waits,what",
    [
        (lambda mask: mask.tolist(), ".tolist()"),
        (lambda mask: mask.sum().item(), ".item()"),
        (lambda mask: bool(mask.any()), ".bool()"),
        (lambda mask: mask.cpu(), "copy to cpu"),
        (lambda mask: torch.tensor([1], device=mask.device), "copy to cuda"),
        (lambda mask: mask[mask], "index by a mask"),
        (lambda mask: mask[[0, 1]], "index from the CPU"),
        (lambda mask: mask.nonzero(), "nonzero"),
    ],
)
def test_a_wait_is_named_with_its_place(monkeypatch, waits, what):
    monkeypatch.setattr(Norm, "__call__", lambda norm, x: (waits(x > 0), x)[1])
    monkeypatch.setattr(fake_cuda, "PACKAGE", Path(__file__).parent)  # so that the line above is of the package
    with FakeCuda() as cuda:
        with pytest.raises(AssertionError, match=rf"test_fake_cuda\.py:\d+ waits \({re.escape(what)}\).*: 1 times, 0"):
            with cuda.waiting({}):
                Norm(heads_of(1, 1)[0, 0], 1e-6)(torch.zeros(4, device="cuda", dtype=torch.long))
