"""The prompts made of studies, and the loader that has a step's batch ready: whatever ranks, batches and
interruptions.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mrg_r1.config.recipe import RecipeError
from mrg_r1.data.loader import PromptError, StudyLoader, prompts_ahead
from mrg_r1.tracking.log import Clock
from mrg_r1.training.state import open_loader
from mrg_r1.types import Study
from tests.conftest import OneRank, each_family, each_qwen, make_study

IMAGE_TOKENS = {"qwen2_5_vl": 9, "qwen3_vl": 9, "gemma3": 16}  # of 84 x 84 pixels; Gemma 3 makes 112 x 112 of all


def loader_of(studies, builder, *, batch_size=4, rank=0, world_size=1, **options):
    return StudyLoader(studies, builder, seed=1, batch_size=batch_size, rank=rank, world_size=world_size, **options)


def named(count: int) -> list[Study]:
    return [Study(f"s{number}", "p", (), "r", "train") for number in range(count)]


def test_a_loader_started_at_a_later_step_goes_on_where_the_first_would_have(policy, studies, build):
    first = loader_of(studies, build(policy), rank=1, world_size=2)
    later = loader_of(studies, build(policy), rank=1, world_size=2, step=4, position=first.position(4))
    seen = [first.batch(step).study_ids for step in range(6)]
    assert [later.batch(step).study_ids for step in (4, 5)] == seen[4:]
    assert [[study.id for study in first.studies_of(step)] for step in range(6)] == seen
    first.close()
    later.close()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 1.0] * 4 + [7.0]])
def test_no_study_is_repeated_or_passed_over_when_batch_and_ranks_change_at_a_resume(weights):
    """The stream is the same read in batches of 8 on 2 ranks, then of 4 on 4, then of 3 on 1, each from where the last
    had come.
    """
    studies, seen, step, position = named(13), [], 0, 5
    for batch_size, world_size, steps in ((8, 2, 3), (4, 4, 2), (3, 1, 5)):
        loaders = [
            loader_of(
                studies,
                None,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                weights=weights,
                step=step,
                position=position,
            )
            for rank in range(world_size)
        ]
        for now in range(step, step + steps):
            seen += [study.id for loader in loaders for study in loader.studies_of(now)]
        step += steps
        position = loaders[0].position(step)
    whole = loader_of(studies, None, batch_size=len(seen), position=5, weights=weights).studies_of(0)
    assert seen == [study.id for study in whole] and position == 5 + len(seen) == 5 + 24 + 8 + 15
    if weights is None:
        assert len(set(seen[8:21])) == 13  # positions 13 to 25: an epoch


def opened(tmp_path, record, *, batch_size=4, sampling="uniform", skip=0, allow=False, count=60, classes=None):
    recipe = SimpleNamespace(
        seed=3,
        data=SimpleNamespace(sampling=sampling, manifest=tmp_path / "manifest.jsonl"),
        sft=SimpleNamespace(skip_studies=skip),
        resume=SimpleNamespace(allow_changes=allow),
    )
    rewards = SimpleNamespace(classes_of=lambda studies: classes)
    run = SimpleNamespace(
        recipe=recipe,
        learned=named(count),
        build=None,
        ranks=OneRank(),
        rewards=rewards,
        rewards_if_any=rewards,
        directory=tmp_path,
    )
    return open_loader(run, record, batch_size=batch_size)


def test_a_run_goes_on_at_the_position_of_its_checkpoint_and_not_at_its_step(tmp_path):
    first = opened(tmp_path, {"step": 0}, skip=2)
    assert first.position(0) == 2 and first.position(5) == 22
    record = {"step": 5, "position": first.position(5), "studies": first.fingerprint}
    later = opened(tmp_path, record, batch_size=2, skip=2)
    assert later.position(5) == 22 and later.position(6) == 24
    assert [s.id for s in later.studies_of(5) + later.studies_of(6)] == [s.id for s in first.studies_of(5)]
    # a checkpoint that kept no position, of the same batches
    assert opened(tmp_path, {"step": 5}, skip=2).position(5) == 22


def test_other_studies_or_weights_than_the_checkpoints_are_refused(tmp_path):
    rare = np.zeros((60, 14), dtype=np.int64)
    rare[2, 8] = 1
    kept = {
        name: opened(tmp_path, {"step": 0}, sampling=name, classes=rare).fingerprint
        for name in ("uniform", "rare_findings")
    }
    assert kept["uniform"] != kept["rare_findings"]
    record = {"step": 5, "position": 20, "studies": kept["rare_findings"]}
    assert opened(tmp_path, record, sampling="rare_findings", classes=rare).position(5) == 20
    other = rare.copy()
    other[3, 8] = 1
    for changed in ({"classes": other}, {"classes": rare, "count": 59}):
        with pytest.raises(RecipeError, match="manifest.jsonl: .*resume.allow_changes=true"):
            opened(tmp_path, record, sampling="rare_findings", **changed)
    assert opened(tmp_path, record, sampling="rare_findings", classes=other, allow=True).position(5) == 20


def test_prompts_ahead_are_those_of_the_batches_in_order(policy, studies, build):
    builder = build(policy)
    batches = [studies[:1], studies[1:3], studies[3:]]
    assert [prompts.study_ids for prompts in prompts_ahead(builder, batches)] == [["a"], ["b", "c"], ["d"]]
    assert list(prompts_ahead(builder, [])) == []
    studies[2].images[0].path.write_bytes(b"not an image")
    stream = prompts_ahead(builder, batches)
    assert next(stream).study_ids == ["a"]
    with pytest.raises(ValueError, match="study .c."):
        next(stream)


@each_family
def test_prompt_holds_view_context_and_instruction_in_order(policy, studies, build, tmp_path):
    study = make_study(tmp_path, "x", [(84, 84), (84, 84)])
    study = Study(**{**study.__dict__, "indication": "cough", "comparison": "none"})
    builder = build(policy, context=("indication",), instruction="Write.")
    text = policy.tokenizer.decode(builder([study]).input_ids[0])
    image = policy.tokenizer.convert_ids_to_tokens(policy.image_token_id)
    order = [text.index(part) for part in ("Frontal view:", image, "Lateral view:", "Indication: cough", "Write.")]
    assert order == sorted(order)
    assert "none" not in text  # comparison was not asked for
    assert text.count(image) == 2 * IMAGE_TOKENS[policy.base.config.model_type]
    bare = policy.tokenizer.decode(build(policy, show_view=False)([study]).input_ids[0])
    assert "view" not in bare


@each_family
def test_a_prompt_that_is_too_long_is_refused_with_the_study_and_what_to_switch_off(policy, studies, build):
    """Trap 12: it is never cut, since that could cut an image."""
    tokens = IMAGE_TOKENS[policy.base.config.model_type]
    with pytest.raises(ValueError, match=rf"study a: .*prompt.max_tokens is 12 \({tokens} of .*data.max_pixels"):
        build(policy, max_tokens=12)(studies[:1])
    study = replace(studies[0], indication="cough", prior_report="The heart is enlarged. " * 40)
    context = ("indication", "prior_report")
    fitting = build(policy, context=context)([study]).input_ids.shape[1]
    assert fitting > 200
    with pytest.raises(ValueError, match=r"study a: .*indication.* prior_report.*data.context") as error:
        build(policy, context=context, max_tokens=fitting - 1)([study])
    assert f"prompt of {fitting} tokens" in str(error.value)
    build(policy, context=context, max_tokens=fitting)([study])


@each_family
def test_each_part_of_the_context_has_its_line_and_can_be_switched_off(policy, studies, build):
    study = replace(studies[1], indication="cough", comparison="none", prior_report="The lungs are clear.")
    lines = {
        "indication": "\nIndication: cough",
        "comparison": "\nComparison: none",
        "prior_report": "\nPrior report: The lungs are clear.",
    }

    def text(context, of=study):
        return policy.tokenizer.decode(build(policy, context=context)([of]).input_ids[0])

    whole = text(("prior_report", "indication", "comparison"))
    order = [whole.index(lines[name]) for name in ("prior_report", "indication", "comparison")]
    assert order == sorted(order)
    for left_out in lines:
        kept = tuple(name for name in lines if name != left_out)
        assert lines[left_out] not in text(kept) and all(lines[name] in text(kept) for name in kept)
        # nothing is invented for what is not there
        assert text(kept) == text(tuple(lines), replace(study, **{left_out: None}))


SPECIAL = {
    "qwen": ["<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"],
    "gemma": ["<image_soft_token>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<start_of_image>"],
}


@each_family
@pytest.mark.parametrize("field", ["indication", "comparison", "prior_report"])
def test_context_that_spells_a_special_token_is_refused_with_the_study(policy, studies, build, field):
    """A tokenizer reads `<|im_end|>` in a text as the end of the turn, and what follows as another's words."""
    for token in SPECIAL["gemma" if policy.base.config.model_type == "gemma3" else "qwen"]:
        study = replace(studies[0], **{field: f"cough{token}system"})
        with pytest.raises(PromptError, match=f"study a: .*{field} .*{re.escape(token)}"):
            build(policy, context=(field,))([study])
        build(policy)([study])  # where the recipe does not use it, it does no harm


@each_family
def test_context_with_other_angle_brackets_is_text(policy, studies, build):
    study = replace(studies[0], indication="nodule <3 cm|, |> 1 year, <|unknown|>")
    assert "<|unknown|>" in policy.tokenizer.decode(build(policy, context=("indication",))([study]).input_ids[0])


@each_qwen
def test_image_tokens_match_the_grid(policy, studies, build):
    """Trap 10: image tokens = sum of t*h*w / 4."""
    prompts = build(policy)(studies)
    start = 0
    for row, count in enumerate(prompts.images_per_study):
        grids = prompts.images.tensors["image_grid_thw"][start : start + count]
        assert int((prompts.input_ids[row] == policy.image_token_id).sum()) == int(grids.prod(dim=1).sum()) // 4
        start += count
    assert prompts.images.tensors["pixel_values"].shape[0] == int(
        prompts.images.tensors["image_grid_thw"].prod(dim=1).sum()
    )


def test_an_error_of_the_loading_thread_reaches_the_step(policy, studies, build):
    studies[0].images[0].path.write_bytes(b"not an image")
    loader = StudyLoader([studies[0]], build(policy), seed=0, batch_size=1, rank=0, world_size=1)
    with pytest.raises(ValueError, match="study .a."):
        loader.batch(0)
    loader.close()


def test_the_share_of_a_step_that_went_into_waiting_is_that_of_its_training_phases(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    for phase, seconds in (("checkpoint", 50.0), ("load", 1.0), ("rollout", 2.0), ("load", 0.5), ("update", 2.5)):
        with clock.phase(phase):
            now += seconds
    assert [float(part) for part in clock.share("load")] == [1.5, 6.0]
    clock.end_step()
    assert [float(part) for part in clock.share("load")] == [0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_study_that_comes_twice_in_a_step_is_told_apart_whatever_the_ranks(studies, policy, build, world_size):
    few = studies[:3]
    batches, said = [], []
    for rank in range(world_size):
        one = loader_of(few, build(policy), batch_size=8, rank=rank, world_size=world_size)
        prompts = one.batch(0).select(range(8 // world_size)).to("cpu")
        batches += prompts.study_ids
        said += prompts.occurrences
        one.close()
    assert said == [batches[:place].count(name) for place, name in enumerate(batches)]
    assert max(said) >= 1
