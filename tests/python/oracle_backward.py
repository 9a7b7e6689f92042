"""oracle.py for gradients: what they are, in fp64 NumPy, and how far from them a result may be.

Written from the definition and from nothing in flashcute. Arrays are (batch, seqlen, heads, d), "bshd".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracle
from oracle import RELATIVE, UNIT_ROUNDOFF, assert_close, rounded

NAMES = ("dq", "dk", "dv")


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

    def gradients(self, dtype: str = "float64") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dq, dk, dv. In a narrower dtype: as separate kernels give them, which round whatever they store."""

        def stored(x: np.ndarray) -> np.ndarray:
            return rounded(x, dtype)

        q, k, v, dout = self.q, self.k, self.v, self.dout
        heads, kv_heads = q.shape[2], k.shape[2]
        scale = oracle.default_scale(q, self.scale)
        seen = oracle.visible(q.shape[1], k.shape[1], self.causal, self.diagonal, self.window)
        repeated_k, repeated_v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        p, _ = oracle.softmax(stored(oracle.scores_of(q, k, scale)), seen)
        out = stored(oracle.weighted_values(stored(p), v))
        dp = stored(np.einsum("bihd,bjhd->bhij", dout, repeated_v, optimize=True))
        delta = np.einsum("bihd,bihd->bhi", dout, out)
        if self.dlse is not None:
            delta = delta - self.dlse
        ds = stored(np.where(seen, p * (dp - delta[..., None]), 0))
        dq = scale * np.einsum("bhij,bjhd->bihd", ds, repeated_k, optimize=True)
        dk = scale * np.einsum("bhij,bihd->bjhd", ds, q, optimize=True)
        dv = np.einsum("bhij,bihd->bjhd", stored(p), dout, optimize=True)
        return (
            stored(dq),
            stored(summed_over_groups(dk, kv_heads)),
            stored(summed_over_groups(dv, kv_heads)),
        )


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


def assert_accurate(p: BackwardProblem, found: tuple[object, object, object]) -> None:
    """The accuracy rule on each gradient: at most twice the error of the naive computation in the inputs' dtype,
    plus one rounding; for fp32 and fp64 a relative bound. dS = P (dP - delta) cancels where few keys are seen, so
    the bound is relative to the largest gradient of the three."""
    expected = p.gradients()
    naive = p.gradients(p.dtype)
    top = max(np.abs(x).max(initial=0) for x in expected)
    top = max(top, np.abs(p.dout).max(initial=0))
    for name, got, want, rough in zip(NAMES, found, expected, naive, strict=True):
        if p.dtype in RELATIVE:
            tolerance = RELATIVE[p.dtype] * top
        else:
            tolerance = 2 * np.abs(rough - want).max(initial=0) + UNIT_ROUNDOFF[p.dtype] * top
        assert_close(got, want, tolerance, name)
