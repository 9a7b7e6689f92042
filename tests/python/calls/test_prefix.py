"""prefix in every call: with causal=True the first keys are visible to every query, as far as the window reaches."""

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
from tensors import every_call, same_bits

everywhere = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in ("float16", "bfloat16", "float32", "float64")),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float32")),
    ],
)
MASKS: list[dict[str, Any]] = [
    {},
    {"diagonal": 0},
    {"diagonal": -30},
    {"diagonal": 1000},
    {"window": (20, 10)},
    {"window": (-1, 5)},
    {"window": (5, -1), "diagonal": 40},
    {"window": (0, 0)},
    {"seqlens_q": (90, 33), "seqlens_k": (64, 140)},
    {"seqlens_k": (3, 0), "window": (50, 50)},
]


@everywhere
@pytest.mark.parametrize("prefix", [1, 40, 64, 139, 10**12, (100, 0), (7, 2**31 - 1)], ids=str)
def test_forward_and_gradients(
    rng: np.random.Generator, where: str, dtype: str, prefix: Any
) -> None:
    """A prefix that the window does not cut, that a causal mask hides, or that the backward does not have."""
    p = oracle_backward.make_problem(
        rng, dtype, batch=2, seqlen_q=90, seqlen_k=140, heads=4, kv_heads=2, d=32, causal=True, with_dlse=True
    )  # fmt: skip
    for mask in MASKS:
        variants.check(rng, dataclasses.replace(p, prefix=prefix, **mask), where)


def test_every_small_prefix(rng: np.random.Generator) -> None:
    """Every prefix with every window up to 3 at sizes up to 4, one element at a time."""
    for sq, sk in itertools.product(range(1, 5), range(1, 5)):
        p = oracle.make_problem(rng, "float64", batch=1, seqlen_q=sq, seqlen_k=sk, heads=1, d=4)
        bounds = range(-1, 4)
        for left, right, prefix, diagonal in itertools.product(bounds, bounds, range(6), (None, 1, -2)):  # fmt: skip
            mask: dict[str, Any] = {"causal": True, "window": (left, right), "prefix": prefix}
            at = dataclasses.replace(p, diagonal=diagonal, **mask)
            where = "end" if diagonal is None else diagonal
            found = fc.flash_attention(p.q, p.k, p.v, diagonal=where, return_lse=True, **mask)
            oracle.assert_accurate(at, *found)


@needs_torch
def test_no_prefix(device: str) -> None:
    """0 is as none, all keys as no causal mask; one number as an array of it."""
    q, k, v = (torch.randn(2, n, 2, 64, device=device).bfloat16() for n in (90, 130, 130))

    def at(prefix: Any, **more: Any) -> torch.Tensor:
        return fc.flash_attention(q, k, v, True, prefix=prefix, **more)

    def each(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    causal, full = fc.flash_attention(q, k, v, True), fc.flash_attention(q, k, v)
    torch.testing.assert_close(at(0), causal)
    torch.testing.assert_close(at(130), full)
    assert (at(130) != causal).any()
    assert same_bits(at(50), at(each(50, 50)))
    assert same_bits(at(0), at(each(-7, 0)))
    assert same_bits(at(130), at(each(2**31 - 1, 130)))
    assert same_bits(at(np.int64(50)), at(50))
    mixed = at(each(0, 50))
    assert same_bits(mixed[:1], at(0)[:1])
    assert same_bits(mixed[1:], at(50)[1:])
    # The bound on the right of a causal window means something now.
    assert (at(60, window=(40, 0)) != at(60, window=(40, 9))).any()
    cut = fc.flash_attention(q, k, v, True, window=(40, 0))
    torch.testing.assert_close(at(60, window=(40, 0)), cut)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("prefix", [40, (100, 3)], ids=str)
def test_reference(rng: np.random.Generator, prefix: Any, mask: Any) -> None:
    """The plain array code means the same."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=2, seqlen_q=90, seqlen_k=140, heads=2, kv_heads=1, d=4, causal=True
    )
    p = dataclasses.replace(p, prefix=prefix, **mask)
    q, k, v, dout = (variants.poisoned(p)[n] for n in ("q", "k", "v", "dout"))
    options = {
        n: np.int32(x) if n in ("seqlens_q", "seqlens_k") else x
        for n, x in {"causal": True, "diagonal": "end", **mask}.items()
    }
    options["prefix"] = prefix if isinstance(prefix, int) else np.int32(prefix)
    oracle.assert_accurate(p.forward, *reference.naive(q, k, v, return_lse=True, **options))
    blocks: dict[str, Any] = {"block_m": 16, "block_n": 32, "return_lse": True}
    oracle.assert_accurate(p.forward, *reference.chunked(q, k, v, **options, **blocks))
    oracle_backward.assert_accurate(p, reference.naive_gradients(dout, q, k, v, **options))


@pytest.mark.parametrize("call", list(every_call(None)))
def test_prefix_of_no_causal_mask(call: str) -> None:
    """Without the causal mask a prefix says nothing, and would be ignored."""
    q = np.ones((1, 4, 2, 8), np.float32)
    for prefix in (3, 0, np.ones(1, np.int32)):
        with pytest.raises(fc.ArgumentError, match=r"^prefix: expected causal=True with it, got"):
            every_call(q)[call](prefix=prefix, window=(3, 3))
        every_call(q)[call](prefix=prefix, causal=True)


@pytest.mark.parametrize("call", list(every_call(None)))
@pytest.mark.parametrize("wrong", [-1, 1.5, "3", True, 2**63, [3], (1, 2)], ids=repr)
def test_no_number(call: str, wrong: Any) -> None:
    """By name."""
    q = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(fc.ArgumentError, match=r"^prefix: expected an integer >= 0 of 64 bits, or"):
        every_call(q)[call](prefix=wrong, causal=True)


@needs_torch
@pytest.mark.parametrize("prefix", [3, (0, 4)], ids=str)
def test_gradcheck(prefix: Any) -> None:
    """The gradients are those of the function that was computed."""
    inputs = [torch.randn(2, n, 2, 4).double().requires_grad_() for n in (5, 6, 6)]
    given = prefix if isinstance(prefix, int) else torch.tensor(prefix, dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *x: fc.flash_attention(*x, True, prefix=given, window=(2, 1), return_lse=True),
        inputs,
    )
