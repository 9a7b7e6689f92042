"""What attention is, in fp64 NumPy, and how far from it a result may be.

Written from the definition and from nothing in flashcute. Arrays are (batch, seqlen, heads, d),
"bshd".

What flashcute promises of its accuracy, `assert_accurate` demands: an error of at most twice the
error of the naive computation in the inputs' dtype, plus one rounding of the output. For fp32
and fp64 it is a relative bound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

UNIT_ROUNDOFF = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}
TF32_ROUNDOFF = 2.0**-11
RELATIVE = {"float32": 1e-5, "float64": 1e-12}  # as flashcute promises


# ---- rounding ------------------------------------------------------------------------------------


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to `dtype` (nearest, ties to even), as fp64."""
    if dtype == "float64":
        return x.astype(np.float64)
    if dtype == "float32":
        return x.astype(np.float32).astype(np.float64)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)
    # bfloat16 is the upper half of an fp32. Going through fp32 rounds twice, which matters to
    # nobody here.
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    kept = np.where(np.isnan(x), bits, (bits + up)) & np.uint32(0xFFFF0000)
    return kept.astype(np.uint32).view(np.float32).astype(np.float64)


# ---- the definition ------------------------------------------------------------------------------


Window = tuple[int, int] | None  # keys before and after the diagonal; -1: no limit


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    diagonal: int | None = None,
    window: Window = None,
    prefix: int = 0,
    queries: int | None = None,
    keys: int | None = None,
) -> np.ndarray:
    """(seqlen_q, seqlen_k): whether query i sees key j. Without a diagonal the last query sees all keys.

    queries, keys: how many there are, where the tensors are longer.
    """
    i = np.arange(seqlen_q)[:, None]
    j = np.arange(seqlen_k)[None, :]
    queries = seqlen_q if queries is None else min(max(queries, 0), seqlen_q)
    keys = seqlen_k if keys is None else min(max(keys, 0), seqlen_k)
    diagonal = keys - queries if diagonal is None else diagonal
    left, right = window or (-1, -1)
    seen = (i < queries) & (j < keys)
    if causal:
        seen &= (j - i <= diagonal) | (j < prefix)
    if left >= 0:
        seen &= j - i >= diagonal - left
    if right >= 0:
        seen &= j - i <= diagonal + right
    return seen


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys the queries of all batch entries see. Of what differs by entry there is one number for each."""

    causal: bool = False
    diagonal: int | None = None
    window: Window = None
    prefix: int | tuple[int, ...] = 0
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None
    # By element: boolean, of 4 dimensions that broadcast; numbers of documents of queries and of keys, (batch or 1, n).
    attn_mask: np.ndarray | None = None
    documents: tuple[np.ndarray, np.ndarray] | None = None
    block_mask: np.ndarray | None = None

    def of(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """(batch, 1, seqlen_q, seqlen_k); where elements are masked, with heads in place of the 1."""

        def entry(b: int) -> np.ndarray:
            return visible(
                q.shape[1],
                k.shape[1],
                self.causal,
                self.diagonal,
                self.window,
                self.prefix if isinstance(self.prefix, int) else self.prefix[b],
                None if self.seqlens_q is None else self.seqlens_q[b],
                None if self.seqlens_k is None else self.seqlens_k[b],
            )

        none = np.zeros((0, q.shape[1], k.shape[1]), bool)
        seen = np.array([entry(b) for b in range(q.shape[0])] or none, bool)[:, None]
        elements = self.elements
        return seen if elements is None else seen & elements & np.ones((q.shape[2], 1, 1), bool)

    @property
    def elements(self) -> np.ndarray | None:
        """What the masks by element show together, of 4 dimensions that broadcast."""
        parts = [x for x in (self.attn_mask, self.block_mask) if x is not None]
        if self.documents is not None:
            queries, keys = self.documents[0][:, None, :, None], self.documents[1][:, None, None, :]
            parts.append((queries == keys) & (queries >= 0))
        return functools.reduce(np.logical_and, parts) if parts else None

    def exists(self, q: np.ndarray) -> np.ndarray:
        """(batch, 1, seqlen_q): which queries there are."""
        lengths = (q.shape[1],) * q.shape[0] if self.seqlens_q is None else self.seqlens_q
        return np.arange(q.shape[1])[None, None, :] < np.array(lengths, int)[:, None, None]


def scores_of(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """scale * q k^T, (batch, heads, seqlen_q, seqlen_k). Query head h uses key head h // (heads
    / kv_heads)."""
    batch, rows, heads, d = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, d)
    s = np.einsum("bigrd,bjgd->bgrij", grouped, k, optimize=True)
    return scale * s.reshape(batch, heads, rows, k.shape[1])


def weighted_values(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """p (batch, heads, seqlen_q, seqlen_k) times v, as (batch, seqlen_q, heads, d)."""
    batch, heads, rows, keys = p.shape
    kv_heads, d = v.shape[2:]
    grouped = p.reshape(batch, kv_heads, heads // kv_heads, rows, keys)
    out = np.einsum("bgrij,bjgd->bigrd", grouped, v, optimize=True)
    return out.reshape(batch, rows, heads, d)


def default_scale(q: np.ndarray, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


def softmax(
    s: np.ndarray, seen: np.ndarray, sink: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and log-sum-exp over the keys that are seen, and of a sink (heads,) one more score. A row that sees
    none: 0, and -inf or the sink."""
    s = np.where(seen, s, -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sink is not None:
        top = np.maximum(top, sink[:, None, None])
    base = np.where(np.isfinite(top), top, 0)
    e = np.exp(s - base)
    total = e.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink[:, None, None] - base)
    empty = ~seen.any(axis=-1)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(empty, 0, e / total)
        lse = (np.log(total) + base)[..., 0]
    return p, lse


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    sink: np.ndarray | None = None,
    **mask: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """out (batch, seqlen_q, heads, d) and LSE (batch, heads, seqlen_q) of finite inputs, in
    fp64. mask: the members of a Mask."""
    masks = Mask(causal, **mask)
    p, lse = softmax(scores_of(q, k, default_scale(q, scale)), masks.of(q, k), sink)
    return weighted_values(p, v), np.where(masks.exists(q), lse, -np.inf)


def naive(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dtype: str,
    *,
    causal: bool = False,
    scale: float | None = None,
    sink: np.ndarray | None = None,
    **mask: Any,
) -> np.ndarray:
    """What three separate kernels in `dtype` give: scores, probabilities and output are each
    rounded to it when they are stored; sums are taken in higher precision, as matrix units do."""
    s = rounded(scores_of(q, k, default_scale(q, scale)), dtype)
    p, _ = softmax(s, Mask(causal, **mask).of(q, k), sink)
    return rounded(weighted_values(rounded(p, dtype), v), dtype)


# ---- comparing -----------------------------------------------------------------------------------


def to_numpy(x: object) -> np.ndarray:
    """Any library's array as NumPy; what NumPy lacks, and fp16, as fp64."""
    if type(x).__module__.partition(".")[0] == "torch":
        x = x.detach().double().cpu().numpy()  # type: ignore[attr-defined]
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return np.asarray(x).astype(np.float64)


def assert_close(got: object, expected: np.ndarray, tolerance: float, what: str) -> None:
    """|got - expected| <= tolerance everywhere. NaN on either side is an error; infinities must
    be equal."""
    got = to_numpy(got)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    assert not np.isnan(expected).any(), f"{what}: the expected values hold NaN: the test is wrong"
    nan = np.isnan(got)
    assert not nan.any(), f"{what}: {nan.sum()} NaN of {nan.size}, first at {_first(nan)}"
    infinite = np.isinf(expected) | np.isinf(got)
    wrong = infinite & (got != expected)
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} infinities differ, first at {_first(wrong)}: "
        f"got {got[wrong][0]}, expected {expected[wrong][0]}"
    )
    error = np.abs(np.where(infinite, 0, got) - np.where(infinite, 0, expected))
    if error.size and error.max() > tolerance:
        at = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{what}: error {error.max():.3e} > {tolerance:.3e} at {tuple(map(int, at))}: "
            f"got {got[at]!r}, expected {expected[at]!r}"
        )


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, exact in their dtype but held in fp64, and what is asked of them."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dtype: str
    causal: bool = False
    scale: float | None = None
    diagonal: int | None = None
    window: Window = None
    prefix: int | tuple[int, ...] = 0
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None
    attn_mask: np.ndarray | None = None
    documents: tuple[np.ndarray, np.ndarray] | None = None
    block_mask: np.ndarray | None = None
    sink: np.ndarray | None = None  # (heads,)

    @property
    def options(self) -> dict[str, Any]:
        names = ("scale", "sink", *(field.name for field in dataclasses.fields(Mask)))
        return {name: getattr(self, name) for name in names}

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        return attention(self.q, self.k, self.v, **self.options)


def make_problem(
    rng: np.random.Generator,
    dtype: str,
    *,
    batch: int = 2,
    seqlen_q: int,
    seqlen_k: int,
    heads: int = 4,
    kv_heads: int | None = None,
    d: int,
    d_v: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    diagonal: int | None = None,
) -> Problem:
    kv_heads = heads if kv_heads is None else kv_heads
    d_v = d if d_v is None else d_v
    q = rng.standard_normal((batch, seqlen_q, heads, d))
    k = rng.standard_normal((batch, seqlen_k, kv_heads, d))
    v = rng.standard_normal((batch, seqlen_k, kv_heads, d_v))
    return Problem(*(rounded(x, dtype) for x in (q, k, v)), dtype, causal, scale, diagonal)


def assert_accurate(
    p: Problem, out: object, lse: object | None, *, tiny: bool = False, tf32: bool = False
) -> None:
    """The accuracy rule on `out`, and an fp32 (fp64) bound on `lse`.

    tiny: the output may have so few elements that the naive error is 0 by luck. Then one
    rounding of every probability, which cannot be avoided on tensor cores, is allowed on top.
    tf32: every operand of a product may have been rounded to TF32's 11 bits.
    """
    expected, expected_lse = p.expected()
    u = UNIT_ROUNDOFF[p.dtype]
    work = "float64" if p.dtype == "float64" else "float32"
    # A score is a sum of products, computed in `work`: no algorithm knows it better than to one
    # rounding of their size, and an error in the scores is a relative error of the probabilities.
    # At the default scale that is within RELATIVE; at a scale of 8 it is not.
    conditioning = 0.0
    if p.scale is not None:
        products = scores_of(np.abs(p.q), np.abs(p.k), p.scale).max(initial=0)
        conditioning = UNIT_ROUNDOFF[work] * products

    if tf32:
        scale = default_scale(p.q, p.scale)
        conditioning += TF32_ROUNDOFF * scores_of(np.abs(p.q), np.abs(p.k), scale).max(initial=0)

    top = np.abs(expected).max(initial=0)
    values = np.abs(p.v).max(initial=0)
    if p.dtype in RELATIVE:
        tolerance = max(RELATIVE[p.dtype] * top, 2 * conditioning * values)
        tolerance += 2 * TF32_ROUNDOFF * values if tf32 else 0
    else:
        rounded_error = naive(p.q, p.k, p.v, p.dtype, **p.options) - expected
        tolerance = 2 * np.abs(rounded_error).max(initial=0) + u * top + (u * values if tiny else 0)
    assert_close(out, expected, tolerance, "out")
    if p.dtype not in RELATIVE and not tiny:
        # The maximum looks at the worst element. On average, too, scores in fp32 are no worse than
        # rounded ones; a quarter is left to chance, for where the naive computation happens to
        # round nothing but the output.
        mine, theirs = np.linalg.norm(to_numpy(out) - expected), np.linalg.norm(rounded_error)
        assert mine <= 1.25 * theirs, f"out: L2 error {mine:.3e}, naive computation {theirs:.3e}"
    if lse is not None:
        finite = np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=1)
        assert_close(lse, expected_lse, max(RELATIVE[work] * max(1, finite), conditioning), "lse")
