"""The page's content: every text escaped, readable while a run runs, errors that name file and line, the files' own
numbers.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mrg_r1.tracking.page import write_page
from mrg_r1.tracking.page.curves import read_curves, sections
from mrg_r1.tracking.page.embedding import embedded
from mrg_r1.types import LABELS_ONLY
from tests.conftest import make_study
from tests.tracking.page_runs import (
    EVIL,
    by_radeval,
    completion,
    labels,
    prediction,
    write_completions,
    write_evaluated,
    write_metrics,
)


class Page(HTMLParser):
    """Tags, the text that a reader sees, and the data that the scripts read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.json: dict[str, Any] = {}
        self.notes: list[str] = []
        self._id: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self._id = (
            named.get("id") if named.get("type") == "application/json" else "" if tag in ("script", "style") else None
        )
        assert not any(
            value and value.startswith(("http:", "https:", "//")) for name, value in attrs if name in {"src", "href"}
        )

    def handle_endtag(self, tag):
        self._id = None

    def handle_data(self, data):
        if self._id:
            self.json[self._id] = json.loads(data)
        elif self._id is None:
            self.text += data

    def cards(self, title: str) -> dict[str, dict[str, Any]]:
        return {
            card["id"]: card for part in self.json["data"]["sets"] if part["title"] == title for card in part["cards"]
        }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_metrics(tmp_path / "run", 3, tail='{"step": 3, "rew')  # a line being written
    return tmp_path / "run"


def test_reports_leave_no_tag_of_their_own_on_the_page(run, tmp_path):
    study = make_study(tmp_path, "s<1>", [(84, 84), (900, 600)], report=EVIL)
    plain = Page(write_page(run, []))
    write_evaluated(run, "test", [prediction(study, EVIL, labels(Cardiomegaly=1), labels(Edema=1))], [study])
    page = Page(write_page(run, [study]))
    assert page.tags.count("script") == plain.tags.count("script") and "img" not in page.tags
    card = page.cards("Test studies")["s<1>"]
    assert card["ref"] == EVIL and card["at"][0]["samples"][0]["report"] == EVIL
    frontal, lateral = (page.json["pictures"][place] for place in card["images"])
    assert frontal.startswith("data:image/png;base64,") and lateral.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(lateral.partition(",")[2]))) as small:
        assert small.size == (256, 384)
    assert card["views"] == ["frontal", "lateral"]


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.text() | st.integers() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_embedded_json_reads_back_and_holds_nothing_that_html_reads(content):
    text = embedded(content)
    assert json.loads(text) == content
    assert not set(text) & set("<>&\u2028\u2029")


def test_a_run_at_its_first_steps_has_curves_only(run):
    page = Page(write_page(run, []))
    assert (
        "3 steps" in page.text
        and "unfinished when this page was written" in page.text
        and "No studies on this page yet" in page.text
    )
    assert "Results" not in page.text and page.json["data"]["sets"] == []


def test_the_heading_of_a_control_says_that_it_is_one(run):
    assert "control" not in Page(write_page(run, [])).text
    (run / "config.yaml").write_text("control: random\n")
    assert "control: random reward" in Page(write_page(run, [])).text


@pytest.mark.parametrize("rendered, heading", [(True, "Rendered phantoms"), (False, "Contains patient data")])
def test_the_page_says_whose_data_it_holds(run, tmp_path, rendered, heading):
    from dataclasses import replace

    phantom, other = (make_study(tmp_path, name, [(84, 84)]) for name in ("phantom", "other"))
    studies = [replace(phantom, rendered=True), replace(other, rendered=rendered)]
    write_evaluated(run, "test", [prediction(study, "Clear.", labels(), labels()) for study in studies], studies)
    text = Page(write_page(run, studies)).text
    assert heading in text and ("Contains patient data" in text) == (heading == "Contains patient data")


def test_a_prediction_of_a_study_that_is_not_in_the_manifest_counts_as_patient_data(run, tmp_path):
    study = make_study(tmp_path, "gone", [(84, 84)])
    write_evaluated(run, "test", [prediction(study, "Clear.", labels(), labels())], [study])
    assert "Contains patient data" in Page(write_page(run, [])).text


def test_radevals_metrics_stand_beside_the_lexical_ones_and_nothing_of_them_is_a_tag(run, tmp_path):
    study = make_study(tmp_path, "one", [(84, 84)])
    rows, wanted = [prediction(study, "Nothing.", labels(), labels())], {"left_out": {"radcliq": f"radcliq {EVIL}"}}
    write_evaluated(run, "test_before", rows, [study], radeval=by_radeval(0.1234, name=EVIL))
    plain = Page(write_page(run, [study]))
    assert "0.123" in plain.text and "before training" in plain.text
    write_evaluated(run, "test", rows, [study], radeval=by_radeval(0.4321, name=EVIL, **wanted))
    page = Page(write_page(run, [study]))
    text = " ".join(page.text.split())
    assert f"{EVIL} RadEval, 95 % 0.422 to 0.4420.1230.432" in text, "a row: its interval, before and after"
    assert "bleu RadEval, 95 % 0.013 to 0.1880.0620.062" in text
    assert "means over 1234 reports by radeval 2.2.1" in text and "weights 5eed5eed5eed." in text
    assert "RadGraph-XL & <simple>" in text and f"RadEval: radcliq {EVIL}" in text
    assert page.tags.count("script") == plain.tags.count("script")
    write_evaluated(run, "test", rows, [study], radeval={"scores": {}, "left_out": {"radeval": "it did not start"}})
    text = Page(write_page(run, [study])).text
    assert "RadEval: it did not start" in text and "form, RadEval" in text
    write_evaluated(run, "test", rows, [study], radeval=None)
    text = Page(write_page(run, [study])).text
    assert "RadEval, 95 %" not in text and "lexical metrics" not in text and "form, RadEval" not in text


def test_before_and_after_stand_beside_one_another_with_every_baseline(run, tmp_path):
    study = make_study(tmp_path, "one", [(84, 84)])
    wanted = labels(Cardiomegaly=1)
    write_evaluated(run, "test_before", [prediction(study, "Nothing.", labels(), wanted)], [study])
    held_out = {
        "definitions": {"disease_micro13": {"precision": 0.5, "recall": 0.5, "f1": 0.4321, "f1_ci": [0.1, 0.9]}}
    }
    more = {"held_out": held_out, "hacking_gap": 0.5679, "lexical": {"bleu": {"BLEU-1": 0.7654}}}
    write_evaluated(run, "test", [prediction(study, "Big heart.", wanted, wanted)], [study], **more)
    page = Page(write_page(run, [study]))
    for shown in (
        "disease_micro13",
        "0.000",
        "1.000",
        "+1.000",
        "normal",
        "blank",
        "random",
        "references",
        "0.432",
        "0.568",
        "BLEU-1",
        "0.765",
    ):
        assert shown in page.text
    assert [version["name"] for version in page.cards("Test studies")["one"]["at"]] == [
        "before training",
        "after training",
    ]


def test_reports_that_repeat_themselves_are_seen_before_and_after(run, tmp_path):
    study = make_study(tmp_path, "one", [(84, 84)])
    for name, text in (("test_before", "Clear."), ("test", "Clear. Big heart. Clear. Clear.")):
        row = prediction(study, text, labels(), labels()) | {"contradictions": 0}
        write_evaluated(run, name, [row], [study])
    text = " ".join(Page(write_page(run, [study])).text.split())
    assert "reports in which a whole sentence stands twice, share0.0001.000" in text
    assert "repetition: share of sentences or phrases said before0.0000.500" in text
    assert "reports that affirm and deny one observation, share0.0000.000" in text
    assert "reports in which a whole sentence stands twice, share1.000before 0.000" in text  # among the first numbers


def test_the_page_says_where_the_references_labels_are_from(run, tmp_path):
    study = make_study(tmp_path, "s", [(84, 84)])
    rows = [prediction(study, "Clear.", labels(), labels())]
    write_evaluated(run, "test", rows, [study])
    assert "The references' labels" not in Page(write_page(run, [study])).text
    labeler = {"name": "<b>mine</b>", "fingerprint": "c0ffee"}
    write_evaluated(run, "test", rows, [study], reference_labels={"said": 0, "read": 1, "labeler": labeler})
    assert "The references' labels: read by the labeler <b>mine</b> (c0ffee)" in Page(write_page(run, [study])).text


def test_a_training_study_is_followed_over_its_steps_and_ranks(run, tmp_path):
    often, once = make_study(tmp_path, "often", [(84, 84)]), make_study(tmp_path, "once", [(84, 84)])
    for step in (0, 3, 7):
        write_completions(
            run,
            step,
            [completion(step, often, g, f"at {step}, {g}", labels(Edema=1), total=g / 2) for g in range(2)],
            rank=1,
        )
    path = write_completions(run, 3, [completion(3, once, 0, "malformed", None)], rank=0)
    path.write_text(path.read_text() + '{"step": 3, "study": "on', encoding="utf-8")  # being written
    page = Page(write_page(run, [often, once], references={"often": labels(Edema=-1)}))
    cards = page.cards("Training studies")
    assert [version["name"] for version in cards["often"]["at"]] == ["step 1", "step 4", "step 8"]
    assert [sample["report"] for sample in cards["often"]["at"][1]["samples"]] == ["at 3, 0", "at 3, 1"]
    assert (
        cards["often"]["said"] == "....?........."
        and cards["often"]["at"][0]["samples"][0]["labels"] == "....+........."
    )
    assert cards["once"]["said"] is None and cards["once"]["at"][0]["samples"][0]["report"] is None


def test_think_text_is_apart_from_the_report(run, tmp_path):
    study = make_study(tmp_path, "thinks", [(84, 84)])
    good = completion(
        0, study, 0, "<think>Large heart.</think><report>Cardiomegaly.</report>", labels(Cardiomegaly=1)
    ) | {"report": "Cardiomegaly."}
    bad = completion(0, study, 1, "<think>Large <report>heart", None)
    write_completions(run, 0, [good, bad])
    samples = Page(write_page(run, [study])).cards("Training studies")["thinks"]["at"][0]["samples"]
    assert samples[0]["think"] == "Large heart." and samples[0]["report"] == "Cardiomegaly." and "raw" not in samples[0]
    assert samples[1]["raw"] == "<think>Large <report>heart" and "think" not in samples[1]


def test_a_radiograph_that_cannot_be_read_costs_a_line_and_not_the_page(run, tmp_path):
    study = make_study(tmp_path, "lost", [(84, 84)])
    write_evaluated(run, "test", [prediction(study, "Clear.", labels(), labels())], [study])
    study.images[0].path.unlink()
    assert "1 radiographs that could not be read" in Page(write_page(run, [study])).text


def test_small_radiographs_are_all_on_the_page_whatever_their_number(run, tmp_path):
    studies = [make_study(tmp_path, f"study-{number}", [(84, 84)]) for number in range(230)]
    write_evaluated(run, "test", [prediction(study, "Clear.", labels(), labels()) for study in studies], studies)
    page = Page(write_page(run, studies))
    assert all(page.json["pictures"][card["images"][0]] for card in page.cards("Test studies").values())
    assert "the radiographs of" not in page.text


def test_every_metric_has_a_place_and_those_that_never_change_a_line(run):
    write_metrics(run, 60)
    placed = sections([read_curves(run)])
    by_title = {section["title"]: section for section in placed}
    assert list(by_title) == ["Rewards", "Validation", "Policy", "Novel", "Time and memory"]
    assert [plot["names"] for plot in by_title["Rewards"]["plots"]] == [["reward/total"]]
    assert by_title["Rewards"]["flat"] == [{"name": "reward/constant", "value": 0.3}]
    assert by_title["Novel"]["plots"] == [{"title": "novel/thing", "names": ["novel/thing"]}]


def test_a_long_run_is_drawn_as_means_of_neighbouring_steps(run):
    write_metrics(run, 4801)
    curves = read_curves(run)
    assert curves.steps == 4801 and curves.bucket == 3 and len(curves.columns["step"]) == 1601
    assert curves.columns["step"][:2] == [2.0, 5.0]
    assert curves.columns["reward/total"][1] == pytest.approx(0.4 + 0.002 * 4)
    # the one step in 25 to 27 that was validated
    assert curves.columns["validation/disease_micro13"][8] == pytest.approx(0.74)
    assert "a point is the mean of 3 steps" in Page(write_page(run, [])).text


def test_several_runs_lie_over_one_another(run, tmp_path):
    write_metrics(tmp_path / "second", 5)
    page = Page(write_page(run, [], others=[tmp_path / "second"], output=tmp_path / "both.html"))
    assert [one["name"] for one in page.json["data"]["runs"]] == ["run", "second"]
    assert len(page.json["data"]["runs"][1]["columns"]["step"]) == 5
    assert not (run / "page").exists()


def test_an_evaluation_alone_is_enough(tmp_path):
    study = make_study(tmp_path, "one", [(84, 84)])
    write_evaluated(
        tmp_path / "evaluated",
        "val",
        [prediction(study, "Big heart.", labels(Cardiomegaly=1), labels(Cardiomegaly=1))],
        [study],
    )
    page = Page(write_page(tmp_path / "evaluated", [study]))
    assert (
        "disease_micro13" in page.text and "F1 before" not in page.text and list(page.cards("Test studies")) == ["one"]
    )


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl"):
        write_page(tmp_path, [])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", '{"step": 0}\n{"step": 1, "loss"\n{"step": 2}\n', "line 2: broken JSON"),
        ("metrics.jsonl", '{"step": 0, "loss": "high"}\n', "line 1: field `loss` is 'high' and not a number"),
        ("metrics.jsonl", '{"loss": 1}\n', "line 1: no field `step`"),
        ("metrics.jsonl", "[1]\n", "line 1: .* is not a JSON object"),
        ("evaluation/test.json", '{\n "n": 3,\n "definitions": {,\n', "line 3: broken JSON"),
        ("evaluation/test.json", "{}", "no field `n`"),
        ("evaluation/test_predictions.jsonl", '{"id": "a"}\n', "line 1: no field `text`"),
        ("completions/step_000004_rank0.jsonl", '{"step": 4}\n', "line 1: no field `study`"),
        ("completions/step_000004_rank0.jsonl", "\udcff\n", "line 1: not UTF-8"),
        ("metrics.jsonl", '{"step": 0, "loss": NaN}\n', "line 1: field `loss` is 'nan' and not a number"),
        ("summary.json", "{", "line 1: broken JSON"),
    ],
)
def test_a_damaged_file_is_named_with_its_line_and_the_older_page_stays(run, name, content, message):
    older = write_page(run, []).read_text()
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        write_page(run, [])
    assert (run / "page" / "index.html").read_text() == older


def test_labels_of_another_length_are_refused_by_line(run, tmp_path):
    study = make_study(tmp_path, "short", [(84, 84)])
    write_completions(run, 0, [completion(0, study, 0, "Clear.", [1, 0])])
    with pytest.raises(ValueError, match=r"step_000000_rank0.jsonl, line 1: labels \[1, 0\] are not 14"):
        write_page(run, [study])


def test_a_reference_of_labels_alone_is_said_to_be_one(tmp_path):
    study = replace(make_study(tmp_path, "s1", [(32, 32)]), report=None, said=tuple(labels()))
    row = prediction(study, "Clear.", labels(), labels())
    write_evaluated(tmp_path / "run", "test", [row], [study])
    write_completions(tmp_path / "run", 0, [completion(0, study, 0, "Clear.", labels())])
    page = Page(write_page(tmp_path / "run", [study]))
    assert [card["ref"] for part in page.json["data"]["sets"] for card in part["cards"]] == [LABELS_ONLY] * 2


def test_the_page_says_what_the_best_adapter_gained_over_the_last(tmp_path):
    write_metrics(tmp_path / "run", 4)
    gain = {"step": 4, "difference": 0.0312, "standard_error": 0.01}
    best = {"step": 2, "score": 0.5, "over_last": gain}
    for one, shown in ((best, "step 2 (+0.031 ± 0.010 over the last, step 4)"), ({"step": 2, "score": 0.5}, "step 2 ")):
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"best": one}))
        page = Page(write_page(tmp_path / "run", []))
        assert f"best validation at {shown.rstrip()}" in page.text and ("over the last" in page.text) == (one is best)
