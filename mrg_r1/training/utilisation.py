"""How much of a card an update uses: model FLOPs utilisation, as PaLM counts it (Chowdhery et al. 2022, appendix B).

Counted are the products of the language model's linear layers, of LoRA and of the head, at two operations a weight and
token. Frozen weights cost one forward product and one for the gradient of their input, trained ones another for their
own. Not counted: attention's products, what is computed again in a backward pass, and the vision tower. Tokens that
completions share (`policy.prefixes`, on a CPU) are counted as often as they stand there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrg_r1.grpo.loss import Metrics
from mrg_r1.policy.shape import PolicyShape

# Dense bfloat16 operations a second by the cards' datasheets, by the name that CUDA tells; other variants of a card
# (PCIe, NVL, a MIG slice) have other figures and other names.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


@dataclass(frozen=True)
class Tokens:
    """What the passes of an update ran over.

    Attributes:
        prompts: tokens of prompts whose gradient was computed: each prompt once an optimizer step.
        prompts_forward: of them those that went forward too; 0 where the rollout's prefill was kept.
        completions: tokens of completions that were read: all but the last of each, which predicts nothing.
        scored: tokens whose log-prob was computed.
    """

    prompts: int
    prompts_forward: int
    completions: int
    scored: int


def update_flops(layers: int, lora: int, head: int, tokens: Tokens, *, frozen: bool = True) -> float:
    """Operations of an update.

    Args:
        layers: weights of the language model's linear layers.
        lora: weights of LoRA on them; 0 without.
        head: weights of the head, vocabulary x width.
        frozen: whether `layers` and `head` are left as they are, as with LoRA, or trained.
    """
    forward, backward = tokens.prompts_forward + tokens.completions, tokens.prompts + tokens.completions
    own = 1 if frozen else 2  # products of a backward pass: for the input's gradient, and for the weight's
    flops = 2 * layers * (forward + own * backward) + 2 * lora * (forward + 2 * backward)
    return float(flops + 2 * head * (1 + own) * tokens.scored)


def utilisation(
    shape: PolicyShape, tokens: Tokens, *, lora_rank: int | None, seconds: float, dtype: torch.dtype
) -> Metrics:
    """`time/update_tflops`, 10^12 operations a second and rank, and `time/update_mfu`, the share of the card's peak, as
    (sum, count) pairs; of what is no known card in bfloat16 nothing is counted.

    Args:
        lora_rank: None where every parameter is trained.
        seconds: of this rank's update.
    """
    flops = update_flops(
        shape.layers * shape.layer_matrices,
        0 if lora_rank is None else shape.lora_parameters(lora_rank),
        shape.vocabulary * shape.hidden,
        tokens,
        frozen=lora_rank is not None,
    )
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    known = peak is not None and dtype == torch.bfloat16
    share = (flops / (peak or 1.0), seconds) if known else (0.0, 0.0)
    return {
        "time/update_tflops": (torch.tensor(flops / 1e12), torch.tensor(seconds)),
        "time/update_mfu": (torch.tensor(share[0]), torch.tensor(share[1])),
    }
