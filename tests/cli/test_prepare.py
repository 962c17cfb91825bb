"""`mrg-r1 prepare iu-xray` and `mrg-r1 prepare manifest` as they are called: what is printed, and what a mistake looks
like.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mrg_r1 import cli
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.observations import OBSERVATIONS, write_labels_csv
from tests.cli.test_cli import refused, run, usage_error
from tests.data.prepare.iu_xray.test_layouts import kaggle, pictures, xmls

NAMES = ("CXR7_IM-0001-1001.png", "CXR7_IM-0001-2001.png", "CXR8_IM-0001-1001.png")


def rows(out: str) -> dict[str, list[str]]:
    """The closing table: its first column and the others."""
    cells = [line.replace("│", " ").split() for line in out.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("kind", ["chexpert", "iu-xray", "manifest", "mimic-cxr", "nih", "padchest"])
def test_help_teaches_by_an_example(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", kind, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and f"examples:\n  mrg-r1 prepare {kind}" in out
    if kind == "manifest":
        assert "by `;` or `|`" in out and "frontal:a/1.png;lateral:a/2.png" in out


def test_iu_xray_closes_with_a_table_of_every_split(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    studies = {
        split: [{"id": f"CXR{n}_IM", "report": "Clear.", "image_path": ["0.png"], "split": split}]
        for n, split in enumerate(("train", "val", "test"))
    }
    (tmp_path / "annotation.json").write_text(json.dumps(studies))
    for name in ("CXR0_IM", "CXR1_IM"):
        write_labels_csv(tmp_path / f"{name}.csv", {name: [0] * 13 + [1]})
    labels = [part for name in ("CXR0_IM", "CXR1_IM") for part in ("--render-missing", tmp_path / f"{name}.csv")]
    code, out, _ = run(
        capsys, "prepare", "iu-xray", tmp_path / "annotation.json", "-o", tmp_path / "out", *labels, "--side", 32
    )
    assert code == 0 and "R2Gen's annotation.json, 3 studies" in out
    expected = {
        "train": ["1", "1", "1", "0"],
        "val": ["1", "1", "1", "0"],
        "test": ["1", "0", "0", "1"],
        "total": ["3", "2", "2", "1"],
    }
    assert rows(out) == expected
    assert f"{tmp_path / 'out' / 'refused.jsonl'}: why each was refused" in out


def test_iu_xray_says_which_layout_it_has_recognised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", *NAMES)
    split = tmp_path / "split.json"
    split.write_text('{"val": ["CXR7_IM-0001"], "test": ["CXR8_IM-0001"]}')
    for source, title, read in (
        (xmls(tmp_path), "Open-i reports (XML), 3 studies", "3"),
        (kaggle(tmp_path), "Kaggle's reports and", "2"),
    ):
        output = tmp_path / read
        options = ("--images", images, "--report", "impression", "--split", split)
        code, out, _ = run(capsys, "prepare", "iu-xray", source, "-o", output, *options)
        assert code == 0 and f"{source}: {title}" in out and rows(out)["total"][:2] == [read, "2"]
        kept = read_manifest(output / "manifest.jsonl")
        assert [(study.id, study.split, study.report) for study in kept] == [
            ("CXR7", "val", "Clear."),
            ("CXR8", "test", "Clear."),
        ]


def test_iu_xray_takes_views_from_projections(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, projections = pictures(tmp_path / "images", *NAMES), kaggle(tmp_path).with_name("indiana_projections.csv")
    source = xmls(tmp_path)
    assert (
        run(
            capsys,
            "prepare",
            "iu-xray",
            source,
            "-o",
            tmp_path / "out",
            "--images",
            images,
            "--projections",
            projections,
        )[0]
        == 0
    )
    (study,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [image.view for image in study.images] == ["frontal", "lateral"]


def test_mistakes_of_iu_xray_are_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, out = xmls(tmp_path), tmp_path / "out"
    assert "gone.json" in refused(capsys, "prepare", "iu-xray", source, "-o", out, "--split", tmp_path / "gone.json")
    assert "--images" in refused(capsys, "prepare", "iu-xray", source, "-o", out, "--images", source)
    assert "gone.csv" in refused(
        capsys, "prepare", "iu-xray", source, "-o", out, "--projections", tmp_path / "gone.csv"
    )
    assert "gone" in refused(capsys, "prepare", "iu-xray", tmp_path / "gone", "-o", out)
    assert not out.exists()
    assert "all 3 " in refused(capsys, "prepare", "iu-xray", source, "-o", out)
    assert "`report`" in refused(capsys, "prepare", "iu-xray", source, "-o", out, "--report", "both")
    assert "--report" in usage_error(capsys, "prepare", "iu-xray", source, "-o", out, "--report", "conclusion")


def test_manifest_closes_with_a_table_and_names_what_it_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.effect_noise((40, 40), 60).save(tmp_path / "1.png")
    lines = [
        "id,patient_id,images,report,split,age",
        "a,p,frontal:1.png;1.png,Clear.,train,60",
        "b,p,1.png,Clear.,test,61",
        "c,q,2.png,x,val,",
    ]
    (tmp_path / "studies.csv").write_text("\n".join(lines))
    code, out, _ = run(capsys, "prepare", "manifest", tmp_path / "studies.csv", "-o", tmp_path / "out")
    assert code == 0 and "studies.csv, studies" in out
    assert rows(out) == {
        "train": ["1", "1", "0"],
        "test": ["1", "1", "0"],
        "val": ["1", "0", "1"],
        "total": ["3", "2", "1"],
    }
    assert "left out, as a study has no place for them: age" in out
    assert "warning: 1 patients have studies in several splits" in out and "the first is 'p', in train and test" in out
    kept = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [image.view for image in kept[0].images] == ["frontal", None]


def test_mistakes_of_manifest_are_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "studies.csv").write_text("id,report\na,Clear.\n")
    message = refused(capsys, "prepare", "manifest", tmp_path / "studies.csv", "-o", out)
    assert "studies.csv, line 1: no column `images`, `split`" in message
    assert "gone.csv" in refused(capsys, "prepare", "manifest", tmp_path / "gone.csv", "-o", out)
    assert "--splits" in usage_error(
        capsys, "prepare", "manifest", tmp_path / "studies.csv", "-o", out, "--splits", "train,,val"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Cardiomegaly", "OBSERVATION=SHARE"),
        ("Heart=0.1", "OBSERVATION=SHARE"),
        ("Pneumothorax=rare", "'rare'"),
    ],
)
def test_a_mistaken_prevalence_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, given: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prepare", "phantom", "-o", str(tmp_path / "out"), "--prevalence", given])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_manifest_of_a_set_prevalence_has_it_and_the_folder_remembers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["prepare", "phantom", "-o", str(tmp_path), "--splits", "train=60", "--side", "32"]
    assert cli.main([*out, "--prevalence", "Cardiomegaly=0.999,Pneumothorax=0.001"]) == 0
    drawn = [study.drawn for study in read_manifest(tmp_path / "manifest.jsonl")]
    heart, pneumothorax = OBSERVATIONS.index("Cardiomegaly"), OBSERVATIONS.index("Pneumothorax")
    assert [(row[heart], row[pneumothorax]) for row in drawn if row] == [(1, 0)] * 60
    assert cli.main(out) == 2 and "other settings" in capsys.readouterr().err
