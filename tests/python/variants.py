"""Random problems in which any of the arguments meet: lengths, masks, sinks, sizes, strides, poison."""

from __future__ import annotations

import dataclasses
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
from optional_torch import torch

# How long a side is: nothing, one, about a tile, several tiles.
LENGTHS = [0, 1, 2, 5, 16, 31, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300]


def random_problem(
    rng: np.random.Generator, dtype: str, *, head_dims: tuple[int, ...] = (1, 3, 8, 16, 40, 64)
) -> oracle_backward.BackwardProblem:
    """Each argument is there or not, whatever the others are, as far as a call allows it."""

    def maybe(x: Any, otherwise: Any = None) -> Any:
        return x if rng.random() < 0.5 else otherwise

    batch, group, kv_heads = (int(rng.integers(1, 4)) for _ in range(3))
    sq, sk = (int(rng.choice(LENGTHS)) for _ in range(2))
    d, d_v = (int(rng.choice(head_dims)) for _ in range(2))
    heads = group * kv_heads
    p = oracle_backward.make_problem(
        rng, dtype, batch=batch, seqlen_q=sq, seqlen_k=sk, heads=heads, kv_heads=kv_heads, d=d, d_v=d_v, with_dlse=True,
        causal=bool(maybe(True, False)), scale=maybe(float(rng.choice([0.0, 0.3]))),
    )  # fmt: skip

    def bound() -> int:
        return int(rng.choice([-1, 0, 1, 7, 64, 100, 500, 2**62]))

    def lengths(longest: int) -> tuple[int, ...]:
        # Also such that are clamped.
        some = [0, 1, longest - 1, longest, longest + 9, -3, *rng.integers(0, longest + 1, 6)]
        return tuple(int(rng.choice(some)) for _ in range(batch))

    window = maybe((bound(), bound()))
    masked = p.causal or (window is not None and window != (-1, -1))
    diagonal = maybe(int(rng.choice([0, -1, 3, -70, 70, sk, -sq, 2**40, -(2**40)])))
    prefix = maybe(int(rng.integers(0, sk + 20)), lengths(sk))
    sink = rng.standard_normal(heads) * 3 + float(rng.choice([0.0, 0.0, 30.0, -30.0]))
    return dataclasses.replace(
        p,
        window=window,
        diagonal=diagonal if masked else None,
        prefix=maybe(prefix, 0) if p.causal else 0,
        seqlens_q=maybe(lengths(sq)),
        seqlens_k=maybe(lengths(sk)),
        sink=maybe(sink.astype(np.float32).astype(np.float64)),
        dlse=maybe(p.dlse),
    )


def said(p: Any, where: str = "cpu") -> dict[str, Any]:
    """What a problem asks for beside q, k and v, in flash_attention's words."""

    def array(x: Any, dtype: Any = None) -> Any:
        return None if x is None else torch.tensor(x, dtype=dtype or torch.int32, device=where)

    return {
        "causal": p.causal,
        "diagonal": "end" if p.diagonal is None else p.diagonal,
        "window": p.window,
        "prefix": (p.prefix or None) if isinstance(p.prefix, int) else array(np.maximum(p.prefix, -(2**31))),
        "seqlens_q": array(p.seqlens_q),
        "seqlens_k": array(p.seqlens_k),
        "sink": array(p.sink, torch.float64 if p.dtype == "float64" else torch.float32),
    }  # fmt: skip


def poisoned(p: oracle_backward.BackwardProblem) -> dict[str, np.ndarray]:
    """q, k, v and dout with NaN in all that does not exist or that no query sees, which is nobody's business."""
    seen = p.mask.of(p.q, p.k)[:, 0]
    rows = p.mask.exists(p.q)[:, 0]
    keys = seen.any(axis=1)
    return {
        name: np.where(kept[:, :, None, None], x, np.nan)
        for name, x, kept in (("q", p.q, rows), ("k", p.k, keys), ("v", p.v, keys), ("dout", p.dout, rows))
    }  # fmt: skip


def strided(
    rng: np.random.Generator, x: np.ndarray, dtype: str, where: str, align: int = 1
) -> torch.Tensor:
    """x in memory of any order, with NaN between and around; the last stride is 1. align: a multiple that strides and
    the offset are."""
    order = [int(axis) for axis in rng.permutation(3)] + [3]
    more = [int(rng.integers(0, 3)) for _ in range(4)]
    sizes = [n + extra for n, extra in zip(x.shape, more, strict=True)]
    sizes[3] = -(-sizes[3] // align) * align
    memory = torch.full(
        [sizes[axis] for axis in order], torch.nan, dtype=getattr(torch, dtype), device=where
    )
    back = [order.index(axis) for axis in range(4)]
    whole = memory.permute(back)
    first = [
        int(rng.integers(0, size - n + 1)) if axis < 3 or align == 1 else 0
        for axis, (size, n) in enumerate(zip(sizes, x.shape, strict=True))
    ]
    view = whole[tuple(slice(at, at + n) for at, n in zip(first, x.shape, strict=True))]
    view.copy_(torch.from_numpy(np.ascontiguousarray(x)))
    return view


def check(
    rng: np.random.Generator,
    p: oracle_backward.BackwardProblem,
    where: str,
    *,
    cfg: fc.ForwardConfig | None = None,
    backward_cfg: fc.BackwardConfig | None = None,
    align: int = 1,
) -> None:
    """Computes a problem forward and back from poisoned, strided tensors, by the default road or with configurations,
    and applies the accuracy rules."""
    tensors = {n: strided(rng, x, p.dtype, where, align) for n, x in poisoned(p).items()}
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    said_of_it = said(p, where)
    sink = said_of_it["sink"]
    dlse = None
    if p.dlse is not None:
        rows = p.mask.exists(p.q)
        dlse = torch.tensor(np.where(rows, p.dlse, np.nan), device=where)
        dlse = dlse.to(torch.float64 if p.dtype == "float64" else torch.float32)
    if cfg is None or backward_cfg is None:
        leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
        out, lse = fc.flash_attention(
            q, k, v, scale=p.scale, return_lse=True, on_unsupported="error", **said_of_it
        )
        results, given = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        found = torch.autograd.grad(results, leaves, given)
    else:
        variant = fc.Variant(**said_of_it)
        out, lse = fc.forward(cfg, q, k, v, variant=variant, scale=p.scale, return_lse=True)
        found = fc.backward(
            backward_cfg, dout, q, k, v, out, lse, dlse=dlse, variant=variant, scale=p.scale
        )
    oracle.assert_accurate(p.forward, out.detach(), lse.detach(), tiny=True)
    oracle_backward.assert_accurate(p, found)
