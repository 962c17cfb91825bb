"""README.md of exported weights, as the hub shows it: metadata, how to load, what was measured on what, and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from mrg_r1.tracking.card.evaluated import evaluation_parts
from mrg_r1.tracking.card.facts import CardFacts, Data
from mrg_r1.tracking.card.loading import Kind, loading_code
from mrg_r1.tracking.card.markdown import code, fence, front_matter, table, text
from mrg_r1.tracking.control import CONTROLS

_NOT_STATED = "state it before you share the weights"
_NOT_A_DEVICE = (
    "> **Not a medical device.** These weights are for research. What they write of a radiograph may be wrong, and no "
    "diagnosis, triage or treatment may rest on it."
)
# what a term needs to be known for its break-even to be one number
_BREAK_EVEN = {
    "mccs": "depends on the labels of the references and on the margin",
    "ccs": "depends on the labels of the references",
    "ce_f1": "depends on the labels of the references",
}


def model_card(facts: CardFacts, record: Mapping[str, Any]) -> str:
    """The whole card.

    Args:
        record: what mrg_r1_export.json says; its paths are not shown.
    """
    kind: Kind = record["kind"]
    sections = {
        "Licence": _licence(facts, kind),
        "Load": [_loading(facts, kind)],
        "What it is": _what(facts, kind, record),
        "Evaluation": evaluation_parts(facts),
        "Reward": _reward(facts),
        "Data": _data(facts),
        "Recipe": _recipe(facts),
        "Limits": [_limits(facts)],
        "Privacy": _privacy(),
    }
    parts = [_metadata(facts, kind), f"# Chest X-ray reports: {_learned(facts)} of {_base_name(facts)}", _NOT_A_DEVICE]
    for title, paragraphs in sections.items():
        parts += [f"## {title}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts, kind: Kind) -> str:
    metadata: dict[str, Any] = {}
    comments = [f"license: {_NOT_STATED}"]
    if facts.base.name is None:
        comments.append(f"base_model: OWNER/NAME of the base checkpoint on the hub; {_NOT_STATED}")
    else:
        metadata["base_model"] = facts.base.name
    metadata["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    if facts.data is not None and facts.data.dataset == "phantom":
        metadata["language"] = ["en"]  # the phantoms' own words
    else:
        comments.append("language: en, or what the reports are written in")
    learned_by = [facts.learned_by.lower()] if facts.learned_by else []
    return front_matter(
        metadata
        | {
            "library_name": "peft" if kind == "adapter" else "transformers",
            "license": "other",
            "pipeline_tag": "image-text-to-text",
            "tags": [
                "mrg-r1",
                *learned_by,
                "lora",
                facts.base.model_type,
                "medical",
                "radiology",
                "chest-x-ray",
                "report-generation",
            ],
        },
        comments,
    )


def _base_name(facts: CardFacts) -> str:
    return code(facts.base.name or facts.base.folder)


def _learned(facts: CardFacts) -> str:
    control = facts.recipe.get("control")
    if control is not None:
        return f"a control ({CONTROLS[control]})"
    return facts.learned_by or "LoRA"


def _licence(facts: CardFacts, kind: Kind) -> list[str]:
    copied = " The base's own licence file, where it has one, lies beside the weights." if kind == "merged" else ""
    return [
        "**Not stated.** `license: other` above only holds its place: whoever shares these weights has to state the "
        "licence, which follows from the base checkpoint's, from the terms of the data and from those of the labeler "
        f"that was the reward.{copied}"
    ]


def _loading(facts: CardFacts, kind: Kind) -> str:
    needed = "transformers and PEFT" if kind == "adapter" else "transformers"
    versions = facts.environment.get("packages") or {}
    named = ", ".join(
        f"{name} {text(versions[name])}"
        for name in ("transformers", *(["peft"] * (kind == "adapter")))
        if name in versions
    )
    trained = f" The run had {named}." if named else ""
    unknown = "" if facts.base.name or kind == "merged" else " Where the base checkpoint is from has to be filled in."
    return (
        f"With plain {needed}: the prompt of the run, images of the run's size, a greedy report.{trained}{unknown} "
        "Radiographs of 8 bits; `mrg-r1 report` reads DICOM and 16 bits too.\n\n"
        + fence(loading_code(facts, kind), "python")
    )


def _what(facts: CardFacts, kind: Kind, record: Mapping[str, Any]) -> list[str]:
    base, summary = facts.base, facts.summary
    relation = (
        "One LoRA adapter for the base checkpoint" if kind == "adapter" else "The base checkpoint with LoRA merged in"
    )
    step = record.get("step")
    of = f" of {summary['steps']:,}" if summary.get("steps") else ""
    lines = [
        f"- {relation}, {code(base.folder)}, model type {code(base.model_type)}"
        + (f", on the hub {code(base.name)}, revision {code(base.revision)}." if base.name else "."),
        f"- Step {step}{of}, the best by validation{_score(facts)}."
        if step is not None
        else "- The run has not ended: its best so far.",
        "- Step 0 is the start itself: nothing that training learned was better." if step == 0 else "",
        f"- **One seed** ({facts.recipe['seed']}): how far another seed would be away is not known from this run.",
    ]
    for name, title in (("cold_start", "Cold start, merged before training"), ("adapter", "Adapter of the run")):
        if (adapter := record.get(name)) is not None:
            targets = f", {text(adapter['targets'])}" if adapter.get("targets") else ""
            lines.append(
                f"- {title}: rank {adapter['rank']}, alpha {adapter['alpha']}, {adapter['modules']} modules{targets}, "
                f"SHA-256 {code(adapter['sha256'])}."
            )
    ranks = summary.get("world_size")
    if summary.get("training_seconds"):
        minutes = summary["training_seconds"] / 60
        lines.append(
            f"- {minutes:,.1f} minutes in training steps, {ranks} rank{'s' if ranks != 1 else ''}, device "
            f"{code(facts.environment.get('device', 'not known'))}."
        )
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in record["versions"].items())
    lines.append(f"- Written by `mrg-r1 export` with {versions}; the numbers are those of the run's own files.")
    return ["\n".join(line for line in lines if line)]


def _score(facts: CardFacts) -> str:
    score = (facts.summary.get("best") or {}).get("score")
    return "" if score is None else f" ({code(facts.recipe['evaluation']['select'])} {score:.3f} there)"


def _reward(facts: CardFacts) -> list[str]:
    if facts.learned_by == "SFT":
        return ["None: supervised fine-tuning on reports."]
    reward = facts.recipe["reward"]
    rows = [[code(name), f"{weight:g}", _break_even(name, facts)] for name, weight in reward["weights"].items()]
    margin = f"{reward['margin']:g}"
    if reward.get("margin_end") is not None:
        margin += f" to {reward['margin_end']:g} in {reward['margin_steps']} steps"
    scale = facts.recipe["grpo"]["advantage_scale"]
    spoiled = ""
    if scale == "group":
        spoiled = (
            " Division by the group's std erases how much a finding gains or costs, so that these break-evens do not "
            "hold as they stand; `mrg-r1 reward-card` shows both."
        )
    return [
        table(["term", "weight", "break-even: the probability from which saying a finding pays"], rows),
        f"Margin of MCCS {margin}, CCS weights {code(reward['ccs_weights'])}, format {code(reward['format'])}, "
        f"normalised by {code(reward['normalise'])}; advantages divided by {code(scale)}.{spoiled}",
    ]


def _break_even(name: str, facts: CardFacts) -> str:
    if name == "additive":
        threshold = facts.recipe["reward"].get("threshold")
        if threshold == "auto":
            found = facts.thresholds
            return "chosen from the training labels, not on record" if found is None else f"{found['threshold']:.3f}"
        if isinstance(threshold, Mapping):
            return ", ".join(f"{text(finding)} {value:g}" for finding, value in threshold.items())
        return f"{threshold:g}"
    if name in _BREAK_EVEN:
        return f"{_BREAK_EVEN[name]}: not computed here, `mrg-r1 reward-card` does"
    return "none: not a term of findings, or one of the user's"


def _data(facts: CardFacts) -> list[str]:
    data, section = facts.data, facts.recipe["data"]
    names = ", ".join(f"{code(section[f'{part}_split'])} ({part})" for part in ("train", "val", "test"))
    said = [f"Splits of the run: {names}. Counted at the time of export, in the manifest that the recipe names."]
    if data is None:
        return [
            "The manifest did not lie where the recipe names it when this was exported: neither hashed nor counted."
        ]
    made = f", made by `mrg-r1 prepare` of {code(data.dataset)}" if data.dataset else ""
    said.append(f"SHA-256 {code(data.sha256)}, {data.size:,} bytes{made}.")
    if data.unchanged is False:
        said.append("**The manifest has changed since the run was evaluated**: its test split has other studies.")
    if data.splits is None:
        return [*said, "It could not be read as a manifest when this was exported: its studies are not counted."]
    return [*said, _split_table(data)]


def _split_table(data: Data) -> str:
    rows = [
        [code(name), f"{one.studies:,}", f"{one.labels_only:,}", f"{one.rendered:,}"]
        for name, one in (data.splits or {}).items()
    ]
    return table(["split", "studies", "with labels alone", "drawn by a program"], rows)


def _recipe(facts: CardFacts) -> list[str]:
    dumped = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True)
    return ["Of every path the last part; the prompt's instruction as it is.", fence(dumped, "yaml")]


def _limits(facts: CardFacts) -> str:
    context = ", ".join(text(field) for field in facts.recipe["data"]["context"]) or "nothing else of the patient"
    lines = [
        f"- It sees the images of one study and {context}; it has no laboratory values, no history and no other "
        "examination.",
        "- F1 here is agreement of labels that a program reads in texts, or that a data set says; it is no "
        "radiologist's judgement of a report, and definitions do not compare with one another.",
        "- Data from elsewhere (other machines, hospitals, patients, languages) were not measured unless a table "
        "above says so.",
        "- A report may name findings that are not there, miss those that are, and say both with the same certainty.",
    ]
    drawn = (
        facts.data is not None
        and facts.data.splits is not None
        and any(one.rendered for one in facts.data.splits.values())
    )
    if drawn:
        lines.insert(0, "- **Drawn by a program**: some or all images are phantoms, and say nothing about radiographs.")
    return "\n".join(lines)


def _privacy() -> list[str]:
    return [
        "Weights can repeat what they were trained on. If that was data under an agreement, such as MIMIC-CXR's, it "
        "may forbid sharing them, or allow it only to people who have signed it: read it first.",
        "This card holds no report and of no path more than its last part. `mrg_r1_export.json` and "
        "`adapter_config.json` beside it name whole paths of the machine that wrote them: look at both before sharing.",
    ]
