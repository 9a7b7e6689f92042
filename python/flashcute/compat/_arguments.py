"""From flash-attn's arguments to those of flash_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .._arrays import library_of
from .._call import index_of
from .._core import ArgumentError, FlashcuteError, UnsupportedError
from .._torch.flash2 import window_of
from .._torch.framework import Tensor, torch
from . import _settings


class Mask(NamedTuple):
    """Which keys a query sees, in flash_attention's words."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None


# ---- arguments that no kernel serves yet -----------------------------------------------------------


def refuse(name: str, value: object, instead: str) -> NoReturn:
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise UnsupportedError(f"{name}: {shown} is not supported yet. {instead}")


def refuse_unless_off(
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attention_chunk: int = 0,
    **tensors: Tensor | None,
) -> None:
    """Raises UnsupportedError for what neither a kernel nor torch's own attention computes."""
    if softcap != 0:
        refuse("softcap", softcap, "Only 0.0 (off) is")
    if attention_chunk != 0:
        refuse("attention_chunk", attention_chunk, "Only 0 (off) is")
    for name, x in {"alibi_slopes": alibi_slopes, **tensors}.items():
        if x is not None:
            refuse(name, x, "Only None is")


def checked_dropout(dropout_p: float) -> float:
    if 0 <= dropout_p <= 2.0**-25:  # 1 - dropout_p is 1 in float32: flash-attn, too, drops nothing
        return 0.0
    if _settings.on_unsupported == "error":
        refuse("dropout_p", dropout_p, f"Only 0.0 is. {ALLOW_TORCH}")
    return dropout_p


ALLOW_TORCH = (
    'flashcute.compat.configure(on_unsupported="warn") lets torch\'s own attention compute it'
)


# ---- masks -----------------------------------------------------------------------------------------


def bounds_of(window_size: object) -> tuple[int, int]:
    """(left, right); any negative number is off, as in flash-attn."""
    try:
        left, right = (index_of(x) for x in window_size)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"window_size: expected two integers, (left, right), where -1 is off, got {window_size!r}"
        ) from None
    return max(left, -1), max(right, -1)


def mask_2(q: Tensor, k: Tensor, causal: bool, window_size: object) -> Mask:
    """flash-attn 2: causal is a right bound of 0, and a bound that is no shorter than the keys is off."""
    return _mask(causal, *window_of(causal, *bounds_of(window_size), length(k)))


def mask_3(q: Tensor, k: Tensor, causal: bool, window_size: object) -> Mask:
    """flash-attn 3: a bound that hides nothing is off, then causal is a right bound of 0."""
    left, right = bounds_of(window_size)
    left = -1 if left >= length(k) - 1 else left
    right = -1 if causal or right >= length(q) - 1 else right  # the causal mask is the right bound
    return _mask(causal, left, right)


def _mask(causal: bool, left: int | None, right: int | None) -> Mask:
    off = left in (None, -1) and right in (None, -1)
    return Mask(causal, None if off else (left, right))


def length(x: Tensor) -> Any:
    """seqlen of (batch, seqlen, heads, d), or total of (total, heads, d), which no sequence exceeds; a symbol in a
    trace. Other shapes are refused by flash_attention."""
    return x.shape[-3] if x.dim() > 2 else 0


# ---- tensors ---------------------------------------------------------------------------------------


def require_tensors(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(f"{name}: expected a torch tensor, got {type(x).__qualname__}")


def adjacent(x: Tensor) -> Tensor:
    """With a last stride of 1: users of flash-attn rely on the copy."""
    return library_of(type(x)).with_unit_stride(x)


def checked_sink(sink: object) -> Tensor | None:
    """Contiguous; flash_attention checks the rest."""
    if sink is None:
        return None
    require_tensors(learnable_sink=sink)
    return sink.contiguous()  # type: ignore[attr-defined]


NAMES = {"sink": "learnable_sink", "seqlens_q": "seqused_q", "seqlens_k": "seqused_k"}


def in_names_of_flash_attn(error: FlashcuteError) -> FlashcuteError:
    """What flash_attention says of its arguments, said of those that they came from."""
    name, colon, rest = str(error).partition(": ")
    return type(error)(f"{NAMES[name]}{colon}{rest}") if name in NAMES else error


def empty_rows_plus_infinity(lse: Tensor) -> Tensor:
    """flash-attn 2's mark of a row that sees no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def empty_rows_minus_infinity(lse: Tensor) -> Tensor:
    """The inverse."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def deterministic_or_default(deterministic: bool) -> bool | None:
    """False is flash-attn's default, and does not overrule torch.use_deterministic_algorithms."""
    return True if deterministic else None


class Sequences(NamedTuple):
    """Where packed sequences lie, in flash_attention's words."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None


NOT_PACKED = Sequences()


def checked_sequences(
    cu_seqlens_q: object, cu_seqlens_k: object, seqused_q: object = None, seqused_k: object = None
) -> Sequences:
    """Contiguous; flash_attention checks the rest."""
    require_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    given = {"seqused_q": seqused_q, "seqused_k": seqused_k}
    require_tensors(**{name: x for name, x in given.items() if x is not None})
    arrays: Any = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    return Sequences(*(None if x is None else x.contiguous() for x in arrays))


MaskOf = Callable[[Tensor, Tensor, bool, object], Mask]
