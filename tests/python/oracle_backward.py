"""oracle.py for gradients: what they are, in fp64 NumPy, and how far from them a result may be.

Written from the definition and from nothing in flashcute. Arrays are (batch, seqlen, heads, d), "bshd".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracle
from oracle import RELATIVE, UNIT_ROUNDOFF, assert_close, rounded

NAMES = ("dq", "dk", "dv", "dsink")


def summed_over_groups(x: np.ndarray, kv_heads: int) -> np.ndarray:
    batch, rows, heads, d = x.shape
    return x.reshape(batch, rows, kv_heads, heads // kv_heads, d).sum(axis=3)


@dataclasses.dataclass(frozen=True)
class BackwardProblem:
    """Inputs and gradients of the results, exact in their dtype but held in fp64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dtype: str
    causal: bool = False
    scale: float | None = None
    dlse: np.ndarray | None = None  # (batch, heads, seqlen_q)
    diagonal: int | None = None
    window: oracle.Window = None
    prefix: int | tuple[int, ...] = 0
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None
    attn_mask: np.ndarray | None = None
    documents: tuple[np.ndarray, np.ndarray] | None = None
    block_mask: np.ndarray | None = None
    sink: np.ndarray | None = None  # (heads,)

    @property
    def forward(self) -> oracle.Problem:
        names = (field.name for field in dataclasses.fields(oracle.Problem))
        return oracle.Problem(**{name: getattr(self, name) for name in names})

    @property
    def mask(self) -> oracle.Mask:
        names = (field.name for field in dataclasses.fields(oracle.Mask))
        return oracle.Mask(**{name: getattr(self, name) for name in names})

    def gradients(self, dtype: str = "float64") -> tuple[np.ndarray, ...]:
        """dq, dk, dv, with a sink dsink. In a narrower dtype: as separate kernels give them, which round whatever they
        store."""

        def stored(x: np.ndarray) -> np.ndarray:
            return rounded(x, dtype)

        q, k, v, dout = self.q, self.k, self.v, self.dout
        heads, kv_heads = q.shape[2], k.shape[2]
        scale = oracle.default_scale(q, self.scale)
        seen, exists = self.mask.of(q, k), self.mask.exists(q)
        repeated_k, repeated_v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        p, lse = oracle.softmax(stored(oracle.scores_of(q, k, scale)), seen, self.sink)
        out = stored(oracle.weighted_values(stored(p), v))
        dp = stored(np.einsum("bihd,bjhd->bhij", dout, repeated_v, optimize=True))
        delta = np.einsum("bihd,bihd->bhi", dout, out)
        if self.dlse is not None:
            delta = delta - self.dlse
        ds = stored(np.where(seen, p * (dp - delta[..., None]), 0))
        dq = scale * np.einsum("bhij,bjhd->bihd", ds, repeated_k, optimize=True)
        dk = scale * np.einsum("bhij,bihd->bjhd", ds, q, optimize=True)
        dv = np.einsum("bhij,bihd->bjhd", stored(p), dout, optimize=True)
        found = (
            stored(dq),
            stored(summed_over_groups(dk, kv_heads)),
            stored(summed_over_groups(dv, kv_heads)),
        )
        if self.sink is None:
            return found
        weights = np.where(exists, weight_of_sink(self.sink, lse), 0)
        return (*found, -(weights * delta).sum(axis=(0, 2)))


def weight_of_sink(sink: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """Its probability, (batch, heads, seqlen_q)."""
    z = np.broadcast_to(sink[:, None], lse.shape)
    return np.exp(np.where(z == -np.inf, -np.inf, z - np.where(z == -np.inf, 0, lse)))


def make_problem(
    rng: np.random.Generator, dtype: str, *, with_dlse: bool = False, **sizes: Any
) -> BackwardProblem:
    """The forward's problem of these sizes, and gradients of its results."""
    p = oracle.make_problem(rng, dtype, **sizes)
    batch, rows, heads, _ = p.q.shape
    dout = rounded(rng.standard_normal((batch, rows, heads, p.v.shape[3])), dtype)
    dlse = rng.standard_normal((batch, heads, rows)).astype(np.float32).astype(np.float64)
    return BackwardProblem(
        p.q, p.k, p.v, dout, dtype, p.causal, p.scale, dlse if with_dlse else None, p.diagonal
    )


def assert_accurate(p: BackwardProblem, found: tuple[object, ...]) -> None:
    """The accuracy rule on each gradient: at most twice the error of the naive computation in the inputs' dtype,
    plus one rounding; for fp32 and fp64 a relative bound. dS = P (dP - delta) cancels where few keys are seen, so
    the bound is relative to the largest gradient of the three. dsink is a sum of as many terms as there are rows, of
    both signs: its bound is relative to the sum of their sizes."""
    expected = p.gradients()
    naive = p.gradients(p.dtype)
    top = max(np.abs(x).max(initial=0) for x in expected)
    top = max(top, np.abs(p.dout).max(initial=0))
    sizes = [top] * 3
    if p.sink is not None:
        out, lse = p.forward.expected()
        terms = np.einsum("bihd,bihd->bhi", np.abs(p.dout), np.abs(out))
        terms = terms + np.abs(0 if p.dlse is None else p.dlse)
        exists = p.mask.exists(p.q)
        terms = terms * np.where(exists, weight_of_sink(p.sink, np.where(exists, lse, 0)), 0)
        sizes.append(terms.sum(axis=(0, 2)).max(initial=0))
    names = NAMES[: len(expected)]
    for name, got, want, rough, top in zip(names, found, expected, naive, sizes, strict=True):
        if p.dtype in RELATIVE:
            tolerance = RELATIVE[p.dtype] * top
        else:
            tolerance = 2 * np.abs(rough - want).max(initial=0) + UNIT_ROUNDOFF[p.dtype] * top
        assert_close(got, want, tolerance, name)
