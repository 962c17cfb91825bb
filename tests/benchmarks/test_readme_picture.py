"""The README's picture: which study it shows, and how findings are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.readme_picture import choose, draw, verdict
from mrg_r1.types import Study, StudyImage


def line(name: str, total: float, **more: Any) -> dict[str, Any]:
    return {"id": name, "total": total, **more}


def test_the_study_is_the_one_in_the_middle_of_the_changes() -> None:
    before = [line("a", 0.5), line("b", 0.5), line("c", 0.1)]
    after = [line("c", 0.9), line("a", 0.4), line("b", 0.7)]
    chosen = choose(before, after)
    assert (chosen.after["id"], chosen.rank, chosen.studies) == ("b", 2, 3)
    assert (chosen.changed, chosen.rose) == (3, 2) and chosen.before["total"] == 0.5


def test_studies_whose_reward_stayed_are_counted_and_not_shown() -> None:
    before = [line(name, 0.5) for name in "abcde"]
    after = [line("a", 0.5), line("b", 0.5), line("c", 0.9), line("d", 0.2), line("e", 0.5)]
    chosen = choose(before, after)
    assert (chosen.after["id"], chosen.rank, chosen.changed, chosen.rose, chosen.studies) == ("d", 1, 2, 1, 5)
    still = choose(before, before)
    assert (still.after["id"], still.changed, still.rose) == ("c", 0, 0)


def test_equal_changes_go_by_id_and_of_an_even_number_the_lower_middle_is_taken() -> None:
    before = [line(name, 0.1) for name in "dbca"]
    after = [line(name, 0.1 + 0.2) for name in "cabd"]
    assert choose(before, after).after["id"] == "b"


@pytest.mark.parametrize(("before", "after"), [([], []), ([line("a", 0.0)], [line("b", 0.0)])])
def test_predictions_of_other_studies_are_refused(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="the same studies"):
        choose(before, after)


@pytest.mark.parametrize(
    ("wanted", "said", "expected"),
    [
        (1, 1, "agreed"),
        (1, -1, "agreed"),
        (0, 0, "agreed"),
        (1, 0, "missed"),
        (-1, None, "missed"),
        (0, 1, "invented"),
        (None, -1, "invented"),
        (0, None, None),
        (None, None, None),
    ],
)
def test_findings_are_marked_by_the_labels(wanted: int | None, said: int | None, expected: str | None) -> None:
    assert verdict(wanted, said) == expected


def test_the_picture_is_written_also_of_a_malformed_and_endless_report(tmp_path: Path) -> None:
    film = tmp_path / "film.png"
    Image.linear_gradient("L").resize((40, 40)).save(film)
    labels = [1, *[None] * 13]
    study = Study(id="s", patient_id="p", images=(StudyImage(film, "frontal"),), report="Heart.", split="test")
    rows = {"reference": "Heart costs $5.", "reference_labels": labels}
    before = line("s", 0.0, text="word " * 500, labels=None, **rows)
    chosen = choose([before], [line("s", 1.0, text="Heart.", labels=labels, **rows)])
    means = {"mean_reward": 0.5, "disease_micro13": 0.25}
    draw(tmp_path / "out.png", chosen, study, {"before": means, "after": means, "steps": 3})
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (1600, 896)
