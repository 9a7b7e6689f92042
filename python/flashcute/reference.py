"""Attention in plain array code: the textbook formula, and FlashAttention's way of computing it.

`naive` and `chunked` return the same numbers; `naive_gradients` goes back. They run on NumPy,
torch, CuPy, JAX and whatever follows the array API standard, on any device of theirs; on float64
arrays they are the reference that the kernels are tested against. They are written to be read, not
to be fast.

For one head with queries q (seqlen_q, d), keys k (seqlen_k, d) and values v (seqlen_k, d):

    S = scale * q kᵀ                    scores          (seqlen_q, seqlen_k)
    P = exp(S - rowmax(S)) / rowsum     probabilities   (seqlen_q, seqlen_k)
    O = P v                             output          (seqlen_q, d)
    L = log(rowsum(exp(S)))             log-sum-exp     (seqlen_q,)

With a causal mask, query i sees key j iff j <= i + diagonal, which is seqlen_k - seqlen_q by
default: the last query sees every key. A window (left, right) shows it keys from i + diagonal -
left to i + diagonal + right. A prefix shows it the first keys whatever a causal mask hides. Where
seqlens_q and seqlens_k say how many queries and keys exist, they take the place of the lengths of
the arrays. Masks by element hide keys one by one. What is told of a mask holds together: a row sees a
key if all of it says so. A row that sees no key has O = 0 and L = -inf. A key that a row does not see never
enters its sums, not even as 0 * NaN; a NaN that it does see comes out.

A sink z is a further score of every row, with a value of 0:

    P = exp(S - L)      O = P v      L = log(rowsum(exp(S)) + exp(z))

From the gradients dO and dL of the results to those of q, k and v:

    dS = P * (dO vᵀ - rowsum(dO * O) + dL)                              (seqlen_q, seqlen_k)
    dq = scale * dS k        dk = scale * dSᵀ q        dv = Pᵀ dO
    dz = -sum(exp(z - L) * (rowsum(dO * O) - dL))
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from ._call import Options, checked_options, is_truth
from ._checks import require_kind
from ._core import ArgumentError
from .block_mask import BlockMask, with_rank

Array = Any
Namespace = Any  # of the functions of an array library

__all__ = ["chunked", "naive", "naive_gradients", "namespace"]

INFINITY = math.inf


def naive(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    diagonal: str | int = "end",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    attn_mask: Array | None = None,
    documents: Array | tuple[Array, Array] | None = None,
    block_mask: BlockMask | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q kᵀ) v, through the whole matrix of scores.

    q: (batch, seqlen_q, heads, d).  k, v: (batch, seqlen_k, kv_heads, d), kv_heads dividing heads.
    layout: "bshd" as above, or "bhsd" with heads before seqlen.
    diagonal: of the causal mask and the window: "end" (seqlen_k - seqlen_q), "start" (0) or an integer.
    window: (left, right), how many keys before and after the diagonal a query sees; -1 or None: no limit.
    prefix: with causal=True, how many first keys every query sees, as far as the window reaches: an
        integer or (batch,).
    seqlens_q, seqlens_k: how many queries and keys exist, integers (batch,); default all. Other queries
        have O = 0 and L = -inf. The diagonal "end" is their difference.
    cu_seqlens_q, cu_seqlens_k: packed sequences: where each begins and the last ends, integers (n + 1,).
        q is (total_q, heads, d), k and v are (total_k, kv_heads, d), L is (heads, total_q). Each sequence
        is a batch entry. Other rows have O = 0 and L = -inf.
    attn_mask: boolean, (batch, heads, seqlen_q, seqlen_k), any of which may be 1, the first two left out:
        True where the query sees the key.
    documents: integers (batch, seqlen) or (seqlen,), or a pair of those of queries and of keys: a query sees
        the keys of its own number. One below 0 sees nothing, and is seen by none.
    block_mask: a BlockMask for these lengths. No mask by element goes with packed sequences.
    sink: z, (heads,), floating point.
    scale: default d**-0.5.
    return_lse: also return L, (batch, heads, seqlen_q), float32 (float64 for float64 arrays).

    What the textbook stores, q kᵀ, P and O, is stored in q's dtype: for float16 and bfloat16 this
    is the naive computation whose error a kernel's error is measured by. The softmax itself is
    done in float32, and so are the sums of the products. Needs O(seqlen_q * seqlen_k) memory for
    each head.

    Returns out, or (out, lse).
    """
    options = checked_options(
        causal, diagonal, scale, layout, window=window,
        prefix=prefix, seqlens_q=seqlens_q, seqlens_k=seqlens_k, sink=sink,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_mask=block_mask,
    )  # fmt: skip
    masks = _Masks(attn_mask, documents, block_mask)
    if options.is_packed:
        masks.require_none()
        return _of_sequences(naive, q, k, v, options, return_lse)
    xp = namespace(q)
    shape, q, k, v = _split_heads(xp, q, k, v, options, masks)
    seen = _visible(xp, shape, 0, shape.rows, 0, shape.keys, q)  # (rows, keys)

    scores = _cast(xp, _matmul(xp, q, _swap(xp, k, -1, -2)), _wide(xp, q))
    scores = scores * (shape.head_dim**-0.5 if scale is None else scale)
    if seen is not None:
        scores = xp.where(seen, scores, -INFINITY)
    row_max = _max(xp, scores)
    if shape.sink is not None:
        row_max = xp.maximum(row_max, _cast(xp, shape.sink, row_max.dtype))
    shift = xp.where(row_max == -INFINITY, 0.0, row_max)  # -inf - -inf would be NaN
    exponentials = xp.exp(scores - shift)
    row_sum = xp.sum(exponentials, axis=-1, keepdims=True)
    row_sum = row_sum + _exponential_of_sink(xp, shape, shift)
    probabilities = exponentials / _at_least_one_key(xp, seen, row_sum)
    out = _weighted_sum(xp, _cast(xp, probabilities, v.dtype), v, seen)
    lse = row_max + xp.log(xp.where(row_sum == 0, 1.0, row_sum))
    return _merge_heads(xp, shape, out, lse[..., 0], layout, return_lse)


def naive_gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    dlse: Array | None = None,
    diagonal: str | int = "end",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    attn_mask: Array | None = None,
    documents: Array | tuple[Array, Array] | None = None,
    block_mask: BlockMask | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    layout: str = "bshd",
) -> tuple[Array, ...]:
    """The gradients of `naive`, through the whole matrix of scores.

    dout: gradient of out, shaped like it.  dlse: gradient of the log-sum-exp, (batch, heads, seqlen_q).
    The other arguments are those of `naive`.

    All in float32 (float64 for float64 arrays). dk and dv are sums over the query heads of a group.

    Returns (dq, dk, dv), in the dtypes of q, k and v; with a sink (dq, dk, dv, dsink), in its dtype.
    """
    options = checked_options(
        causal, diagonal, scale, layout, window=window,
        prefix=prefix, seqlens_q=seqlens_q, seqlens_k=seqlens_k, sink=sink,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_mask=block_mask,
    )  # fmt: skip
    masks = _Masks(attn_mask, documents, block_mask)
    if options.is_packed:
        masks.require_none()
        return _gradients_of_sequences(dout, dlse, q, k, v, options)
    xp = namespace(q)
    out, lse = naive(
        q,
        k,
        v,
        causal,
        diagonal=diagonal,
        window=window,
        prefix=prefix,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        attn_mask=attn_mask,
        documents=documents,
        block_mask=block_mask,
        sink=sink,
        scale=scale,
        layout=layout,
        return_lse=True,
    )
    dtype, wide = q.dtype, _wide(xp, q)
    shape, q, k, v = (
        x if isinstance(x, _Shape) else _cast(xp, x, wide)
        for x in _split_heads(xp, q, k, v, options, masks)
    )
    scale = shape.head_dim**-0.5 if scale is None else scale
    seen = _visible(xp, shape, 0, shape.rows, 0, shape.keys, q)  # (rows, keys)
    lse = xp.reshape(lse, (*shape.out[:4], 1))  # (..., rows, 1)
    dout, out = (_split_rows(xp, shape, _cast(xp, x, wide), layout) for x in (dout, out))

    scores = scale * xp.matmul(q, _swap(xp, k, -1, -2))  # (..., rows, keys)
    p = xp.exp(scores - lse)
    delta = xp.sum(dout * out, axis=-1, keepdims=True)  # (..., rows, 1)
    if dlse is not None:
        delta = delta - xp.reshape(dlse, (*shape.out[:4], 1))
    ds = p * (xp.matmul(dout, _swap(xp, v, -1, -2)) - delta)
    if seen is not None:
        p, ds = (xp.where(seen, x, 0.0) for x in (p, ds))
    seen_by = None if seen is None else _swap(xp, seen, -1, -2)  # (keys, rows)
    dsink = None if sink is None else _gradient_of_sink(xp, shape, lse, delta, sink)
    dq = scale * _weighted_sum(xp, ds, k, seen)
    dk = scale * _weighted_sum(xp, _swap(xp, ds, -1, -2), q, seen_by)
    dv = _weighted_sum(xp, _swap(xp, p, -1, -2), dout, seen_by)
    dk, dv = (xp.sum(x, axis=2) for x in (dk, dv))  # (batch, kv_heads, keys, d)
    batch, kv_heads, group = shape.out[:3]
    dq = xp.reshape(dq, (batch, kv_heads * group, shape.rows, shape.head_dim))
    if layout == "bshd":
        dq, dk, dv = (_swap(xp, x, 1, 2) for x in (dq, dk, dv))
    found = _cast(xp, dq, dtype), _cast(xp, dk, dtype), _cast(xp, dv, dtype)
    return found if dsink is None else (*found, dsink)


def chunked(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    diagonal: str | int = "end",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    attn_mask: Array | None = None,
    documents: Array | tuple[Array, Array] | None = None,
    block_mask: BlockMask | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    block_m: int = 64,
    block_n: int = 64,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q kᵀ) v as the kernels compute it: tile by tile, never a whole row of scores.

    block_m: query rows per tile (B_r).  block_n: keys per K/V block (B_c).
    The other arguments and what is returned are those of `naive`.

    A tile of queries meets the K/V blocks one after another and keeps, for each row, the maximum
    m of the scores so far, the sum l of their exponentials relative to m, and the output O
    relative to m. A block that raises the maximum rescales what was summed before it:

        m' = max(m, rowmax(S))      l' = exp(m - m') l + rowsum(exp(S - m'))
                                    O' = exp(m - m') O + exp(S - m') v

    After the last block, a sink changes m and l as one more key would. O / l is the output and m +
    log(l) the log-sum-exp. Blocks that the tile does not see are not visited, but with a prefix,
    lengths or a mask by element all are. All in float32 (float64 for float64 arrays); a kernel also
    rounds exp(S - m') to 16 bits for the tensor cores.

    Sources: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1; the online softmax is that of
    Milakov and Gimelshein, arXiv 1805.02867.
    """
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if block < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {block}")
    options = checked_options(
        causal, diagonal, scale, layout, window=window,
        prefix=prefix, seqlens_q=seqlens_q, seqlens_k=seqlens_k, sink=sink,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_mask=block_mask,
    )  # fmt: skip
    masks = _Masks(attn_mask, documents, block_mask)
    if options.is_packed:
        masks.require_none()
        blocks = {"block_m": block_m, "block_n": block_n}
        return _of_sequences(chunked, q, k, v, options, return_lse, **blocks)
    xp = namespace(q)
    dtype, wide = q.dtype, _wide(xp, q)
    shape, q, k, v = _split_heads(xp, q, k, v, options, masks)
    scale = shape.head_dim**-0.5 if scale is None else scale

    tiles: list[tuple[Array, Array]] = []
    for i in range(0, max(shape.rows, 1), block_m):  # where there is no row, one tile of none
        i_end = min(i + block_m, shape.rows)
        q_tile = _cast(xp, q[..., i:i_end, :], wide)  # (..., B_r, d)
        m = xp.full_like(q_tile[..., :1], -INFINITY)  # (..., B_r, 1)
        l = xp.zeros_like(m)  # (..., B_r, 1)  # noqa: E741  the paper's name
        o = xp.broadcast_to(l, (*shape.out[:3], i_end - i, shape.out[4]))  # (..., B_r, d)

        first, end = shape.keys_seen_by(i)[0], shape.keys_seen_by(i_end - 1)[1]
        for j in range(first // block_n * block_n, end, block_n):
            j_end = min(j + block_n, end)
            k_block = _cast(xp, k[..., j:j_end, :], wide)  # (..., B_c, d)
            v_block = _cast(xp, v[..., j:j_end, :], wide)  # (..., B_c, d)

            s = scale * xp.matmul(q_tile, _swap(xp, k_block, -1, -2))  # (..., B_r, B_c)
            # Only blocks on the edges need the mask: between them, every row sees every key.
            partial = (
                not shape.is_uniform
                or j < shape.keys_seen_by(i_end - 1)[0]
                or j_end > shape.keys_seen_by(i)[1]
            )
            seen = _visible(xp, shape, i, i_end, j, j_end, q) if partial else None  # (B_r, B_c)
            if seen is not None:
                s = xp.where(seen, s, -INFINITY)

            m_new = xp.maximum(m, _max(xp, s))
            shift = xp.where(m_new == -INFINITY, 0.0, m_new)  # -inf - -inf would be NaN
            p = xp.exp(s - shift)  # 0 where masked
            rescale = xp.exp(m - shift)  # 0 before the first key
            l = rescale * l + xp.sum(p, axis=-1, keepdims=True)  # noqa: E741
            o = rescale * o + _weighted_sum(xp, p, v_block, seen)
            m = m_new

        if shape.sink is not None:
            m_new = xp.maximum(m, _cast(xp, shape.sink, m.dtype) + xp.zeros_like(m))
            shift = xp.where(m_new == -INFINITY, 0.0, m_new)
            rescale = xp.exp(m - shift)
            l = rescale * l + _exponential_of_sink(xp, shape, shift)  # noqa: E741
            o = rescale * o
            m = m_new

        if first < end:
            o = o / _at_least_one_key(xp, _visible(xp, shape, i, i_end, first, end, q), l)
        tiles.append((_cast(xp, o, dtype), m + xp.log(xp.where(l == 0, 1.0, l))))

    out, lse = (_concatenate(xp, parts, -2) for parts in zip(*tiles, strict=True))
    return _merge_heads(xp, shape, out, lse[..., 0], layout, return_lse)


# ---- the helpers that are about attention ------------------------------------------------------


def _exponential_of_sink(xp: Namespace, shape: _Shape, shift: Array) -> Array:
    """exp(sink - shift) for a shift (..., rows, 1) that is not below the sink; without one 0."""
    if shape.sink is None:
        return xp.zeros_like(shift)
    sink = _cast(xp, shape.sink, shift.dtype)
    same = sink == shift  # inf - inf would be NaN
    return xp.exp(xp.where(same, 0.0, sink) - xp.where(same, 0.0, shift))


def _gradient_of_sink(xp: Namespace, shape: _Shape, lse: Array, delta: Array, sink: Array) -> Array:
    """(heads,): -sum(exp(sink - lse) * delta) over the batch and the rows that exist."""
    value = _cast(xp, shape.sink, lse.dtype)
    terms = xp.exp(value - lse) * delta
    exists = _exists(xp, shape, 0, shape.rows, lse)
    if exists is not None:
        terms = xp.where(exists, terms, 0.0)
    terms = xp.where(value == -INFINITY, 0.0, terms)
    return _cast(xp, xp.reshape(-xp.sum(terms, axis=(0, 3, 4)), sink.shape), sink.dtype)


def _at_least_one_key(xp: Namespace, seen: Array | None, row_sum: Array) -> Array:
    """row_sum (..., rows, 1), with 1 where the row sees no key: its output is 0 / 1, not 0 / 0.

    A row whose visible scores are all -inf keeps its 0: its softmax is not defined, NaN says so.
    """
    if seen is None:
        return row_sum
    sees = xp.any(seen, axis=-1, keepdims=True)
    return xp.where(sees, row_sum, 1.0)


def _weighted_sum(xp: Namespace, p: Array, v: Array, seen: Array | None) -> Array:
    """p v for p (..., rows, keys) and v (..., keys, d), without the keys that a row does not see.

    Their p is 0, which is as good as leaving them out, unless v is not finite: 0 * NaN is NaN.
    """
    if seen is None or bool(xp.all(xp.isfinite(v))):
        return _matmul(xp, p, v)
    wide_p, wide_v = (_cast(xp, x, _wide(xp, x)) for x in (p, v))
    terms = [
        xp.where(seen[..., j : j + 1], wide_p[..., j : j + 1] * wide_v[..., j : j + 1, :], 0.0)
        for j in range(v.shape[-2])
    ]
    return _cast(xp, sum(terms[1:], start=terms[0]), v.dtype)


# ---- masks by element ----------------------------------------------------------------------------


class _Masks(NamedTuple):
    attn_mask: Array | None
    documents: Array | tuple[Array, Array] | None
    block_mask: BlockMask | None

    def require_none(self) -> None:
        """Beside packed sequences."""
        for name, mask in self._asdict().items():
            if mask is not None:
                raise ArgumentError(
                    f"{name}: expected None beside cu_seqlens_q, got a mask: packed sequences have no "
                    "(seqlen_q, seqlen_k) grid"
                )

    def shown(
        self, xp: Namespace, batch: int, kv_heads: int, group: int, rows: int, keys: int
    ) -> Array | None:
        """What all of them show, (batch, kv_heads, group, rows, keys), the first three or 1. None: there are none."""
        heads = kv_heads * group
        parts = []
        if self.attn_mask is not None:
            require_kind(attn_mask=self.attn_mask)
            dense = with_rank(
                _own(xp, self.attn_mask), 4, "attn_mask", "(batch, heads, seqlen_q, seqlen_k)"
            )
            if not is_truth(dense):
                raise ArgumentError(f"attn_mask: expected dtype bool, got {dense.dtype}")
            _require_shape(
                "attn_mask", dense, batch=batch, heads=heads, seqlen_q=rows, seqlen_k=keys
            )
            parts.append(xp.broadcast_to(dense, (*dense.shape[:2], rows, keys)))
        if self.documents is not None:
            given = self.documents
            pair = given if isinstance(given, tuple) else (given, given)
            require_kind(documents=pair[0])
            require_kind(documents=pair[1])
            of_rows, of_keys = (
                with_rank(_own(xp, x), 2, "documents", "(batch, seqlen)") for x in pair
            )
            if of_rows.shape[1] != rows or of_keys.shape[1] != keys:
                raise ArgumentError(
                    f"documents: expected those of {rows} queries and {keys} keys, got {of_rows.shape[1]} and "
                    f"{of_keys.shape[1]}"
                )
            for numbers in (of_rows, of_keys):
                _require_shape("documents", numbers, batch=batch, seqlen=numbers.shape[1])
            of_rows, of_keys = of_rows[:, None, :, None], of_keys[:, None, None, :]
            parts.append((of_rows == of_keys) & (of_rows >= 0))
        if self.block_mask is not None:
            mask = self.block_mask
            if mask.sizes[2:] != (rows, keys):
                raise ArgumentError(
                    f"block_mask: expected one built for seqlen_q {rows}, seqlen_k {keys}, got one built for "
                    f"seqlen_q {mask.seqlen_q}, seqlen_k {mask.seqlen_k}. Build it for these sizes"
                )
            dense = _own(xp, mask.to_dense())
            _require_shape(
                "block_mask", dense, batch=batch, heads=heads, seqlen_q=rows, seqlen_k=keys
            )
            parts.append(dense)
        found = None
        for part in parts:  # each with the heads of queries by the heads of keys
            groups = (1, 1) if part.shape[1] == 1 else (kv_heads, group)
            part = xp.reshape(part, (part.shape[0], *groups, rows, keys))
            found = part if found is None else found & part
        return found


def _require_shape(name: str, array: Array, **sizes: int) -> None:
    """Of which any may be 1."""
    if any(own not in (1, size) for own, size in zip(array.shape, sizes.values(), strict=True)):
        raise ArgumentError(
            f"{name}: expected shape ({', '.join(sizes)}) = {tuple(sizes.values())}, or 1 in place of any, "
            f"got {tuple(array.shape)}"
        )


# ---- packed sequences ----------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Rows of packed arrays: a sequence, or rows of none, of which there are some before and after."""

    number: int | None  # of the sequence
    queries: tuple[int, int]
    keys: tuple[int, int]

    def arguments(self, options: Options) -> dict[str, Any]:
        """What is said of the sequence."""

        def own(x: Array | None) -> Array | None:
            return None if x is None or self.number is None else x[self.number : self.number + 1]

        window = (options.window_left, options.window_right) if options.has_window else None
        return {
            "causal": options.causal,
            "diagonal": "end" if options.diagonal is None else options.diagonal,
            "window": window,
            "prefix": options.prefix if options.prefixes is None else own(options.prefixes),
            "seqlens_q": own(options.seqlens_q),
            "seqlens_k": own(options.seqlens_k),
            "sink": options.sink,
            "scale": options.scale,
            "layout": options.layout,
        }


def _pieces(q: Array, k: Array, options: Options) -> list[_Piece]:
    row = 0 if options.layout == "bshd" else 1

    def ends(starts: Array, rows: int) -> list[int]:
        return [0, *(max(0, min(int(x), rows)) for x in starts), rows]

    queries = ends(options.cu_seqlens_q, q.shape[row])
    starts_k = options.cu_seqlens_q if options.cu_seqlens_k is None else options.cu_seqlens_k
    keys = ends(starts_k, k.shape[row])
    last = len(queries) - 2
    return [
        _Piece(
            i - 1 if 0 < i < last else None, (queries[i], queries[i + 1]), (keys[i], keys[i + 1])
        )
        for i in range(last + 1)
    ]


def _rows_of(x: Array, ends: tuple[int, int], options: Options) -> Array:
    """Of a packed array, as a batch of one."""
    begin, end = ends
    return x[None, begin:end] if options.layout == "bshd" else x[None, :, begin:end]


def _of_sequences(
    attend: Any, q: Array, k: Array, v: Array, options: Options, return_lse: bool, **more: int
) -> Any:
    """`attend`, which is naive or chunked, of each sequence."""
    xp = namespace(q)
    outs, lses = [], []
    for piece in _pieces(q, k, options):
        x, keys = (
            _rows_of(q, piece.queries, options),
            piece.keys if piece.number is not None else (0, 0),
        )
        y, z = (_rows_of(a, keys, options) for a in (k, v))
        arguments = piece.arguments(options)
        if piece.number is None:
            arguments["sink"] = None
        out, lse = attend(x, y, z, return_lse=True, **arguments, **more)
        outs.append(out[0])
        lses.append(lse[0])
    out = _concatenate(xp, outs, 0 if options.layout == "bshd" else 1)
    return (out, _concatenate(xp, lses, 1)) if return_lse else out


def _gradients_of_sequences(
    dout: Array, dlse: Array | None, q: Array, k: Array, v: Array, options: Options
) -> tuple[Array, ...]:
    xp = namespace(q)
    found: list[list[Array]] = [[], [], []]
    dsink = None if options.sink is None else xp.zeros_like(options.sink)
    for piece in _pieces(q, k, options):
        x, dx = (_rows_of(a, piece.queries, options) for a in (q, dout))
        y, z = (_rows_of(a, piece.keys, options) for a in (k, v))
        if piece.number is None:
            parts = tuple(xp.zeros_like(a) for a in (x, y, z))
        else:
            begin, end = piece.queries
            own = None if dlse is None else dlse[None, :, begin:end]
            parts = naive_gradients(dx, x, y, z, dlse=own, **piece.arguments(options))
        for pieces, part in zip(found, parts, strict=False):
            pieces.append(part[0])
        if dsink is not None and piece.number is not None:
            dsink = dsink + parts[3]
    row = 0 if options.layout == "bshd" else 1
    gradients = tuple(_concatenate(xp, pieces, row) for pieces in found)
    return gradients if dsink is None else (*gradients, dsink)


# ---- shapes ------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """Of the arrays while they are computed with."""

    rows: int  # seqlen_q
    keys: int  # seqlen_k
    head_dim: int
    # Query i sees no key before i + before, and none after i + after; None: no limit. Numbers, or
    # where lengths differ (batch, 1, 1, 1, 1), as all that depends on the batch entry.
    before: Any
    after: Any
    # With a prefix: no key that is both after i + diagonal and not among the first `prefix`.
    diagonal: Any
    prefix: Any
    queries_existing: Array | None  # None: all
    keys_existing: Array | None
    shown: (
        Array | None
    )  # by masks by element, (batch, kv_heads, group, rows, keys), the first three or 1. None: all
    sink: Array | None  # (kv_heads, group, 1, 1)
    out: tuple[int, ...]  # (batch, kv_heads, group, seqlen_q, d)

    @property
    def is_uniform(self) -> bool:
        """Whether the rows of all batch entries see the same keys, those between two diagonals."""
        lengths = self.queries_existing is not None or self.keys_existing is not None
        return self.prefix is None and not lengths and self.shown is None

    def keys_seen_by(self, row: int) -> tuple[int, int]:
        """The keys [first, end) that a row sees at most; if the sequences are uniform, exactly."""
        if not self.is_uniform:
            return 0, self.keys
        first = 0 if self.before is None else row + self.before
        end = self.keys if self.after is None else row + self.after + 1
        return max(0, min(self.keys, first)), max(0, min(self.keys, end))


def _split_heads(
    xp: Namespace, q: Array, k: Array, v: Array, options: Options, masks: _Masks
) -> tuple[_Shape, Array, Array, Array]:
    """q as (batch, kv_heads, group, seqlen_q, d), k and v as (batch, kv_heads, 1, seqlen_k, d).

    A group is the heads / kv_heads query heads that share a K/V head. Broadcasting repeats the K/V
    head for them, without a copy.
    """
    require_kind(q=q, k=k, v=v, **options.arrays)
    if options.layout == "bshd":
        q, k, v = (_swap(xp, x, 1, 2) for x in (q, k, v))
    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ArgumentError(f"k: expected a head count that divides q's {heads}, got {kv_heads}")
    group = heads // kv_heads

    def of_batch(name: str, x: Array | None) -> Array | None:
        if x is None:
            return None
        if tuple(x.shape) != (batch,):
            raise ArgumentError(
                f"{name}: expected shape (batch,) = ({batch},), got {tuple(x.shape)}"
            )
        return xp.reshape(_cast(xp, x, xp.int64), (batch, 1, 1, 1, 1))

    queries_existing = _held(xp, of_batch("seqlens_q", options.seqlens_q), rows)
    keys_existing = _held(xp, of_batch("seqlens_k", options.seqlens_k), keys)
    prefix = options.prefix if options.prefixes is None else of_batch("prefix", options.prefixes)
    if isinstance(prefix, int):
        prefix = min(prefix, keys)

    def held(x: int) -> int:
        return int(max(-2 * (rows + keys), min(x, 2 * (rows + keys))))  # beyond nothing changes

    left, right = options.window_left, options.window_right
    if options.causal and prefix is None:
        right = 0
    diagonal: Any = options.diagonal
    if diagonal is None:
        diagonal = (keys if keys_existing is None else keys_existing) - (
            rows if queries_existing is None else queries_existing
        )
    # The difference of lengths is small, and a number of the caller's is added before it is held.
    hold = held if isinstance(diagonal, int) else lambda x: x
    before = None if left is None else hold(diagonal - (left if hold is held else held(left)))
    after = None if right is None else hold(diagonal + (right if hold is held else held(right)))
    sink = options.sink
    if sink is not None:
        if tuple(sink.shape) != (heads,):
            raise ArgumentError(
                f"sink: expected shape (heads,) = ({heads},), got {tuple(sink.shape)}"
            )
        sink = xp.reshape(sink, (kv_heads, group, 1, 1))
    shape = _Shape(
        rows=rows,
        keys=keys,
        head_dim=head_dim,
        before=before,
        after=after,
        diagonal=hold(diagonal),
        prefix=prefix,
        queries_existing=queries_existing,
        keys_existing=keys_existing,
        shown=masks.shown(xp, batch, kv_heads, group, rows, keys),
        sink=sink,
        out=(batch, kv_heads, group, rows, v.shape[-1]),
    )
    q = xp.reshape(q, (batch, kv_heads, group, rows, head_dim))
    return shape, q, k[:, :, None, :, :], v[:, :, None, :, :]


def _held(xp: Namespace, x: Array | None, most: int) -> Array | None:
    """Lengths between 0 and that of the array."""
    return None if x is None else xp.where(x < 0, 0, xp.where(x > most, most, x))


def _split_rows(xp: Namespace, shape: _Shape, array: Array, layout: str) -> Array:
    """An array shaped like the output as (batch, kv_heads, group, seqlen_q, d)."""
    return xp.reshape(_swap(xp, array, 1, 2) if layout == "bshd" else array, shape.out)


def _merge_heads(
    xp: Namespace, shape: _Shape, out: Array, lse: Array, layout: str, return_lse: bool
) -> Any:
    """Undoes _split_heads: out in the caller's layout, lse as (batch, heads, seqlen_q)."""
    exists = _exists(xp, shape, 0, shape.rows, out)
    if exists is not None:
        out = xp.where(exists, out, 0.0)
        lse = xp.where(exists[..., 0], lse, -INFINITY)
    batch, kv_heads, group, rows, head_dim = shape.out
    out = xp.reshape(out, (batch, kv_heads * group, rows, head_dim))
    if layout == "bshd":
        out = _swap(xp, out, 1, 2)
    return (out, xp.reshape(lse, (batch, kv_heads * group, rows))) if return_lse else out


def _visible(
    xp: Namespace, shape: _Shape, i: int, i_end: int, j: int, j_end: int, like: Array
) -> Array | None:
    """The mask of a block of scores: True where row sees key, (i_end - i, j_end - j), or with (batch, kv_heads,
    group) before these, each of which may be 1. None: there is none."""
    rows = _positions(xp, i, i_end, like)[:, None]
    keys = _positions(xp, j, j_end, like)[None, :]
    conditions = []
    if shape.before is not None:
        conditions.append(keys >= rows + shape.before)
    if shape.after is not None:
        conditions.append(keys <= rows + shape.after)
    if shape.prefix is not None:
        conditions.append((keys <= rows + shape.diagonal) | (keys < shape.prefix))
    if shape.keys_existing is not None:
        conditions.append(keys < shape.keys_existing)
    if shape.shown is not None:
        conditions.append(shape.shown[..., i:i_end, j:j_end])
    exists = _exists(xp, shape, i, i_end, like)
    if exists is not None:
        conditions.append(exists & (keys >= 0))
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return seen


def _exists(xp: Namespace, shape: _Shape, i: int, i_end: int, like: Array) -> Array | None:
    """Which rows exist, (batch, 1, 1, i_end - i, 1). None: all."""
    if shape.queries_existing is None:
        return None
    return _positions(xp, i, i_end, like)[:, None] < shape.queries_existing


# ---- what array libraries spell differently ----------------------------------------------------


def namespace(array: Array) -> Namespace:
    """The functions that work on an array: its array API namespace, or its library."""
    standard = getattr(array, "__array_namespace__", None)
    if standard is not None:
        return standard()
    names = [base.__module__.partition(".")[0] for base in type(array).__mro__]
    # A class of a program counts as its base: a module of a program has no such functions.
    library = next((name for name in names if name in ("numpy", "torch", "cupy", "jax")), names[0])
    return sys.modules[library]


def _wide(xp: Namespace, array: Array) -> Any:
    """The dtype that sums are kept in."""
    return xp.float64 if array.dtype == xp.float64 else xp.float32


def _own(xp: Namespace, array: Array) -> Array:
    """The array in the library whose functions xp are."""
    return array if namespace(array) is xp else xp.asarray(array)


def _cast(xp: Namespace, array: Array, dtype: Any) -> Array:
    if array.dtype == dtype:
        return array
    if hasattr(array, "to"):  # torch
        return array.to(dtype)
    return array.astype(dtype) if hasattr(array, "astype") else xp.astype(array, dtype)


def _matmul(xp: Namespace, a: Array, b: Array) -> Array:
    """a b, summed in float32 at least, rounded to a's dtype. NumPy alone would sum in 16 bits."""
    if xp.__name__ == "numpy" and a.dtype.itemsize == 2:
        return xp.matmul(a.astype(xp.float32), b.astype(xp.float32)).astype(a.dtype)
    return xp.matmul(a, b)


def _max(xp: Namespace, array: Array) -> Array:
    """Of the last axis, which is kept; of nothing, -inf."""
    if array.shape[-1] == 0:
        return xp.sum(array, axis=-1, keepdims=True) - INFINITY
    maximum = getattr(xp, "amax", None) or xp.max  # torch.max is something else
    return maximum(array, axis=-1, keepdims=True)


def _concatenate(xp: Namespace, arrays: Any, axis: int) -> Array:
    return (getattr(xp, "concat", None) or xp.concatenate)(arrays, axis=axis)


def _swap(xp: Namespace, array: Array, a: int, b: int) -> Array:
    """A view with two axes swapped."""
    if hasattr(xp, "swapaxes"):
        return xp.swapaxes(array, a, b)
    axes = list(range(array.ndim))
    axes[a], axes[b] = axes[b], axes[a]
    return xp.permute_dims(array, axes)


def _positions(xp: Namespace, start: int, stop: int, like: Array) -> Array:
    """start, start + 1, ... stop - 1, on the device of `like`."""
    if xp.__name__ in ("numpy", "cupy"):  # on the current device
        return xp.arange(start, stop)
    return xp.arange(start, stop, device=like.device)
