"""Attention problems, and how far a result is from the fp64 reference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import reference
from .kits import Array, Inputs, Kit

# Distance from 1 to the next number: twice the relative rounding error.
EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}
# What is forgiven beside the naive computation's error, relative to the largest output: half a unit
# in the last place for 16 bits; where the sums are as narrow as the output, the order of summation.
FORGIVEN = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 1e-5, "float64": 1e-13}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# How many keys before and after the diagonal a query sees; -1: no limit. None: no window.
Window = tuple[int, int] | None


class Case(NamedTuple):
    """The size of a problem."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: str
    window: Window = None
    head_dim_v: int | None = None  # None: as head_dim
    sink: bool = False  # one logit a head that takes part in the softmax, and has no value

    @property
    def value_dim(self) -> int:
        """The head dimension of v and of the output."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def only_causal(self) -> bool:
        """Whether the causal mask is all that the kernels have to know."""
        return self.causal and self.window is None and not self.sink

    @property
    def counted_pairs(self) -> float:
        """Of a query and a key, in all heads, by which FLOPs are counted: half of all under a causal mask, by
        convention; with a window those that are visible."""
        if self.window is not None:
            return float(self.batch * self.heads * self.visible_pairs)
        return self.score_count / 2 if self.causal else float(self.score_count)

    @property
    def flops(self) -> float:
        """Of the two matrix products."""
        return 2 * self.counted_pairs * (self.head_dim + self.value_dim)

    def keys_of(self, row: int) -> range:
        """Which keys query `row` sees."""
        left, right = (-1, -1) if self.window is None else self.window
        own = row + self.seqlen_k - self.seqlen_q
        first = 0 if left < 0 else own - left
        last = self.seqlen_k - 1 if right < 0 else own + right
        last = min(last, own) if self.causal else last
        return range(max(0, first), min(self.seqlen_k, last + 1))

    @property
    def visible_pairs(self) -> int:
        """Of a query and a key, in each head."""
        left, right = (-1, -1) if self.window is None else self.window
        right = 0 if self.causal else right
        own = self.seqlen_k - self.seqlen_q  # the key of query 0
        before_end = self.seqlen_q * self.seqlen_k if right < 0 else self._pairs_up_to(own + right)
        return before_end - (0 if left < 0 else self._pairs_up_to(own - left - 1))

    def _pairs_up_to(self, key: int) -> int:
        """Pairs whose key is at most `key` for query 0, one further for each query after it."""

        def sum_to(n: int) -> int:
            return n * (n + 1) // 2 if n > 0 else 0

        def pairs(last: int) -> int:
            """As if keys had no end."""
            return sum_to(last + self.seqlen_q) - sum_to(last)

        return pairs(key) - pairs(key - self.seqlen_k)

    @property
    def score_count(self) -> int:
        """Elements of the matrix that flash attention does not store."""
        return self.batch * self.heads * self.seqlen_q * self.seqlen_k

    @property
    def label(self) -> str:
        length = str(self.seqlen_q)
        if self.seqlen_k != self.seqlen_q:
            length += f"/{self.seqlen_k}"
        heads = str(self.heads) if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        mask = "causal" if self.causal else "full"
        if self.window is not None:
            mask += " window {},{}".format(*self.window)
        if self.sink:
            mask += " sink"
        dims = str(self.head_dim)
        if self.value_dim != self.head_dim:
            dims += f"/{self.value_dim}"
        return f"b{self.batch} s{length} h{heads} d{dims} {mask}"

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of q (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d) and v (batch, seqlen_k, kv_heads, d_v)."""
        q = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        k = (self.batch, self.seqlen_k, self.kv_heads, self.head_dim)
        return q, k, (*k[:3], self.value_dim)

    @property
    def input_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * sum(math.prod(shape) for shape in self.shapes())

    def random_inputs(self, kit: Kit) -> Inputs:
        q, k, v = (kit.normal(shape, self.dtype) for shape in self.shapes())
        return q, k, v

    def random_sink(self, kit: Kit) -> Array | None:
        """(heads,), where there is one."""
        return kit.normal((self.heads,), self.dtype) if self.sink else None


class Given(NamedTuple):
    """What an implementation is given: arrays as bshd, and what hides keys."""

    q: Array
    k: Array
    v: Array
    causal: bool
    window: Window = None
    sink: Array | None = None

    @property
    def inputs(self) -> Inputs:
        return self.q, self.k, self.v


class Result(NamedTuple):
    """Float64 NumPy arrays."""

    out: Any  # (batch, seqlen_q, heads, d), or some rows of it
    lse: Any  # (batch, heads, seqlen_q); None if the implementation does not give it


class Errors(NamedTuple):
    """Distances from the reference; NaN as soon as anything in the result is NaN."""

    max_error: float  # max |out - ref|
    rel_l2: float  # |out - ref| / |ref|, Euclidean norms
    lse_error: float | None  # max |lse - ref|


def fp64_reference(kit: Kit, given: Given) -> Result:
    """In float64 on the kit's device, in O(seqlen) memory."""
    q, k, v = (kit.double(x) for x in given.inputs)
    out, lse = reference.chunked(
        q, k, v, given.causal, window=given.window,
        sink=None if given.sink is None else kit.double(given.sink),
        block_m=512, block_n=512, return_lse=True,
    )  # fmt: skip
    return Result(kit.to_numpy(out), kit.to_numpy(lse))


def naive_result(kit: Kit, given: Given) -> Result:
    """The naive computation in the inputs' dtype, whose error bounds that of others."""
    out, lse = reference.naive(
        *given.inputs, given.causal, window=given.window, sink=given.sink, return_lse=True
    )
    return Result(kit.to_numpy(out), kit.to_numpy(lse))


def errors(result: Result, ref: Result) -> Errors:
    import numpy as np

    difference = result.out - ref.out
    norm = float(np.linalg.norm(ref.out))
    distance = float(np.linalg.norm(difference))
    rel_l2 = distance / norm if norm else distance
    if result.lse is None:
        lse_error = None
    else:
        with np.errstate(invalid="ignore"):  # -inf - -inf of rows that see no key
            apart = np.where(result.lse == ref.lse, 0.0, np.abs(result.lse - ref.lse))
        lse_error = float(np.max(apart, initial=0.0))
    return Errors(float(np.max(np.abs(difference), initial=0.0)), rel_l2, lse_error)


def complaint(found: Errors, naive: Errors, ref: Result, dtype: str) -> str | None:
    """Why a result is not accurate enough, or None if it is.

    out: at most twice the error of the naive computation in the same dtype, and what is FORGIVEN;
    so for the largest error and for the norm of all. lse: 2**-16 relative, for float64 2**-40,
    since 16-bit inputs too have their scores summed in float32.
    """
    import numpy as np

    largest = float(np.max(np.abs(ref.out), initial=0.0))
    bounds = [
        ("max error", found.max_error, 2 * naive.max_error + FORGIVEN[dtype] * largest),
        ("relative L2 error", found.rel_l2, 2 * naive.rel_l2 + FORGIVEN[dtype]),
    ]
    if found.lse_error is not None:
        finite = np.abs(ref.lse[np.isfinite(ref.lse)])
        relative = 2.0**-40 if dtype == "float64" else 2.0**-16
        bounds.append(
            ("LSE error", found.lse_error, relative * max(1.0, np.max(finite, initial=0)))
        )
    for what, value, bound in bounds:
        if math.isnan(value):
            return f"{what}: NaN"
        if not value <= bound:
            return f"{what} {value:.3g} is over {bound:.3g}"
    return None
