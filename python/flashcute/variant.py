"""What `forward` and `backward` compute, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._arrays import Array
from ._call import SDPA, Options, checked_options, is_bias, require_grid
from ._checks import require_arrays
from ._core import ArgumentError, UnsupportedError
from ._masks import Documents, arrays_of, with_masks
from .block_mask import BlockMask


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """What attention is computed: the same value for `forward` and for `backward`, so that the gradients are those of
    the function that was computed.

    causal: query i sees key j if and only if j <= i + diagonal.
    diagonal: of the causal mask and the window. "end" is seqlen_k - seqlen_q: the last query is aligned to the last
        key; "start" is 0: the first query is aligned to the first key; or an integer, which may be negative. Without
        causal=True or a window only "end" is allowed.
    window: (left, right): query i sees keys from i + diagonal - left to i + diagonal + right, both included; -1 or None
        is no limit. With causal=True it also sees no key after i + diagonal. A causal window of w keys, the query's own
        included, is causal=True, window=(w - 1, 0).
    prefix: with causal=True, keys that every query sees, whatever the causal mask hides: those before this number, an
        integer >= 0 or one for each batch entry, int32 (batch,). The window still cuts them.
    seqlens_q, seqlens_k: how many queries and keys of each batch entry exist, int32 (batch,); default all. Numbers
        below 0 count as 0, those above the length of q or k as that. A query beyond has output 0, LSE -inf and gradient
        0; a key beyond is seen by none, and its gradients are 0. It does not matter what memory holds there, NaN
        included. The diagonal "end" of entry b is seqlens_k[b] - seqlens_q[b].
    cu_seqlens_q, cu_seqlens_k: packed sequences: where each of n sequences begins and the last ends, int32 (n + 1,).
        q is (total_q, heads, d), k and v are (total_k, kv_heads, d), with layout="bhsd" (heads, total, d), and so are
        the output and gradients; the LSE is (heads, total_q). Sequence i has the rows from cu_seqlens[i] up to
        cu_seqlens[i + 1], sees no other one, and is what is called a batch entry here: prefix and seqlens have n
        numbers. cu_seqlens_k: default cu_seqlens_q. Rows that belong to no sequence do not exist, as those beyond
        seqlens. Numbers that descend, or are no rows of the arrays, give wrong results, but touch no other memory.
    sink: (heads,), float32 or q's dtype: for each query head a logit beside the scaled scores, as of a key that every
        query sees and whose value is 0. Neither scale nor masks apply to it. The LSE includes it. A query that sees no
        key has output 0 and LSE sink.

    attn_mask: a boolean array that broadcasts to (batch, heads, seqlen_q, seqlen_k), with any strides: True where the
        query sees the key.
    documents: numbers of documents, int32 (batch, seqlen) or (seqlen,), or a pair of such arrays, of the queries and of
        the keys: a query sees the keys of its own document. One below 0 sees nothing, and is seen by none. A call has
        room for 65,536 cells of 64 x 64 of which some elements are visible and some are not (64 MiB), or for 2 % of all
        cells if that is more. Documents whose numbers alternate may have more: then all results are NaN, and
        `BlockMask.from_documents` makes a mask that has room.
    block_mask: a `BlockMask` for the lengths of q and k: any mask, made before the calls that use it. Each call makes
        one of attn_mask and documents, without synchronising, so a mask of several calls is better made once
        (`BlockMask.from_dense`, `BlockMask.from_documents`). Packed sequences take none of the three.

    The arrays are on q's device, all but attn_mask and documents contiguous, and may be of any library that supports
    DLPack. No call reads their values on the host: they may change between the replays of a CUDA graph. Masks AND: none
    switches another off.

    Raises ArgumentError for what is wrong whatever q, k and v are; the rest is checked in the calls.
    """

    causal: bool = False
    diagonal: str | int = "end"
    window: tuple[int | None, int | None] | None = None
    prefix: int | Array | None = None
    seqlens_q: Array | None = None
    seqlens_k: Array | None = None
    sink: Array | None = None
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    attn_mask: Array | None = None
    documents: Documents | None = None
    block_mask: BlockMask | None = None

    def __post_init__(self) -> None:
        options = options_of(self)
        require_arrays(options.arrays | arrays_of(self.attn_mask, self.documents))
        require_grid(options, self.attn_mask, self.documents)
        if self.attn_mask is not None and is_bias(self.attn_mask):
            raise UnsupportedError(
                f"float attn_mask is not supported yet: use {SDPA}(attn_mask=...)"
            )


def options_of(
    variant: Variant | None,
    causal: object = False,
    scale: object = None,
    layout: object = "bshd",
    stream: object = None,
) -> Options:
    """The options of a call that takes `variant`, or `causal` alone. Without what the variant says by element: see
    `with_masks_of`."""
    if variant is None:
        return checked_options(causal, "end", scale, layout, stream)
    if not isinstance(variant, Variant):
        raise ArgumentError(f"variant: expected a Variant or None, got {variant!r}")
    if causal is not False:
        raise ArgumentError(
            f"causal: expected none beside variant=, which has its own, got {causal!r}"
        )
    return checked_options(
        variant.causal,
        variant.diagonal,
        scale,
        layout,
        stream,
        window=variant.window,
        prefix=variant.prefix,
        seqlens_q=variant.seqlens_q,
        seqlens_k=variant.seqlens_k,
        sink=variant.sink,
        cu_seqlens_q=variant.cu_seqlens_q,
        cu_seqlens_k=variant.cu_seqlens_k,
        block_mask=variant.block_mask,
    )


def with_masks_of(
    variant: Variant | None, options: Options, q: Array, k: Array, v: Array, **how: Any
) -> Options:
    """`with_masks`, of a variant."""
    if variant is None:
        return options
    return with_masks(options, q, k, v, variant.attn_mask, variant.documents, **how)
