"""Preset `full`: all 13 observations with the rates of IU X-Ray's reports, two views, patients with two studies.

What is said comes first, because that is what IU's rates count; the truth follows from it: what is said to be there is
there, what is denied is not, half of what is doubted is there, faintly, and a little of what is passed over. Studies
come in pairs (2k, 2k + 1); in some of them the second is a later study of the first's patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from mrg_r1.labels.observations import NO_FINDING
from mrg_r1.phantom.lexicon import SPLITS
from mrg_r1.phantom.lexicon_full import COMPARED, FULL, INDICATIONS, NEUTRAL_INDICATIONS, REMARKS, TECHNIQUE
from mrg_r1.phantom.prevalence import Doubles, label_model, prevalence
from mrg_r1.phantom.study import PhantomStudy, no_finding
from mrg_r1.phantom.traits import LABELS_STREAM, PATIENT_STREAM, WORDING_STREAM, Trait, keyed_generator
from mrg_r1.phantom.views import FRONTAL, LATERAL, patient_traits
from mrg_r1.phantom.wording import write_report

_SHARE_FOLLOWED = 0.3  # of the pairs: one patient, two studies
_PERSISTENCE = 0.8  # correlation of a patient's latent variables between two studies
_SHARE_FRONTAL_ONLY = 0.15
_DOUBT_IS_RIGHT = 0.5  # of what is said to be uncertain is drawn
_PASSED_OVER = 0.04  # findings drawn but not mentioned, of those said to be there
_INDICATED = 2.0  # how much likelier an indication is where one of its findings is drawn: 1 + this to 1
_NEUTRAL = 0.4  # share of indications that go with nothing


def sample_full(seed: int, index: int, *, wording: str) -> PhantomStudy:
    """Study `index` of preset `full`; arguments as `sampler.sample_study`'s, checked there."""
    follows = index % 2 == 1 and keyed_generator(seed, index // 2, PATIENT_STREAM).random() < _SHARE_FOLLOWED
    patient = index - 1 if follows else index
    latent, u = _latent(seed, index)
    if follows:
        before, _ = _latent(seed, patient)
        latent = _PERSISTENCE * before + sqrt(1 - _PERSISTENCE**2) * latent
        earlier = [*label_model().say(*before), None]
    else:
        earlier = None
    said = label_model().say(*latent)
    drawn: list[int | None] = [
        _truth(observation, said[observation], float(u[observation])) for observation in range(NO_FINDING)
    ]
    views = (FRONTAL,) if u[NO_FINDING] < _SHARE_FRONTAL_ONLY else (FRONTAL, LATERAL)
    drawn.append(no_finding(drawn))
    said.append(no_finding(said))
    rng = keyed_generator(seed, index, WORDING_STREAM)
    indication = _indication(drawn, rng)
    report = write_report(said, patient_traits(seed, patient), rng, wording=wording, lexicon=FULL, earlier=earlier)
    return PhantomStudy(
        index=index,
        drawn=tuple(drawn),
        said=tuple(said),
        report=_surrounded(report, len(views), follows, rng, wording),
        patient_id=f"phantom-{seed}-{patient:06d}",
        patient=patient,
        views=views,
        indication=indication,
        comparison="Earlier chest radiograph." if follows else "None.",
        prior=patient if follows else None,
    )


def balanced_full(
    seed: int, index: int, said: list[int | None], *, wording: str, traits: Sequence[Trait] | None = None
) -> PhantomStudy:
    """A study of one view for 13 chosen values, whose findings lie where `traits` say, by default as in `full`."""
    traits = patient_traits(seed, index) if traits is None else traits
    drawn: list[int | None] = [int(value in (1, -1)) for value in said]
    drawn.append(no_finding(drawn))
    said = [*said, no_finding(said)]
    rng = keyed_generator(seed, index, WORDING_STREAM)
    follows = rng.random() < _SHARE_FOLLOWED / 2
    earlier = [None if value is None else int(rng.random() < 0.5) for value in said] if follows else None
    report = write_report(said, traits, rng, wording=wording, lexicon=FULL, earlier=earlier)
    report = _surrounded(report, 1, follows, rng, wording)
    return PhantomStudy(index, tuple(drawn), tuple(said), report, f"phantom-{seed}-{index:06d}", index)


def _latent(seed: int, index: int) -> tuple[Doubles, Doubles]:
    """A study's own [2, 13] normal variables and [14] uniform ones."""
    rng = keyed_generator(seed, index, LABELS_STREAM)
    return rng.standard_normal((2, NO_FINDING)), rng.random(NO_FINDING + 1)


def _truth(observation: int, said: int | None, u: float) -> int:
    if said is None:
        return int(u * prevalence(observation, None) < _PASSED_OVER * prevalence(observation, 1))
    return int(u < _DOUBT_IS_RIGHT) if said == -1 else said


def _indication(drawn: list[int | None], rng: np.random.Generator) -> str:
    """A reason for the examination: likelier with some findings, never certain of any."""
    if rng.random() < _NEUTRAL:
        return NEUTRAL_INDICATIONS[int(rng.integers(len(NEUTRAL_INDICATIONS)))]
    weights = np.array(
        [1 + _INDICATED * any(drawn[o] == 1 for o in observations) for observations in INDICATIONS.values()]
    )
    texts = list(INDICATIONS)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return texts[int(rng.integers(len(texts)))]


def _surrounded(report: str, views: int, follows: bool, rng: np.random.Generator, wording: str) -> str:
    """The report among sentences that no label reads: views, comparison, what is always so."""

    def one_of(texts: dict[str, tuple[str, ...]]) -> str:
        options = texts[SPLITS[int(rng.integers(len(SPLITS)))] if wording == "all" else wording]
        return options[int(rng.integers(len(options)))]

    sentences = []
    if rng.random() < 0.25:
        sentences.append(one_of({split: texts[views] for split, texts in TECHNIQUE.items()}))
    if rng.random() < (0.6 if follows else 0.1):
        sentences.append(one_of({split: texts[follows] for split, texts in COMPARED.items()}))
    sentences.append(report)
    if rng.random() < 0.35:
        sentences.append(one_of(REMARKS))
    return " ".join(sentences)
