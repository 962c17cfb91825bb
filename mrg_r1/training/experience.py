"""Saved experience: a step's reports and rewards on the disk, for the debugging phases and for batches that could not
be learned from.

A step is one part a rank, `step_NNNNNN_rankR.safetensors` and `.json`; a reader joins the parts in the order of the
ranks, which is that of the global batch, and cuts the whole over ranks of its own, so their number may be another.
Images are not kept: prompts are made again from the manifest by study id, and must be the same. Nothing is pickled.
Reports are patient data, and never leave the machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.data.loader import PromptBuilder
from mrg_r1.engine.ranks import Ranks
from mrg_r1.files import atomically, save_tensors, sha256_of, write_text_atomically
from mrg_r1.training.resume import differences
from mrg_r1.types import Completions, Prompts, Rewards, Sampled, Study

_FORMAT = 1
_NAME = re.compile(r"step_(\d{6,})_rank(\d+)\.(json|safetensors)")
# what may change within a `phases=rollout` run: nothing of it is seen in a report or a reward
_NOT_SAMPLED_UNDER = ("engine.", "optimizer.", "steps", "rollout.cache_tokens", "rollout.reuse_prefill")
# what prompts and log-probs hang on
_SAMPLED_UNDER = ("prompt.", "data.min_pixels", "data.max_pixels", "data.context", "rollout.temperature")
_BLOCKS, _BLOCK = 16, 65_536  # of each file of a policy, read for its fingerprint: a 7B checkpoint is 15 GB


def write_step(
    folder: Path,
    step: int,
    sampled: Sampled,
    *,
    recipe: Recipe,
    ranks: Ranks,
    problem: str | None = None,
    own_weights: bool = False,
) -> None:
    """Write this rank's part of a step, its JSON last: a part is whole when that is there and its digest fits.

    Args:
        folder: made if absent.
        problem: why there are no rewards.
        own_weights: the LoRA in `adapter_folder` belongs to this step.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, rewards = sampled.completions, sampled.rewards
    tensors = {"token_ids": done.token_ids, "mask": done.mask, "logp": done.logp, "ended": done.ended}
    optional = {"reference_logp": sampled.reference_logp, "old_logp": sampled.old_logp}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    if rewards is not None:
        tensors |= {"total": rewards.total, "labels": rewards.labels, "reference_labels": rewards.reference_labels}
        tensors |= {f"term/{name}": values for name, values in rewards.terms.items()}
        tensors |= {f"constant/{name}": values for name, values in rewards.constant.items()}
        if rewards.contradictions is not None:
            tensors["contradictions"] = rewards.contradictions
    path = folder / f"step_{step:06d}_rank{ranks.rank}.safetensors"
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomically(path) as temporary:
        save_tensors(temporary, stored)
    record = {
        "format": _FORMAT,
        "step": step,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "studies": sampled.prompts.study_ids,
        "prompts": prompt_digests(sampled.prompts),
        "texts": done.texts,
        "reports": None if rewards is None else rewards.report_texts,
        "weights": None if rewards is None else rewards.weights,
        "problem": problem,
        "own_weights": own_weights,
        **_fingerprints(recipe),
        "recipe": recipe.model_dump(mode="json"),
        "sha256": sha256_of(path),
    }
    write_text_atomically(path.with_suffix(".json"), json.dumps(record) + "\n")


def next_step(run: Path, recipe: Recipe, ranks: Ranks) -> int:
    """The first step of `phases=rollout` that is not in RUN/experience whole, or not in RUN/metrics.jsonl. Every rank
    calls this.

    Raises:
        RecipeError: what is there was made under another recipe, and `resume.allow_changes` is false.
    """
    return ranks.from_main(lambda: _first_missing(run, recipe), RecipeError)


def _first_missing(run: Path, recipe: Recipe) -> int:
    folder, metrics = run / "experience", run / "metrics.jsonl"
    # a kill can come between a step and its line
    logged = metrics.read_text(encoding="utf-8").count("\n") if metrics.is_file() else 0
    for step in range(min(recipe.steps, logged)):
        try:
            parts = _read_parts(folder, step)
        except RecipeError:
            return step
        changed = [line for line in differences(parts[0]["recipe"], recipe) if not line.startswith(_NOT_SAMPLED_UNDER)]
        if changed and not recipe.resume.allow_changes:
            listed = "\n".join(f"  {line}" for line in changed)
            raise RecipeError(
                f"{folder}: step {step} was sampled under another recipe:\n{listed}\n"
                "take the old values back, set another output_dir, or go on with resume.allow_changes=true"
            )
    return min(recipe.steps, logged)


@dataclass(frozen=True)
class SavedExperience:
    """Steps to learn from, in their order; their files have been checked.

    Attributes:
        steps: of each step its parts' records, rank 0 first.
        adapter: the LoRA that the only step is to be repeated with; None: a fresh one.
    """

    folder: Path
    steps: list[list[dict[str, Any]]]
    adapter: Path | None
    recipe: Recipe = field(repr=False)

    def read(
        self, number: int, *, build: PromptBuilder, studies: Mapping[str, Study], ranks: Ranks
    ) -> tuple[Sampled, Rewards]:
        """This rank's share of the `number`-th step, and its rewards, on its device.

        Raises:
            RecipeError: a study is not in the manifest, or its prompt is not the one that was sampled for.
        """
        parts = self.steps[number]
        ids = [study for part in parts for study in part["studies"]]
        share = len(ids) // ranks.world_size
        rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
        where = f"{self.folder}, step {parts[0]['step']}"
        lost = [study for study in ids[rows] if study not in studies]
        if lost:
            raise RecipeError(
                f"{where}: study {lost[0]} is not in split {self.recipe.data.train_split!r} of "
                f"{self.recipe.data.manifest}; give the manifest and split that it was sampled from"
            )
        prompts = build([studies[study] for study in ids[rows]])
        digests = [digest for part in parts for digest in part["prompts"]][rows]
        for study, now, then in zip(ids[rows], prompt_digests(prompts), digests, strict=True):
            if now != then and not self.recipe.resume.allow_changes:
                raise RecipeError(
                    f"{where}: the prompt of study {study} is not the one that was sampled for, its images or "
                    "tokenizer have changed (or are read otherwise here); restore them, or learn from it all the "
                    "same with resume.allow_changes=true"
                )
        loaded = [load_file(_file(self.folder, part["step"], part["rank"], "safetensors")) for part in parts]
        return _joined(loaded, parts, prompts, rows, pad_id=build.tokenizer.pad_token_id, device=ranks.device)


def open_experience(path: Path, recipe: Recipe) -> SavedExperience:
    """Check the first `steps` saved steps at `path`, before any model is loaded.

    Args:
        path: a folder, for all its steps, or any file of one step, for that one.

    Raises:
        RecipeError: nothing there, too few steps, a part that is missing or damaged, no rewards, a group or batch of
            another size, another manifest, policy or prompt than now (unless `resume.allow_changes`); names the file,
            both values and the remedy.
    """
    named = _NAME.fullmatch(path.name)
    folder = path if named is None else path.parent
    found = sorted({int(match[1]) for match in map(_NAME.fullmatch, _names(folder)) if match})
    if not found or (named is not None and not path.is_file()):
        raise RecipeError(
            f"experience {path}: no saved experience there; give RUN/experience of a phases=rollout run, or a file "
            "step_NNNNNN_rankR.json of RUN/experience or RUN/not_finite"
        )
    wanted = found[: recipe.steps] if named is None else [int(named[1])]
    if len(wanted) < recipe.steps:
        raise RecipeError(
            f"experience {path}: {len(wanted)} saved step(s), steps is {recipe.steps}; set steps={len(wanted)}"
        )
    steps = [_read_parts(folder, step) for step in wanted]
    adapters = [_adapter_of(folder, parts[0]) for parts in steps]
    if len(steps) > 1 and any(adapters):
        raise RecipeError(
            f"experience {path}: each of these steps has weights of its own; give one step's file, "
            f"as {_file(folder, wanted[0], 0, 'json')}, and steps=1"
        )
    fingerprints = _fingerprints(recipe)
    for parts in steps:
        _check_fit(folder, parts, recipe, fingerprints)
    return SavedExperience(folder, steps, adapters[0], recipe)


def adapter_folder(folder: Path, step: int) -> Path:
    """Where the LoRA stands that a step is to be repeated with."""
    return folder / f"step_{step:06d}_adapter"


def keep_newest_adapters(folder: Path, count: int) -> None:
    """Remove the weights, and nothing else, of all but the newest `count` steps: they would fill the disk."""
    for old in sorted(folder.glob("step_*_adapter"))[:-count]:
        shutil.rmtree(old)


def prompt_digests(prompts: Prompts) -> list[str]:
    """B digests of what the policy reads: ids without padding, and the images as its tower takes them."""
    prompts, digests = prompts.to("cpu"), []
    for study in range(len(prompts)):
        one = prompts.select([study])
        tensors = one.images.tensors
        digest = hashlib.sha256()
        for part in (one.input_ids[one.attention_mask.bool()], *(tensors[name] for name in sorted(tensors))):
            digest.update(part.contiguous().numpy().tobytes())
        digests.append(digest.hexdigest()[:16])
    return digests


def _joined(
    loaded: Sequence[dict[str, Tensor]],
    records: Sequence[dict[str, Any]],
    prompts: Prompts,
    rows: slice,
    *,
    pad_id: int,
    device: torch.device,
) -> tuple[Sampled, Rewards]:
    """The parts of a step as one, of which `rows` are kept."""
    done = Completions.join(
        [
            Completions(part["token_ids"], part["mask"], part["logp"], part["ended"], record["texts"])
            for part, record in zip(loaded, records, strict=True)
        ],
        pad_id=pad_id,
    )
    length = done.token_ids.shape[2]

    def stacked(name: str) -> Tensor:
        return torch.cat([part[name] for part in loaded])[rows]

    def padded(name: str) -> Tensor | None:
        if name not in loaded[0]:
            return None
        return torch.cat([pad(part[name], (0, length - part[name].shape[2])) for part in loaded])[rows].to(device)

    rewards = Rewards(
        total=stacked("total"),
        terms={name.removeprefix("term/"): stacked(name) for name in loaded[0] if name.startswith("term/")},
        weights=records[0]["weights"],
        labels=stacked("labels"),
        report_texts=[group for record in records for group in record["reports"]][rows],
        reference_labels=stacked("reference_labels"),
        constant={name.removeprefix("constant/"): stacked(name) for name in loaded[0] if name.startswith("constant/")},
        contradictions=stacked("contradictions") if "contradictions" in loaded[0] else None,
    )
    completions = Completions(
        token_ids=done.token_ids[rows].to(device),
        mask=done.mask[rows].to(device),
        logp=done.logp[rows].to(device),
        ended=done.ended[rows].to(device),
        texts=done.texts[rows],
    )
    return Sampled(prompts.to(device), completions, rewards, padded("reference_logp"), padded("old_logp")), rewards


def _read_parts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The records of a step, rank 0 first.

    Raises:
        RecipeError: a part is missing, damaged, or of another writing than the first.
    """
    first = _read_part(folder, step, 0)
    parts = [first, *(_read_part(folder, step, rank) for rank in range(1, first["world_size"]))]
    for rank, part in enumerate(parts):
        for key in ("world_size", "manifest", "policy", "recipe"):
            if part[key] != first[key]:
                raise RecipeError(
                    f"{_file(folder, step, rank, 'json')}: its {key} is not that of rank 0's part; sample the step "
                    "again"
                )
    return parts


def _read_part(folder: Path, step: int, rank: int) -> dict[str, Any]:
    path, tensors = _file(folder, step, rank, "json"), _file(folder, step, rank, "safetensors")
    for file in (path, tensors):
        if not file.is_file():
            raise RecipeError(f"{file}: missing; a step has a part of each rank that wrote it, sample it again")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: damaged ({error}); sample the step again") from error
    if record.get("format") != _FORMAT:
        raise RecipeError(f"{path}: format {record.get('format')}, this version reads {_FORMAT}; sample the step again")
    if record["sha256"] != sha256_of(tensors):
        raise RecipeError(f"{tensors}: damaged (its digest is not the one in {path.name}); sample the step again")
    return record


def _adapter_of(folder: Path, record: dict[str, Any]) -> Path | None:
    """The weights to repeat a step with, where it has its own."""
    if not record["own_weights"]:
        return None
    adapter = adapter_folder(folder, record["step"])
    if not adapter.is_dir():
        raise RecipeError(
            f"{adapter}: missing (only the newest are kept); without its weights step {record['step']} cannot be "
            "repeated"
        )
    return adapter


def _check_fit(folder: Path, parts: list[dict[str, Any]], recipe: Recipe, fingerprints: Mapping[str, str]) -> None:
    """Refuse a saved step that cannot be learned from under this recipe."""
    first = parts[0]
    where = f"{folder}, step {first['step']}"
    if first["reports"] is None:
        raise RecipeError(f"{where}: it has no rewards to learn from: {first['problem']}")
    studies, group = sum(len(part["studies"]) for part in parts), len(first["texts"][0])
    for name, now, then in (
        ("grpo.group_size", recipe.grpo.group_size, group),
        ("grpo.studies_per_step", recipe.grpo.studies_per_step, studies),
    ):
        if now != then:
            raise RecipeError(f"{where}: {name} is {then} there and {now} in the recipe; set {name}={then}")
    under = (*_SAMPLED_UNDER, "policy.lora.") if first["own_weights"] else _SAMPLED_UNDER
    changed = [line for line in differences(first["recipe"], recipe) if line.startswith(under)]
    for key, name in (
        ("manifest", f"data.manifest {recipe.data.manifest}"),
        ("policy", f"policy.path {recipe.policy.path}"),
    ):
        if first[key] != fingerprints[key]:
            changed.append(f"{name}: fingerprint {first[key]} -> {fingerprints[key]}")
    if changed and not recipe.resume.allow_changes:
        listed = "\n".join(f"  {line}" for line in changed)
        raise RecipeError(
            f"{where}: sampled under other values:\n{listed}\ntake the old ones back, or learn from it all the same "
            "with resume.allow_changes=true"
        )


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _file(folder: Path, step: int, rank: int, kind: str) -> Path:
    return folder / f"step_{step:06d}_rank{rank}.{kind}"


def _fingerprints(recipe: Recipe) -> dict[str, str]:
    """Of the manifest and of the policy as they are now."""
    policy = _policy_fingerprint(recipe.policy.path, recipe.policy.adapter)
    return {"manifest": sha256_of(recipe.data.manifest)[:16], "policy": policy}


def _policy_fingerprint(path: Path, adapter: Path | None) -> str:
    """Of the files of a checkpoint and its cold start: names, sizes, and blocks spread evenly over each."""
    digest = hashlib.sha256()
    files = [
        file for folder in (path, adapter) if folder is not None for file in sorted(folder.iterdir()) if file.is_file()
    ]
    for entry in files:
        size = entry.stat().st_size
        digest.update(f"{entry.name} {size} ".encode())
        with open(entry, "rb") as file:
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
