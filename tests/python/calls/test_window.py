"""Windows in every call: query i sees keys from i + diagonal - left to i + diagonal + right, both included."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
from block_counts import expected_block_counts
from flashcute import reference
from optional_torch import needs_torch, torch
from tensors import every_call, with_variant

LENGTHS = [(70, 70), (50, 131), (131, 50), (1, 140), (140, 1)]
WINDOWS = [(0, 0), (5, 0), (0, 7), (31, 16), (64, 64), (-1, 3), (3, -1), (200, 0), (0, 200)]
LARGEST = 2**63 - 1
everywhere = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in ("float16", "bfloat16", "float32", "float64")),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float32")),
    ],
)
lengths = pytest.mark.parametrize(("sq", "sk"), LENGTHS)


def tensors(p: Any, where: str, *names: str) -> list[torch.Tensor]:
    dtype = getattr(torch, p.dtype)
    return [torch.tensor(getattr(p, name), dtype=dtype, device=where) for name in names]


def arch_of(where: str) -> str | int:
    return "cpu" if where == "cpu" else fc._core.driver_info().gpus[0].arch


def masks(sq: int, sk: int) -> list[dict[str, Any]]:
    """Windows alone, with a causal mask, and at other diagonals than the end."""
    return [
        *({"window": w, "causal": causal} for w in WINDOWS for causal in (False, True)),
        *({"window": (20, 10), "diagonal": d} for d in (0, -30, sk, -sq, sk + 15, -sq - 15)),
        {"window": (20, 10), "diagonal": 3, "causal": True},
    ]


@everywhere
@lengths
def test_forward(rng: np.random.Generator, where: str, dtype: str, sq: int, sk: int) -> None:
    """A window that is off by one, aligned to the wrong end, cut by a length, or that a causal mask switches off."""
    p = oracle.make_problem(rng, dtype, batch=1, seqlen_q=sq, seqlen_k=sk, kv_heads=2, d=64)
    q, k, v = tensors(p, where, "q", "k", "v")
    cfg = fc.default_config(64, dtype, arch_of(where))
    for mask in masks(sq, sk):
        at = dataclasses.replace(p, **mask)
        # One row that sees few keys has so few elements that the naive error may be 0.
        oracle.assert_accurate(at, *fc.flash_attention(q, k, v, **mask, return_lse=True), tiny=True)
        oracle.assert_accurate(
            at, *fc.forward(cfg, q, k, v, return_lse=True, **with_variant(**mask)), tiny=True
        )


@everywhere
@lengths
def test_gradients(rng: np.random.Generator, where: str, dtype: str, sq: int, sk: int) -> None:
    """A window that the forward has and the backward does not, by autograd and by `backward`."""
    p = oracle_backward.make_problem(
        rng, dtype, batch=1, seqlen_q=sq, seqlen_k=sk, kv_heads=2, d=64, with_dlse=True
    )
    q, k, v, dout = tensors(p, where, "q", "k", "v", "dout")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for mask in masks(sq, sk):
        at = dataclasses.replace(p, **mask)
        # Not the same for all: a window that hides nothing is none.
        cfg = fc.explain(q, k, v, gradients=True, **mask).gradients.config
        out, lse = fc.flash_attention(q, k, v, return_lse=True, **mask)
        dlse = torch.tensor(p.dlse, dtype=lse.dtype, device=where)
        found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        oracle_backward.assert_accurate(at, found)
        inputs = (x.detach() for x in (dout, q, k, v, out, lse))
        again = fc.backward(cfg, *inputs, dlse=dlse, **with_variant(**mask))
        for a, b in zip(again, found, strict=True):
            assert torch.equal(a, b)


def test_every_small_window(rng: np.random.Generator) -> None:
    """Every pair of bounds from none to 7 at sizes up to 7, one element at a time."""
    for sq, sk in itertools.product(range(1, 8), range(1, 8)):
        p = oracle.make_problem(rng, "float64", batch=1, seqlen_q=sq, seqlen_k=sk, heads=1, d=4)
        for window, causal in itertools.product(
            itertools.product(range(-1, 8), range(-1, 8)), (False, True)
        ):
            at = dataclasses.replace(p, window=window, causal=causal)
            found = fc.flash_attention(p.q, p.k, p.v, causal, window=window, return_lse=True)
            oracle.assert_accurate(at, *found)


@lengths
def test_reference(rng: np.random.Generator, sq: int, sk: int) -> None:
    """The plain array code means the same."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=1, seqlen_q=sq, seqlen_k=sk, heads=2, d=8, with_dlse=True
    )
    for mask in masks(sq, sk):
        at = dataclasses.replace(oracle.Problem(p.q, p.k, p.v, p.dtype), **mask)
        options = {"diagonal": "end", **mask, "return_lse": True}
        oracle.assert_accurate(at, *reference.naive(p.q, p.k, p.v, **options))
        blocks = {"block_m": 16, "block_n": 32}
        oracle.assert_accurate(at, *reference.chunked(p.q, p.k, p.v, **options, **blocks))
        oracle_backward.assert_accurate(
            dataclasses.replace(p, **mask),
            reference.naive_gradients(p.dout, p.q, p.k, p.v, dlse=p.dlse, **mask),
        )


@lengths
def test_count_blocks(device: str, sq: int, sk: int) -> None:
    """Blocks outside the window are skipped, not computed and masked."""
    q, k, v = (torch.ones(1, n, 1, 64, dtype=torch.bfloat16, device=device) for n in (sq, sk, sk))
    cfg = fc.default_config(64, "bfloat16", arch_of(device))
    if device == "cpu":
        cfg = cfg.replace(block_n=16)
    for mask in masks(sq, sk):
        found = fc.count_blocks(cfg, q, k, v, **with_variant(**mask))
        causal, diagonal = mask.get("causal", False), mask.get("diagonal")
        expected = expected_block_counts(cfg, sq, sk, causal, diagonal, mask["window"])
        assert torch.equal(found.cpu()[0, 0], expected), mask


def test_no_limit(device: str) -> None:
    """-1, None, and more keys than there are, to the bit; what is none of these is a window."""
    q, k, v = (torch.randn(1, n, 2, 64, device=device).bfloat16() for n in (90, 130, 130))

    def at(window: Any, causal: bool = True) -> torch.Tensor:
        return fc.flash_attention(q, k, v, causal, window=window)

    causal, full = at(None), at(None, causal=False)
    for window in [(-1, -1), (None, None), (-1, 5), (LARGEST, 0), (129, 0), [np.int32(129), 4]]:
        assert torch.equal(at(window), causal), window
    for window in [(-1, 0), (200, 0), (None, np.int64(0))]:
        assert torch.equal(at(window, causal=False), causal), window
    for window in [(-1, -1), (200, 200), (129, 89), (LARGEST, LARGEST)]:
        assert torch.equal(at(window, causal=False), full), window
    assert not torch.equal(at((128, 0)), causal)
    assert not torch.equal(at((129, 88), causal=False), full)


@pytest.mark.parametrize(
    ("diagonal", "window"),
    [
        (2**62, (2**62 + 5, -1)), (-(2**62), (-1, 2**62 - 3)), (2**40 + 3, (2**40 + 6, 0)),
        (-(2**63), (LARGEST, LARGEST)), (LARGEST, (LARGEST, LARGEST)), (LARGEST, (LARGEST, 0)),
        (-(2**63), (0, LARGEST)), (2**33, (2**33 + 2, 2**62)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_numbers_of_64_bits(
    rng: np.random.Generator, diagonal: int, window: tuple[int, int], causal: bool
) -> None:
    """A sum that wraps, or bounds that are cut off before they are added."""
    p = oracle.make_problem(rng, "float64", batch=1, seqlen_q=9, seqlen_k=12, heads=1, d=4)
    left, right = window
    seen = np.array(
        [
            [
                (not causal or j <= i + diagonal)
                and (left < 0 or j >= i + diagonal - left)
                and (right < 0 or j <= i + diagonal + right)
                for j in range(12)
            ]
            for i in range(9)
        ]
    )
    weights, lse = oracle.softmax(oracle.scores_of(p.q, p.k, 0.5), seen)
    found = fc.flash_attention(
        p.q, p.k, p.v, causal, diagonal=diagonal, window=window, return_lse=True
    )
    oracle.assert_close(found[0], oracle.weighted_values(weights, p.v), 1e-12, "out")
    oracle.assert_close(found[1], lse, 1e-12, "lse")


def test_what_a_window_hides_does_not_leak(rng: np.random.Generator, device: str) -> None:
    """NaN in keys and values before and after the window, also in blocks that other queries of the tile see."""
    p = oracle.make_problem(rng, "float32", batch=1, seqlen_q=100, seqlen_k=300, d=64)
    p = dataclasses.replace(p, window=(10, 5), diagonal=100)
    q, k, v = tensors(p, device, "q", "k", "v")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        for x in (k, v):
            x[:, :90] = torch.nan
            x[:, 205:] = torch.nan
    options: dict[str, Any] = {"window": (10, 5), "diagonal": 100}
    out, lse = fc.flash_attention(q, k, v, return_lse=True, **options)
    oracle.assert_accurate(p, out, lse)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    assert dq.isfinite().all()
    assert dk[:, 90:205].isfinite().all()
    assert dv[:, 90:205].isfinite().all()
    assert not dk[:, :90].any()
    assert not dv[:, 205:].any()
    # A value that some queries of a tile see and others do not.
    with torch.no_grad():
        v[:, 150] = torch.nan
        sees = torch.arange(300)[None, :] - torch.arange(100)[:, None] - 100
        sees = (sees >= -10) & (sees <= 5)
        found = fc.flash_attention(q, k, v, **options).isnan().any(-1).any(-1)[0].cpu()
    assert torch.equal(found, sees[:, 150])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(every_call(None)))
@pytest.mark.parametrize(
    "wrong", [3, (3,), (1, 2, 3), (-2, 0), (0, -3), (1.0, 2), ("1", 2), (True, 1), (0, 2**63)], ids=repr
)  # fmt: skip
def test_no_window(call: str, wrong: Any) -> None:
    """Refused by name: a count that is none, or one in place of two."""
    q = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(
        fc.ArgumentError,
        match=r"^window: expected \(left, right\), two integers >= -1 \(-1 or None: no limit\), got ",
    ):
        every_call(q)[call](window=wrong)
    every_call(q)[call](window=(1, 2), diagonal=1)  # a window has a diagonal, causal or not


# ---- torch ---------------------------------------------------------------------------------------


def qkv(sq: int = 9, sk: int = 14) -> list[torch.Tensor]:
    return [
        torch.randn(2, n, h, 8).double().requires_grad_() for n, h in ((sq, 4), (sk, 2), (sk, 2))
    ]


@needs_torch
@pytest.mark.parametrize("window", [(2, 0), (0, 3), (-1, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(window: tuple[int, int], causal: bool) -> None:
    """The gradients are those of the function that was computed."""
    assert torch.autograd.gradcheck(
        lambda *x: fc.flash_attention(*x, causal, window=window, on_unsupported="error"), qkv(4, 6)
    )


@needs_torch
def test_compile() -> None:
    """A window that the operators' arguments drop, forward or backward; one compilation for all numbers."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def attend(*x: torch.Tensor, window: Any) -> torch.Tensor:
        return fc.flash_attention(*x, window=window, on_unsupported="error")

    inputs = qkv()
    traced = torch.compile(attend, fullgraph=True, backend=backend)
    real = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for window in ((2, 1), (3, 2), (4, 5), (7, 3)):
        expected = attend(*inputs, window=window)
        assert torch.equal(traced(*inputs, window=window), expected)
        found = real(*inputs, window=window)
        assert torch.equal(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert len(graphs) == 2  # for the first numbers, then for all


@needs_torch
def test_export_and_vmap() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fc.flash_attention(q, k, v, causal=True, window=(3, 0), diagonal=2)

    rows, keys = torch.export.Dim("rows", min=2), torch.export.Dim("keys", min=2)
    shapes = {"q": {1: rows}, "k": {1: keys}, "v": {1: keys}}
    module = Attention()
    program = torch.export.export(module, tuple(qkv()), dynamic_shapes=shapes)
    for other in (qkv(), qkv(30, 31), qkv(31, 12)):
        assert torch.equal(program.module()(*other), module(*other))
    q, k, v = (x.detach() for x in qkv())
    many = torch.stack([q, q + 1, q * 2])
    for a, b in zip(torch.func.vmap(module, (0, None, None))(many, k, v), many, strict=True):
        torch.testing.assert_close(a, module(b, k, v))


@needs_torch
def test_a_window_beside_what_no_kernel_covers() -> None:
    """torch's own attention has the window too."""
    q, k, v = qkv()
    bias = torch.randn(9, 14).to(q.dtype)
    found = fc.flash_attention(q, k, v, window=(4, 3), attn_mask=bias, on_unsupported="silent")
    seen = torch.tensor(oracle.visible(9, 14, False, None, (4, 3)))
    both = bias.masked_fill(~seen, -torch.inf)
    expected = fc.flash_attention(q, k, v, attn_mask=both, on_unsupported="silent")
    torch.testing.assert_close(found, expected)
