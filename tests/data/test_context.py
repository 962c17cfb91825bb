"""The report of the study before: found in any split, never the study's own, nothing where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrg_r1.config.recipe import RecipeError, load_recipe
from mrg_r1.data.context import with_prior_reports
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.doctor.inputs import read_splits
from mrg_r1.types import Study, StudyImage


def study(name: str, *, split: str = "train", prior: str | None = None, image: str | None = None) -> Study:
    return Study(name, "p", (StudyImage(Path(f"/i/{image or name}.png")),), f"Report of {name}.", split, prior=prior)


def test_a_prior_of_another_split_is_found_and_a_study_without_one_has_none():
    studies = [study("c", prior="b"), study("b", split="val", prior="a"), study("a", split="test"), study("x")]
    filled = with_prior_reports(studies)
    assert [one.prior_report for one in filled] == ["Report of b.", "Report of a.", None, None]
    assert [one.report for one in filled] == [one.report for one in studies]
    assert all(one.prior_report != one.report for one in filled)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"]])
def test_priors_in_a_circle_are_refused(names):
    studies = [study(name, prior=names[number - 1]) for number, name in enumerate(names)] + [study("e", prior="a")]
    with pytest.raises(ValueError, match="study 'a': .*a <- "):
        with_prior_reports(studies)


def test_a_prior_of_the_same_image_is_the_study_itself_and_refused():
    with pytest.raises(ValueError, match="study 'b': .*prior 'a' .*one.png"):
        with_prior_reports([study("a", image="one"), study("b", prior="a", image="one")])


def test_a_manifest_without_priors_is_refused_where_they_are_asked_for():
    with pytest.raises(ValueError, match="prior_report .*data.context"):
        with_prior_reports([study("a"), study("b")])


def test_a_run_reads_priors_only_where_its_recipe_asks(world, tmp_path):
    studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
    train = [one for one in studies if one.split == "train"]
    later, earlier = train[0], next(one for one in studies if one.split == "test")
    known = Study(**{**later.__dict__, "prior": earlier.id, "patient_id": earlier.patient_id})
    write_manifest(tmp_path / "manifest.jsonl", [known if one.id == later.id else one for one in studies])
    recipe = world.recipe(tmp_path / "run")
    manifest = f"data.manifest={tmp_path / 'manifest.jsonl'}"
    plain = read_splits(load_recipe(recipe, [manifest]))[0]
    assert all(one.prior_report is None for part in plain.values() for one in part)
    asked = read_splits(load_recipe(recipe, [manifest, "data.context=[prior_report]"]))[0]
    found = {one.id: one.prior_report for part in asked.values() for one in part if one.prior_report}
    assert found == {later.id: earlier.report}
    with pytest.raises(RecipeError, match="manifest.jsonl: .*data.context"):
        read_splits(load_recipe(recipe, ["data.context=[prior_report]"]))
