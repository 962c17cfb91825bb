"""The standard error of a validation's score, against the textbook's for a mean and against resampling for F1."""

from __future__ import annotations

import numpy as np
import pytest

from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores
from mrg_r1.metrics.standard_error import f1_without_each, mean_without_each, standard_error


def systems(studies: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """References, what a system reads as, and what a slightly better one does; [N, 14] classes."""
    generator = np.random.default_rng(0)
    reference = generator.choice(4, (studies, 14), p=[0.5, 0.3, 0.15, 0.05])
    reference[:, 13] %= 2
    worse = np.where(generator.random(reference.shape) < 0.3, 0, reference)
    better = np.where((worse != reference) & (generator.random(reference.shape) < 0.2), reference, worse)
    return reference, worse, better


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_is_left_out_is_the_score_of_the_others(name: str) -> None:
    reference, worse, _ = systems(12)
    found = f1_without_each(worse, reference, name)
    for study in range(12):
        others = np.arange(12) != study
        assert found[study] == pytest.approx(clinical_scores(worse[others], reference[others])[name].f1)


def test_of_a_mean_it_is_the_textbooks() -> None:
    values = np.random.default_rng(1).random(50)
    found = mean_without_each(values)
    assert found[3] == pytest.approx(np.delete(values, 3).mean())
    assert standard_error(found) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert standard_error(found - found) == 0 and standard_error(mean_without_each(values[:1])) is None


@pytest.mark.parametrize("name", ["disease_micro13", "disease_macro13", "example14"])
def test_of_f1_and_of_a_paired_difference_it_is_that_of_resampled_studies(name: str) -> None:
    reference, worse, better = systems()
    without = [f1_without_each(system, reference, name) for system in (worse, better)]
    generator, drawn = np.random.default_rng(2), []
    for _ in range(400):
        rows = generator.integers(200, size=200)
        drawn.append([clinical_scores(system[rows], reference[rows])[name].f1 for system in (worse, better)])
    sampled = np.array(drawn)
    assert standard_error(without[0]) == pytest.approx(sampled[:, 0].std(), rel=0.15)
    alone, paired = standard_error(without[1]), standard_error(without[1] - without[0])
    assert paired == pytest.approx((sampled[:, 1] - sampled[:, 0]).std(), rel=0.15)
    assert alone is not None and paired is not None and paired < 0.7 * alone
