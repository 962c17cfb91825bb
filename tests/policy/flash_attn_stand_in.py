"""Modules with the signatures of flash-attn 2.8.3 and of flash-attn 3, that compute with whole score matrices."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch

from mrg_r1.policy.attention import SeqLens, attend, attend_backward


def stand_in(major: int) -> ModuleType:
    """`calls` counts forward and backward."""
    module = ModuleType("flash_attn.flash_attn_interface" if major == 2 else "flash_attn_interface")
    module.calls = {"forward": 0, "backward": 0}

    def lens(starts, longest, tensor):
        assert starts.dtype == torch.int32 and starts.device == tensor.device
        lengths = tuple(end - start for start, end in pairwise(starts.tolist()))
        assert longest == max(lengths) and sum(lengths) == len(tensor)
        return SeqLens(lengths, tensor.device)

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert softmax_scale == q.shape[-1] ** -0.5 and q.dtype == k.dtype == v.dtype != torch.float32
        module.calls["forward"] += 1
        seq_lens = lens(cu_seqlens_q, max_seqlen_q, q), lens(cu_seqlens_k, max_seqlen_k, k)
        out, lse = attend(q.float(), k.float(), v.float(), *seq_lens, causal=causal)
        return out.to(q.dtype), lse

    def run_back(dout, q, k, v, out, softmax_lse, dq, dk, dv, starts, longest, softmax_scale, causal):
        assert softmax_scale == q.shape[-1] ** -0.5 and softmax_lse.dtype == torch.float32
        assert all(one.is_contiguous() for one in (dq, dk, dv))
        module.calls["backward"] += 1
        seq_lens = lens(starts[0], longest[0], q), lens(starts[1], longest[1], k)
        wide = (one.float() for one in (dout, q, k, v, out))
        for target, found in zip(
            (dq, dk, dv), attend_backward(*wide, softmax_lse, *seq_lens, causal=causal), strict=True
        ):
            target.copy_(found)
        return softmax_lse

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *run(q, k, v, *starts, softmax_scale, causal), torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_back(dout, q, k, v, out, softmax_lse, dq, dk, dv, starts, longest, softmax_scale, causal)

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *run(q, k, v, *starts, softmax_scale, causal), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is None and sequed_k is None
        starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_back(dout, q, k, v, out, softmax_lse, dq, dk, dv, starts, longest, softmax_scale, is_causal)

    two, three = (_flash_attn_varlen_forward, _flash_attn_varlen_backward), (_flash_attn_forward, _flash_attn_backward)
    for function in two if major == 2 else three:
        setattr(module, function.__name__, function)
    return module
