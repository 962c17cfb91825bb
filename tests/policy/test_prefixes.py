"""Completions that begin alike as trees, against the sets of their beginnings."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.policy.prefixes import PrefixTree


@st.composite
def passes(draw):
    """Completions of few different tokens, in their studies' order, those of a study shortest first."""
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6)
    groups = draw(st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=3))
    return [sorted(group, key=len) for group in groups]


def tree_of(groups):
    rows = [row for group in groups for row in group]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    studies = [study for study, group in enumerate(groups) for _ in group]
    return PrefixTree.of(ids, [len(row) for row in rows], studies), ids


def beginnings(groups, *, without_last):
    return {
        (study, *row[:length])
        for study, group in enumerate(groups)
        for row in group
        for length in range(1, len(row) + 1 - without_last)
    }


@given(passes())
def test_each_beginning_is_one_node_that_is_predicted_from_the_one_before(groups):
    tree, ids = tree_of(groups)
    total = sum(len(row) for group in groups for row in group)
    predicted = beginnings(groups, without_last=False)
    if tree is None:
        assert len(predicted) > 0.9 * total
        return
    read = beginnings(groups, without_last=True)
    assert len(tree.places) == len(tree.parents) == len(predicted) <= 0.9 * total

    # what is read, in the order of the packed axis, by walking each completion from where its own nodes begin
    rows = [(study, row) for study, group in enumerate(groups) for row in group]
    axis = [
        (study, *row[: depth + 1])
        for (study, row), begin in zip(rows, tree.begins, strict=True)
        for depth in range(begin, len(row) - 1)
    ]
    assert len(axis) == len(set(axis)) and set(axis) == read
    prompts = [(study,) for study in range(len(groups))]
    nodes = [
        (*([*prompts, *axis][parent]), token)
        for parent, token in zip(tree.parents.tolist(), ids.flatten()[tree.places].tolist(), strict=True)
    ]
    assert set(nodes) == predicted
    wanted = [(study, *row[: depth + 1]) for study, row in rows for depth in range(len(row))]
    assert [nodes[node] for node in tree.predicted.tolist()] == wanted

    # a completion with nodes of its own reads all of its tokens, each node is one completion's own
    node, is_own = tree.nodes
    lengths = [length for group in tree.members for length in group]
    assert sum(lengths) == len(node) == len(is_own)
    assert sorted(node[is_own].tolist()) == list(range(len(axis)))
    kept = [(study, row) for (study, row), begin in zip(rows, tree.begins, strict=True) if begin < len(row) - 1]
    assert [axis[one] for one in node.tolist()] == [(s, *r[: d + 1]) for s, r in kept for d in range(len(r) - 1)]
    assert [len(group) for group in tree.members] == [sum(s == study for s, _ in kept) for study in range(len(groups))]


def test_completions_that_share_next_to_nothing_are_no_tree():
    groups = [[[0, 1], [0, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9]]]
    assert tree_of(groups)[0] is None  # 18 of 19 tokens are left
    assert tree_of([[*groups[0], groups[0][-1]]])[0] is not None
