"""The library's functions as ctypes knows them, and the look at what they are given: C reads and writes whatever lies
at an address.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor

from mrg_r1.kernels.library import state

_WORTH = 2**20  # multiplications, some 20 microseconds
OF_AN_ELEMENT = 32  # as many take as long as a norm or a rotation of an element from and to memory


def at(tensor: Tensor | None, elements: int | None = None, dtype: torch.dtype = torch.float32) -> int | None:
    """Where a tensor begins.

    Raises:
        ValueError: it is not laid out densely, has not so many elements, is of another dtype or on another device, or
            its gradient would be lost.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous() or (elements is not None and tensor.numel() != elements):
        raise ValueError(f"a kernel was given {tuple(tensor.shape)} with strides {tensor.stride()}")
    return _begin(tensor, dtype)


def heads_at(tensor: Tensor) -> int:
    """Where a tensor [T, heads, D] begins whose tokens' heads lie behind one another."""
    if tensor.stride(2) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2]):
        raise ValueError(f"a kernel was given heads {tuple(tensor.shape)} with strides {tensor.stride()}")
    return _begin(tensor, torch.float32)


def _begin(tensor: Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(f"a kernel was given {tensor.dtype} on {tensor.device}, not {dtype} on a CPU")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("a kernel has no gradient: call it inside an autograd function or without gradients")
    return tensor.data_ptr()


def threads(multiplications: int) -> int:
    """How many to compute with: torch's, or one where so little is to do that waking them costs more."""
    return torch.get_num_threads() if multiplications >= _WORTH else 1


class Step(Structure):
    """attention.c's Step."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_long) for name in ("q_row", "k_row", "v_row")),
        *((name, c_void_p) for name in ("places", "of_place")),
        *((name, c_long) for name in ("rows", "studies", "members", "heads", "key_heads", "size")),
        *((name, c_void_p) for name in ("prompt_keys", "prompt_values", "prompt_bias")),
        *((name, c_long) for name in ("prompt", "bias_row")),
        *((name, c_void_p) for name in ("own_keys", "own_values", "own_bias")),
        *((name, c_long) for name in ("length", "width")),
        ("out", c_void_p),
    ]


class Group(Structure):
    """group.c's Group."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "prompt_k", "prompt_v")),
        *((name, c_long) for name in ("q_row", "k_row", "v_row", "prompt_k_row", "prompt_v_row")),
        *((name, c_void_p) for name in ("of_study", "prompts", "starts", "begins", "paths")),
        *((name, c_long) for name in ("studies", "heads", "key_heads", "size", "own")),
        *((name, c_void_p) for name in ("out", "lse", "grad", "dq", "dk", "dv", "d_prompt_k", "d_prompt_v")),
    ]


class Draw(Structure):
    """sampling.c's Draw."""

    _fields_ = [
        *((name, c_void_p) for name in ("logits", "sums")),
        *((name, c_long) for name in ("rows", "tokens")),
        *((name, c_void_p) for name in ("of_place", "uniforms")),
        *((name, c_long) for name in ("places", "length", "step")),
        ("eos", c_void_p),
        *((name, c_long) for name in ("ends", "pad")),
        *((name, c_void_p) for name in ("drawn", "token_ids", "logp", "mask", "ended")),
    ]


@cache
def library() -> ctypes.CDLL:
    """The functions by name."""
    library = state().library
    if library is None:
        raise RuntimeError(f"no kernels here: {state().text}")
    pointer, number = c_void_p, c_long
    library.panel_columns.restype = c_long
    library.sample.restype = c_long
    library.rms_norm.argtypes = [pointer, pointer, c_float, pointer, pointer, number, number, c_int]
    library.rms_norm_backward.argtypes = [*[pointer] * 5, number, number, c_int]
    library.swiglu.argtypes = [pointer, pointer, number, number, c_int]
    library.swiglu_backward.argtypes = [pointer, pointer, pointer, number, number, c_int]
    library.rotate.argtypes = [
        pointer, number, pointer, number, pointer, pointer, number, c_float, number, number, number, c_int,
    ]  # fmt: skip
    library.pack.argtypes = [pointer, *[number] * 6, pointer]
    library.linear.argtypes = [pointer, pointer, pointer, pointer, number, number, number, c_int]
    library.decode_attention.argtypes = [POINTER(Step), c_int]
    library.group_attention.argtypes = [POINTER(Group), c_int, c_int]
    library.sample.argtypes = [POINTER(Draw), c_int]
    return library
