"""How often what is said together in IU X-Ray reports: counts, and a model of them to draw labels from.

Counts of CheXbert's labels of the 2,365 train and val reports of IU X-Ray (Indiana University,
doi:10.1093/jamia/ocv080; R2Gen's split; labels as published with ORGan, github.com/wjhou/ORGan). Only these sums are
kept here, no report and no row.

The model: two vectors of 13 correlated normal variables (a Gaussian copula each). The first cuts every observation into
positive, uncertain and neither; the second cuts neither into negative and not mentioned. Each observation's four rates
are exact, the pairs of positives and of negatives follow the correlations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING

STUDIES = 2365
# positive, negative, uncertain, not mentioned
CLASS_COUNTS: tuple[tuple[int, int, int, int], ...] = (
    (43, 1361, 145, 816),  # Enlarged Cardiomediastinum
    (256, 1573, 26, 510),  # Cardiomegaly
    (328, 380, 2, 1655),  # Lung Opacity
    (94, 102, 5, 2164),  # Lung Lesion
    (14, 136, 16, 2199),  # Edema
    (16, 862, 2, 1485),  # Consolidation
    (14, 77, 8, 2266),  # Pneumonia
    (98, 3, 60, 2204),  # Atelectasis
    (9, 1759, 2, 595),  # Pneumothorax
    (57, 1789, 16, 503),  # Pleural Effusion
    (32, 0, 4, 2329),  # Pleural Other
    (85, 159, 5, 2116),  # Fracture
    (109, 1, 0, 2255),  # Support Devices
)
# Studies in which both observations are positive: row i, columns i + 1 to 12.
POSITIVE_PAIRS: tuple[tuple[int, ...], ...] = (
    (9, 9, 0, 1, 0, 1, 1, 0, 3, 1, 1, 2),
    (55, 7, 9, 2, 2, 23, 0, 18, 5, 5, 14),
    (6, 5, 9, 7, 40, 3, 26, 12, 14, 26),
    (0, 0, 1, 1, 0, 1, 4, 3, 4),
    (0, 0, 1, 0, 2, 1, 0, 3),
    (0, 5, 0, 4, 0, 2, 4),
    (1, 0, 1, 0, 0, 2),
    (2, 16, 1, 5, 11),
    (2, 0, 2, 4),
    (0, 4, 13),
    (2, 2),
    (5,),
)
# Studies in which both observations are negative, likewise.
NEGATIVE_PAIRS: tuple[tuple[int, ...], ...] = (
    (896, 237, 50, 18, 471, 37, 2, 1001, 1006, 0, 112, 0),
    (277, 87, 97, 456, 64, 0, 1123, 1160, 0, 86, 0),
    (6, 7, 23, 29, 0, 339, 335, 0, 33, 0),
    (30, 15, 31, 0, 80, 86, 0, 1, 0),
    (83, 33, 0, 92, 126, 0, 4, 0),
    (4, 2, 745, 797, 0, 54, 0),
    (0, 67, 68, 0, 1, 0),
    (1, 1, 0, 0, 0),
    (1640, 0, 148, 1),
    (0, 146, 0),
    (0, 0),
    (0,),
)
# studies added to what is seen and to what independence expects: rare pairs are not taken at their word
_PSEUDO_COUNT = 0.5
_WIDEST = 0.95  # no correlation is stronger

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class LabelModel:
    """Cuts of the latent variables, 13 each, and the factors [13, 13] that correlate them."""

    positive: Doubles  # below: positive
    uncertain: Doubles  # below, and not positive: uncertain
    negative: Doubles  # second variable below, and neither: negative
    presence: Doubles  # lower triangular factor of the first vector's correlations
    mention: Doubles  # of the second's

    def say(self, presence: Doubles, mention: Doubles) -> list[int | None]:
        """13 said values from two vectors of 13 independent standard normal variables."""
        first, second = self.presence @ presence, self.mention @ mention
        said: list[int | None] = []
        for i in range(NO_FINDING):
            if first[i] < self.positive[i]:
                said.append(1)
            elif first[i] < self.uncertain[i]:
                said.append(-1)
            else:
                said.append(0 if second[i] < self.negative[i] else None)
        return said


@lru_cache(maxsize=1)
def label_model() -> LabelModel:
    """The model fitted to the counts above; the same on every machine but for the last bits of float64."""
    counts = np.array(CLASS_COUNTS, dtype=np.float64)
    positive, uncertain = counts[:, 0] / STUDIES, (counts[:, 0] + counts[:, 2]) / STUDIES
    negative = counts[:, 1] / (counts[:, 1] + counts[:, 3])
    positive_pairs = positive[:, None] * positive * _lifts(POSITIVE_PAIRS, counts[:, 0])
    presence = _correlations(positive, positive_pairs)
    # two observations are both neither with about this probability; of those, the second vector makes pairs of
    # negatives
    either = np.outer(uncertain, uncertain) * np.divide(positive_pairs, np.outer(positive, positive))
    both_neither = 1 - uncertain[:, None] - uncertain + either
    both_negative = _lifts(NEGATIVE_PAIRS, counts[:, 1]) * np.outer(counts[:, 1], counts[:, 1]) / STUDIES**2
    mention = _correlations(negative, both_negative / both_neither)
    return LabelModel(
        positive=_cuts(positive),
        uncertain=_cuts(uncertain),
        negative=_cuts(negative),
        presence=_factor(presence),
        mention=_factor(mention),
    )


def prevalence(observation: int, value: int | None) -> float:
    """The share of IU studies that say `value` (1, 0, -1 or None) of one of the 13 observations."""
    return CLASS_COUNTS[observation][(1, 0, -1, None).index(value)] / STUDIES


def _lifts(pairs: tuple[tuple[int, ...], ...], singles: Doubles) -> Doubles:
    """[13, 13] how many times as often as by chance two observations come together; 1 on the diagonal."""
    lifts = np.eye(NO_FINDING)
    for i, row in enumerate(pairs):
        for j, seen in enumerate(row, start=i + 1):
            expected = singles[i] * singles[j] / STUDIES
            lifts[i, j] = lifts[j, i] = (seen + _PSEUDO_COUNT) / (expected + _PSEUDO_COUNT)
    return lifts


def _cuts(shares: Doubles) -> Doubles:
    return np.array(
        [NormalDist().inv_cdf(share) if 0 < share < 1 else np.copysign(np.inf, share - 0.5) for share in shares]
    )


def _correlations(shares: Doubles, both: Doubles) -> Doubles:
    """[13, 13] tetrachoric correlations: those at which two normal variables fall below their cuts with the
    probabilities `both`.

    P(a, b) = P(a) P(b) + the integral of the bivariate density at the cuts over the correlation from 0 (Plackett,
    1954), here by Gauss and Legendre; solved by bisection. An observation that is never or always below its cut
    correlates with nothing.
    """
    cuts = _cuts(shares)
    usable = np.isfinite(cuts)
    h = np.where(usable, cuts, 0.0)[:, None]
    k = h.T
    nodes, weights = np.polynomial.legendre.leggauss(24)
    low, high = np.full((NO_FINDING, NO_FINDING), -_WIDEST), np.full((NO_FINDING, NO_FINDING), _WIDEST)
    for _ in range(40):
        middle = (low + high) / 2
        r = middle[..., None] * (nodes + 1) / 2
        density = np.exp(-(h * h + k * k)[..., None] / (2 * (1 - r * r)) + (h * k)[..., None] * r / (1 - r * r))
        density /= 2 * np.pi * np.sqrt(1 - r * r)
        probability = np.outer(shares, shares) + middle / 2 * (density @ weights)
        low, high = np.where(probability < both, middle, low), np.where(probability < both, high, middle)
    correlations = np.where(usable[:, None] & usable, (low + high) / 2, 0.0)
    np.fill_diagonal(correlations, 1.0)
    return correlations


def _factor(correlations: Doubles) -> Doubles:
    """[13, 13] Cholesky factor of the nearest proper correlations: negative eigenvalues are cut off, the diagonal set
    back to 1.
    """
    values, vectors = np.linalg.eigh(correlations)
    proper = (vectors * np.maximum(values, 1e-3)) @ vectors.T
    scale = 1 / np.sqrt(np.diag(proper))
    return np.asarray(np.linalg.cholesky(proper * np.outer(scale, scale)), dtype=np.float64)
