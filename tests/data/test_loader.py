"""The order of studies and the prompts made of them."""

from __future__ import annotations

import pytest

from mrg_r1.data.loader import StudyLoader, rank_indices, stream_indices
from mrg_r1.types import Study
from tests.conftest import make_study


def test_every_epoch_visits_every_study_once_in_another_order():
    stream = stream_indices(10, seed=0, start=0, length=30)
    epochs = [stream[:10], stream[10:20], stream[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_global_batch_whatever_their_number(world_size):
    """Trap 7: a study, and so its whole group, is on one rank; the batch is the same on 1, 2 and 4 ranks and after a resume."""
    for step in (0, 3, 7):
        together = [
            index
            for rank in range(world_size)
            for index in rank_indices(13, seed=5, step=step, batch_size=8, rank=rank, world_size=world_size)
        ]
        assert together == stream_indices(13, seed=5, start=8 * step, length=8)


def test_a_loader_started_at_a_later_step_goes_on_where_the_first_would_have(policy, studies, build):
    def loader() -> StudyLoader:
        return StudyLoader(studies, build(policy), seed=1, batch_size=4, rank=1, world_size=2)

    first, later = loader(), loader()
    seen = [first.batch(step).study_ids for step in range(6)]
    assert [later.batch(step).study_ids for step in (4, 5)] == seen[4:]
    assert [[study.id for study in first.studies_of(step)] for step in range(6)] == seen
    first.close()
    later.close()


def test_prompt_holds_view_context_and_instruction_in_order(policy, studies, build, tmp_path):
    study = make_study(tmp_path, "x", [(84, 84), (84, 84)])
    study = Study(**{**study.__dict__, "indication": "cough", "comparison": "none"})
    builder = build(policy, context=("indication",), instruction="Write.")
    text = policy.tokenizer.decode(builder([study]).input_ids[0])
    order = [text.index(part) for part in ("Frontal view: ", "<|image_pad|>", "Lateral view: ", "Indication: cough", "Write.")]
    assert order == sorted(order)
    assert "none" not in text  # comparison was not asked for
    assert text.count("<|image_pad|>") == 18
    bare = policy.tokenizer.decode(build(policy, show_view=False)([study]).input_ids[0])
    assert "view" not in bare


def test_a_prompt_that_is_too_long_is_refused_with_the_study(policy, studies, build):
    """Trap 12: it is never cut, since that could cut an image."""
    with pytest.raises(ValueError, match=r"study a: prompt of \d+ tokens, prompt.max_tokens is 12"):
        build(policy, max_tokens=12)(studies[:1])


def test_context_that_names_an_image_placeholder_is_refused(policy, studies, build):
    study = Study(**{**studies[0].__dict__, "indication": "see <|image_pad|>"})
    with pytest.raises(ValueError, match="study a: 1 image.*2 image placeholders"):
        build(policy, context=("indication",))([study])


def test_image_tokens_match_the_grid(policy, studies, build):
    """Trap 10: image tokens = sum of t*h*w / 4."""
    prompts = build(policy)(studies)
    start = 0
    for row, count in enumerate(prompts.images_per_study):
        grids = prompts.image_grid_thw[start : start + count]
        assert int((prompts.input_ids[row] == policy.image_token_id).sum()) == int(grids.prod(dim=1).sum()) // 4
        start += count
    assert prompts.pixel_values.shape[0] == int(prompts.image_grid_thw.prod(dim=1).sum())


def test_an_error_of_the_loading_thread_reaches_the_step(policy, studies, build):
    studies[0].images[0].path.write_bytes(b"not an image")
    loader = StudyLoader([studies[0]], build(policy), seed=0, batch_size=1, rank=0, world_size=1)
    with pytest.raises(ValueError, match="study .a."):
        loader.batch(0)
    loader.close()
