"""Studies of one, two and three views of unequal size, from the manifest's files to log-probs: traps 7, 10 and 12."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from mrg_r1.data.loader import PromptBuilder, PromptWords, StudyLoader
from mrg_r1.policy.load import load_image_processor
from mrg_r1.policy.logprobs import completion_logprobs, group_logprobs, micro_batches
from mrg_r1.rollout import decode
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.types import Completions, Prompts, Study, StudyImage
from tests.conftest import FAMILIES, QWEN, make_study
from tests.shared_data import shared_data

VIEWS = (3, 1, 2, 2, 1, 3, 2, 1)  # of eight studies


def generated(folder: Path) -> list[Study]:
    sides = [(84, 56), (112, 112), (56, 140), (140, 84), (112, 56)]
    return [
        make_study(folder, f"s{n}", [sides[(n + view) % 5] for view in range(count)]) for n, count in enumerate(VIEWS)
    ]


def aspect(path: Path) -> float:
    with Image.open(path) as image:
        return image.height / image.width


def real(_: Path) -> list[Study]:
    """The three views of IU X-Ray's study 1000, and radiographs of many sizes put together as studies."""
    folder = shared_data()
    paths = sorted((folder / "iu_xray" / "images").iterdir())
    others = sorted((path for path in (folder / "radiographs").iterdir() if path.suffix != ".csv"), key=aspect)
    paths += others[:: len(others) // (sum(VIEWS) - len(paths) - 1)]  # from the broadest to the tallest
    studies = []
    for n, count in enumerate(VIEWS):
        images = tuple(StudyImage(path, ("frontal", "lateral", None)[view]) for view, path in enumerate(paths[:count]))
        studies.append(Study(f"s{n}", f"p{n}", images, "The heart is enlarged.", "train"))
        paths = paths[count:]
    return studies


def each(families, *, slowly=False):
    """Each of the families with generated studies and with real ones. Slow are the real ones of all but the first, or
    whatever is not the first of both.
    """
    cases = [
        pytest.param(family, kind, marks=pytest.mark.slow if number > (0 if slowly else 1) and (slowly or real) else [])
        for number, (family, (real, kind)) in enumerate(product(families, enumerate(("generated", "real"))))
    ]
    return pytest.mark.parametrize(("tiny_policy_directory", "studies"), cases, indirect=True)


@pytest.fixture
def studies(request, tmp_path) -> list[Study]:
    return {"generated": generated, "real": real}[request.param](tmp_path)


@pytest.fixture
def build(tiny_policy_directory):
    """Images of up to 252 x 252 pixels, so that radiographs come in several grids."""
    processor = load_image_processor(tiny_policy_directory, min_pixels=56 * 56, max_pixels=252 * 252)

    def make(policy, **words) -> PromptBuilder:
        said = PromptWords(**{"instruction": "Write the findings of this chest X-ray.", **words})
        return PromptBuilder(tokenizer=policy.tokenizer, image_processor=processor, layout=policy.layout, words=said)

    return make


def image_tokens(policy, prompts: Prompts) -> list[int]:
    return (prompts.input_ids == policy.image_token_id).sum(dim=1).tolist()


def merged_patches(prompts: Prompts) -> list[int]:
    """sum(t * h * w) / 4 of each study's images."""
    per_image = iter((prompts.images.tensors["image_grid_thw"].prod(dim=1) // 4).tolist())
    return [sum(next(per_image) for _ in range(count)) for count in prompts.images_per_study]


@each(QWEN)
def test_image_tokens_are_a_quarter_of_the_patches_or_nothing_goes_on(policy, studies, build):
    prompts = build(policy)(studies)
    assert prompts.images_per_study == list(VIEWS)
    assert len({tuple(grid) for grid in prompts.images.tensors["image_grid_thw"].tolist()}) > 2  # of unequal size
    assert image_tokens(policy, prompts) == merged_patches(prompts)
    assert prompts.images.tensors["pixel_values"].shape[0] == 4 * sum(merged_patches(prompts))
    features = policy.encode_images(prompts).per_study
    assert [len(part) for part in features] == merged_patches(prompts)
    places = (prompts.input_ids[0] == policy.image_token_id).nonzero().flatten().tolist()
    for place in (places[0], places[-1]):  # one token of the first view gone, one of the last
        cut = prompts.select(range(len(prompts)))
        cut.input_ids[0, place] = 10
        count = len(places)
        with pytest.raises(
            ValueError, match=f"study s0: {count - 1} image tokens in the prompt, {count} features from its 3 image"
        ):
            policy.encode_images(cut)
        with pytest.raises(
            ValueError,
            match="prompt 0: an image of grid .* needs .* image tokens; the prompt was cut inside them|runs of image",
        ):
            policy.layout.positions(cut.input_ids, cut.attention_mask, cut.images)


@each(FAMILIES)
def test_views_stand_in_the_manifests_order_each_with_its_own_pixels(policy, studies, build):
    builder = build(policy)
    prompts = builder(studies)
    for row, study in enumerate(studies):
        alone = [builder([Study(**{**study.__dict__, "images": (image,)})]) for image in study.images]
        one = prompts.select([row])
        assert "pixel_values" in one.images.tensors
        for name, tensor in one.images.tensors.items():
            assert torch.equal(tensor, torch.cat([view.images.tensors[name] for view in alone]))
        text = policy.tokenizer.decode(one.input_ids[0][one.attention_mask[0].bool()])
        named = [image.view for image in study.images if image.view]
        places = [text.index(f"{view.capitalize()} view:") for view in dict.fromkeys(named)]
        assert places == sorted(places) and text.count(" view:") == len(named)


@each(FAMILIES)
def test_log_probs_follow_their_study_through_permuting_and_slicing(lora_policy, studies, build):
    """Trap 10: other views, or another order of a study's own, give other log-probs."""
    prompts = build(lora_policy)(studies)
    vision = lora_policy.encode_images(prompts)
    done = rollout(lora_policy, prompts, vision, Sampling(group_size=2, max_new_tokens=8, seed=0, step=0))
    whole = group_logprobs(lora_policy, prompts, vision, done, token_budget=4096)
    length = done.token_ids.shape[2]

    def again(rows: list[int], some: Prompts) -> torch.Tensor:
        ids, mask = done.token_ids[rows].view(-1, length), done.mask[rows].view(-1, length)
        study_of_row = torch.arange(len(rows)).repeat_interleave(2)
        return completion_logprobs(lora_policy, some, lora_policy.encode_images(some), ids, mask, study_of_row)[0].view(
            len(rows), 2, length
        )

    for rows in ([5, 2, 7, 0, 3, 6, 1, 4], [0, 5], [2], [7, 6, 0]):
        torch.testing.assert_close(again(rows, prompts.select(rows)), whole[rows], atol=1e-5, rtol=0)
    swapped = Study(**{**studies[0].__dict__, "images": studies[0].images[::-1]})
    assert (
        again([0], build(lora_policy, show_view=False)([swapped]))
        - again([0], build(lora_policy, show_view=False)([studies[0]]))
    ).abs().max() > 1e-4


def sampled(policy, loader: StudyLoader, step: int) -> dict[str, list[list[int]]]:
    """Study -> the tokens of its group, in the order of its members."""
    prompts = loader.batch(step)
    done = rollout(
        policy, prompts, policy.encode_images(prompts), Sampling(group_size=3, max_new_tokens=6, seed=0, step=step)
    )
    return {
        study: [done.token_ids[b, g][done.mask[b, g]].tolist() for g in range(3)]
        for b, study in enumerate(prompts.study_ids)
    }


@each(FAMILIES, slowly=True)
def test_groups_are_whole_and_the_same_on_one_two_and_four_ranks_and_after_a_resume(lora_policy, studies, build):
    """Trap 7: each study's members on one rank, in their order, whatever the shuffle put beside it."""
    builder = build(lora_policy)

    def steps(world_size: int, first: int) -> list[list[dict[str, list[list[int]]]]]:
        loaders = [
            StudyLoader(
                studies, builder, seed=0, batch_size=4, rank=rank, world_size=world_size, step=first, position=4 * first
            )
            for rank in range(world_size)
        ]
        seen = [[sampled(lora_policy, loader, step) for loader in loaders] for step in range(first, 3)]
        for loader in loaders:
            loader.close()
        return seen

    alone = [ranks[0] for ranks in steps(1, 0)]
    assert sorted([*alone[0], *alone[1]]) == sorted(study.id for study in studies)  # an epoch, shuffled
    assert list(alone[0]) != [study.id for study in studies[:4]]
    # members differ: their order can be seen
    assert all(len({tuple(tokens) for tokens in group}) > 1 for group in alone[0].values())
    for world_size, first in ((2, 0), (4, 0), (1, 1), (2, 2)):
        for step, ranks in enumerate(steps(world_size, first), start=first):
            assert [len(rank) for rank in ranks] == [4 // world_size] * world_size
            assert [*(study for rank in ranks for study in rank)] == list(alone[step])
            assert {study: group for rank in ranks for study, group in rank.items()} == alone[step]


@each(FAMILIES, slowly=True)
def test_a_prompt_of_three_views_that_is_too_long_is_refused_with_its_study(policy, studies, build):
    """Trap 12: no view is cut."""
    lengths = build(policy)(studies).attention_mask.sum(dim=1).tolist()
    longest = max(range(len(studies)), key=lambda row: lengths[row])
    assert VIEWS[longest] > 1
    with pytest.raises(
        ValueError,
        match=f"study {studies[longest].id}: prompt of {lengths[longest]} tokens, prompt.max_tokens is .*never cut",
    ):
        build(policy, max_tokens=lengths[longest] - 1)([studies[longest]])
    assert build(policy, max_tokens=lengths[longest])(studies).input_ids.shape[1] == lengths[longest]


@each(FAMILIES)
def test_what_needs_most_memory_comes_first_in_a_step(lora_policy, studies, build, monkeypatch):
    """The tower takes all images at once; prefill and decoding go part by part, scoring and updates pass by pass,
    largest first.
    """
    builder, passes, parts = build(lora_policy), [], []
    prompts = builder(sorted(studies, key=lambda study: len(study.images)))  # the longest last
    tokens = prompts.attention_mask.sum(dim=1).tolist()
    inner, family = decode._decode, lora_policy.family

    def counted_tower(model, images, *arguments):
        passes.append(len(images))
        return family.see(model, images, *arguments)

    def recorded(policy, language, some, *arguments):
        parts.append(int(some.attention_mask.sum()) + 16 * len(some))
        return inner(policy, language, some, *arguments)

    monkeypatch.setattr(lora_policy, "family", replace(family, see=counted_tower))
    monkeypatch.setattr(decode, "_decode", recorded)
    vision = lora_policy.encode_images(prompts)
    assert passes == [sum(VIEWS)]
    options = {"group_size": 2, "max_new_tokens": 8, "seed": 0, "step": 0}
    done = rollout(lora_policy, prompts, vision, Sampling(cache_tokens=max(tokens) + 16 + tokens[0], **options))
    cut = decode._parts(prompts, own=16, cache_tokens=max(tokens) + 16 + tokens[0])
    sizes = [sum(tokens[study] + 16 for study in part) for part in cut]
    assert len(parts) > 2 and parts == sorted(sizes, reverse=True) != sizes
    whole: Completions = rollout(lora_policy, prompts, vision, Sampling(**options))
    assert torch.equal(done.token_ids, whole.token_ids) and done.texts == whole.texts  # back in the studies' order

    mask, study_of_row = done.mask.flatten(0, 1), torch.arange(len(prompts)).repeat_interleave(2)
    plan = micro_batches(prompts, mask, study_of_row, token_budget=max(tokens) + 20)
    lengths = mask.sum(dim=1)
    sizes = [
        sum(tokens[b] for b in {int(study_of_row[row]) for row in rows}) + int(lengths[rows].sum()) for rows in plan
    ]
    assert len(sizes) > 3 and sizes == sorted(sizes, reverse=True)
