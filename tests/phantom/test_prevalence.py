"""Labels of preset `full` against the real labels of IU X-Ray (skipped where those are not there) and against the
counts kept of them.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.phantom import prevalence
from mrg_r1.phantom.prevalence import CLASS_COUNTS, NEGATIVE_PAIRS, POSITIVE_PAIRS, STUDIES, label_model
from mrg_r1.phantom.sampler import sample_study
from tests.shared_data import shared_data

DRAWS = 20_000
VALUES: tuple[int | None, ...] = (1, 0, -1, None)
MISSING = 9  # stands for None in arrays


@lru_cache(maxsize=1)
def drawn() -> NDArray[np.int64]:
    """[20000, 13] said values of the preset."""
    said = [sample_study("full", 5, index).said[:13] for index in range(DRAWS)]
    return np.array([[MISSING if value is None else value for value in values] for values in said])


@lru_cache(maxsize=1)
def real() -> NDArray[np.int64]:
    """[2365, 13] CheXbert's labels of IU X-Ray."""
    with (shared_data() / "iu_xray" / "chexbert_labels_train_val.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[int(float(row[name])) if row[name] else MISSING for name in OBSERVATIONS[:13]] for row in rows])


def code(value: int | None) -> int:
    return MISSING if value is None else value


def test_the_counts_kept_are_those_of_the_real_labels() -> None:
    labels = real()
    assert len(labels) == STUDIES
    for i, counts in enumerate(CLASS_COUNTS):
        assert counts == tuple((labels[:, i] == code(value)).sum() for value in VALUES), OBSERVATIONS[i]
    for pairs, value in ((POSITIVE_PAIRS, 1), (NEGATIVE_PAIRS, 0)):
        for i in range(12):
            assert pairs[i] == tuple(
                ((labels[:, i] == value) & (labels[:, j] == value)).sum() for j in range(i + 1, 13)
            )


@pytest.mark.parametrize("observation", range(13))
def test_each_value_is_said_as_often_as_in_the_real_labels(observation: int) -> None:
    labels = real()
    for value in VALUES:
        share = (labels[:, observation] == code(value)).mean()
        got = (drawn()[:, observation] == code(value)).mean()
        # four binomial standard errors; a little wider, since patients with two studies make these draws slightly
        # dependent
        assert abs(got - share) <= 4.5 * sqrt(share * (1 - share) / DRAWS) + 1e-12, (
            OBSERVATIONS[observation],
            value,
            got,
            share,
        )


def pair_counts(labels: NDArray[np.int64], value: int) -> NDArray[np.float64]:
    """[78] studies in 2,365 in which both observations of a pair have `value`."""
    has = (labels == value).astype(float)
    return np.asarray((has.T @ has)[np.triu_indices(13, 1)] * STUDIES / len(labels))


def by_chance(labels: NDArray[np.int64], value: int) -> NDArray[np.float64]:
    shares = (labels == value).mean(axis=0)
    return np.asarray(np.outer(shares, shares)[np.triu_indices(13, 1)] * STUDIES)


def test_what_is_positive_together_in_real_labels_is_positive_together_here() -> None:
    seen, expected = pair_counts(real(), 1), by_chance(real(), 1)
    got = pair_counts(drawn(), 1)
    enough = expected > 1.0  # below, a lift of 2,365 studies is mostly accident
    assert enough.sum() >= 30
    lifts = (
        np.log((seen[enough] + 0.5) / (expected[enough] + 0.5)),
        np.log((got[enough] + 0.5) / (expected[enough] + 0.5)),
    )
    assert np.corrcoef(*lifts)[0, 1] > 0.9
    # as many pairs in all, which independence misses by far
    assert abs(got.sum() - seen.sum()) < 0.08 * seen.sum() < 0.5 * (seen.sum() - expected.sum())
    assert np.abs(got - seen).max() < 4 * np.sqrt(seen.max())


def test_what_is_denied_together_in_real_labels_is_denied_together_here() -> None:
    seen, got, expected = pair_counts(real(), 0), pair_counts(drawn(), 0), by_chance(real(), 0)
    often = expected > 20
    assert np.corrcoef(np.log(seen[often] / expected[often]), np.log(got[often] / expected[often]))[0, 1] > 0.85
    assert np.abs(got - seen).max() < 100 and np.abs(seen - expected).max() > 150


def test_the_number_of_findings_a_study_is_that_of_real_reports() -> None:
    for value, bins in ((1, 5), (0, 8)):
        shares = [
            np.bincount((labels == value).sum(axis=1), minlength=14)[:bins] / len(labels)
            for labels in (real(), drawn())
        ]
        assert np.abs(shares[0] - shares[1]).max() < (0.03 if value == 1 else 0.10)


def test_without_the_real_labels_the_draws_follow_the_counts() -> None:
    for i, counts in enumerate(CLASS_COUNTS):
        assert sum(counts) == STUDIES
        for value, count in zip(VALUES, counts, strict=True):
            share = count / STUDIES
            assert abs((drawn()[:, i] == code(value)).mean() - share) <= 4.5 * sqrt(share * (1 - share) / DRAWS) + 1e-12


def test_tetrachoric_correlations_give_their_probabilities_back() -> None:
    shares = np.full(13, 0.1)
    shares[1] = 0.3
    both = np.outer(shares, shares)
    both[0, 1] = both[1, 0] = 0.06
    both[0, 2] = both[2, 0] = 0.002
    fitted = prevalence._correlations(shares, both)
    cuts = prevalence._cuts(shares)
    for other, probability in ((1, 0.06), (2, 0.002), (3, 0.01)):
        covariance = [[1, fitted[0, other]], [fitted[0, other], 1]]
        assert multivariate_normal(cov=covariance).cdf([cuts[0], cuts[other]]) == pytest.approx(probability, abs=2e-5)
    assert fitted[0, 3] == pytest.approx(0, abs=1e-6)


def test_the_latent_variables_have_unit_variance() -> None:
    model = label_model()
    for factor in (model.presence, model.mention):
        assert np.allclose((factor @ factor.T).diagonal(), 1) and (np.triu(factor, 1) == 0).all()
