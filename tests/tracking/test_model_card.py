"""The card beside exported weights: what the hub reads, code that runs, the run's numbers, and nothing of a patient."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from mrg_r1.config.recipe import load_run
from mrg_r1.data.study import write_manifest
from mrg_r1.evaluation.generate import reports_of_one
from mrg_r1.files import sha256_of
from mrg_r1.metrics.clinical import DEFINITIONS
from mrg_r1.policy.export.export import export
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.lora import load_adapter, save_adapter
from mrg_r1.tracking.card.card import model_card
from mrg_r1.tracking.card.facts import read_facts
from tests.conftest import each_family, make_study, with_lora
from tests.tracking.page_runs import by_radeval, labels, prediction, write_evaluated, write_metrics

RECORD = {
    "kind": "adapter",
    "run": "/data/smith_john/run",
    "step": 30,
    "policy": "/data/smith_john/base",
    "cold_start": None,
    "adapter": {"path": "x", "sha256": "c0ffee", "rank": 4, "alpha": 8, "modules": 28, "targets": "language"},
    "versions": {"mrg-r1": "0.2.0", "torch": "2.13.0+cpu"},
}
HOSTILE = "a|b `c` ```\n---\n# Heading <script>alert(1)</script> [x](http://e.org) **z** \x00"
LABELER = {"name": "labeler", "fingerprint": "feb889ca61c0c588"}
HEADINGS = ["Licence", "Load", "What it is", "Evaluation", "Reward", "Data", "Recipe", "Limits", "Privacy"]


@pytest.fixture
def run(tmp_path, tiny_policy_directory):
    """RUN and its manifest, in folders that are named after a patient; not evaluated yet."""
    folder = tmp_path / "smith_john" / "run"
    folder.mkdir(parents=True)
    studies = [make_study(tmp_path, name, [(84, 84)], report="Heart grossly enlarged.") for name in "abc"]
    manifest = tmp_path / "smith_john" / "manifest.jsonl"
    write_manifest(manifest, studies)
    recipe = {
        "output_dir": str(folder),
        "steps": 40,
        "data": {"manifest": str(manifest), "test_split": "train", "min_pixels": 56 * 56, "max_pixels": 112 * 112},
        "prompt": {"mode": "plain", "instruction": "Write the findings of this chest X-ray."},
        "policy": {"path": str(tiny_policy_directory), "dtype": "float32"},
        "rollout": {"max_new_tokens": 12},
        "reward": {"labeler": "/models/labeler", "weights": {"mccs": 0.75, "format": 0.25}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    write_metrics(folder, 3)
    return SimpleNamespace(folder=folder, studies=studies, manifest=manifest, policy=tiny_policy_directory)


def change(run, section, **values):
    path = run.folder / "config.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe[section] |= values
    path.write_text(yaml.safe_dump(recipe))


def evaluate(run, name="test", *, labeler=LABELER, studies=None, **more):
    studies = studies or run.studies
    said = labels(Cardiomegaly=1)
    rows = [prediction(study, "The heart is enlarged.", said, said) for study in studies]
    known = {"labeler": labeler, "reference_labels": {"said": 1, "read": 2, "labeler": labeler}}
    return write_evaluated(run.folder, name, rows, studies, **known, **more)


def facts_of(run):
    recipe = load_run(run.folder)
    dumped = recipe.model_dump(mode="json")
    return read_facts(run.folder, dumped, instruction=recipe.prompt.words, policy=run.policy)


def card_of(run, **more):
    return model_card(facts_of(run), RECORD | more)


def body(card):
    """The card below its metadata, as Markdown's tokens."""
    return MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)


def headings(card):
    tokens = body(card)
    return [
        tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"
    ]


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_hub_reads_the_metadata(run, tmp_path, kind):
    card = card_of(run, kind=kind)
    (tmp_path / "README.md").write_text(card)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["license"] == "other" and metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["base_model_relation"] == {"adapter": "adapter", "merged": "finetune"}[kind]
    assert metadata["library_name"] == {"adapter": "peft", "merged": "transformers"}[kind]
    assert {"grpo", "lora", "radiology", "qwen2_5_vl"} <= set(metadata["tags"])
    assert "base_model" not in metadata and "language" not in metadata, "nobody has said them"
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == metadata["library_name"] and loaded.text.lstrip().startswith("# Chest")
    assert headings(card) == HEADINGS
    assert "has to state the licence" in card.replace("\n", " ") and "Not a medical device" in card


def test_a_base_in_the_hubs_cache_is_named_as_the_hub_names_it(run, tmp_path):
    folder = tmp_path / "hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/0123abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((run.policy / "config.json").read_bytes())
    run.policy = folder
    card = ModelCard(card_of(run))
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert "base = 'Qwen/Qwen2.5-VL-7B-Instruct'" in card.text and "revision `0123abc`" in card.text


def test_every_definition_stands_with_its_interval_and_baselines(run):
    assert "**Not evaluated**" in card_of(run)
    result = evaluate(run)
    card = card_of(run)
    assert "Not evaluated" not in card
    assert "what the manifest says \\(labels.said\\) of 1 studies, read by the labeler labeler" in card
    for name in DEFINITIONS:
        row = next(line for line in card.splitlines() if line.startswith(f"| `{name}` |"))
        low, high = result["definitions"][name]["f1_ci"]
        assert f"{low:.3f}–{high:.3f}" in row
        assert row.count("|") == len(["name", "P", "R", "F1", "ci", "before", "normal", "blank", "itself"]) + 1
    assert "| normal | blank | itself |" in card and "**One seed** (0)" in card


def test_who_else_has_read_the_reports_is_on_the_card(run):
    result = evaluate(run)
    second = {"labeler": {"name": "second", "fingerprint": "0ddba11"}, "agreement_on_references": 0.9}
    held_out = second | {"definitions": result["definitions"], "disease_micro13": 0.5}
    lexical = {"cleaning": "raw", "scores": {"bleu4": 0.125}}
    truth = {"disease_micro13": {"precision": 0.25, "recall": 0.25, "f1": 0.25}}
    more = {"held_out": held_out, "hacking_gap": 0.5, "lexical": lexical, "truth": truth, "rendered": 3}
    (run.folder / "evaluation/test.json").write_text(json.dumps(result | more))
    card = card_of(run)
    assert "By the labeler `second`, `0ddba11`, which was never rewarded:" in card
    assert card.count("| `chexbert_micro5` |") == 2 and "hacking gap +0.500" in card
    assert "| scores bleu4 | – | 0.125 |" in card and "| `disease_micro13` | 0.250 | 0.250 | 0.250 |" in card
    (run.folder / "evaluation/test.json").write_text(json.dumps({"n": 3, "definitions": {}}))
    with pytest.raises(ValueError, match="test.json: no field `baselines`"):
        card_of(run)


def test_radevals_metrics_stand_with_version_weights_and_interval(run):
    left_out = {"left_out": {"radcliq": "radcliq left out: not finite for studies smith_john (radcliq_v1)"}}
    evaluate(run, "test_before", radeval=by_radeval(0.1234, name=HOSTILE))
    evaluate(run, radeval=by_radeval(0.4321, name=HOSTILE, **left_out))
    card = card_of(run)
    assert "By radeval 2.2.1, means over 1,234 reports:" in card
    assert "| 0.123 | 0.432 | 0.422–0.442 |" in card and "| `bleu` | 0.062 | 0.062 | 0.013–0.188 |" in card
    assert f"RadGraph-XL \\& \\<simple\\>; weights' SHA-256 `{'5eed' * 16}`" in card
    assert "- `bleu`: sacreBLEU; no weights" in card
    assert "Asked of RadEval and not scored: `radcliq`." in card and "smith_john" not in card
    assert headings(card) == HEADINGS and not [token for token in body(card) if token.type == "html_block"]
    evaluate(run, radeval={"scores": {}, "left_out": {"radeval": "/data/smith_john/python: it did not start"}})
    card = card_of(run)
    assert (
        "Asked of RadEval and not scored: `radeval`." in card and "smith_john" not in card and "By radeval" not in card
    )
    evaluate(run, radeval=None)
    card = card_of(run)
    assert "By radeval" not in card and "Asked of RadEval" not in card


def test_data_stand_by_hash_size_and_studies(run):
    evaluate(run)
    card = card_of(run)
    assert f"`{sha256_of(run.manifest)}`, {run.manifest.stat().st_size:,} bytes" in card
    assert "| `train` | 3 | 0 | 0 |" in card and "has changed" not in card
    write_manifest(run.manifest, run.studies[:2])
    assert "**The manifest has changed since the run was evaluated**" in card_of(run)
    run.manifest.write_text("{}\n")
    assert "could not be read as a manifest" in card_of(run)
    run.manifest.unlink()
    assert "neither hashed nor counted" in card_of(run)


def test_no_report_and_no_folder_is_on_the_card(run):
    evaluate(run)
    card = card_of(run)
    for secret in ("smith_john", "grossly", "The heart is enlarged", str(run.policy.parent), "/models/"):
        assert secret not in card


def test_whatever_names_hold_the_card_stays_valid(run, tmp_path):
    change(run, "prompt", instruction=HOSTILE)
    evaluate(run, labeler={"name": HOSTILE, "fingerprint": HOSTILE})
    (run.folder / "environment.json").write_text(json.dumps({"device": HOSTILE, "packages": {"peft": HOSTILE}}))
    (run.manifest.parent / "prepare.json").write_text(json.dumps({"dataset": HOSTILE}))
    card = card_of(run, adapter=RECORD["adapter"] | {"targets": HOSTILE}, versions={HOSTILE: HOSTILE})
    assert headings(card) == HEADINGS and ModelCard(card).data.license == "other"
    tokens = body(card)
    inline = [child for token in tokens if token.children for child in token.children]
    assert not [token for token in [*tokens, *inline] if token.type in ("html_block", "html_inline", "link_open")]
    assert [token.type for token in tokens].count("hr") == 0
    recipe = next(token for token in tokens if token.type == "fence" and token.info == "yaml")
    assert yaml.safe_load(recipe.content) == facts_of(run).recipe
    code = next(token for token in tokens if token.type == "fence" and token.info == "python")
    compile(code.content, "card", "exec")
    assert f"instruction = {HOSTILE!r}" in code.content
    widths = {
        table: {row.count("td_open") + row.count("th_open") for row in rows}
        for table, rows in enumerate(_tables(tokens))
    }
    assert widths and all(len(width) == 1 for width in widths.values()), "no cell was cut in two"


def _tables(tokens):
    """For each table its rows, each as the kinds of its tokens."""
    rows = None
    for token in tokens:
        if token.type == "table_open":
            rows = []
        elif token.type == "table_close":
            yield rows
        elif token.type == "tr_open":
            rows.append([])
        elif rows and rows[-1] is not None:
            rows[-1].append(token.type)


def test_sft_has_no_reward_and_says_so(run):
    (run.folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "sft/target_tokens": 20.0}\n')
    card = card_of(run)
    assert "# Chest X-ray reports: SFT of" in card and "None: supervised fine-tuning on reports." in card
    assert "sft" in ModelCard(card).data.tags


def test_a_break_even_that_is_known_is_named(run):
    change(run, "reward", weights={"additive": 1.0}, threshold=0.3)
    card = card_of(run)
    assert "| `additive` | 1 | 0.3 |" in card and "erases how much a finding gains" in card
    change(run, "reward", threshold="auto")
    assert "not on record" in card_of(run)
    (run.folder / "thresholds.json").write_text(json.dumps({"threshold": 0.28123}))
    assert "| `additive` | 1 | 0.281 |" in card_of(run)


@each_family
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_writes_the_runs_own_report(run, studies, build, tmp_path, monkeypatch, capsys, kind):
    """Word for word: two images of unequal size, views, context, without this project."""
    policy = load_policy(run.policy, dtype=torch.float32)
    save_adapter(with_lora(policy), run.folder / "adapter")
    change(run, "prompt", show_view=True)
    change(run, "data", context=["indication"])
    out = {"adapter": None, "merged": None, kind: tmp_path / "out"}
    export(run.folder, policy=run.policy, cold_start=None, card=lambda record: card_of(run, kind=kind), **out)

    policy = load_policy(run.policy, dtype=torch.float32)
    load_adapter(policy, run.folder / "adapter")
    study = replace(studies[1], indication="cough")
    words = build(policy, show_view=True, context=("indication",))
    [expected] = reports_of_one(policy, study, build=words, mode="plain", max_new_tokens=12)

    code = re.search("```python\n(.*?)\n```", (tmp_path / "out/README.md").read_text(), re.DOTALL)[1]
    code = code.replace("'the base checkpoint'", repr(str(run.policy)))
    code = code.replace('images = ["frontal.png"]', f"images = {[str(image.path) for image in study.images]!r}")
    code = code.replace('views = ["frontal"]', 'views = ["frontal", "lateral"]')
    code = code.replace('indication = ""', 'indication = "cough"')
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    capsys.readouterr()
    exec(compile(code, "card", "exec"), names)
    prompts = words([study])
    assert names["ids"].tolist() == prompts.input_ids.tolist()
    assert (names["seen"]["pixel_values"] == prompts.images.tensors["pixel_values"]).all()
    assert expected["text"] and names["report"] == expected["text"].strip()
