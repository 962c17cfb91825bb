"""What several nodes must have in common, checked before any of them loads a model: the recipe, the files it points at,
RUN's folder.

On one node there is nothing to compare, and nothing is done.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import mrg_r1
from mrg_r1.config.recipe import Recipe, RecipeError
from mrg_r1.engine.ranks import Ranks
from mrg_r1.files import sha256_of
from mrg_r1.training.resume import flat
from mrg_r1.types import Study

SHARED_WITHIN = (
    90.0  # seconds; a network file system may show a new folder a minute late to a node that has looked for it before
)
_OWN_KEYS = ("reward.device", "evaluation.held_out_device")  # what a node may have otherwise
_PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def agree_on_recipe(recipe: Recipe | None, problem: str | None, ranks: Ranks) -> Recipe:
    """The recipe, if every node could read it and reads the same; each node has its own command line. Every rank calls
    this.

    Raises:
        RecipeError: all ranks raise it; the nodes and their values are named.
    """
    values = None if recipe is None else flat(recipe.model_dump(mode="json"))
    everyone = ranks.gather((problem, values) if ranks.leads_node else None)
    said = [everyone[node.first] for node in ranks.nodes]
    problems = [problem for problem, _ in said]
    lines = [f"{node}: {problem}" for node, problem in zip(ranks.nodes, problems, strict=True) if problem is not None]
    if problems[0] is not None and len(set(problems)) == 1:
        lines = [problems[0]]
    if not lines:
        first = said[0][1]
        for node, (_, theirs) in zip(ranks.nodes[1:], said[1:], strict=True):
            for key in sorted(first.keys() | theirs.keys()):
                if key not in _OWN_KEYS and first.get(key) != theirs.get(key):
                    lines.append(
                        f"{key}: {first.get(key)} on {ranks.nodes[0]}, {theirs.get(key)} on {node}; start all "
                        "nodes with one recipe"
                    )
    if lines or recipe is None:
        raise RecipeError("\n".join(lines))
    return recipe


def check_files(recipe: Recipe, ranks: Ranks) -> None:
    """Compare what the recipe points at, and the code, over the nodes: contents of small files, names and sizes of
    weights.

    Every rank calls this; the first of each node looks.

    Raises:
        RecipeError: all ranks raise it; every difference from the first node is named.
    """
    if len(ranks.nodes) == 1:
        return
    everyone = ranks.gather(_fingerprints(recipe) if ranks.leads_node else None)
    ours = everyone[0]
    lines = []
    for node in ranks.nodes[1:]:
        for what, theirs in everyone[node.first].items():
            if theirs != ours[what]:
                lines.append(
                    f"{what}: {theirs or 'not there'} on {node}, {ours[what] or 'not there'} on {ranks.nodes[0]}"
                )
    if lines:
        lines.append(
            "what a recipe points at must be the same on every node: a file system that they share, or equal copies"
        )
        raise RecipeError("\n".join(lines))


def missing_images(studies: Sequence[Study], ranks: Ranks) -> str | None:
    """What is wrong with this node's images, or None. Each rank looks whether its share of the node's images is there;
    the first node's are opened by rank 0 (`data.study.check_images`).
    """
    share = studies[ranks.rank - ranks.node.first :: ranks.node.size]
    missing = [f"{study.id}: {image.path}" for study in share for image in study.images if not image.path.is_file()]
    if not missing:
        return None
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"images that are not there on {ranks.node}: {', '.join(missing[:3])}{more}; the manifest's images must be "
        "on every node"
    )


def check_shared(directory: Path, ranks: Ranks) -> None:
    """Refuse an output_dir that is another one on another node. It exists on rank 0's. Every rank calls this.

    Raises:
        RecipeError: all ranks raise it; the nodes that do not see what rank 0 wrote there are named.
    """
    if len(ranks.nodes) == 1:
        return
    name = ranks.agree(f".shared_{secrets.token_hex(8)}")
    if ranks.is_main:
        (directory / name).touch()
    ranks.barrier()
    everyone = ranks.gather(_sees(directory, name) if ranks.leads_node else None)
    if ranks.is_main:
        (directory / name).unlink()
    blind = [str(node) for node in ranks.nodes if not everyone[node.first]]
    if blind:
        raise RecipeError(
            f"output_dir {directory}: {', '.join(blind)} cannot see what rank 0 writes there on {ranks.nodes[0]}: "
            "checkpoints, completions and logs of all nodes belong into one folder; set output_dir to a file "
            "system that all nodes share"
        )


def _sees(directory: Path, name: str) -> bool:
    """Whether a file is there, or comes within `SHARED_WITHIN` seconds; reading the folder makes network file systems
    look again.
    """
    deadline = time.monotonic() + SHARED_WITHIN
    while True:
        try:
            if name in os.listdir(directory):
                return True
        except OSError:
            pass  # not there (yet)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _fingerprints(recipe: Recipe) -> dict[str, str | None]:
    """What this node has: a line for each thing that must be the same, None where it is not there."""
    code = Path(mrg_r1.__file__).parent
    found = {
        f"data.manifest {recipe.data.manifest}": _content([recipe.data.manifest]),
        f"policy.path {recipe.policy.path}": _listing(recipe.policy.path),
        f"reward.labeler {recipe.reward.labeler}": _listing(recipe.reward.labeler),
        f"engine.deepspeed {recipe.engine.deepspeed}": _content([recipe.engine.deepspeed]),
        "code of mrg_r1": _content(sorted(code.rglob("*.py"))),
    }
    if recipe.policy.adapter is not None:
        found[f"policy.adapter {recipe.policy.adapter}"] = _listing(recipe.policy.adapter)
    if recipe.reward.tokenizer is not None:
        found[f"reward.tokenizer {recipe.reward.tokenizer}"] = _listing(Path(recipe.reward.tokenizer))
    if recipe.evaluation.held_out_labeler is not None:
        found[f"evaluation.held_out_labeler {recipe.evaluation.held_out_labeler}"] = _listing(
            recipe.evaluation.held_out_labeler
        )
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _content(paths: Sequence[Path]) -> str | None:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return None
        digest.update(bytes.fromhex(sha256_of(path)))
    return f"sha256 {digest.hexdigest()[:12]}"


def _listing(path: Path) -> str | None:
    """Names and sizes, as a digest: weights are too large to be read on every node."""
    if not path.exists():
        return None
    listed = [path] if path.is_file() else sorted(path.iterdir())
    sizes = {file.name: file.stat().st_size for file in listed if file.is_file() and not file.name.startswith(".")}
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
    return f"{len(sizes)} files of {sum(sizes.values())} bytes (names and sizes {digest})"
