"""One phantom study from (preset, seed, index): labels first, then what is said of them, then the words.

Nothing here draws: `findings.render` takes `drawn` with the same seed and index, and `views.render_view` `shown`. Truth
(`drawn`) and text (`said`) are kept apart, because a report is silent, unsure or shorter than the truth, and metrics
are given against each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.phantom.full import balanced_full, sample_full
from mrg_r1.phantom.habits import USUAL, Habits, Writer, writer_of
from mrg_r1.phantom.lexicon import SPLITS
from mrg_r1.phantom.study import PhantomStudy, no_finding
from mrg_r1.phantom.traits import (
    CARDIOMEGALY,
    FAINT,
    LABELS_STREAM,
    LUNG_LESION,
    PLEURAL_EFFUSION,
    PNEUMOTHORAX,
    SUPPORT_DEVICES,
    WORDING_STREAM,
    keyed_generator,
    sample_traits,
    strengths_of,
)
from mrg_r1.phantom.wording import write_report

PRESETS: tuple[str, ...] = ("five", "full", "balanced")
FIVE_FINDINGS: tuple[int, ...] = (CARDIOMEGALY, LUNG_LESION, PNEUMOTHORAX, PLEURAL_EFFUSION, SUPPORT_DEVICES)

_PREVALENCE = 0.35  # of each of the five
_STATES: tuple[int | None, ...] = (1, 0, -1, None)
_STATE_SHARES = (0.30, 0.30, 0.25, 0.15)  # of `sample_balanced`
# the same for 13 findings, which all together would make an endless report
_FULL_STATE_SHARES = (0.14, 0.26, 0.12, 0.48)
# of preset "balanced": a policy is to meet each finding often, and seldom a doubtful one
_BALANCED_STATE_SHARES = (0.18, 0.30, 0.02, 0.50)
# Correlations of the latent normal variables, ours: mild versions of what goes together in hospital series.
_CORRELATIONS: dict[tuple[int, int], float] = {
    (CARDIOMEGALY, PLEURAL_EFFUSION): 0.40,
    (CARDIOMEGALY, SUPPORT_DEVICES): 0.20,
    (LUNG_LESION, PLEURAL_EFFUSION): 0.10,
    (PNEUMOTHORAX, SUPPORT_DEVICES): 0.35,
    (PLEURAL_EFFUSION, SUPPORT_DEVICES): 0.15,
}


def sample_study(
    preset: str,
    seed: int,
    index: int,
    *,
    wording: str = "train",
    prevalence: Mapping[int, float] | None = None,
    faint: float = 0.0,
    habits: Habits = USUAL,
) -> PhantomStudy:
    """Study `index` of the endless data set (`preset`, `seed`).

    Args:
        preset: "five": five findings, each in 35 % of studies, in reports of at most 45 words, one frontal view, one
            study a patient. "full": all 13 with the rates of IU X-Ray, as `full` tells. "balanced": all 13, each in
            20 % of studies and independent of the others, one frontal view, one study a patient: what a policy meets to
            learn to see and to name before it meets real reports, whose findings are rare.
        seed: 0 or greater.
        index: 0 or greater; studies do not depend on each other, but for the second of a patient of "full".
        wording: "train", "heldout" or "all", as `wording.write_report`'s; it changes the report alone.
        prevalence: of "five" alone: observation -> share of studies that have it, for those that are to differ from 35
            %.
        faint: of "five" alone: share of the findings that are there which are drawn faintly, each by a strength of its
            own, from nothing to `FAINT`.
        habits: of "five" alone: how the reports are written.

    Returns:
        The same study for the same arguments.

    Raises:
        ValueError: an unknown preset or wording, a negative seed or index, or a prevalence that the preset has not or
            that is none.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}; allowed are {', '.join(PRESETS)}")
    for observation, share in (prevalence or {}).items():
        if preset != "five" or observation not in FIVE_FINDINGS or not 0 < share < 1:
            raise ValueError(
                f"prevalence {OBSERVATIONS[observation]} {share} with preset {preset!r}; it can be set for preset "
                f"five, between 0 and 1, of {', '.join(OBSERVATIONS[known] for known in FIVE_FINDINGS)}"
            )
    if wording not in (*SPLITS, "all"):
        raise ValueError(f"wording {wording!r}; allowed are {', '.join(SPLITS)} and all")
    require_writable(preset, faint, habits)
    if preset == "full":
        return sample_full(seed, index, wording=wording)
    if preset == "balanced":
        study = _sample_said(preset, seed, index, _BALANCED_STATE_SHARES, wording=wording)
        return replace(study, strengths=tuple(strengths_of(study.shown)))
    rng = keyed_generator(seed, index, LABELS_STREAM)
    # Gaussian copula: exact prevalences, chosen correlations
    latent = _copula() @ rng.standard_normal(len(FIVE_FINDINGS))
    shares = [(prevalence or {}).get(observation, _PREVALENCE) for observation in FIVE_FINDINGS]
    present = latent < np.array([NormalDist().inv_cdf(share) for share in shares])
    speech = rng.random(len(FIVE_FINDINGS))
    writer = writer_of(habits, seed, index)
    drawn: list[int | None] = [0] * NO_FINDING
    said: list[int | None] = [None] * NO_FINDING
    for i, observation in enumerate(FIVE_FINDINGS):
        drawn[observation] = int(present[i])
        said[observation] = writer.say(bool(present[i]), float(speech[i]))
    strengths = [0.0] * NO_FINDING
    for i, (pale, strength) in enumerate(rng.random((len(FIVE_FINDINGS), 2)).tolist()):
        strengths[FIVE_FINDINGS[i]] = float(present[i]) * (FAINT * strength if pale < faint else 1.0)
    return _spoken(drawn, said, seed, index, wording, writer=writer, strengths=tuple(strengths))


def require_writable(preset: str, faint: float, habits: Habits) -> None:
    """Refuse what a preset cannot draw or write.

    Raises:
        ValueError: a share of faint findings outside 0 to 1, or settings of "five" with another preset.
    """
    if not 0 <= faint <= 1:
        raise ValueError(f"faint {faint}; it is a share between 0 and 1")
    if preset != "five" and (faint or habits != USUAL):
        raise ValueError("faint findings and the radiologists' habits can be set for preset five; full has its own")


def sample_balanced(preset: str, seed: int, index: int, *, wording: str = "train") -> PhantomStudy:
    """A report for training a labeler, whose findings are said positive, negative, uncertain or not at all often
    enough.

    Uncertain statements are one in fifty findings of `sample_study`: too few to learn to read them from. There is no
    truth behind these texts, so `drawn` says of each finding what the text says, an uncertain one counting as drawn.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}; allowed are {', '.join(PRESETS)}")
    return _sample_said(preset, seed, index, _STATE_SHARES if preset == "five" else _FULL_STATE_SHARES, wording=wording)


def _sample_said(preset: str, seed: int, index: int, shares: Sequence[float], *, wording: str) -> PhantomStudy:
    """A study whose findings are each said positive, negative, uncertain or not at all, independently."""
    spoken = FIVE_FINDINGS if preset == "five" else range(NO_FINDING)
    choices = keyed_generator(seed, index, LABELS_STREAM).choice(len(_STATES), size=len(spoken), p=shares)
    said: list[int | None] = [None] * NO_FINDING
    for observation, state in zip(spoken, choices, strict=True):
        said[observation] = _STATES[state]
    if preset == "full":
        return balanced_full(seed, index, said, wording=wording)
    if preset == "balanced":  # `findings.render` draws its films, as it does those of IU X-Ray's labels
        return balanced_full(seed, index, said, wording=wording, traits=sample_traits(seed, index))
    drawn: list[int | None] = [int(value in (1, -1)) for value in said]
    return _spoken(drawn, said, seed, index, wording, writer=writer_of(USUAL, seed, index))


def _spoken(
    drawn: list[int | None],
    said: list[int | None],
    seed: int,
    index: int,
    wording: str,
    *,
    writer: Writer,
    strengths: tuple[float, ...] | None = None,
) -> PhantomStudy:
    """The study of 13 drawn and 13 said values, with No Finding and the words."""
    drawn.append(no_finding(drawn))
    said.append(no_finding(said))
    report = write_report(
        said,
        sample_traits(seed, index),
        keyed_generator(seed, index, WORDING_STREAM),
        wording=wording,
        lexicon=writer.lexicon,
        alike=writer.normal_alike,
    )
    return PhantomStudy(
        index, tuple(drawn), tuple(said), report, f"phantom-{seed}-{index:06d}", index, strengths=strengths
    )


@lru_cache(maxsize=1)
def _copula() -> NDArray[np.float64]:
    """[5, 5] Cholesky factor of the latent correlations."""
    correlation = np.eye(len(FIVE_FINDINGS))
    for (a, b), value in _CORRELATIONS.items():
        i, j = FIVE_FINDINGS.index(a), FIVE_FINDINGS.index(b)
        correlation[i, j] = correlation[j, i] = value
    return np.asarray(np.linalg.cholesky(correlation), dtype=np.float64)
