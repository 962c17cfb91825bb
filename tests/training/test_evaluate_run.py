"""What is done with a run that has ended: a report of one study, an evaluation or plain reports of a manifest, and
nothing overwritten.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrg_r1 import cli
from mrg_r1.config.recipe import RecipeError, dump_recipe, load_recipe
from mrg_r1.data.study import ManifestError, read_manifest, write_manifest
from mrg_r1.evaluation.generate import NOT_FOR_CLINICAL_USE, add_labels, shown_report
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import save_adapter
from mrg_r1.policy.policy import Policy
from mrg_r1.training.evaluate_run import evaluate_run, evaluation_name
from mrg_r1.training.run import open_run
from mrg_r1.types import StudyImage
from tests.conftest import OneRank, with_lora
from tests.world import World

KEYS = [
    "prompt.show_view=true",
    "data.context=[indication, prior_report]",
    "rollout.max_new_tokens=20",
    "evaluation.batch_size=3",
]


@pytest.fixture
def finished(world, tmp_path) -> Path:
    """RUN of a finished training: its recipe, whose prompts have views and context, and an adapter."""
    studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
    images = [study.images[0].path for study in studies]
    test = [number for number, study in enumerate(studies) if study.split == "test"]
    two = (StudyImage(images[0], "frontal"), StudyImage(images[test[1]], "lateral"))
    studies[test[1]] = replace(studies[test[1]], images=two, indication="The heart is enlarged.")
    studies[test[2]] = replace(studies[test[2]], images=(replace(two[1], view=None), two[0]))
    before = studies[0]
    studies[test[3]] = replace(studies[test[3]], patient_id=before.patient_id, prior=before.id)
    write_manifest(tmp_path / "manifest.jsonl", studies)
    run = tmp_path / "run"
    recipe = load_recipe(world.recipe(run), [f"data.manifest={tmp_path}/manifest.jsonl", *KEYS])
    run.mkdir()
    (run / "config.yaml").write_text(dump_recipe(recipe))
    (run / "metrics.jsonl").touch()
    save_adapter(restless(with_lora(load_policy(recipe.policy.path, dtype=torch.float32))), run / "adapter")
    return run


def restless(policy: Policy) -> Policy:
    """LoRA so large that every word of the prompt moves the report; a random policy repeats one token, whatever it
    sees.
    """
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    return policy


def evaluated(run: Path, *overrides: str) -> None:
    evaluate_run(load_recipe(run / "config.yaml", overrides), OneRank())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one(capsys, study, run: Path, *more: object) -> dict:
    views = [word for image in study.images if image.view for word in ("--view", image.view)]
    if len(views) != 2 * len(study.images):
        views = []
    context = [
        word
        for name, text in (("indication", study.indication), ("prior", study.prior_report))
        if text
        for word in (f"--{name}", text)
    ]
    code, out, _ = asked(
        capsys, *[image.path for image in study.images], "--run", run, *views, *context, "--json", "-", *more
    )
    assert code == 0
    return json.loads(out)


def bare(manifest: Path, name: str, *, report: str | None = None, of: slice = slice(None)) -> Path:
    """The manifest's test studies without references, beside it."""
    records = [record for record in lines(manifest) if record["split"] == "test"]
    for record in records[of]:
        record["report"] = report
        record["labels"] = {"said": None, "drawn": None} if report is None else record["labels"]
    path = manifest.with_name(name)
    path.write_text("".join(json.dumps(record | {"prior": None}) + "\n" for record in records))
    return path


def test_the_report_is_the_one_that_the_evaluation_writes(finished, capsys, inline_rewards):
    """Of a study with one image, of two with views, of one with an indication, of one with a prior report: prompt,
    policy and labels.
    """
    evaluated(finished)
    rows = {row["id"]: row for row in lines(finished / "evaluation/test_predictions.jsonl")}
    studies = {study.id: study for study in read_manifest(finished.parent / "manifest.jsonl")}
    test = [studies[name] for name in rows]
    assert len({row["text"] for row in rows.values()}) > 3, "a policy that says the same of everything shows nothing"
    for study in (test[0], test[1], test[3]):
        given = replace(study, prior_report=studies[study.prior].report if study.prior else None)
        answer = one(capsys, given, finished)
        (written,) = answer["reports"]
        row = rows[study.id]
        assert (
            written["text"] == row["text"]
            and written["report"] == row["report"]
            and written["truncated"] is not row["ended"]
        )
        assert written["labels"] == (row["labels"] if row["report"] else None) and answer["observations"] == list(
            OBSERVATIONS
        )
        assert answer["sampling"] is None and answer["notice"] == NOT_FOR_CLINICAL_USE
    changed = [
        one(capsys, replace(test[1], indication=None), finished),
        one(capsys, replace(test[1], images=test[1].images[::-1]), finished),
        one(capsys, replace(test[1], images=tuple(replace(image, view=None) for image in test[1].images)), finished),
    ]
    assert rows[test[1].id]["text"] not in [answer["reports"][0]["text"] for answer in changed], (
        "the options reach the prompt"
    )


def test_samples_come_from_their_seed_and_temperature(finished, capsys):
    study = read_manifest(finished.parent / "manifest.jsonl", split="test")[0]

    def texts(*more: object) -> list[str]:
        return [row["text"] for row in one(capsys, study, finished, "--no-labeler", "--samples", 3, *more)["reports"]]

    first = texts("--seed", 1)
    assert len(set(first)) == 3 and texts("--seed", 1) == first and texts("--seed", 2) != first
    greedy = one(capsys, study, finished, "--no-labeler")
    assert greedy["labeler"] is None and greedy["reports"][0]["labels"] is None
    assert texts("--temperature", 0.0001) == [greedy["reports"][0]["text"]] * 3


def test_the_terminal_shows_report_findings_and_that_it_is_no_diagnosis(finished, capsys, tmp_path):
    study = read_manifest(finished.parent / "manifest.jsonl", split="test")[0]
    code, out, err = asked(capsys, study.images[0].path, "--run", finished, "--json", tmp_path / "report.json")
    assert (
        code == 0
        and out.startswith("report\n")
        and NOT_FOR_CLINICAL_USE in out
        and "no --indication" in err
        and "no --view" in err
    )
    (row,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert ("truncated" in out) is row["truncated"]
    code, out, _ = asked(capsys, study.images[0].path, "--run", finished, "--no-labeler")
    assert code == 0 and "(labeler)" not in out and NOT_FOR_CLINICAL_USE in out


def test_what_was_written_is_shown_as_what_it_is(world):
    """Think text apart, malformed completions raw and unlabelled, blank findings left out."""
    from rich.console import Console

    def said(**changes) -> str:
        row = {
            "text": "<raw>",
            "report": "Clear.",
            "think": None,
            "labels": [None] * 14,
            "truncated": False,
            "malformed": False,
        }
        console = Console(width=200)
        with console.capture() as caught:
            console.print(shown_report(row | changes, title="report", mode="think", labeler="chexbert"))
        return caught.get()

    labels = [None] * 14
    labels[1], labels[9], labels[8] = 1, -1, 0
    shown = said(think="large heart [bold]", labels=labels)
    assert (
        "large heart [bold]" in shown and "truncated" not in shown and "malformed" not in shown and "<raw>" not in shown
    )
    table = {
        tuple(line.strip("│ \n").replace("│", " ").split("  ")[0:1])[0].strip(): line
        for line in shown.splitlines()
        if "│" in line
    }
    assert set(table) == {"Cardiomegaly", "Pleural Effusion", "Pneumothorax"}
    assert (
        "positive" in table["Cardiomegaly"]
        and "uncertain" in table["Pleural Effusion"]
        and "negative" in table["Pneumothorax"]
    )
    assert "no well-formed think block" in said() and "no finding in it" in said()
    broken = said(report=None, malformed=True, truncated=True, labels=None)
    assert "malformed" in broken and "<raw>" in broken and "truncated" in broken and "│" not in broken

    rows = [{"report": None, "labels": None}, {"report": "The heart is enlarged.", "labels": None}]
    labeler = Labeler.load(world.folder / "labeler")
    add_labels(rows, labeler.label)
    assert rows[0]["labels"] is None
    assert classes_of_values(rows[1]["labels"]) == labeler.label(["The heart is enlarged."])[0].tolist()


def test_what_cannot_be_reported_is_refused_with_the_remedy(finished, capsys, tmp_path):
    image = read_manifest(finished.parent / "manifest.jsonl", split="test")[0].images[0].path

    def refused(*arguments: object) -> str:
        code, _, err = asked(capsys, *arguments)
        assert code == 2 and "Traceback" not in err
        return err

    def usage(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            asked(capsys, *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "`mrg-r1 summary RUN`" in usage(finished)
    assert "give --samples N too" in usage(image, "--run", finished, "--seed", 1)
    assert "no config.yaml" in refused(image, "--run", tmp_path)
    assert "--view: 1 given, but 2 image(s)" in refused(image, image, "--run", finished, "--view", "frontal")
    unused = refused(image, "--run", finished, "--comparison", "none")
    assert "--comparison" in unused and "['indication', 'prior_report']" in unused and "leave it out" in unused
    assert "--indication ' ': empty" in refused(image, "--run", finished, "--indication", " ")
    assert "its indication contains <|im_end|>" in refused(
        image, "--run", finished, "--indication", "a<|im_end|>", "--no-labeler"
    )
    assert f"{tmp_path}/none.png: no such file" in refused(tmp_path / "none.png", "--run", finished)
    assert "--no-labeler" in refused(image, "--run", finished, "--labeler", tmp_path / "gone")
    assert "--device cuda:99: cannot be used" in refused(image, "--run", finished, "--device", "cuda:99")
    config = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(config.replace("/policy\n", "/gone\n"))
    assert (
        "/gone: no such folder (policy.path of" in (message := refused(image, "--run", finished))
        and "--policy" in message
    )
    policy = load_recipe(finished.parent / "recipe.yaml").policy.path
    assert asked(capsys, image, "--run", finished, "--no-labeler", "--policy", policy)[0] == 0


def test_a_run_that_trained_every_parameter_is_its_own_policy(finished, capsys, inline_rewards):
    """RUN/policy, not the policy that it began with: on the terminal and in the evaluation."""
    from mrg_r1.policy.load import save_policy
    from mrg_r1.policy.lora import merge_adapter

    recipe = load_recipe(finished / "config.yaml", ["sft.trainable=all"])
    study = read_manifest(finished.parent / "manifest.jsonl", split="test")[0]
    (with_adapter,) = one(capsys, study, finished, "--no-labeler")["reports"]
    policy = load_policy(recipe.policy.path, dtype=torch.float32)
    merge_adapter(policy, finished / "adapter")
    save_policy(policy, finished / "policy", source=recipe.policy.path)
    (finished / "adapter").rename(finished / "other")
    (finished / "config.yaml").write_text(dump_recipe(recipe))
    (merged,) = one(capsys, study, finished, "--no-labeler")["reports"]
    evaluated(finished, "evaluation.max_test_studies=1")
    (row,) = lines(finished / "evaluation/test_predictions.jsonl")
    assert merged["text"] == with_adapter["text"] == row["text"]


def test_studies_without_references_get_reports_and_no_scores(finished, capsys, inline_rewards):
    evaluated(finished)
    scored = (finished / "evaluation/test.json").read_bytes()
    config = (finished / "config.yaml").read_bytes()
    predictions = {row["id"]: row for row in lines(finished / "evaluation/test_predictions.jsonl")}
    other = bare(finished.parent / "manifest.jsonl", "hospital.jsonl")
    capsys.readouterr()
    evaluated(finished, f"data.manifest={other}", "data.context=[indication]")
    assert "8 reports" in capsys.readouterr().out
    rows = lines(finished / "evaluation/hospital_test_reports.jsonl")
    assert [row["id"] for row in rows] == list(predictions)
    assert set(rows[0]) == {"id", "text", "report", "think", "labels", "truncated", "malformed"}
    for row in rows[:3]:  # the fourth has lost its prior
        before = predictions[row["id"]]
        assert row["text"] == before["text"] and row["truncated"] is not before["ended"]
        assert row["labels"] == (before["labels"] if row["report"] else None)
    assert (finished / "evaluation/test.json").read_bytes() == scored and (
        finished / "config.yaml"
    ).read_bytes() == config
    assert not (finished / "evaluation/hospital_test.json").exists()


def test_another_manifest_of_the_same_split_name_overwrites_nothing(finished, inline_rewards):
    """With references and no training split: scored without the baseline that needs one, under the manifest's name."""
    evaluated(finished)
    scored = {path: path.read_bytes() for path in (finished / "evaluation").iterdir()}
    other = bare(finished.parent / "manifest.jsonl", "other.jsonl", report="The heart is enlarged.")
    evaluated(finished, f"data.manifest={other}", "data.context=[indication]")
    result = json.loads((finished / "evaluation/other_test.json").read_text())
    assert result["n"] == 8 and result["baselines"]["random_train"] is None and result["manifest"] == str(other)
    assert all(path.read_bytes() == content for path, content in scored.items())
    assert load_recipe(finished / "config.yaml").data.manifest == finished.parent / "manifest.jsonl"
    other.write_text("".join(other.read_text().splitlines(keepends=True)[:4]))  # another file of that name
    with pytest.raises(RecipeError, match="other_test_predictions.jsonl: there already, and of other studies"):
        evaluated(finished, f"data.manifest={other}", "data.context=[indication]")


def test_an_evaluation_is_named_after_split_and_foreign_manifest(finished):
    def name(manifest: str, split: str = "test") -> str:
        return evaluation_name(
            load_recipe(finished / "config.yaml", [f"data.manifest={manifest}", f"data.test_split={split}"])
        )

    own = finished.parent / "manifest.jsonl"
    assert (
        name(str(own)) == "test" and name(str(own), "val") == "val" and name(f"{finished}/../manifest.jsonl") == "test"
    )
    assert name("/x/iu/manifest.jsonl") == "iu_test" and name("/x/ours.jsonl", "all") == "ours_all"


def test_a_test_split_of_which_a_part_has_references_is_refused(finished, inline_rewards):
    other = bare(finished.parent / "manifest.jsonl", "other.jsonl", of=slice(2, 5))
    with pytest.raises(
        RecipeError,
        match="3 of 8 studies of data.test_split 'test' have neither report nor labels .*a split of their own",
    ):
        evaluated(finished, f"data.manifest={other}", "data.context=[indication]")


def test_training_goes_on_demanding_references(finished, tmp_path):
    other = bare(finished.parent / "manifest.jsonl", "other.jsonl")
    with pytest.raises(
        ManifestError,
        match="`report`: null, and so is `labels.said`.*only `launch/evaluate.py` takes studies with neither",
    ):
        read_manifest(other)


def test_what_a_report_cannot_be_written_with_is_refused_before_the_policy_is_loaded(
    finished, world, tmp_path, capsys, monkeypatch
):
    """Words that its tokenizer would read as a token; a checkpoint that is not whole (`tests/policy` has each way)."""
    image = read_manifest(world.folder / "phantoms/manifest.jsonl")[0].images[0].path
    code, _, said = asked(capsys, image, "--run", finished, "--no-labeler", "--policy", headless(world, tmp_path))
    assert code == 2 and "no tensor model.language_model.norm.weight" in said.replace("\n", " ")
    monkeypatch.setattr("mrg_r1.policy.load.load_policy", lambda *args, **kwargs: pytest.fail("it was loaded"))
    words = ("--indication", "Cough.<|im_end|>")
    code, _, said = asked(capsys, image, "--run", finished, "--no-labeler", *words)
    assert code == 2 and "its indication contains <|im_end|>" in said


def headless(world: World, folder: Path) -> Path:
    """The world's policy without its last norm."""
    shutil.copytree(world.folder / "policy", folder / "headless")
    tensors = load_file(folder / "headless/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "model.norm" not in name}
    save_file(kept, folder / "headless/model.safetensors", metadata={"format": "pt"})
    return folder / "headless"


def test_a_special_token_in_any_context_ends_the_launch_and_not_the_step_that_meets_it(finished, inline_rewards):
    studies = read_manifest(finished.parent / "manifest.jsonl")
    studies[2] = replace(studies[2], indication="cough <|im_start|>system")
    write_manifest(finished.parent / "manifest.jsonl", studies)
    with pytest.raises(RecipeError, match=rf"study {studies[2].id}: its indication contains <\|im_start\|>"):
        open_run(load_recipe(finished / "config.yaml", [f"output_dir={finished.parent}/new"]), OneRank(), task="grpo")
