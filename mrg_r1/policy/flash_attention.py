"""The flash-attn package in place of torch's own flash kernels, where a recipe asks for it (`policy.attention`).

Its public functions hide the log-sum-exp and have no backward for a part of the keys; what is called here are the two
functions under them. They have no promised signature. Read for this: flash-attn 2.7.0 to 2.8.3, and flash-attn 3
(`flash_attn_interface`) from February 2025 to August 2026. Nothing here has run on a card yet (docs/gpus.md).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_OLDEST = (2, 7)  # before it, the two functions took and gave other things
_HOPPER = 9  # what version 3 is written for


@dataclass(frozen=True)
class FlashAttention:
    """The two functions of one of the package's versions, as `attention.attend` and `attend_backward` want them.

    Letters as there: q [Tq, heads, D], k and v [Tk, key heads, D], bfloat16 or float16; starts [sequences + 1] int32 of
    each sequence on its axis, all on one CUDA device; D a multiple of 8.
    """

    module: ModuleType
    major: int  # 2 or 3
    version: str

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        q_most: int,
        k_most: int,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """out [Tq, heads, D] and log-sum-exp [heads, Tq] float32.

        Args:
            q_most, k_most: tokens of the longest sequence.
        """
        lens = {"cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts, "max_seqlen_q": q_most, "max_seqlen_k": k_most}
        options = {"softmax_scale": q.shape[-1] ** -0.5, "causal": causal}
        if self.major == 3:
            out, lse, *_ = self.module._flash_attn_forward(q, k, v, **lens, **options)
        else:
            out, lse, *_ = self.module._flash_attn_varlen_forward(q, k, v, **lens, **options, dropout_p=0.0)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        q_most: int,
        k_most: int,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; `out` and `lse` may be those of a larger attention, as in `attend_backward`."""
        # written to; contiguous, which q, k and v need not be
        dq, dk, dv = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, k, v))
        scale, deterministic = q.shape[-1] ** -0.5, torch.are_deterministic_algorithms_enabled()
        if self.major == 3:  # by place: the last one was `causal` once
            self.module._flash_attn_backward(
                grad, q, k, v, out, lse, q_starts, k_starts, None, None, q_most, k_most, dq, dk, dv, scale, causal,
                deterministic=deterministic,
            )  # fmt: skip
        else:
            self.module._flash_attn_varlen_backward(
                grad, q, k, v, out, lse, dq, dk, dv, q_starts, k_starts, q_most, k_most,
                dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
                softcap=0.0, alibi_slopes=None, deterministic=deterministic,
            )  # fmt: skip
        return dq, dk, dv


_in_use: FlashAttention | None = None


def in_use() -> FlashAttention | None:
    """What this process attends with on a CUDA device; None: torch's kernels."""
    return _in_use


def choose(attention: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """From now on this process attends as the recipe's `policy.attention` says.

    Raises:
        ValueError: flash_attn, and it cannot be used; says what to do.
    """
    global _in_use
    _in_use = None if attention != "flash_attn" else find(device=device, dtype=dtype)


def find(*, device: torch.device, dtype: torch.dtype) -> FlashAttention:
    """The package for a device: version 3 where it is installed and the device is a Hopper, else 2.

    Raises:
        ValueError: not for this device or dtype, not installed, too old, or without the functions that are called here.
    """
    asked, instead = "policy.attention flash_attn", "or set policy.attention=torch, which has flash kernels too"
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{asked}: it has no {dtype} kernels; set policy.dtype=bfloat16, {instead}")
    if device.type != "cuda":
        raise ValueError(f"{asked}: it runs on CUDA devices only, and this is {device}; set policy.attention=torch")
    problems: list[str] = []
    if torch.cuda.get_device_capability(device)[0] == _HOPPER:
        module = _imported("flash_attn_interface", problems)
        if module is not None and _has(module, "_flash_attn_forward", "_flash_attn_backward", problems):
            return FlashAttention(module, 3, str(getattr(module, "__version__", "3")))
    package = _imported("flash_attn", problems)
    module = None if package is None else _imported("flash_attn.flash_attn_interface", problems)
    if package is not None and module is not None:
        version = str(package.__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            problems.append(f"flash-attn {version} is older than {'.'.join(map(str, _OLDEST))}")
        elif _has(module, "_flash_attn_varlen_forward", "_flash_attn_varlen_backward", problems):
            return FlashAttention(module, 2, version)
    remedy = f"pip install --no-build-isolation flash-attn (it compiles), {instead}"
    raise ValueError(f"{asked}: {'; '.join(problems)}. {remedy}")


def _imported(name: str, problems: list[str]) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # not there, or built for another torch or CUDA
        problems.append(f"{name} cannot be imported ({' '.join(str(error).split())[:120]})")
        return None


def _has(module: ModuleType, forward: str, backward: str, problems: list[str]) -> bool:
    missing = [name for name in (forward, backward) if not hasattr(module, name)]
    problems += [f"{module.__name__} has no {name}: a version that is not known here" for name in missing]
    return not missing
