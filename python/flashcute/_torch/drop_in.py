"""scaled_dot_product_attention: torch's arguments as those of flash_attention."""

from __future__ import annotations

import math
import sys

from .._arrays import library_of
from .._call import is_truth
from .._core import ArgumentError
from ..attention import flash_attention
from .framework import Tensor, has_autocast, torch
from .served import LARGEST_SCALE, leave
from .tracing import differentiates_as_function


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    _check_options(attn_mask, dropout_p, is_causal)
    tensors = query, key, value
    simple, reason = False, _why_not_dense(tensors)
    if not reason:
        simple = _is_simple(*tensors)
        _check_kinds(*tensors)
        if not simple:
            _check_shapes(*tensors, enable_gqa)
        diagonal = _causal_diagonal(query, key, attn_mask, is_causal)
        reason = _why_torch(tensors, attn_mask, dropout_p, scale, enable_gqa)
    if reason:
        leave(reason)
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = None if _is_causal_bias(attn_mask) else attn_mask
    if simple and (mask is None or mask.dim() <= 4):
        return _flash(query, key, value, mask, diagonal, scale)
    lead, (q, k, v) = _folded(*tensors, enable_gqa)
    if mask is not None:
        mask = _folded_mask(mask, lead, (q.shape[-2], k.shape[-2]))
    out = _flash(q, k, v, mask, diagonal, scale)
    return out.reshape(*lead, *out.shape[-2:])


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    diagonal: str | None,
    scale: float | None,
) -> Tensor:
    # A last stride other than 1 costs a copy of the tensor, not the scores in memory.
    q, k, v = (library_of(type(x)).with_unit_stride(x) for x in (q, k, v))
    causal = diagonal is not None
    # flash_attention goes to torch itself where gradients have no kernel.
    return flash_attention(
        q, k, v, causal, diagonal=diagonal or "end", attn_mask=mask, scale=scale, layout="bhsd",
        on_unsupported="silent",
    )  # fmt: skip


# ---- arguments -------------------------------------------------------------------------------------


def _check_options(attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    if not isinstance(is_causal, bool):
        raise ArgumentError(f"is_causal: expected True or False, got {is_causal!r}")
    if attn_mask is not None and is_causal:
        raise ArgumentError(
            "attn_mask: expected None with is_causal=True, got a mask. Pass one of the two"
        )
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p!r}")


def _causal_diagonal(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> str | None:
    """What flash_attention calls a causal mask; None for none and for a mask that has elements."""
    if not _is_causal_bias(attn_mask):
        return "start" if is_causal else None
    lengths, made_for = (
        (query.shape[-2], key.shape[-2]),
        (attn_mask.seq_len_q, attn_mask.seq_len_kv),
    )
    if made_for != lengths:
        raise ArgumentError(
            f"attn_mask: expected a CausalBias of query's and key's lengths, {lengths}, got one of {made_for}"
        )
    variants = sys.modules["torch.nn.attention.bias"].CausalVariant
    return "end" if attn_mask.variant == variants.LOWER_RIGHT else "start"


def _is_causal_bias(mask: object) -> bool:
    module = sys.modules.get("torch.nn.attention.bias")  # without it nobody has made one
    return module is not None and isinstance(mask, module.CausalBias)


def _why_not_dense(tensors: tuple[Tensor, ...]) -> str | None:
    for x in tensors:
        if x.is_nested or x.layout is not torch.strided or type(x).__name__ == "MaskedTensor":
            return "a tensor that is not dense"
    return None


def _why_torch(
    tensors: tuple[Tensor, ...],
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why torch's own function computes the call."""
    query, key, value = tensors
    if not (attn_mask is None or is_truth(attn_mask) or _is_causal_bias(attn_mask)):
        return "an attn_mask that is added to the scores"
    if dropout_p != 0.0:
        return "dropout"
    if scale is not None and not 0.0 <= scale <= LARGEST_SCALE:
        return "a scale below 0 or above 2e38"
    if not (1 <= query.shape[-1] <= 256 and 1 <= value.shape[-1] <= 256):
        return "a head dimension of 0 or above 256"
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        return "numbers of heads that differ between key and value"
    if query.dtype == torch.float64 and query.is_cuda:
        return "float64 on a GPU"
    if differentiates_as_function(*tensors):
        return "derivatives of torch.func or forward mode"
    return None


def _check_kinds(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("key", key), ("value", value)):
        if x.device != query.device:
            raise ArgumentError(f"{name}: expected query's device {query.device}, got {x.device}")
        if x.dtype != query.dtype and not _is_cast(query):
            raise ArgumentError(f"{name}: expected query's dtype {query.dtype}, got {x.dtype}")


def _is_cast(x: Tensor) -> bool:
    """Whether autocast will make the dtypes one."""
    kind = x.device.type
    return has_autocast(kind) and bool(torch.is_autocast_enabled(kind))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """In torch's words: flash_attention would speak of tensors that the caller has not seen."""
    least = 3 if enable_gqa else 2
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.dim() < least:
            raise ArgumentError(
                f"{name}: expected at least {least} dimensions, got {tuple(x.shape)}"
                + (" with enable_gqa=True" if enable_gqa else "")
            )
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            f"key: expected query's head dimension {query.shape[-1]}, got {key.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ArgumentError(f"value: expected key's seqlen {key.shape[-2]}, got {value.shape[-2]}")
    ends = -3 if enable_gqa else -2
    shapes = {name: tuple(x.shape[:ends]) for name, x in tensors.items()}
    if not _broadcast_together(*shapes.values()):
        hint = "" if enable_gqa else ". Fewer heads of key and value need enable_gqa=True"
        raise ArgumentError(
            f"query, key, value: expected leading dimensions that broadcast, got {shapes}{hint}"
        )
    if enable_gqa:
        for name, x in (("key", key), ("value", value)):
            if x.shape[-3] == 0 or query.shape[-3] % x.shape[-3] != 0:
                raise ArgumentError(
                    f"{name}: expected a number of heads that divides query's {query.shape[-3]}, got {x.shape[-3]}"
                )


def _broadcast_together(*shapes: tuple[int, ...]) -> bool:
    rank = max(len(shape) for shape in shapes)
    full = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    for sizes in zip(*full, strict=True):
        size = 1
        for other in sizes:
            if other != 1 and size != 1 and other != size:
                return False
            size = size if other == 1 else other
    return True


# ---- leading dimensions ----------------------------------------------------------------------------


def _is_simple(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the tensors are as flash_attention takes them, and mean the same with and without enable_gqa."""
    q, k, v = query.shape, key.shape, value.shape
    return bool(
        len(q) == len(k) == len(v) == 4
        and q[:2] == k[:2] == v[:2]
        and q[3] == k[3]
        and k[2] == v[2]
    )


def _folded(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The output's leading dimensions, and the tensors with four dimensions."""
    tensors = (query, key, value)
    if enable_gqa:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
        heads = [x.shape[-3] for x in tensors]
        lead = (*batch, heads[0])
    else:
        lead = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
        batch, rest = lead[:-1], lead[-1:]
        heads = [math.prod(rest)] * 3
        if all(x.dim() > 2 and x.shape[-3] == 1 for x in (key, value)):
            heads[1:] = 1, 1  # shared by all heads of query: kernels need no copies
    size = math.prod(batch)
    folded = tuple(
        x.expand(*batch, *([count] if lead else []), *x.shape[-2:]).reshape(
            size, count, *x.shape[-2:]
        )
        for x, count in zip(tensors, heads, strict=True)
    )
    return tuple(lead), folded


def _folded_mask(mask: Tensor, lead: tuple[int, ...], lengths: tuple[int, int]) -> Tensor:
    """Of the output's leading dimensions, with at most four, and without a copy where all have the same mask."""
    whole = (*lead, *lengths)
    missing = len(whole) - mask.dim()
    fits = missing >= 0 and all(
        have == 1 or have == want for have, want in zip(mask.shape, whole[missing:], strict=True)
    )
    if not fits:
        raise ArgumentError(
            f"attn_mask: expected a shape that broadcasts to (..., heads, seqlen_q, seqlen_k) = {whole}, got "
            f"{tuple(mask.shape)}"
        )
    if mask.dim() <= 3:
        return mask
    batch, own = lead[:-1], mask.shape[-3:]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *own)
    return mask.expand(*batch, *own).reshape(math.prod(batch), *own)
