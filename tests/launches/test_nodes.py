"""Several nodes: what they must have in common, before a run begins. Ranks are threads here."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.study import read_manifest
from mrg_r1.engine.ranks import Node, Ranks
from mrg_r1.training import nodes

CPU = torch.device("cpu")
TWO = (Node(0, "a", 0, 2), Node(1, "b", 2, 2))


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, nodes: tuple[Node, ...], box: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(box), CPU, nodes)
        object.__setattr__(self, "_box", box)
        object.__setattr__(self, "_barrier", barrier)

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(timeout=60)
        everyone = list(self._box)
        self._barrier.wait(timeout=60)
        return everyone

    def agree(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)


def on_ranks(work: Callable[[ThreadRanks], Any], layout: tuple[Node, ...] = TWO) -> list[Any]:
    """What each rank's `work` returns, or the error that it raises."""
    count = sum(node.size for node in layout)
    box, barrier = [None] * count, threading.Barrier(count)

    def run(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, layout, box, barrier))
        except RecipeError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_nodes_that_are_started_with_other_recipes_are_told_the_keys(world, tmp_path):
    path = world.recipe(tmp_path / "run")
    other = ["steps=5", "grpo.group_size=6", "reward.device=cuda:3"]  # a device is a node's own

    def agree(ranks: ThreadRanks) -> Any:
        return nodes.agree_on_recipe(load_recipe(path, other if ranks.node.number else []), None, ranks)

    answers = on_ranks(agree)
    assert len(set(answers)) == 1
    lines = answers[0].splitlines()
    assert lines[1].startswith("steps: 4 on node 0 (a), 5 on node 1 (b)") and lines[0].startswith(
        "grpo.group_size: 3 on node 0 (a), 6"
    )
    assert len(lines) == 2
    del other[:2]
    agreed = on_ranks(agree)
    assert agreed[0] == load_recipe(path, []) and agreed[3].reward.device == "cuda:3"


def test_a_recipe_that_one_node_cannot_read_ends_all_with_its_name(world, tmp_path):
    recipe = load_recipe(world.recipe(tmp_path / "run"), [])

    def agree(ranks: ThreadRanks) -> Any:
        bad = ranks.node.number == 1
        return nodes.agree_on_recipe(None if bad else recipe, "recipe.yaml: no such file" if bad else None, ranks)

    assert on_ranks(agree) == ["node 1 (b): recipe.yaml: no such file"] * 4
    assert (
        on_ranks(lambda ranks: nodes.agree_on_recipe(None, "steps: not a number", ranks)) == ["steps: not a number"] * 4
    )


def test_files_that_are_other_ones_on_another_node_are_named(world, tmp_path, monkeypatch):
    """One node after the other looks at the same paths, and finds them changed."""
    folder = tmp_path / "world"
    subprocess.run(["cp", "-r", str(world.folder), str(folder)], check=True)
    recipe = load_recipe(type(world)(folder).recipe(tmp_path / "run"), [])
    first = nodes._fingerprints(recipe)
    assert None not in first.values() and on_ranks(lambda ranks: nodes.check_files(recipe, ranks)) == [None] * 4
    with open(folder / "phantoms/manifest.jsonl", "a") as file:
        file.write("\n")
    (folder / "policy/model.safetensors").rename(folder / "policy/other.safetensors")
    subprocess.run(["rm", "-r", str(folder / "labeler")], check=True)
    second = nodes._fingerprints(recipe) | {"torch": "1.0"}

    def check(ranks: ThreadRanks) -> None:
        threading.current_thread().name = f"on {ranks.node.number}"
        nodes.check_files(recipe, ranks)

    monkeypatch.setattr(
        nodes, "_fingerprints", lambda recipe: second if threading.current_thread().name == "on 1" else first
    )
    answers = on_ranks(check)
    assert len(set(answers)) == 1
    lines = answers[0].splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines[:-1]] == [
        "data.manifest",
        "policy.path",
        "reward.labeler",
        "torch",
    ]
    assert (
        f"reward.labeler {folder / 'labeler'}: not there on node 1 (b), " in answers[0]
        and "torch: 1.0 on node 1 (b), 2" in answers[0]
    )
    assert lines[-1].startswith("what a recipe points at must be the same on every node")


def test_images_that_are_missing_on_a_node_are_named_and_each_rank_looks_at_its_share(world):
    studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
    gone = {studies[0].images[0].path, studies[7].images[0].path}
    moved = [
        study
        if study.images[0].path not in gone
        else type(study)(**{**vars(study), "images": (lost(study.images[0]),)})
        for study in studies
    ]
    answers = on_ranks(lambda ranks: nodes.missing_images(moved, ranks))
    assert studies[0].id in answers[2] and studies[7].id not in answers[2] and "not there on node 1 (b)" in answers[2]
    assert studies[7].id in answers[3] and studies[0].id not in answers[3]
    assert on_ranks(lambda ranks: nodes.missing_images(studies, ranks)) == [None] * 4


def lost(image: Any) -> Any:
    return type(image)(image.path.with_suffix(".gone"), image.view)


def test_an_output_dir_that_a_node_does_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SHARED_WITHIN", 0.6)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    answers = on_ranks(lambda ranks: nodes.check_shared(tmp_path / ranks.node.host, ranks))
    assert all(f"output_dir {tmp_path}" in answer and "node 1 (b) cannot see" in answer for answer in answers)
    absent = on_ranks(
        lambda ranks: nodes.check_shared(tmp_path / ("a" if ranks.node.number == 0 else "nowhere"), ranks)
    )
    assert all("node 1 (b) cannot see" in answer for answer in absent)
    assert on_ranks(lambda ranks: nodes.check_shared(tmp_path / "a", ranks)) == [None] * 4
    assert not list((tmp_path / "a").iterdir()), "nothing is left behind"


def test_a_network_file_system_may_be_late(tmp_path, monkeypatch):
    """It shows a folder to another node when its memory of there being none has run out."""
    seen, listdir = [], os.listdir

    def late(path: Any) -> list[str]:
        if threading.current_thread().name != "node 1":
            return listdir(path)
        seen.append(path)
        if len(seen) < 3:
            raise FileNotFoundError(path)
        return listdir(path)

    monkeypatch.setattr(nodes.os, "listdir", late)

    def check(ranks: ThreadRanks) -> None:
        threading.current_thread().name = f"node {ranks.node.number}"
        nodes.check_shared(tmp_path, ranks)

    assert on_ranks(check) == [None] * 4 and len(seen) == 3
