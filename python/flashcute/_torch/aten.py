"""Overrides of the operators behind torch's flash attention.

Each takes over what flashcute computes and hands the rest to the kernel that was there. Below autograd, functorch and
FakeTensor nothing is recorded or traced: the tensors are plain, and torch keeps its own shapes, derivatives and
compilation of these operators. What an override returns has therefore the strides that torch's shape functions
(torch._meta_registrations) promise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .. import _core
from .._arrays import library_of
from .._call import Options, rows_of_heads
from .flash2 import window_of
from .framework import Tensor, torch
from .gradients import gradients
from .served import NotServedError, leave, refusal, taken


class Override(NamedTuple):
    device: str
    compute: Callable[..., Any]  # raises NotServedError for torch's own kernel


class Overrides:
    """The operators of some devices, overridden until `remove`."""

    def __init__(self, devices: Iterable[str]) -> None:
        self.libraries = []
        for device in devices:
            key = device.upper()
            library = torch.library.Library("aten", "IMPL", key)
            self.libraries.append(library)
            for name, override in TABLE.items():
                if override.device == device and (own := _kernel(name, key)):
                    with warnings.catch_warnings():  # that a kernel is overridden is the point
                        warnings.simplefilter("ignore")
                        library.impl(name, _either(name, override, own), key, with_keyset=True)

    def remove(self) -> None:
        """Puts torch's kernels back. torch's registry calls it."""
        for library in self.libraries:
            # Dropping the reference is not enough: somebody else may hold one.
            library._destroy()
        self.libraries = []


def _kernel(name: str, key: str) -> Any:
    """torch's own, or None where this torch, or a build without CUDA, has none to fall back to."""
    if not hasattr(torch.ops.aten, name):
        return None
    try:
        return torch.library.get_kernel(f"aten::{name}", key)
    except RuntimeError:
        return None


def _either(name: str, override: Override, own: Any) -> Callable[..., Any]:
    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = override.compute(*args, **kwargs)
        except NotServedError as reason:
            leave(str(reason))
            return own.call_boxed(keyset, *args, **kwargs)
        taken[name] += 1
        return found

    return call


# ---- what all share --------------------------------------------------------------------------------


def _options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    dropout_p: float,
    causal: bool,
    diagonal: int | None,
    scale: float | None,
    window: tuple[int | None, int | None] = (None, None),
    starts: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Options:
    cu_seqlens_q, cu_seqlens_k = starts
    reason = refusal(q, k, v, layout, dropout_p, scale, packed=cu_seqlens_q is not None)
    if reason:
        raise NotServedError(reason)
    left, right = window_of(causal, *window, k.shape[-3 if layout == "bshd" else -2])
    return Options(
        causal, diagonal if causal else None, scale, layout, window_left=left, window_right=right,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def _require_off(**arguments: object) -> None:
    """What no kernel of flashcute does, and what a newer torch has added; and seqused_k of _flash_attention_forward,
    which kernels have as seqlens_k: _flash_attention_backward is not told of it, so it would differentiate another
    function than the one that was computed."""
    for name, value in arguments.items():
        if value is not None:
            raise NotServedError(name)


def _starts_of(
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Where packed sequences begin. For dense tensors autograd hands None on, and a traced graph may hold an empty
    tensor."""
    given = [x for x in (cum_seq_q, cum_seq_k) if x is not None and x.numel() > 0]
    if not given:
        return None, None
    if len(given) == 1 or any(x.dtype != torch.int32 for x in given):
        raise NotServedError("packed queries or keys alone, or offsets of other than 32 bits")
    starts_q, starts_k = (x.contiguous() for x in given)
    return starts_q, starts_k


def _require_dense(*cum_seqlens: Tensor | None) -> None:
    if any(x is not None for x in _starts_of(*cum_seqlens)):
        raise NotServedError("packed sequences of an operator that has none")


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: Options) -> Tensor:
    """Writes out, and returns the log-sum-exp, contiguous."""
    q, k, v = (library_of(type(x)).with_unit_stride(x) for x in (q, k, v))
    target = out if _is_adjacent(out) else out.new_empty(out.shape)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(rows_of_heads(q, options.layout), dtype=dtype, device=q.device)
    _core.forward(None, q, k, v, target, lse, None, options)
    if target is not out:
        out.copy_(target)
    return lse


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    new_like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, ...]:
    """dq, dk and dv with the strides that new_like gives."""
    promised = tuple(new_like(x) for x in (q, k, v))
    written = tuple(x if _is_adjacent(x) else x.new_empty(x.shape) for x in promised)
    q, k, v, out = (library_of(type(x)).with_unit_stride(x) for x in (q, k, v, out))
    gradients(dout, q, k, v, out, lse.contiguous(), None, options, written)
    return tuple(
        x if x is same else same.copy_(x) for x, same in zip(written, promised, strict=True)
    )


def _is_adjacent(x: Tensor) -> bool:
    """Whether neighbours in the last dimension are, as in all that kernels write."""
    return bool(x.shape[-1] < 2 or x.stride(-1) == 1)


def _without_random(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rng_state, unused and debug_attn_mask, as without dropout: only their shapes mean something."""
    return (
        torch.empty(2, dtype=torch.uint64, device=q.device),
        torch.empty((), dtype=torch.uint64, device=q.device),
        torch.empty(0, dtype=q.dtype, device=q.device),
    )


# ---- the operators on a GPU ------------------------------------------------------------------------

# is_causal is aligned to the last key there, as in FlashAttention-2: scaled_dot_product_attention calls these operators
# with it only where seqlen_q is seqlen_k, and CausalBias where it means the last key.
LAST_KEY = None


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **newer: object,
) -> Any:
    _require_off(return_debug_mask=return_debug_mask or None, **newer)
    options = _options(query, key, value, "bhsd", dropout_p, is_causal, LAST_KEY, scale)
    out = torch.empty_like(query)
    lse = _attend(query, key, value, out, options)
    return out, lse, None, None, query.shape[2], key.shape[2], *_without_random(query)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **newer: object,
) -> Any:
    _require_dense(cum_seq_q, cum_seq_k)
    _require_off(**newer)
    options = _options(query, key, value, "bhsd", dropout_p, is_causal, LAST_KEY, scale)
    return _differentiate(grad_out, query, key, value, out, logsumexp, options)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    num_splits: int | None = None,  # how fast, not what
    **others: object,
) -> Any:
    starts = _starts_of(cum_seq_q, cum_seq_k)
    _require_off(return_debug_mask=return_debug_mask or None, **others)
    window = window_size_left, window_size_right
    options = _options(
        query, key, value, "bshd", dropout_p, is_causal, LAST_KEY, scale, window, starts
    )
    out = torch.empty_like(query)
    lse = _attend(query, key, value, out, options)
    return out, lse, *_without_random(query)


def _flash_forward_into(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    num_splits: int | None = None,  # how fast, not what
    **others: object,
) -> Any:
    starts = _starts_of(cum_seq_q, cum_seq_k)
    _require_off(return_debug_mask=return_debug_mask or None, **others)
    window = window_size_left, window_size_right
    options = _options(
        query, key, value, "bshd", dropout_p, is_causal, LAST_KEY, scale, window, starts
    )
    return _attend(query, key, value, out, options)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: object,
) -> Any:
    starts = _starts_of(cum_seq_q, cum_seq_k)
    _require_off(**others)
    window = window_size_left, window_size_right
    options = _options(
        query, key, value, "bshd", dropout_p, is_causal, LAST_KEY, scale, window, starts
    )
    return _differentiate(grad_out, query, key, value, out, logsumexp, options)


# ---- the operators on the CPU ----------------------------------------------------------------------

# There is_causal is aligned to the first key, for all lengths.
FIRST_KEY = 0


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **newer: object,
) -> Any:
    _require_off(attn_mask=attn_mask, **newer)
    options = _options(query, key, value, "bhsd", dropout_p, is_causal, FIRST_KEY, scale)
    out = torch.empty_like(query)
    lse = _attend(query, key, value, out, options)
    # torch stores it (batch, seqlen_q, heads), and compiled code relies on that.
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **newer: object,
) -> Any:
    _require_off(attn_mask=attn_mask, **newer)
    options = _options(query, key, value, "bhsd", dropout_p, is_causal, FIRST_KEY, scale)
    return _differentiate(
        grad_out, query, key, value, out, logsumexp, options, _new_with_heads_inside
    )


def _new_with_heads_inside(x: Tensor) -> Tensor:
    """In memory (batch, seqlen, heads, head_dim), as torch has its gradients on the CPU."""
    return torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


TABLE = {
    "_scaled_dot_product_flash_attention": Override("cuda", _sdpa_forward),
    "_scaled_dot_product_flash_attention_backward": Override("cuda", _sdpa_backward),
    "_flash_attention_forward": Override("cuda", _flash_forward),
    "_flash_attention_forward_no_dropout_inplace": Override("cuda", _flash_forward_into),
    "_flash_attention_backward": Override("cuda", _flash_backward),
    "_scaled_dot_product_flash_attention_for_cpu": Override("cpu", _cpu_forward),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Override("cpu", _cpu_backward),
}
DEVICES = ("cpu", "cuda")
