from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.sampler import FIVE_FINDINGS, sample_study
from mrg_r1.phantom.traits import sample_traits

SIDE = 112


def only(observation: int | None, value: int = 1) -> list[int | None]:
    values: list[int | None] = [None] * 14
    if observation is not None:
        values[observation] = value
    return values


def change(observation: int, index: int, value: int = 1) -> NDArray[np.float64]:
    """[S, S] what the finding does to the picture; the noise of both is the same."""
    with_it, without = (
        render(only(which, value), seed=0, index=index, side=SIDE).astype(float) for which in (observation, None)
    )
    return with_it - without


def test_the_same_arguments_give_the_same_bytes_in_another_process() -> None:
    program = (
        "import hashlib; from mrg_r1.phantom.findings import "
        "render;print(hashlib.sha256(b''.join(render([1]*13+[None], seed=3, index=i, side=96).tobytes() for i in "
        "(4, 5))).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    # drawn in the other order, between other sizes: nothing is remembered from call to call
    second = render([1] * 13 + [None], seed=3, index=5, side=96).tobytes()
    render(only(None), seed=1, index=1, side=64)
    first = render([1] * 13 + [None], seed=3, index=4, side=96).tobytes()
    assert run.stdout.strip() == hashlib.sha256(first + second).hexdigest()


def test_studies_differ_and_none_is_over_or_under_exposed() -> None:
    images = [render(only(None), seed=seed, index=index, side=SIDE) for seed in (0, 1) for index in range(20)]
    assert len({image.tobytes() for image in images}) == 40
    for image in images:
        assert image.dtype == np.uint8 and image.shape == (SIDE, SIDE)
        assert 70 < image.mean() < 170 and image.std() > 30
        assert (image == 255).mean() < 0.02


def test_a_normal_chest_has_dark_lungs_beside_a_bright_mediastinum_above_a_bright_abdomen() -> None:
    mean = np.mean([render(only(None), seed=0, index=index, side=SIDE) for index in range(30)], axis=0)
    s = SIDE
    lungs = [mean[int(0.35 * s) : int(0.6 * s), int(a * s) : int(b * s)].mean() for a, b in ((0.2, 0.32), (0.72, 0.82))]
    spine = mean[int(0.35 * s) : int(0.6 * s), int(0.47 * s) : int(0.53 * s)].mean()
    abdomen = mean[int(0.9 * s) :, int(0.2 * s) : int(0.8 * s)].mean()
    heart_left, heart_right = mean[int(0.68 * s), int(0.64 * s)], mean[int(0.68 * s), int(0.30 * s)]
    assert max(lungs) + 60 < min(spine, abdomen)
    assert heart_left > heart_right + 40  # the heart lies to the patient's left, on the right of the image


@pytest.mark.parametrize("observation", range(13))
def test_every_finding_changes_its_chest_visibly_and_faintly_when_uncertain(observation: int) -> None:
    for index in range(8):
        certain, uncertain = (np.abs(change(observation, index, value)) for value in (1, -1))
        assert (certain > 25).sum() > 20, OBSERVATIONS[observation]
        assert 0 < uncertain.sum() < certain.sum()
        assert not change(observation, index, 0).any()


# observation: (top, bottom, left, right) shares of the image that hold nearly all of the change; sides as seen on the
# image
REGIONS = {
    "Enlarged Cardiomediastinum": (0.0, 0.95, 0.25, 0.75),
    "Cardiomegaly": (0.40, 0.98, 0.15, 0.95),
    "Edema": (0.1, 0.9, 0.08, 0.92),
    "Atelectasis": (0.5, 1.0, 0.05, 0.95),
    "Pleural Effusion": (0.35, 1.0, 0.0, 1.0),
    "Support Devices": (0.0, 0.85, 0.0, 1.0),
}


@pytest.mark.parametrize("name", REGIONS)
def test_findings_lie_where_they_belong(name: str) -> None:
    top, bottom, left, right = (int(share * SIDE) for share in REGIONS[name])
    for index in range(12):
        changed = np.abs(change(OBSERVATIONS.index(name), index))
        assert changed[top:bottom, left:right].sum() > 0.95 * changed.sum()


SIDED = ["Lung Opacity", "Lung Lesion", "Consolidation", "Pneumonia", "Atelectasis"]
SIDED += ["Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"]


@pytest.mark.parametrize("name", SIDED)
def test_the_patients_left_is_on_the_right_of_the_image(name: str) -> None:
    observation = OBSERVATIONS.index(name)
    seen = set()
    for index in range(24):
        side = sample_traits(0, index)[observation].side
        changed = np.abs(change(observation, index))
        on_right = changed[:, SIDE // 2 :].sum() / changed.sum()
        assert {"left": on_right > 0.85, "right": on_right < 0.15, "both": 0.2 < on_right < 0.8}[side]
        seen.add(side)
    assert {"left", "right"} <= seen


def test_signs_have_the_right_brightness() -> None:
    for index in range(12):
        for name in ("Cardiomegaly", "Lung Lesion", "Pleural Effusion", "Support Devices", "Consolidation"):
            changed = change(OBSERVATIONS.index(name), index)
            assert changed[changed > 0].sum() > 5 * -changed[changed < 0].sum(), name
        # free air is darker than the lung that it replaces
        assert (change(OBSERVATIONS.index("Pneumothorax"), index) < -15).sum() > 60


def test_a_linear_probe_on_small_images_finds_each_of_the_five() -> None:
    studies = [sample_study("five", 11, index) for index in range(900)]
    images = np.stack([render(study.drawn, seed=11, index=study.index, side=SIDE) for study in studies])
    features = images.reshape(len(studies), 56, 2, 56, 2).mean(axis=(2, 4), dtype=np.float32).reshape(len(studies), -1)
    for observation in FIVE_FINDINGS:
        truth = np.array([study.drawn[observation] for study in studies])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200)).fit(
            features[:650], truth[:650]
        )
        assert roc_auc_score(truth[650:], probe.decision_function(features[650:])) > 0.85, OBSERVATIONS[observation]


def test_what_cannot_be_rendered_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="14"):
        render([1] * 13, seed=0, index=0, side=64)
    with pytest.raises(ValueError, match="Edema.* 2"):
        render(only(4, 2), seed=0, index=0, side=64)
    with pytest.raises(ValueError, match="side 16"):
        render(only(None), seed=0, index=0, side=16)
    with pytest.raises(ValueError, match="seed -1"):
        render(only(None), seed=-1, index=0, side=64)
