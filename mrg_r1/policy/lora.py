"""LoRA on the language model, and where asked for on merger and tower, by PEFT.

The reference is the base model with adapters off: no second copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from mrg_r1.files import folder_filled
from mrg_r1.policy.adapter_files import naming_config, read_adapter, require_placed
from mrg_r1.policy.completeness import is_tied
from mrg_r1.policy.family import lora_pattern
from mrg_r1.policy.weights import PolicyWeights


def add_lora(policy: PolicyWeights, *, rank: int, alpha: int, seed: int, targets: str = "language") -> None:
    """Put a fresh trainable LoRA on every linear layer that `targets` names; everything else stays frozen.

    The new parameters take the base weights' dtype, so that DeepSpeed keeps one fp32 master of each.

    Args:
        targets: the recipe's `policy.lora.targets`.

    Raises:
        ValueError: the policy's family has no such layers.
    """
    pattern = lora_pattern(policy.family, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every rank starts from the same A, whatever it did before
        policy.model = get_peft_model(policy.model, config, autocast_adapter_dtype=False)


def merge_adapter(policy: PolicyWeights, adapter: Path) -> None:
    """Fold a cold-start adapter into the base weights, before any new LoRA: it becomes part of the reference.

    Raises:
        ValueError: as `load_adapter`.
    """
    load_adapter(policy, adapter)
    assert isinstance(policy.model, PeftModel)
    for layer in policy.language_model.layers:  # under a partition one layer at a time is whole
        with policy.gathered(layer, written=True):
            for module in layer.modules():
                if isinstance(module, LoraLayer):
                    module.merge(safe_merge=True)
    for module in policy.model.modules():  # an adapter of somebody else's may reach beyond the decoder's layers
        if isinstance(module, LoraLayer) and not module.merged:
            with policy.gathered(module, written=True):
                module.merge(safe_merge=True)
    merged = policy.model.unload()
    merged.requires_grad_(False)
    policy.model = merged


def load_adapter(policy: PolicyWeights, adapter: Path) -> None:
    """Put a trained adapter of a run on the policy, frozen, for evaluation.

    PEFT's own loading passes over tensors that it cannot place, with a warning: an adapter named after another
    version's modules would change nothing.

    Raises:
        ValueError: the file's parameters are not those of its LoRA on this policy, or it is more than LoRA on linear
            layers, or on a weight that head and embedding share.
    """
    read = read_adapter(adapter, tied=is_tied(policy.base))
    # its first weights are about to be replaced
    with naming_config(read), torch.random.fork_rng(devices=[]):
        policy.model = get_peft_model(policy.model, LoraConfig.from_pretrained(adapter), autocast_adapter_dtype=False)
    require_placed(read, policy.base)
    restore_adapter(policy, adapter)
    policy.model.requires_grad_(False)


def save_adapter(policy: PolicyWeights, directory: Path, *, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` in PEFT's own layout."""
    assert isinstance(policy.model, PeftModel)
    with folder_filled(directory) as fresh:
        policy.model.save_pretrained(fresh, safe_serialization=True, save_embedding_layers=False, state_dict=state)
        (fresh / "README.md").unlink(missing_ok=True)  # PEFT's model-card template says nothing about this run


@contextmanager
def reference(policy: PolicyWeights) -> Iterator[PolicyWeights]:
    """The reference policy: adapters off inside the block, bitwise the base model."""
    assert isinstance(policy.model, PeftModel)
    with policy.model.disable_adapter():
        yield policy


def restore_adapter(policy: PolicyWeights, directory: Path) -> None:
    """Put the weights that `save_adapter` wrote back into the policy's own LoRA.

    Raises:
        ValueError: the file's parameters are not those of this LoRA.
    """
    assert isinstance(policy.model, PeftModel)
    state = load_file(directory / "adapter_model.safetensors")
    result = set_peft_model_state_dict(policy.model, state)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{directory}: not an adapter of this policy; missing {missing[:3]}, unexpected "
            f"{list(result.unexpected_keys)[:3]}"
        )
