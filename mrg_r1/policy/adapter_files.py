"""An adapter's files in PEFT's layout, read without building a model: plain LoRA on linear layers, or refused.

Whatever puts an adapter on a policy's weights, or writes one into a checkpoint, reads it here first: PEFT's own loading
and merging pass over what else an adapter may hold, and say so in a warning at most.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mrg_r1.files import parse_json, sha256_of
from mrg_r1.policy.checkpoint_files import StoredTensor

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of an adapter's matrices
_MERGEABLE = ("F32", "BF16", "F16")  # anything else is a quantised weight
# Settings of PEFT under which an adapter is more, or other, than W + scale * B A. Empty or false everywhere else.
_OTHER_THAN_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# others (pissa, olora, corda, …) change the base weights as well
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Low:
    """One module's LoRA: it adds scale * b a to the weight."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter directory in PEFT's layout: its configuration, and its matrices by the name of the module in
    transformers.
    """

    directory: Path
    config: dict[str, Any]
    modules: dict[str, Low]

    def describe(self, lora_targets: Mapping[str, str]) -> dict[str, Any]:
        """What the record of an export says of it; as `targets`, the family's name of its modules, or None."""
        return {
            "path": str(self.directory),
            "sha256": sha256_of(self.directory / _WEIGHTS),
            "rank": self.config["r"],
            "alpha": self.config["lora_alpha"],
            "modules": len(self.modules),
            "targets": next((n for n, one in lora_targets.items() if one == self.config.get("target_modules")), None),
        }


def read_adapter(directory: Path, *, tied: bool) -> Adapter:
    """Read a LoRA adapter in PEFT's layout.

    Args:
        tied: the policy's head is its embedding. LoRA on one of the two would change the other as well once merged.

    Raises:
        ValueError: not there, not safetensors, or more than LoRA on linear layers; names the file and what it is.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory}: no {name} there; give an adapter folder as a run leaves it (a pickle is not loaded)"
            )
    try:
        config: Any = parse_json((directory / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / _CONFIG}: not JSON ({error}); fetch the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / _CONFIG}: {json.dumps(config)[:40]} is no object of settings; fetch it again")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA is merged")
    _check_numbers(config, directory / _CONFIG)
    unknown = [name for name in _OTHER_THAN_LORA if config.get(name)]
    unknown += ["bias"] if config.get("bias", "none") != "none" else []
    unknown += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_STARTS else []
    # of a newer PEFT, which this one would leave out
    unknown += [name for name in config if name not in LoraConfig.__dataclass_fields__ and config[name]]
    if unknown:
        named = ", ".join(f"{name} {config[name]!r}" for name in unknown)
        raise ValueError(
            f"{directory / _CONFIG}: {named}: more than a product added to linear layers, which is all that is merged; "
            "merge it into the checkpoint with PEFT (merge_and_unload), or train it without"
        )
    try:
        tensors = load_file(directory / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / _WEIGHTS}: not a whole safetensors file ({error})") from error
    modules = dict(sorted(_pair(tensors, config, directory / _WEIGHTS)))
    shared = [name for name in modules if name.split(".")[-1] in ("lm_head", "embed_tokens")]
    if tied and shared:
        raise ValueError(
            f"{directory / _WEIGHTS}: LoRA of {shared[0]}, whose weight is also the "
            f"{'embedding' if shared[0].endswith('lm_head') else 'head'} (tie_word_embeddings): merged it would change "
            "both; untie them in the checkpoint, or train without it"
        )
    return Adapter(directory, config, modules)


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Ranks and alphas, which the scale of every product comes from.

    Raises:
        ValueError: one is absent or no number above 0; names it.
    """
    absent = [name for name in ("r", "lora_alpha") if name not in config]
    if absent:
        raise ValueError(f"{file}: no {' and no '.join(absent)} in it; PEFT writes both")
    stated = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{file}: {name} is {pattern!r}; PEFT writes an object of modules and numbers")
        stated |= {f"{name}.{module}": value for module, value in pattern.items()}
        for module in pattern:
            try:
                re.compile(module)
            except re.error as error:
                raise ValueError(f"{file}: {name} names {module!r}, which is no pattern ({error})") from error
    for name, value in stated.items():
        whole = name in ("r", "rank_pattern") or name.startswith("rank_pattern.")
        number = isinstance(value, int) if whole else isinstance(value, (int, float))
        if not number or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{file}: {name} is {value!r}; PEFT writes a {'whole ' if whole else ''}number above 0")


def _pair(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Low]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise ValueError(f"{file}: {name} {list(tensor.shape)} is not a LoRA matrix of a linear layer")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    for module, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: {module} has only lora_{'A' if 'A' in pair else 'B'}; its other half is missing")
        for half in "AB":
            if pair[half].dtype not in _DTYPES:
                raise ValueError(
                    f"{file}: lora_{half} of {module} is stored as {pair[half].dtype}; LoRA is read from "
                    f"{', '.join(map(str, _DTYPES))} only"
                )
            if not pair[half].isfinite().all():
                raise ValueError(f"{file}: lora_{half} of {module} is not finite; the adapter is damaged")
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank:
            raise ValueError(
                f"{file}: {module} has lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}; their "
                "ranks differ"
            )
        alpha = _alpha(module, config)
        yield module, Low(pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    """A module's alpha: that of the first pattern which its name ends in, as PEFT looks it up, or the adapter's."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    return next(
        (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"]
    )


def require_fit(adapter: Adapter, stored: Mapping[str, StoredTensor], policy: Path, model: nn.Module) -> None:
    """Every matrix of the adapter has a weight of its shape in the checkpoint, under the name by which the trainer's
    PEFT finds it, and its configuration puts LoRA on just these modules.

    Args:
        stored: of the checkpoint, by its names in the module tree.
        model: of the checkpoint, without weights; PEFT's layers are left on it.

    Raises:
        ValueError: a matrix without a weight, or not of its shape, or as `require_placed`; names the file and the
            module.
    """
    for module, low in adapter.modules.items():
        weight = stored.get(f"{module}.weight")
        if weight is None:
            raise ValueError(
                f"{adapter.directory / _WEIGHTS}: LoRA of {module}, which {policy} does not have; was the run "
                "trained on another one?"
            )
        shape = (low.b.shape[0], low.a.shape[1])
        if weight.shape != shape:
            raise ValueError(
                f"{adapter.directory / _WEIGHTS}: LoRA of {module} is for a weight {list(shape)}, in {policy} it "
                f"is {list(weight.shape)}; was the run trained on another one?"
            )
        if weight.dtype not in _MERGEABLE:
            raise ValueError(
                f"{weight.file}: {weight.name} is stored as {weight.dtype}; LoRA is added to "
                f"{', '.join(_MERGEABLE)} only"
            )
    with naming_config(adapter):
        inject_adapter_in_model(LoraConfig.from_pretrained(adapter.directory), model, low_cpu_mem_usage=True)
    require_placed(adapter, model)


@contextmanager
def naming_config(adapter: Adapter) -> Iterator[None]:
    """What PEFT refuses inside, it refuses of the adapter's configuration, without saying which file that is."""
    try:
        yield
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(f"{adapter.directory / _CONFIG}: PEFT cannot put it on this policy: {error}") from error


def require_placed(adapter: Adapter, model: nn.Module) -> None:
    """The LoRA that PEFT has put on a model by the adapter's configuration is that of its matrices: the same modules,
    ranks and scales.

    Raises:
        ValueError: they differ; names file, module and both values.
    """
    placed = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    bare = sorted(set(placed) - set(adapter.modules))
    if bare:
        raise ValueError(
            f"{adapter.directory / _WEIGHTS}: LoRA of {bare[0]}{_more(bare)} is missing, on which {_CONFIG} "
            "puts one (target_modules); the two files are of different adapters"
        )
    strange = sorted(set(adapter.modules) - set(placed))
    if strange:
        raise ValueError(
            f"{adapter.directory / _WEIGHTS}: LoRA of {strange[0]}{_more(strange)}, on which {_CONFIG} puts none "
            "(target_modules, layers_to_transform, exclude_modules); the two files are of different adapters"
        )
    for name, low in adapter.modules.items():
        layer = placed[name]
        wanted, found = [layer.out_features, layer.in_features], [low.b.shape[0], low.a.shape[1]]
        if wanted != found:
            raise ValueError(
                f"{adapter.directory / _WEIGHTS}: LoRA of {name} is for a weight {found}, this policy's is {wanted}; "
                "was the adapter trained on another one?"
            )
        (rank,), (scale,) = layer.r.values(), layer.scaling.values()
        if rank != low.a.shape[0]:
            raise ValueError(
                f"{adapter.directory / _CONFIG}: r, or rank_pattern, gives {name} rank {rank}, in {_WEIGHTS} it has "
                f"{low.a.shape[0]}; the two files are of different adapters"
            )
        assert math.isclose(scale, low.scale, rel_tol=1e-9), f"{name}: PEFT scales by {scale}, {low.scale} was read"


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
