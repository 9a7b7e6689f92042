"""Random problems in which any of the arguments meet: lengths, masks of all kinds, sinks, sizes, strides, poison."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
from optional_torch import torch

# How long a side is: nothing, one, about a tile, several tiles.
LENGTHS = [0, 1, 2, 5, 16, 31, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300]


def random_problem(
    rng: np.random.Generator,
    dtype: str,
    *,
    head_dims: tuple[int, ...] = (1, 3, 8, 16, 40, 64),
    head_dims_v: tuple[int, ...] | None = None,
    elements: bool = True,
) -> oracle_backward.BackwardProblem:
    """Each argument is there or not, whatever the others are, as far as a call allows it. head_dims_v: of v, if not
    head_dims. elements: also masks by element, which do not go with packed sequences."""

    def maybe(x: Any, otherwise: Any = None) -> Any:
        return x if rng.random() < 0.5 else otherwise

    batch, group, kv_heads = (int(rng.integers(1, 4)) for _ in range(3))
    sq, sk = (int(rng.choice(LENGTHS)) for _ in range(2))
    d, d_v = (int(rng.choice(dims)) for dims in (head_dims, head_dims_v or head_dims))
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
    by_element = random_elements(rng, batch, heads, sq, sk) if maybe(elements, False) else {}
    return dataclasses.replace(
        p,
        **by_element,
        window=window,
        diagonal=diagonal if masked else None,
        prefix=maybe(prefix, 0) if p.causal else 0,
        seqlens_q=maybe(lengths(sq)),
        seqlens_k=maybe(lengths(sk)),
        sink=maybe(sink.astype(np.float32).astype(np.float64)),
        dlse=maybe(p.dlse),
    )


def random_elements(
    rng: np.random.Generator, batch: int, heads: int, sq: int, sk: int
) -> dict[str, Any]:
    """Some of the masks by element, at least one."""

    def documents(entries: int, rows: int) -> np.ndarray:
        # Runs, as of packed documents, or any order; some of no document.
        numbers = rng.integers(-1, 4, (entries, rows))
        return (np.sort(numbers) if rng.random() < 0.7 else numbers).astype(np.int32)

    def dense() -> np.ndarray:
        """Of each cell all is visible, or nothing, or some elements; any dimension may be 1."""
        shape = [n if rng.random() < 0.6 else 1 for n in (batch, heads, sq, sk)]
        cells = rng.choice(
            [0.0, 0.0, 0.3, 0.9, 1.0, 1.0], (*shape[:2], *(n // 64 + 1 for n in shape[2:]))
        )
        chance = cells.repeat(64, axis=2).repeat(64, axis=3)[..., : shape[2], : shape[3]]
        return rng.random(shape) < chance

    entries, others = (batch if rng.random() < 0.7 else 1 for _ in range(2))
    kinds = ("attn_mask", "documents", "block_mask")
    chosen = {str(rng.choice(kinds)), *(kind for kind in kinds if rng.random() < 0.3)}
    made = {
        "attn_mask": dense(),
        "documents": (documents(entries, sq), documents(others, sk)),
        "block_mask": dense(),
    }
    return {kind: made[kind] for kind in kinds if kind in chosen}


def block_mask_of(rng: np.random.Generator, p: Any, where: str = "cpu") -> fc.BlockMask | None:
    """What a problem's masks by element show together, from arrays of any strides: of torch, or on the CPU of NumPy."""
    lengths = {"seqlen_q": p.q.shape[1], "seqlen_k": p.k.shape[1]}
    of_numpy = where == "cpu" and rng.random() < 0.5
    parts = []
    for dense in (p.attn_mask, p.block_mask):
        if dense is not None:
            view, shape = strided_booleans(rng, dense, p, negative=of_numpy)
            memory = view if of_numpy else torch.from_numpy(view).to(where)
            broadcast = np.broadcast_to if of_numpy else torch.broadcast_to
            parts.append(fc.BlockMask.from_dense(broadcast(memory, shape), **lengths))
    if p.documents is not None:
        numbers = [x if of_numpy else torch.tensor(x, device=where) for x in p.documents]
        parts.append(fc.BlockMask.from_documents(*numbers))
    return functools.reduce(operator.and_, parts) if parts else None


def strided_booleans(
    rng: np.random.Generator, dense: np.ndarray, p: Any, *, negative: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """A mask in memory of any order, among other values; and a shape to broadcast it to, in which dimensions of 1 stay
    or are those of the call. negative: some dimensions run backwards."""
    order = [int(axis) for axis in rng.permutation(4)]
    more = [int(rng.integers(0, 3)) for _ in range(4)]
    memory = rng.random([dense.shape[axis] + more[axis] for axis in order]) < 0.5
    view = memory.transpose([order.index(axis) for axis in range(4)])
    view = view[tuple(slice(extra, None) for extra in more)]
    if negative:
        view = view[tuple(slice(None, None, -1 if rng.random() < 0.5 else 1) for _ in range(4))]
    view[...] = dense
    whole = p.q.shape[0], p.q.shape[2], p.q.shape[1], p.k.shape[1]
    shape = tuple(
        size if own == 1 and rng.random() < 0.5 else own
        for own, size in zip(dense.shape, whole, strict=True)
    )
    return view, shape


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
    seen = p.mask.of(p.q, p.k)
    rows = p.mask.exists(p.q)[:, 0, :, None]
    keys = seen.any(axis=2).swapaxes(1, 2)  # (batch, seqlen_k, 1 or heads)
    if keys.shape[2] > 1:  # a head of keys is read by the queries of its group
        kv_heads = p.k.shape[2]
        keys = keys.reshape(*keys.shape[:2], kv_heads, keys.shape[2] // kv_heads).any(axis=3)
    return {
        name: np.where(kept[..., None], x, np.nan)
        for name, x, kept in (("q", p.q, rows), ("k", p.k, keys), ("v", p.v, keys), ("dout", p.dout, rows))
    }  # fmt: skip


def strided(
    rng: np.random.Generator, x: np.ndarray, dtype: str, where: str, align: int = 1
) -> torch.Tensor:
    """x in memory of any order, with NaN between and around; the last stride is 1. align: a multiple that strides and
    the offset are."""
    last = x.ndim - 1
    order = [int(axis) for axis in rng.permutation(last)] + [last]
    more = [int(rng.integers(0, 3)) for _ in x.shape]
    sizes = [n + extra for n, extra in zip(x.shape, more, strict=True)]
    sizes[last] = -(-sizes[last] // align) * align
    memory = torch.full(
        [sizes[axis] for axis in order], torch.nan, dtype=getattr(torch, dtype), device=where
    )
    back = [order.index(axis) for axis in range(x.ndim)]
    whole = memory.permute(back)
    first = [
        int(rng.integers(0, size - n + 1)) if axis < last or align == 1 else 0
        for axis, (size, n) in enumerate(zip(sizes, x.shape, strict=True))
    ]
    view = whole[tuple(slice(at, at + n) for at, n in zip(first, x.shape, strict=True))]
    view.copy_(torch.from_numpy(np.ascontiguousarray(x)))
    return view


class Side(NamedTuple):
    """Where the batch entries of a problem lie as packed sequences: of queries, or of keys."""

    starts: tuple[int, ...]
    total: int
    existing: tuple[int, ...]  # rows of each, from the first of its slot on

    @staticmethod
    def of(
        rng: np.random.Generator, rows: int, batch: int, lengths: tuple[int, ...] | None
    ) -> Side:
        """One after the other, with rows of none before, behind and, where lengths are told, within slots."""
        existing = tuple(min(max(n, 0), rows) for n in lengths or (rows,) * batch)
        slots = existing
        if lengths is not None and rng.random() < 0.5:
            slots = tuple(int(rng.integers(n, rows + 1)) for n in existing)
        first = int(rng.integers(0, 4))
        starts = tuple(int(x) for x in np.cumsum([first, *slots]))
        return Side(starts, starts[-1] + int(rng.integers(0, 4)), existing)

    @property
    def has_gaps(self) -> bool:
        return any(np.diff(self.starts) != self.existing)

    def pack(self, x: np.ndarray) -> np.ndarray:
        """(batch, rows, ...) as (total, ...), with NaN in rows that do not exist."""
        packed = np.full((self.total, *x.shape[2:]), np.nan)
        for entry, start, n in zip(x, self.starts, self.existing, strict=False):
            packed[start : start + n] = entry[:n]
        return packed

    def unpack(self, found: torch.Tensor, rows: int, fill: float = 0.0) -> torch.Tensor:
        """The inverse. Rows that do not exist are to hold `fill`."""
        whole = found.new_full((len(self.existing), rows, *found.shape[1:]), fill)
        gone = torch.ones(self.total, dtype=torch.bool, device=found.device)
        for entry, start, n in zip(whole, self.starts, self.existing, strict=False):
            entry[:n] = found[start : start + n]
            gone[start : start + n] = False
        assert (found[gone] == fill).all(), "rows of no sequence were not written"
        return whole


def as_lse(p: oracle_backward.BackwardProblem, x: np.ndarray, where: str) -> torch.Tensor:
    """In the dtype in which LSE and its gradient are given."""
    return torch.tensor(x, device=where).to(
        torch.float64 if p.dtype == "float64" else torch.float32
    )


def check_packed(
    rng: np.random.Generator,
    p: oracle_backward.BackwardProblem,
    where: str,
    *,
    cfg: fc.ForwardConfig | None = None,
    backward_cfg: fc.BackwardConfig | None = None,
    align: int = 1,
) -> None:
    """As `check`, with the entries of the batch as packed sequences."""
    batch, rows, keys = *p.q.shape[:2], p.k.shape[1]
    queries = Side.of(rng, rows, batch, p.seqlens_q)
    others = Side.of(rng, keys, batch, p.seqlens_k)
    layout = "bhsd" if rng.random() < 0.5 else "bshd"
    told = said(p, where)
    for name, side in (("q", queries), ("k", others)):
        told[f"cu_seqlens_{name}"] = torch.tensor(side.starts, dtype=torch.int32, device=where)
        existing = torch.tensor(side.existing, dtype=torch.int32, device=where)
        told[f"seqlens_{name}"] = existing if side.has_gaps else None
    if queries.starts == others.starts and rng.random() < 0.5:
        told["cu_seqlens_k"] = None

    def placed(x: np.ndarray, side: Side) -> torch.Tensor:
        packed = side.pack(x)
        packed = packed.swapaxes(0, 1) if layout == "bhsd" else packed
        return strided(rng, packed, p.dtype, where, align)

    q, k, v, dout = (
        placed(poisoned(p)[name], side)
        for name, side in (("q", queries), ("k", others), ("v", others), ("dout", queries))
    )
    dlse = None
    if p.dlse is not None:
        dlse = as_lse(p, queries.pack(p.dlse.swapaxes(1, 2)).swapaxes(0, 1), where)
    out, lse, found = computed(p, (q, k, v, dout, dlse), told, layout, cfg, backward_cfg)
    seqlen = 1 if layout == "bhsd" else 0
    out = queries.unpack(out.movedim(seqlen, 0), rows)
    lse = queries.unpack(lse.T, rows, -torch.inf).transpose(1, 2)
    sides = ((queries, rows), (others, keys), (others, keys))
    gradients = [
        side.unpack(x.movedim(seqlen, 0), n) for x, (side, n) in zip(found, sides, strict=False)
    ]
    oracle.assert_accurate(p.forward, out, lse, tiny=True)
    oracle_backward.assert_accurate(p, (*gradients, *found[3:]))


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
    dlse = None
    if p.dlse is not None:
        rows = p.mask.exists(p.q)
        dlse = as_lse(p, np.where(rows, p.dlse, np.nan), where)
    given = (q, k, v, dout, dlse)
    told = {**said(p, where), "block_mask": block_mask_of(rng, p, where)}
    out, lse, found = computed(p, given, told, "bshd", cfg, backward_cfg)
    oracle.assert_accurate(p.forward, out, lse, tiny=True)
    oracle_backward.assert_accurate(p, found)


def computed(
    p: oracle_backward.BackwardProblem,
    given: tuple[torch.Tensor, ...],
    told: dict[str, Any],
    layout: str,
    cfg: fc.ForwardConfig | None,
    backward_cfg: fc.BackwardConfig | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """out, LSE and gradients of q, k, v, dout and dlse."""
    q, k, v, dout, dlse = given
    options = {"scale": p.scale, "layout": layout}
    if cfg is None or backward_cfg is None:
        leaves = [x.requires_grad_() for x in (q, k, v, told["sink"]) if x is not None]
        out, lse = fc.flash_attention(
            q, k, v, return_lse=True, on_unsupported="error", **options, **told
        )
        results, given = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        return out.detach(), lse.detach(), torch.autograd.grad(results, leaves, given)
    variant = fc.Variant(**told)
    out, lse = fc.forward(cfg, q, k, v, variant=variant, return_lse=True, **options)
    return (
        out,
        lse,
        fc.backward(backward_cfg, dout, q, k, v, out, lse, dlse=dlse, variant=variant, **options),
    )
