"""The reward card: exact against an independent loop and the reward's own functions, IU's published facts, and the
command.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mrg_r1 import cli
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.labels.observations import (
    OBSERVATIONS,
    classes_of_values,
    read_labels_csv,
    signed_vector,
    values_of_classes,
    write_labels_csv,
)
from mrg_r1.reward.card.card import MARGINS, best_real_constants, reward_card, says
from mrg_r1.reward.card.search import distinct, earned_by_constants
from mrg_r1.reward.terms import ccs, ce_f1, inverse_prevalence, mccs
from mrg_r1.types import Study, StudyImage
from tests.conftest import World
from tests.reward.card.constants import best_constant
from tests.shared_data import shared_data

CLASS_OF_SIGN = {0: 0, 1: 1, -1: 2}


def classes_of(vectors: list[list[int]]) -> NDArray[np.int64]:
    """Signs of the first observations -> [N, 14] classes, blank after them."""
    return np.array([[*(CLASS_OF_SIGN[sign] for sign in row), *[0] * (14 - len(row))] for row in vectors])


def reward(a: tuple[int, ...], b: tuple[int, ...], margin: float) -> float:
    """MCCS in plain Python, from the specification and from nothing of the project."""
    if not any(a) or not any(b):
        cosine = float(not any(a) and not any(b))
    else:
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(map(abs, a)) * sum(map(abs, b)))
    return max((cosine - margin) / (1 - margin), 0.0)


def card_of(vectors: list[list[int]], margins: list[float] | None = None):
    ids = [f"s{i}" for i in range(len(vectors))]
    return reward_card(classes_of(vectors), ids, [f"text {i}" for i in ids], margins or [])


def four_signs(size: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).choice([-1, 0, 1], p=[0.4, 0.4, 0.2], size=(size, 4)).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.37, 0.5, 0.7, 0.95])
def test_the_best_constant_is_the_one_that_an_exhaustive_loop_finds(seed: int, margin: float) -> None:
    references = [tuple(row) for row in four_signs(30, seed)]
    means = {c: np.mean([reward(c, r, margin) for r in references]) for c in itertools.product((-1, 0, 1), repeat=4)}
    best, mean = best_constant(signed_vector(classes_of([list(r) for r in references])), margin)
    assert mean == pytest.approx(max(means.values()), abs=1e-6)
    assert means[tuple(best[:4].tolist())] == pytest.approx(mean, abs=1e-6) and not best[4:].any()
    equals = [c for c, value in means.items() if value > max(means.values()) - 1e-9]
    assert np.abs(best).sum() == min(sum(map(abs, c)) for c in equals)  # of equals the one that names the fewest
    row = card_of([list(r) for r in references], [margin]).at(margin)
    assert row.constant.zeros == pytest.approx(
        np.mean([reward(row.constant.vector[:4], r, margin) < 1e-7 for r in references])
    )
    assert row.real.mean == pytest.approx(max(means[r] for r in references), abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_random_reports_are_all_pairs_of_different_studies(margin: float) -> None:
    references = [tuple(row) for row in [*four_signs(20, 1), [0] * 4, [0] * 4]]
    pairs = [(a, b) for (i, a), (j, b) in itertools.product(enumerate(references), repeat=2) if i != j]
    card = card_of([list(r) for r in references])
    row = card.at(margin)
    assert row.random_mean == pytest.approx(np.mean([reward(a, b, margin) for a, b in pairs]), abs=1e-6)
    assert row.random_zeros == pytest.approx(np.mean([reward(a, b, margin) < 1e-7 for a, b in pairs]))
    assert card.both_silent == pytest.approx(np.mean([not any(a) and not any(b) for a, b in pairs]))
    assert card.silent == pytest.approx(np.mean([not any(r) for r in references]))
    signs = (
        np.array([[*a, *[0] * 9] for a, _ in pairs], dtype=np.int8),
        np.array([[*b, *[0] * 9] for _, b in pairs], dtype=np.int8),
    )
    assert card.random_ccs == pytest.approx(ccs(*signs).mean(dtype=np.float64), abs=1e-6)


SIGNS = st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=5, max_size=5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(SIGNS, st.sampled_from(MARGINS))
def test_no_constant_beats_the_best_and_real_ones_do_not_either(rows: list[list[int]], margin: float) -> None:
    vectors = signed_vector(classes_of(rows))
    best, mean = best_constant(vectors, margin)
    (study,) = best_real_constants(classes_of(rows), ["text"] * len(rows), [margin])
    assert mean == pytest.approx(
        mccs(ccs(np.broadcast_to(best, vectors.shape), vectors), margin).mean(dtype=np.float64)
    )
    for other in [*vectors, -best, np.zeros(13, dtype=np.int8)]:
        assert mccs(ccs(np.broadcast_to(other, vectors.shape), vectors), margin).mean() <= mean + 1e-6
    real = mccs(ccs(np.broadcast_to(vectors[study], vectors.shape), vectors), margin).mean(dtype=np.float64)
    assert 1 / len(rows) - 1e-6 <= real <= mean + 1e-6  # it is right at least about its own study
    assert best_constant(vectors[::-1], margin)[1] == pytest.approx(mean)


@settings(deadline=None, max_examples=60)
@given(SIGNS, st.booleans(), st.sampled_from([(1.0, 0.0), (0.5, 1.0)]))
def test_the_best_reference_is_that_of_the_reward_at_hand(
    rows: list[list[int]], weighted: bool, shares: tuple[float, float]
) -> None:
    classes, margins = classes_of(rows), [0.2, 0.5, 0.8]
    vectors, weights = signed_vector(classes), inverse_prevalence(classes) if weighted else None
    cosines = np.stack([ccs(np.broadcast_to(vector, vectors.shape), vectors, weights) for vector in vectors])
    chosen = best_real_constants(
        classes, ["text"] * len(rows), margins, ccs_weights=weights, of_mccs=shares[0], of_ccs=shares[1]
    )
    for margin, study in zip(margins, chosen, strict=True):
        earned = (shares[0] * mccs(cosines, margin) + shares[1] * cosines).mean(axis=1, dtype=np.float64)
        assert earned[study] == pytest.approx(earned.max(), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(SIGNS)
def test_what_not_looking_earns_never_grows_with_the_margin(rows: list[list[int]]) -> None:
    card = card_of(rows)
    for before, after in itertools.pairwise(card.margins):
        assert after.constant.mean <= before.constant.mean + 1e-6
        assert after.real.mean <= before.real.mean + 1e-6
        if len(rows) > 1:
            assert after.random_mean <= before.random_mean + 1e-6 and after.random_zeros >= before.random_zeros - 1e-9
    for states in card.prevalence.values():
        assert sum(states.values()) == len(rows)


def test_every_reference_earns_what_the_reward_gives_it_over_all_13_observations() -> None:
    vectors = np.random.default_rng(0).integers(-1, 2, (60, 13)).astype(np.int8)
    references = distinct(vectors)
    earned = earned_by_constants(references, [0.1, 0.5])
    for row, vector in enumerate(references.vectors):
        cosines = ccs(np.broadcast_to(vector, vectors.shape), vectors)
        assert earned.ccs[row] == pytest.approx(cosines.mean(dtype=np.float64), abs=1e-6)
        for m, margin in enumerate((0.1, 0.5)):
            rewards = mccs(cosines, margin)
            assert earned.mean[row, m] == pytest.approx(rewards.mean(dtype=np.float64), abs=1e-9)
            assert earned.zeros[row, m] == pytest.approx((rewards <= 1e-6).mean())


def test_few_references_and_many_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = np.random.default_rng(0).choice(4, p=[0.7, 0.1, 0.15, 0.05], size=(200, 14))
    classes[:, 9:] = 0
    chosen = []
    for few in (0, len(classes)):
        monkeypatch.setattr("mrg_r1.reward.card.card._FEW_VECTORS", few)
        chosen.append(best_real_constants(classes, ["text"] * len(classes), [0.0, 0.3, 0.8], of_ccs=0.3, of_ce_f1=0.5))
    assert chosen[0] == chosen[1]


def test_the_time_does_not_grow_with_the_pairs_of_studies() -> None:
    rng = np.random.default_rng(0)
    classes = rng.choice(4, p=[0.6, 0.15, 0.2, 0.05], size=(40_000, 14))
    classes[:, 11:] = 0
    seconds = []
    for studies in (4_000, 40_000):
        start = time.process_time()
        best_real_constants(classes[:studies], ["text"] * studies, [0.5])
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * seconds[0]  # a pass over all pairs takes a hundred times as long


def test_of_the_studies_that_say_the_same_the_most_frequent_text_is_shown() -> None:
    classes = classes_of([[1, -1]] * 5 + [[0, 1]])
    assert best_real_constants(classes, ["long text", "rare", "long text", "short", "short", "x"], [0.5]) == [3]
    card = reward_card(classes, list("abcdef"), ["long text", "rare", "long text", "short", "short", "x"])
    assert card.at(0.5).real.study == "d"
    assert card.at(0.5).constant.says == ("Enlarged Cardiomediastinum", "no Cardiomegaly") == says([1, -1, *[0] * 11])


def test_the_suggested_margin_is_the_first_at_which_half_of_the_random_reports_earn_nothing() -> None:
    card = card_of(four_signs(50, 3), [0.33])
    first = next(row.margin for row in card.margins if row.random_zeros >= 0.5 and row.margin in MARGINS)
    assert card.suggested_margin == first


def test_references_that_all_agree_suggest_no_margin() -> None:
    card = card_of([[1, -1]] * 5)
    assert card.suggested_margin is None and card.at(0.5).constant.mean == card.at(0.5).random_mean == 1.0


def test_silent_references_are_best_answered_with_silence() -> None:
    best, mean = best_constant(np.zeros((3, 13), dtype=np.int8), 0.5)
    assert not best.any() and mean == 1.0


def test_one_study_has_no_random_report() -> None:
    card = card_of([[1, 0, -1]])
    assert (
        card.at(0.5).random_mean is None
        and card.random_ccs is None
        and card.both_silent is None
        and card.suggested_margin is None
    )


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="N "):
        best_constant(np.zeros((0, 13), dtype=np.int8), 0.5)
    with pytest.raises(ValueError, match="-1, 0, 1"):
        best_constant(np.full((1, 13), 2, dtype=np.int8), 0.5)
    with pytest.raises(ValueError, match="margin 1.0"):
        best_constant(np.zeros((1, 13), dtype=np.int8), 1.0)
    with pytest.raises(ValueError, match="1 texts.*2 "):
        best_real_constants(classes_of([[1], [0]]), ["a"], [0.5])
    with pytest.raises(ValueError, match="1 ids.*2 texts"):
        reward_card(classes_of([[1], [0]]), ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="not on this card"):
        card_of([[1]]).at(0.123)


def test_iu_gives_the_published_facts() -> None:
    """Of 2,955 studies, here 2,365: five negatives earn 0.576 at m 0.2, four 0.420 at 0.5, 0.253 at 0.7; a random CCS
    is 0.43.
    """
    labels = read_labels_csv(shared_data() / "iu_xray" / "chexbert_labels_train_val.csv")
    card = reward_card(np.array(list(labels.values())), list(labels), ["text"] * len(labels))
    facts = {0.2: (5, 0.576, 0.10), 0.5: (4, 0.420, 0.25), 0.7: (5, 0.253, 0.50)}
    for margin, (named, mean, zeros) in facts.items():
        constant = card.at(margin).constant
        assert len(constant.says) == named and all(name.startswith("no ") for name in constant.says)
        assert constant.mean == pytest.approx(mean, abs=0.01)
        assert constant.zeros == pytest.approx(zeros, abs=0.025)
    assert card.random_ccs == pytest.approx(0.43, abs=0.01)
    assert card.suggested_margin == 0.5


# The command


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four studies that were not rendered, without labels of their own; three are of the train split."""
    texts = ["No effusion.", "No effusion.", "The heart is enlarged.", "Clear."]
    studies = [
        Study(f"s{i}", f"p{i}", (StudyImage(tmp_path / f"{i}.png"),), text, "train" if i < 3 else "test")
        for i, text in enumerate(texts)
    ]
    write_manifest(tmp_path / "manifest.jsonl", studies)
    rows = [[0] * 14 for _ in texts]
    rows[0][9] = rows[1][9] = 2
    rows[2][1] = 1
    write_labels_csv(tmp_path / "labels.csv", {study.id: row for study, row in zip(studies, rows, strict=True)})
    return tmp_path / "manifest.jsonl"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["reward-card", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_a_card_from_a_labels_csv(capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    code, out, err = run(
        capsys, manifest, "--labels", labels, "--split", "train", "--margin", 0.33, "-o", tmp_path / "new" / "card"
    )
    assert code == 0 and not err
    assert "Margin 0.33: one constant report (no Pleural Effusion) earns a mean MCCS of 0.667" in out
    assert "does not rise above 0.667 has learned nothing" in out and "rendered" not in out
    card = json.loads((tmp_path / "new" / "card" / "reward_card.json").read_text())
    assert (
        card["n"] == 3 and card["margin"] == 0.33 and card["rendered"] is False and card["project"]["name"] == "mrg-r1"
    )
    assert card["source"] == {
        "manifest": str(manifest),
        "split": "train",
        "labels": "file",
        "rendered": 0,
        "name": str(labels),
        "fingerprint": None,
    }
    assert {row["margin"] for row in card["margins"]} == {*MARGINS, 0.33}
    assert card["prevalence"]["Pleural Effusion"]["negative"] == {"count": 2, "share": 2 / 3}
    assert card["prevalence"].keys() == set(OBSERVATIONS) and card["margins"][0]["real"]["study"] == "s0"
    assert card["rules"]["mccs"] == "max((CCS - m) / (1 - m), 0)" and "0.667" in card["summary"]
    assert Image.open(tmp_path / "new" / "card" / "reward_card.png").size[0] > 1500


def test_without_an_output_nothing_is_written(
    capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(capsys, manifest, "--labels", tmp_path / "labels.csv")[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_said_labels_of_phantoms_say_that_they_are_phantoms(
    capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, world.folder / "phantoms/manifest.jsonl", "--said", "-o", tmp_path)
    assert code == 0 and "32 studies; all rendered phantoms" in out
    card = json.loads((tmp_path / "reward_card.json").read_text())
    assert (
        card["rendered"] is True
        and card["source"]["rendered"] == card["n"] == 32
        and card["source"]["labels"] == "said"
    )
    vectors = signed_vector(
        np.array([classes_of_values(study.said) for study in read_manifest(world.folder / "phantoms/manifest.jsonl")])
    )
    assert next(row for row in card["margins"] if row["margin"] == 0.5)["constant"]["mean"] == pytest.approx(
        best_constant(vectors, 0.5)[1]
    )


def test_a_labeler_reads_the_reports(capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path) -> None:
    manifest, labeler = world.folder / "phantoms/manifest.jsonl", world.folder / "labeler"
    assert run(capsys, manifest, "--labeler", labeler, "--split", "val", "-o", tmp_path)[0] == 0
    card = json.loads((tmp_path / "reward_card.json").read_text())
    assert card["n"] == 8 and card["source"]["labels"] == "labeler" and card["source"]["name"] == "labeler"
    assert len(card["source"]["fingerprint"]) == 16


def test_bad_input_is_refused_in_one_message(
    capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run(capsys, *arguments)
        assert code == 2 and not out and err.startswith("mrg-r1: ")
        return err

    labels = tmp_path / "labels.csv"
    assert all(name in refused(manifest) for name in ("--labeler", "--labels", "--said"))
    assert "--labels and --said" in refused(manifest, "--labels", labels, "--said")
    assert "field `labels.said`" in refused(manifest, "--said")
    assert "'validate'" in refused(manifest, "--said", "--split", "validate")
    nowhere = tmp_path / "nowhere"
    for arguments in ((nowhere, "--said"), (manifest, "--labels", nowhere), (manifest, "--labeler", nowhere)):
        assert str(nowhere) in refused(*arguments)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(tmp_path / "empty.jsonl", "--said")
    known = read_labels_csv(labels)
    write_labels_csv(tmp_path / "short.csv", {"s0": known["s0"], "s3": known["s3"]})
    message = refused(manifest, "--labels", tmp_path / "short.csv")
    assert "short.csv" in message and "s1, s2" in message and "mrg-r1 label" in message
    assert values_of_classes(known["s2"])[1] == 1
    for margin in ("1", "-0.1", "x", "nan"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["reward-card", str(manifest), "--said", f"--margin={margin}"])
        assert stopped.value.code == 2 and "--margin" in capsys.readouterr().err


def test_studies_with_labels_alone_count_and_are_no_real_report_unless_there_is_none() -> None:
    """Two of three say the first vector, and have no report: the one report there is is the best real one."""
    classes = np.zeros((3, 14), dtype=np.int64)
    classes[:2, 9], classes[2, [1, 9]] = 2, (1, 2)
    mixed = reward_card(classes, ["a", "b", "c"], [None, None, "Heart."]).at(0.0)
    assert mixed.real.study == "c" and mixed.real.mean == pytest.approx((2 / np.sqrt(2) + 1) / 3, abs=1e-6)
    assert mixed.constant == reward_card(classes, ["a", "b", "c"], ["x", "x", "Heart."]).at(0.0).constant
    assert best_real_constants(classes, [None, None, "Heart."], [0.0, 0.5]) == [2, 2]
    assert reward_card(classes, ["a", "b", "c"], [None] * 3).at(0.0).real.study == "a"


@pytest.mark.parametrize("labels", ["file", "labeler"])
def test_a_card_takes_the_manifests_labels_of_studies_without_a_report(
    capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path, manifest: Path, labels: str
) -> None:
    first, *others = read_manifest(manifest)
    write_manifest(manifest, [replace(first, report=None, said=(*[None] * 4, 1, *[None] * 9)), *others])
    (tmp_path / "labels.csv").write_text(
        "".join(line for line in (tmp_path / "labels.csv").read_text().splitlines(True) if not line.startswith("s0,"))
    )
    given = ("--labels", tmp_path / "labels.csv") if labels == "file" else ("--labeler", world.folder / "labeler")
    assert run(capsys, manifest, *given, "-o", tmp_path / "card")[0] == 0
    card = json.loads((tmp_path / "card" / "reward_card.json").read_text())
    assert card["n"] == 4 and card["prevalence"]["Edema"]["positive"]["count"] >= 1
    assert card["margins"][0]["real"]["study"] != "s0"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=13, max_size=13), min_size=1, max_size=14),
    st.floats(0, 1),
)
def test_the_best_constant_follows_ce_f1_in_which_uncertain_is_no_positive(
    rows: list[list[int]], of_mccs: float
) -> None:
    classes = np.array([[*row, 0] for row in rows])
    (study,) = best_real_constants(classes, ["text"] * len(rows), [0.5], of_mccs=of_mccs, of_ce_f1=1.0)
    signs = signed_vector(classes)

    def earned(answer: int) -> float:
        said = np.broadcast_to(classes[answer], classes.shape)
        clinical = mccs(ccs(np.broadcast_to(signs[answer], signs.shape), signs), 0.5)
        return float(ce_f1(said, classes).mean() + of_mccs * clinical.mean())

    assert earned(study) == pytest.approx(max(earned(answer) for answer in range(len(rows))), abs=1e-5)
