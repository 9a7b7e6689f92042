"""One call: its options as one value, the checks of its arguments, and the call of the library.

All public functions make `Options` here and hand them down; nothing below them takes causal, scale and the others apart
again. This module imports neither those functions nor what belongs to torch.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any, NamedTuple, TypeVar

from . import _core
from ._arrays import Array, Library, Torch, library_of, stream_number, would_record
from ._checks import require_arrays, require_memory, require_mutable
from ._core import (
    ArgumentError,
    BackwardExplanation,
    Explanation,
    ForwardConfig,
    UnsupportedError,
)
from .block_mask import BlockMask
from .block_mask import Sizes as BlockMaskSizes

Found = TypeVar("Found", Explanation, BackwardExplanation)

SDPA = "torch.nn.functional.scaled_dot_product_attention"


# ---- options -------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a call computes of q, k and v, and how: CallOptions of the C++ interface, which reads them by position. A
    tuple, because torch.compile traces how it is made, and because it is made in every call."""

    causal: bool = False
    diagonal: int | None = None  # key j is visible to query i iff j <= i + diagonal; None: "end"
    scale: float | None = None
    layout: str = "bshd"
    # As the caller gave it, which keeps it alive until the gradients are computed. C++ takes its address.
    stream: object = None
    allow_tf32: bool = False
    deterministic: bool | None = None  # None: what `same_bits` says when gradients are computed
    gradients_follow: bool = False
    # How many keys before and after the diagonal a query sees; None: no limit.
    window_left: int | None = None
    window_right: int | None = None
    # (batch,): how many queries and keys exist. `prefix` is one number for all batch entries, `prefixes` (batch,).
    seqlens_q: Array | None = None
    seqlens_k: Array | None = None
    prefix: int | None = None
    prefixes: Array | None = None
    sink: Array | None = None  # (heads,)
    # Packed: (sequences + 1,), where each sequence begins in tensors without a batch dimension.
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None  # None: as those of the queries
    # The words of a BlockMask, and its (batch, heads, seqlen_q, seqlen_k).
    block_mask: Array | None = None
    block_mask_sizes: BlockMaskSizes | None = None

    def offset(self, rows: int, keys: int) -> int:
        """The diagonal as a number."""
        return keys - rows if self.diagonal is None else self.diagonal

    @property
    def has_window(self) -> bool:
        return self.window_left is not None or self.window_right is not None

    @property
    def has_lengths(self) -> bool:
        return self.seqlens_q is not None or self.seqlens_k is not None

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def has_prefix(self) -> bool:
        return self.prefix is not None or self.prefixes is not None

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays among the options that are given, by the name of their argument."""
        queries, keys, prefixes, sink = self.seqlens_q, self.seqlens_k, self.prefixes, self.sink
        starts = self.cu_seqlens_q
        if (
            queries is None
            and keys is None
            and prefixes is None
            and sink is None
            and starts is None
            and self.block_mask is None
        ):
            return {}  # in most calls, where time matters
        found = {
            "seqlens_q": queries,
            "seqlens_k": keys,
            "cu_seqlens_q": starts,
            "cu_seqlens_k": self.cu_seqlens_k,
            "prefix": prefixes,
            "sink": sink,
            "block_mask": self.block_mask,
        }
        return {name: x for name, x in found.items() if x is not None}


def checked_options(
    causal: object,
    diagonal: object,
    scale: object,
    layout: object,
    stream: object = None,
    allow_tf32: object = False,
    deterministic: object = None,
    window: object = None,
    prefix: object = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    sink: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    block_mask: BlockMask | None = None,
) -> Options:
    """The arguments of a public function as one value. Raises ArgumentError for what is wrong whatever q, k and v are;
    the rest is checked with them, in C++."""
    if layout != "bshd" and layout != "bhsd":
        raise ArgumentError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}")
    if causal is not True and causal is not False:
        if not is_boolean(causal):
            raise ArgumentError(f"causal: expected True or False, got {causal!r}")
        causal = bool(causal)
    at_end = isinstance(diagonal, str) and diagonal == "end"
    left, right = (None, None) if window is None else checked_window(window)
    windowed = left is not None or right is not None
    offset = None if at_end else checked_diagonal(diagonal, causal or windowed)
    shared, prefixes = (None, None) if prefix is None else checked_prefix(prefix, causal)
    if cu_seqlens_k is not None and cu_seqlens_q is None:
        raise ArgumentError("cu_seqlens_k: expected None without cu_seqlens_q, got an array")
    words, sizes = (None, None) if block_mask is None else checked_block_mask(block_mask)
    if stream is not None:
        stream_number(stream)
    if deterministic is not None and not isinstance(deterministic, bool):
        raise ArgumentError(f"deterministic: expected True, False or None, got {deterministic!r}")
    factor = None if scale is None else number(scale)
    # Options(...) without the function that a NamedTuple defines for it, which takes twice the time.
    return tuple.__new__(
        Options,
        (
            causal,
            offset,
            factor,
            layout,
            stream,
            bool(allow_tf32),
            deterministic,
            False,
            left,
            right,
            seqlens_q,
            seqlens_k,
            shared,
            prefixes,
            sink,
            cu_seqlens_q,
            cu_seqlens_k,
            words,
            sizes,
        ),
    )


def is_boolean(x: object) -> bool:
    """NumPy's bool is a type of its own, named bool or, before NumPy 2, bool_."""
    return type(x).__name__ in ("bool", "bool_")


def is_truth(x: object) -> bool:
    """Whether x is a boolean, or an array or tensor of booleans: float and operator.index take both for 0 or 1."""
    return is_boolean(x) or str(getattr(x, "dtype", "")).endswith("bool")


def index_of(x: object) -> int:
    """The value of an integer, also of a library's or a tensor's. Raises TypeError for booleans and all else."""
    if is_truth(x):
        raise TypeError(f"expected an integer, got {x!r}")
    return operator.index(x)  # type: ignore[arg-type]


def checked_diagonal(diagonal: object, masked: object) -> int | None:
    """As a number; None for "end"."""
    value: Any = {"end": None, "start": 0}
    if isinstance(diagonal, str):
        value = value.get(diagonal, "")
    elif type(diagonal) is int or type(diagonal).__name__ == "SymInt":
        value = diagonal  # a symbol of torch.export stays one: operator.index would fix its value
    else:
        try:
            value = index_of(diagonal)
        except (TypeError, ValueError, RuntimeError):  # the last: a tensor without a value
            value = ""
    too_long = isinstance(value, int) and not -(2**63) <= value < 2**63
    if isinstance(value, str) or too_long:
        raise ArgumentError(
            f"diagonal: expected 'end', 'start' or an integer of 64 bits, got {diagonal!r}"
        )
    if value is not None and not masked:
        raise ArgumentError(
            f"diagonal: expected 'end' without causal=True or a window, got {diagonal!r}"
        )
    found: int | None = value
    return found


def checked_window(window: object) -> tuple[int | None, int | None]:
    """(left, right), with None for no limit."""
    try:
        bounds = [checked_bound(bound) for bound in window]  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor without a value
        bounds = []
    if len(bounds) != 2 or not all(-1 <= bound < 2**63 for bound in bounds):
        raise ArgumentError(
            f"window: expected (left, right), two integers >= -1 (-1 or None: no limit), got {window!r}"
        )
    left, right = (None if bound == -1 else bound for bound in bounds)
    return left, right


def checked_bound(bound: object) -> int:
    if bound is None:
        return -1
    if type(bound) is int or type(bound).__name__ == "SymInt":
        return bound  # type: ignore[return-value]  # a symbol stays one, as of a diagonal
    return index_of(bound)


def checked_prefix(prefix: object, causal: object) -> tuple[int | None, Array | None]:
    """One number for all batch entries, or an array of one for each; the other is None."""
    if not causal:
        raise ArgumentError(f"prefix: expected causal=True with it, got causal={causal!r}")
    value: Any = prefix
    # A symbol stays one, as of a diagonal; the library checks its value.
    if type(prefix).__name__ == "SymInt":
        return value, None
    if type(prefix) is not int:
        # An array, also one without dimensions: its value is not read on the host.
        if hasattr(prefix, "__dlpack__"):
            return None, prefix
        try:
            value = index_of(prefix)
        except TypeError:
            value = -1
    if not 0 <= value < 2**63:
        raise ArgumentError(
            f"prefix: expected an integer >= 0 of 64 bits, or an int32 array (batch,), got {prefix!r}"
        )
    return value, None


def checked_block_mask(mask: object) -> tuple[Array, BlockMaskSizes]:
    if isinstance(mask, BlockMask):
        return mask.words, mask.sizes
    hint = ". BlockMask.from_flex makes one of torch's" if hasattr(mask, "kv_indices") else ""
    raise ArgumentError(
        f"block_mask: expected a flashcute.BlockMask or None, got {type(mask).__qualname__}{hint}"
    )


def number(scale: object) -> float:
    """The value of `scale`, of which no gradient is computed."""
    if isinstance(scale, float):
        return scale
    if would_record(scale):
        raise ArgumentError(
            "scale: expected a number or None, got a tensor that requires gradients. There is no gradient of "
            "scale: multiply q by it, flash_attention(q * scale, k, v, scale=1.0), or pass its value, scale.item()"
        )
    try:
        if is_truth(scale):
            raise TypeError
        return float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several numbers
        raise ArgumentError(f"scale: expected a number or None, got {scale!r}") from None


def same_bits(asked: bool | None) -> bool:
    """Whether gradients are to have the same bits in every run: as the call asks, or as torch was told."""
    if asked is not None:
        return bool(asked)
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.are_deterministic_algorithms_enabled())


# ---- arguments that no kernel serves yet -----------------------------------------------------------


def missing_feature(
    attn_mask: Array | None, dropout_p: float, options: Options, documents: Any = None
) -> str | None:
    """The first of these features that is asked for, and what to use instead: no kernel has it yet."""
    require_grid(options, attn_mask, documents)
    if attn_mask is not None and is_bias(attn_mask):
        return f"float attn_mask is not supported yet: use {SDPA}(attn_mask=...)"
    if not isinstance(dropout_p, float) and would_record(dropout_p):
        raise ArgumentError(
            f"dropout_p: expected a number, got a tensor that requires gradients: {dropout_p!r}. There is no "
            "gradient of dropout_p: pass its value, dropout_p.item()"
        )
    if dropout_p != 0.0:
        return f"dropout_p={dropout_p} is not supported yet: use {SDPA}(dropout_p=...)"
    return None


def require_grid(options: Options, attn_mask: Array | None, documents: Any) -> None:
    """Raises ArgumentError for masks by element beside packed sequences."""
    if not options.is_packed:
        return
    for name, given in (("attn_mask", attn_mask), ("documents", documents)):
        if given is not None:
            raise ArgumentError(
                f"{name}: expected None beside cu_seqlens_q, got an array: packed sequences have no "
                "(seqlen_q, seqlen_k) grid"
            )


def is_bias(attn_mask: Array) -> bool:
    """Whether a mask is added to the scores, and does not say which keys are seen. Raises ArgumentError where it is
    neither."""
    if is_truth(attn_mask):
        return False
    dtype = str(getattr(attn_mask, "dtype", type(attn_mask).__qualname__))
    if "float" in dtype:
        return True
    raise ArgumentError(
        f"attn_mask: expected an array of dtype bool (True: the key is seen) or a float, got {dtype}"
    )


# ---- the call --------------------------------------------------------------------------------------


def run(
    cfg: ForwardConfig | None,
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    out: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """The forward, on the stream of the options."""
    arrays = {"q": q, "k": k, "v": v, **options.arrays}
    if out is not None:
        arrays["out"] = out
    require_arrays(arrays)
    if out is not None:
        require_mutable("out", out)
    library = library_of(type(q))
    try:
        address = None if options.stream is None else stream_number(options.stream)
        if address is None:
            return _run(library, cfg, q, k, v, options, out, return_lse)
        with library.use_stream(address, list(arrays.values())):
            options = options._replace(stream=address)
            return _run(library, cfg, q, k, v, options, out, return_lse)
    except (ArgumentError, RuntimeError):
        require_memory(**arrays)  # says it better, if that is the reason
        raise


def _run(
    library: Library,
    cfg: ForwardConfig | None,
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    out: Array | None,
    return_lse: bool,
) -> Any:
    rank = 3 if options.is_packed else 4
    if (out is None or return_lse) and not (
        len(q.shape) == rank and len(v.shape) == rank and 1 <= v.shape[-1] <= 256
    ):
        _core.check_problem(q, k, v, options)  # raises before anything is allocated
    target = library.empty((*q.shape[:-1], v.shape[-1]), q) if out is None else out
    lse = None
    if return_lse:
        double = str(q.dtype).endswith("float64")
        lse = library.empty(rows_of_heads(q, options.layout), q, "float64" if double else "float32")
    _core.forward(cfg, q, k, v, target, lse, None, options)
    if out is not None:
        library_of(type(out)).wrote(out)
    result = library.finish(target, q) if out is None else out
    return (result, library.finish(lse, q)) if return_lse else result


def rows_of_heads(q: Array, layout: str) -> tuple[int, ...]:
    """The shape of the log-sum-exp: (batch, heads, seqlen_q); packed, (heads, total_q)."""
    *batch, rows, heads = q.shape[:-1]
    return (*batch, heads, rows) if layout == "bshd" else (*batch, rows, heads)


# ---- explanations ----------------------------------------------------------------------------------


def replaced(found: Found, **changes: object) -> Found:
    """A copy of an explanation with some members changed."""
    members = {
        name: getattr(found, name)
        for name, x in vars(type(found)).items()
        if isinstance(x, property)
    }
    return type(found)(**members | changes)


def with_copies(found: Explanation, q: Array, v: Array) -> Explanation:
    """With what Python does for gradients before the library computes them."""
    gradients = found.gradients
    if gradients is None or not gradients.backend:
        return found
    copied = math.prod(q.shape[:-1]) * v.shape[-1] * q.dtype.itemsize
    note = f"A gradient of the output whose last stride is not 1 is copied first ({copied} bytes)."
    return replaced(found, gradients=replaced(gradients, notes=[*gradients.notes, note]))


def unsupported(found: Explanation, missing: str) -> Explanation:
    """The explanation of a call that raises UnsupportedError."""
    return Explanation(
        backend="",
        config=None,
        kernel="",
        image="",
        rejected=[(found.backend or "kernels", missing), *found.rejected],
        notes=[],
    )


def checked_fallback(on_unsupported: str | None, library: Library) -> str:
    """What to do where no kernel serves a call."""
    if on_unsupported not in (None, "warn", "error", "silent"):
        raise ArgumentError(
            f"on_unsupported: expected 'warn', 'error', 'silent' or None, got {on_unsupported!r}"
        )
    if not isinstance(library, Torch):
        return "error"  # nobody else's attention is at hand
    return on_unsupported or "warn"


def require_unrecorded(**arrays: Array) -> None:
    """For `forward`, which records no gradient."""
    if name := _wanting_gradients(arrays):
        raise ArgumentError(
            f"{name}: expected a tensor without requires_grad, got requires_grad=True. forward records "
            "no gradient: call it under torch.no_grad(), detach the tensor, or use flash_attention"
        )


def require_torch_to_record(**arrays: Array) -> None:
    """For `flash_attention` of arrays of which not all are torch tensors, or where out is one."""
    if name := _wanting_gradients(arrays):
        raise UnsupportedError(
            f"{name}: gradients (requires_grad=True) need q, k and v to be torch tensors, and out to "
            "require none. Call flash_attention under torch.no_grad(), or detach the tensor"
        )


def _wanting_gradients(arrays: dict[str, Array]) -> str | None:
    """The first of the arrays of which a gradient would be expected."""
    for name, array in arrays.items():
        if library_of(type(array)).wants_gradient(array):
            return name
    return None
