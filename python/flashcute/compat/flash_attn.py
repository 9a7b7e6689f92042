"""The functions of flash-attn 2.8, with its names, arguments and results.

Tensors are (batch, seqlen, heads, head_dim), of packed sequences (varlen) (total, heads, head_dim). The causal mask is
aligned to the last key. Beside what flash-attn takes, these functions take float32, tensors on the CPU and a head_dim
of v of its own. A last stride other than 1 is copied silently, as there. `learnable_sink`, (heads,), is an argument of
flashcute's, always the last: a logit of each query head beside its scaled scores, with the value 0, which softmax_lse
includes. It is float32 or of q's dtype, and gets a gradient.

With `return_attn_probs=True` the result is (out, softmax_lse, S_dmask): softmax_lse is (batch, heads, seqlen_q), of
packed sequences (heads, total_q), float32 (float64 for float64 inputs), by the natural logarithm, +inf for a row that
sees no key (with a sink: the sink), and differentiable; S_dmask is an empty tensor, as flash-attn's is without dropout.

Raises UnsupportedError (a NotImplementedError) for what no kernel covers yet, naming the argument and its value:
dropout, softcap, ALiBi, caches. `flashcute.compat.configure` can send dropout to torch's own attention. Raises
ArgumentError (a ValueError) for arguments that do not fit.
"""

from __future__ import annotations

from typing import Any

from .._arrays import library_of
from .._call import checked_options
from .._core import ArgumentError, FlashcuteError, UnsupportedError
from .._torch.framework import Tensor, torch
from .._torch.gradients import gradient_like, gradients
from ._arguments import (
    NOT_PACKED,
    Sequences,
    adjacent,
    checked_dropout,
    checked_sequences,
    checked_sink,
    deterministic_or_default,
    empty_rows_minus_infinity,
    empty_rows_plus_infinity,
    in_names_of_flash_attn,
    mask_2,
    refuse,
    refuse_unless_off,
    require_tensors,
)
from ._attention import Packing, Rest, Three, attend, attend_packed, require_packed

__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


# ---- attention ---------------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of q (batch, seqlen_q, heads, d), k and v (batch, seqlen_k, kv_heads, d)."""
    refuse_unless_off(softcap, alibi_slopes)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )
    return _result(attend(q, k, v, rest), q, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of q and kv (batch, seqlen_k, 2, kv_heads, d). The kernels write to the gradient of kv directly."""
    refuse_unless_off(softcap, alibi_slopes)
    require_tensors(q=q)
    require_packed("kv", kv, 2)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )
    return _result(attend_packed(q, kv, Packing(), rest), q, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of qkv (batch, seqlen, 3, heads, d). The kernels write to the gradient of qkv directly."""
    refuse_unless_off(softcap, alibi_slopes)
    require_packed("qkv", qkv, 3)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )
    return _result(attend_packed(None, qkv, Packing(), rest), qkv, return_attn_probs)


def _rest(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: object,
    deterministic: bool,
    return_lse: bool,
    sink: object,
    sequences: Sequences = NOT_PACKED,
) -> Rest:
    dropout_p, sink = checked_dropout(dropout_p), checked_sink(sink)
    common = causal, window_size, softmax_scale, deterministic, return_lse
    return Rest(mask_2, *common, dropout_p, sink, sequences)


def _result(found: Any, q: Tensor, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return found
    out, lse = found
    return out, empty_rows_plus_infinity(lse), q.new_empty(0)


# ---- packed sequences --------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q (total_q, heads, d), k and v (total_k, kv_heads, d). Sequence i has the rows
    from cu_seqlens[i] up to cu_seqlens[i + 1], int32. max_seqlen_q and max_seqlen_k have no effect. softmax_lse is
    (heads, total_q)."""
    refuse_unless_off(softcap, alibi_slopes, block_table=block_table)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
        checked_sequences(cu_seqlens_q, cu_seqlens_k),
    )
    return _result(attend(q, k, v, rest), q, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """As flash_attn_varlen_func, of q and kv (total_k, 2, kv_heads, d). The kernels write to the gradient of kv."""
    refuse_unless_off(softcap, alibi_slopes)
    require_tensors(q=q)
    require_packed("kv", kv, 2, "total_k")
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
        checked_sequences(cu_seqlens_q, cu_seqlens_k),
    )
    return _result(attend_packed(q, kv, Packing(), rest), q, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """As flash_attn_varlen_func, of qkv (total, 3, heads, d). The kernels write to the gradient of qkv directly."""
    refuse_unless_off(softcap, alibi_slopes)
    require_packed("qkv", qkv, 3, "total")
    require_tensors(cu_seqlens=cu_seqlens)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        learnable_sink,
        checked_sequences(cu_seqlens, cu_seqlens),
    )
    try:
        found = attend_packed(None, qkv, Packing(), rest)
    except (ArgumentError, UnsupportedError) as error:
        raise _of_one_cu_seqlens(error) from None
    return _result(found, qkv, return_attn_probs)


def _of_one_cu_seqlens(error: FlashcuteError) -> FlashcuteError:
    """Said of the one argument that is both."""
    return type(error)(str(error).replace("cu_seqlens_q", "cu_seqlens", 1))


# ---- not served yet ----------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Raises UnsupportedError: caches are not supported yet."""
    raise UnsupportedError(NO_CACHES)


NO_CACHES = (
    "flash_attn_with_kvcache: caches are not supported yet: call flash_attn_func with the filled part of the cache, "
    "k_cache[:, :seqlen] and v_cache[:, :seqlen]"
)


# ---- private names that other packages import -------------------------------------------------------

# Plain functions with flash-attn's parameter names: ring-flash-attn makes keyword arguments of the signature.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (out, softmax_lse, S_dmask, rng_state); S_dmask is empty, also with return_softmax, and rng_state zeros:
    there is no dropout."""
    window = (window_size_left, window_size_right)
    out, lse, s_dmask = flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False, True
    )
    return out, lse, s_dmask, q.new_zeros(2, dtype=torch.int64)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients to dq, dk and dv.

    Returns softmax_d, rowsum(dout * out): (batch, heads, seqlen_q rounded up to a multiple of 128), float32, with zeros
    after seqlen_q.
    """
    refuse_unless_off(softcap, alibi_slopes)
    require_tensors(q=q, softmax_lse=softmax_lse)
    lse = _as_memory_has_it(softmax_lse, q)
    rest = Rest(
        mask_2,
        causal,
        (window_size_left, window_size_right),
        softmax_scale,
        deterministic,
        True,
        dropout_p,
    )
    _write_gradients(dout, (q, k, v), out, lse, (dq, dk, dv), rest)
    sums = _softmax_d(dout, out)
    return torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 128))


def _write_gradients(
    dout: Tensor, q_k_v: Three, out: Tensor, lse: Tensor, into: Three, rest: Rest
) -> None:
    if checked_dropout(rest.dropout_p) != 0:  # configure() may allow it in the forward
        refuse("dropout_p", rest.dropout_p, "Only 0.0 is")
    q, k, v = q_k_v
    dq, dk, dv = into
    require_tensors(dout=dout, q=q, k=k, v=v, out=out, dq=dq, dk=dk, dv=dv)
    mask = rest.mask_of(q, k, rest.causal, rest.window_size)
    options = checked_options(
        mask.causal,
        "end",
        rest.scale,
        "bshd",
        deterministic=deterministic_or_default(rest.deterministic),
        window=mask.window,
        **rest.sequences._asdict(),
    )
    lse = empty_rows_minus_infinity(lse).contiguous()
    dout, q, k, v, out = (adjacent(x.detach()) for x in (dout, q, k, v, out))
    own = dq.detach(), dk.detach(), dv.detach()
    try:
        gradients(dout, q, k, v, out, lse.detach(), None, options, own)
    except (ArgumentError, UnsupportedError) as error:
        raise in_names_of_flash_attn(error) from None
    for x in into:
        library_of(type(x)).wrote(x)


def _as_memory_has_it(lse: Tensor, q: Tensor) -> Tensor:
    """flash-attn reads (batch, heads, seqlen_q) from memory, whatever the shape: diffusers passes that transposed."""
    if lse.shape == q.shape[:3] and lse.transpose(1, 2).is_contiguous():
        return lse.transpose(1, 2)
    return lse


def _softmax_d(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what _flash_attn_forward does. zero_tensors has no effect: all rows are written."""
    refuse_unless_off(softcap, alibi_slopes, block_table=block_table, leftpad_k=leftpad_k)
    rest = _rest(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        False,
        True,
        None,
        checked_sequences(cu_seqlens_q, cu_seqlens_k, None, seqused_k),
    )
    out, lse, s_dmask = _result(attend(q, k, v, rest), q, True)
    return out, lse, s_dmask, q.new_zeros(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes the gradients to dq, dk and dv; None: computes them and drops them, as flash-attn does.

    Returns softmax_d, rowsum(dout * out): (heads, total_q + 128 for each sequence), float32, with zeros after total_q.
    """
    refuse_unless_off(softcap, alibi_slopes)
    require_tensors(q=q, k=k, v=v, softmax_lse=softmax_lse)
    rest = Rest(
        mask_2,
        causal,
        (window_size_left, window_size_right),
        softmax_scale,
        deterministic,
        True,
        dropout_p,
        sequences=checked_sequences(cu_seqlens_q, cu_seqlens_k),
    )
    own = tuple(gradient_like(x) if dx is None else dx for dx, x in ((dq, q), (dk, k), (dv, v)))
    _write_gradients(dout, (q, k, v), out, softmax_lse, own, rest)
    sums = _softmax_d(dout, out)
    return torch.nn.functional.pad(sums, (0, 128 * (len(cu_seqlens_q) - 1)))


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
