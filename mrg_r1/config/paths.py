"""What a recipe points at: each check is handed a path, and says whether what should be there is there."""

from __future__ import annotations

from pathlib import Path

from mrg_r1.files import parse_json
from mrg_r1.model_types import family_names, no_checkpoint, other_model


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the field, the value and the remedy."""


def check_manifest(path: Path) -> None:
    """Refuse a manifest that is not there.

    Raises:
        RecipeError: names data.manifest and the remedy.
    """
    if not path.is_file():
        raise RecipeError(f"data.manifest {path}: no such file; `mrg-r1 prepare` makes one")


def check_labeler_path(field: str, path: Path) -> None:
    """Refuse a labeler that is not there.

    Args:
        field: of the recipe, which names it.

    Raises:
        RecipeError: names the field and the remedy.
    """
    if not path.exists():
        optional = ", or leave it out" if field != "reward.labeler" else ""
        raise RecipeError(f"{field} {path}: no such file or directory; `mrg-r1 labeler train` makes one{optional}")


def check_adapter(path: Path) -> None:
    """Refuse a folder that holds no adapter.

    Raises:
        RecipeError: names policy.adapter and the remedy.
    """
    if not (path / "adapter_config.json").is_file():
        raise RecipeError(f"policy.adapter {path}: no adapter_config.json there; give the adapter/ folder of a run")


def check_deepspeed(path: Path) -> None:
    """Refuse a DeepSpeed configuration that is not there.

    Raises:
        RecipeError: names engine.deepspeed and the remedy.
    """
    if not path.is_file():
        raise RecipeError(f"engine.deepspeed {path}: no such file; ds_configs/ has zero1.json to zero3.json")


def check_checkpoint_directory(path: Path) -> None:
    """Refuse a directory that is not a checkpoint of a model family that loads.

    Raises:
        RecipeError: names policy.path, what was found there and the remedy.
    """
    config = path / "config.json"
    if not config.is_file():
        raise RecipeError(f"policy.path {path}: {no_checkpoint(path)}")
    try:
        content = parse_json(config.read_text(encoding="utf-8"))
    except ValueError as error:  # also where it is not UTF-8
        raise RecipeError(
            f"policy.path {path}: config.json is not JSON ({error}); fetch the checkpoint again"
        ) from error
    model_type = content.get("model_type") if isinstance(content, dict) else content
    if model_type not in family_names():
        raise RecipeError(f"policy.path {path}: config.json says {other_model(model_type)}")
    if not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"policy.path {path}: no *.safetensors there; the download is incomplete, or the weights are a pickle "
            "(not loaded)"
        )
