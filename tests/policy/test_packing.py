"""Micro-batches by token budget: properties of the plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.policy.packing import plan_micro_batches

batches = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(0, 40), min_size=1, max_size=6)), min_size=1, max_size=6
)


def cost(rows, prompts, lengths, studies):
    return sum(prompts[study] for study in {studies[row] for row in rows}) + sum(lengths[row] for row in rows)


@given(batches, st.integers(1, 400), st.integers(1, 12))
def test_every_row_once_within_budget_longest_first_and_as_many_passes_as_asked(batch, budget, at_least):
    prompts = [prompt for prompt, _ in batch]
    lengths = [length for _, group in batch for length in group]
    studies = [study for study, (_, group) in enumerate(batch) for _ in group]
    at_least = min(at_least, len(lengths))
    plan = plan_micro_batches(prompts, lengths, studies, token_budget=budget, at_least=at_least)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    assert len(plan) >= at_least and all(plan)
    costs = [cost(rows, prompts, lengths, studies) for rows in plan]
    assert costs == sorted(costs, reverse=True)
    assert all(tokens <= budget or len(rows) == 1 for tokens, rows in zip(costs, plan, strict=True))


def test_a_prompt_counts_once_where_pieces_of_its_study_meet():
    assert plan_micro_batches([7], [2, 2, 6, 21, 21], [0] * 5, token_budget=37) == [[4, 2, 0], [3, 1]]


def test_a_study_that_fits_is_not_cut():
    plan = plan_micro_batches([50, 10], [5, 5, 5, 5], [0, 0, 1, 1], token_budget=60)
    assert sorted(map(sorted, plan)) == [[0, 1], [2, 3]]


def test_small_studies_share_a_pass():
    assert plan_micro_batches([10, 10], [5, 5, 5, 5], [0, 0, 1, 1], token_budget=40) == [[0, 1, 2, 3]]
