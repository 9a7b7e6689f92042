"""seqlens_q and seqlens_k in every call: rows and keys from there on do not exist."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
import variants
from flashcute import reference
from optional_torch import needs_torch, torch
from tensors import every_call, require_refused, same_bits, same_bits_under_any_mask

everywhere = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in ("float16", "bfloat16", "float32", "float64")),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float32")),
    ],
)
QUERIES, KEYS = (90, 0, 1, 33, 64), (70, 140, 0, 1, 128)
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "diagonal": 0},
    {"causal": True, "diagonal": 7},
    {"causal": True, "diagonal": -20},
    {"window": (20, 10)},
    {"window": (-1, 3)},
    {"window": (5, -1), "diagonal": 0},
    {"window": (5, 0), "diagonal": 40, "causal": True},
]
LENGTHS: list[dict[str, Any]] = [
    {"seqlens_q": QUERIES},
    {"seqlens_k": KEYS},
    {"seqlens_q": QUERIES, "seqlens_k": KEYS},
]


def make_problem(rng: np.random.Generator, dtype: str) -> oracle_backward.BackwardProblem:
    return oracle_backward.make_problem(
        rng, dtype, batch=5, seqlen_q=90, seqlen_k=140, heads=4, kv_heads=2, d=32, with_dlse=True
    )


@everywhere
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "+".join(x))
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_padding_is_nobodys_business(
    rng: np.random.Generator, where: str, dtype: str, lengths: Any, mask: Any
) -> None:
    """Padding that is read: q, k, v, dout and dlse hold NaN there, and results are to be 0 and -inf. A diagonal "end"
    at the end of the tensor; lengths that the forward has and the backward does not."""
    p = dataclasses.replace(make_problem(rng, dtype), **lengths, **mask)
    variants.check(rng, p, where)


@everywhere
def test_backward_reads_no_padding(rng: np.random.Generator, where: str, dtype: str) -> None:
    """The function `backward` with configurations, from an output and an LSE with NaN in rows that do not exist."""
    p = dataclasses.replace(make_problem(rng, dtype), **LENGTHS[2], causal=True)
    arch = "cpu" if where == "cpu" else fc._core.driver_info().gpus[0].arch
    tensors = {
        n: variants.strided(rng, x, dtype, where, 8) for n, x in variants.poisoned(p).items()
    }
    q, k, v, dout = (tensors[n] for n in ("q", "k", "v", "dout"))
    variant = fc.Variant(**variants.said(p, where))
    out, lse = fc.forward(
        fc.default_config(32, dtype, arch), q, k, v, variant=variant, return_lse=True
    )
    oracle.assert_accurate(p.forward, out, lse, tiny=True)
    gone = ~torch.tensor(p.mask.exists(p.q)[:, 0], device=where)
    out[gone] = torch.nan
    lse.transpose(1, 2)[gone] = torch.nan
    dlse = torch.tensor(p.dlse, device=where).to(lse.dtype)
    dlse.transpose(1, 2)[gone] = torch.nan
    cfg = same_bits_under_any_mask(32, dtype, arch)
    found = fc.backward(cfg, dout, q, k, v, out, lse, dlse=dlse, variant=variant)
    oracle_backward.assert_accurate(p, found)


def test_every_small_length(rng: np.random.Generator) -> None:
    """Every pair of lengths, 0 and 1 included, in tensors of every size up to 3, with and without the causal mask."""
    for sq, sk, causal in itertools.product(range(4), range(4), (False, True)):
        pairs = list(itertools.product(range(sq + 1), range(sk + 1)))
        p = oracle_backward.make_problem(
            rng, "float64", batch=len(pairs), seqlen_q=sq, seqlen_k=sk, heads=2, kv_heads=1, d=4, causal=causal
        )  # fmt: skip
        queries, keys = (tuple(x) for x in zip(*pairs, strict=True))
        p = dataclasses.replace(p, seqlens_q=queries, seqlens_k=keys)
        q, k, v, dout = (variants.poisoned(p)[n] for n in ("q", "k", "v", "dout"))
        arrays = {"seqlens_q": np.int32(queries), "seqlens_k": np.int32(keys)}
        out, lse = fc.flash_attention(q, k, v, causal, return_lse=True, **arrays)
        oracle.assert_accurate(p.forward, out, lse)
        cfg = fc.default_backward_config(4, "float64", "cpu")
        variant = fc.Variant(causal=causal, **arrays)
        found = fc.backward(cfg, dout, q, k, v, out, lse, variant=variant)
        oracle_backward.assert_accurate(p, found)


@needs_torch
@pytest.mark.parametrize("causal", [False, True])
def test_zeros_and_ones_on_both_devices(
    rng: np.random.Generator, device: str, causal: bool
) -> None:
    """Entries of length 0 and 1 beside long ones, in one call."""
    queries, keys = (tuple(x) for x in zip(*itertools.product((0, 1, 130), repeat=2), strict=True))
    p = oracle_backward.make_problem(
        rng, "float32", batch=9, seqlen_q=130, seqlen_k=130, heads=2, d=64, causal=causal
    )
    variants.check(rng, dataclasses.replace(p, seqlens_q=queries, seqlens_k=keys), device)


@needs_torch
def test_lengths_are_clamped(device: str) -> None:
    """A length beyond the tensor would read its neighbour."""
    q, k, v = (torch.randn(3, n, 2, 64, device=device).bfloat16() for n in (50, 70, 70))

    def at(queries: Any, keys: Any) -> torch.Tensor:
        lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys))
        names = ("seqlens_q", "seqlens_k")
        return fc.flash_attention(q, k, v, True, **dict(zip(names, lengths, strict=True)))

    large = 2**31 - 1
    assert same_bits(at([51, -1, large], [-(2**31), large, 71]), at([50, 0, 50], [0, 70, 70]))


@needs_torch
def test_a_row_does_not_depend_on_its_batch_mates(rng: np.random.Generator, device: str) -> None:
    """Entries in another order, and alone, have the same bits; so have their gradients."""
    q, k, v = (torch.randn(5, n, 4, 64, device=device).bfloat16() for n in (90, 140, 140))
    sink = torch.randn(4, device=device)
    dout = torch.randn_like(q)
    lengths = [torch.tensor(x, dtype=torch.int32, device=device) for x in (QUERIES, KEYS)]

    def run(order: list[int]) -> list[torch.Tensor]:
        leaves = [x[order].requires_grad_() for x in (q, k, v)]
        queries, keys = (x[order] for x in lengths)
        out, lse = fc.flash_attention(
            *leaves, True, window=(60, -1), seqlens_q=queries, seqlens_k=keys, sink=sink,
            return_lse=True, deterministic=True,
        )  # fmt: skip
        found = [out, lse.nan_to_num(neginf=0.0), *torch.autograd.grad(out, leaves, dout[order])]
        return [x.detach() for x in found]

    together = run([0, 1, 2, 3, 4])
    for order in ([4, 2, 0, 1, 3], [3], [1, 0]):
        for a, b in zip(together, run(order), strict=True):
            assert same_bits(a[order], b)


@needs_torch
def test_each_argument_alone_changes_the_result(device: str) -> None:
    """An argument that is accepted and ignored."""
    q, k, v = (torch.randn(2, n, 2, 64, device=device).bfloat16() for n in (40, 60, 60))
    short = torch.tensor([39, 20], dtype=torch.int32, device=device)
    plain, causal = fc.flash_attention(q, k, v), fc.flash_attention(q, k, v, True)
    fewer_keys = fc.flash_attention(q, k, v, seqlens_k=short)
    assert (fewer_keys != plain).any(-1).all()
    fewer_queries = fc.flash_attention(q, k, v, seqlens_q=short)
    torch.testing.assert_close(fewer_queries[1, :20], plain[1, :20])
    assert not fewer_queries[1, 20:].any()
    # The diagonal "end" moves with the number of queries, and others do not.
    moved = fc.flash_attention(q, k, v, True, seqlens_q=short)
    assert (moved[:, :20] != causal[:, :20]).any()
    start = fc.flash_attention(q, k, v, True, diagonal="start", seqlens_q=short)
    expected = fc.flash_attention(q, k, v, True, diagonal="start")
    torch.testing.assert_close(start[1, :20], expected[1, :20])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_reference(rng: np.random.Generator, mask: Any) -> None:
    """The plain array code means the same."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=5, seqlen_q=90, seqlen_k=140, heads=2, kv_heads=1, d=4, with_dlse=True
    )
    p = dataclasses.replace(p, **mask, **LENGTHS[2])
    q, k, v, dout = (variants.poisoned(p)[n] for n in ("q", "k", "v", "dout"))
    arrays = {name: np.int32(x) for name, x in LENGTHS[2].items()}
    options = {"diagonal": "end", **mask, **arrays, "return_lse": True}
    oracle.assert_accurate(p.forward, *reference.naive(q, k, v, **options))
    blocks = {"block_m": 16, "block_n": 32}
    oracle.assert_accurate(p.forward, *reference.chunked(q, k, v, **options, **blocks))
    del options["return_lse"]
    found = reference.naive_gradients(dout, q, k, v, dlse=p.dlse, **options)
    oracle_backward.assert_accurate(p, found)


@pytest.mark.parametrize("call", list(every_call(None)))
def test_lengths_reach_every_call(call: str) -> None:
    """Refused by name where they do not fit, and else taken."""
    q = np.ones((1, 4, 2, 8), np.float32)
    for name in ("seqlens_q", "seqlens_k"):
        says = rf"{name}: expected .*\(batch,\) = "
        require_refused(call, every_call(q)[call], {name: np.ones(2, np.int32)}, says)
        every_call(q)[call](**{name: np.ones(1, np.int32)})


@pytest.mark.gpu
def test_lengths_change_between_replays() -> None:
    """Lengths that are read on the host, or baked into a graph."""
    q, k, v = (torch.randn(2, n, 2, 64, device="cuda").bfloat16() for n in (130, 200, 200))
    lengths = torch.tensor([130, 200], dtype=torch.int32, device="cuda")
    sink, dout = torch.randn(2, device="cuda"), torch.randn_like(q)
    prefix = torch.tensor([3, 9], dtype=torch.int32, device="cuda")
    options = {"prefix": prefix, "seqlens_q": lengths, "seqlens_k": lengths, "sink": sink}
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]

    def step() -> list[torch.Tensor]:
        out = fc.flash_attention(q, k, v, True, **options)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in ([1, 77], [130, 0], [64, 128]):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        prefix.copy_(torch.tensor(values, dtype=torch.int32) // 2)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
