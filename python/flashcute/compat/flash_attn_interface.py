"""The functions of flash-attn 3 (its module flash_attn_interface), with its names, arguments and results.

What differs from flash-attn 2: there is no dropout, so the positions of arguments differ; `return_attn_probs=True`
gives (out, softmax_lse); a row that sees no key has -inf in softmax_lse, with a sink the sink; `num_splits`, `pack_gqa`
and `sm_margin`, which tune flash-attn's kernels, are accepted and change nothing: keys are never split, and a row's
result does not depend on the batch. All else is as in `flashcute.compat.flash_attn`, also the exceptions.
"""

from __future__ import annotations

from typing import Any

from .._core import ArgumentError, UnsupportedError
from .._torch.framework import Tensor, torch
from ._arguments import (
    checked_sequences,
    checked_sink,
    mask_3,
    refuse_unless_off,
    require_tensors,
)
from ._attention import Packing, Rest, attend, attend_packed, require_packed
from .flash_attn import NO_CACHES

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of q (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d) and v (..., kv_heads, d_v)."""
    refuse_unless_off(
        softcap,
        attention_chunk=attention_chunk,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    common = causal, window_size, softmax_scale, deterministic, return_attn_probs
    rest = Rest(mask_3, *common, sink=checked_sink(learnable_sink))
    return attend(q, k, v, rest)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of qkv (batch, seqlen, 3, heads, d), or, with num_heads_q, (batch, seqlen, heads, d): first the heads
    of q, then as many of k as of v. The kernels write to the gradient of qkv directly."""
    refuse_unless_off(
        softcap,
        attention_chunk=attention_chunk,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    packing = _packing(qkv, num_heads_q)
    common = causal, window_size, softmax_scale, deterministic, return_attn_probs
    rest = Rest(mask_3, *common, sink=checked_sink(learnable_sink))
    return attend_packed(None, qkv, packing, rest)


def _packing(qkv: Tensor, num_heads_q: int | None) -> Packing:
    require_tensors(qkv=qkv)
    if qkv.dim() != 4:
        require_packed("qkv", qkv, 3)
        return Packing()
    if num_heads_q is None:
        raise ArgumentError(
            "num_heads_q: expected the number of q's heads beside a qkv of four dimensions, got None"
        )
    others = qkv.shape[2] - num_heads_q
    if num_heads_q < 1 or others < 2 or others % 2:
        raise ArgumentError(
            f"num_heads_q: expected to leave an even number of qkv's {qkv.shape[2]} heads for k and v, got "
            f"{num_heads_q}"
        )
    return Packing((num_heads_q, others // 2, others // 2))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q (total_q, heads, d), k (total_k, kv_heads, d) and v (total_k, kv_heads, d_v).
    Sequence i has the rows from cu_seqlens[i] up to cu_seqlens[i + 1], of which the first seqused[i] count, all int32.
    max_seqlen_q and max_seqlen_k have no effect. softmax_lse is (heads, total_q)."""
    refuse_unless_off(
        softcap,
        attention_chunk=attention_chunk,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    common = causal, window_size, softmax_scale, deterministic, return_attn_probs
    sequences = checked_sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    rest = Rest(mask_3, *common, sink=checked_sink(learnable_sink), sequences=sequences)
    return attend(q, k, v, rest)


# ---- not served yet ----------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Raises UnsupportedError: caches are not supported yet."""
    raise UnsupportedError(NO_CACHES)


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: Any = None
) -> Any:
    """Raises UnsupportedError: splits of the keys are not supported yet."""
    raise UnsupportedError(
        "flash_attn_combine: the merge of partial results is not supported yet. Take the one call over all keys"
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: Any = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> None:
    """None: flashcute plans a call without metadata."""
