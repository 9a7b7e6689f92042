"""Sinks in every call: for each query head one more logit, neither scaled nor masked, whose value is 0."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
import variants
from flashcute import reference
from optional_torch import needs_torch, torch
from tensors import every_call, require_refused, same_bits_under_any_mask

INF, NAN = math.inf, math.nan
everywhere = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in ("float16", "bfloat16", "float32", "float64")),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float32")),
    ],
)
SINKS = [(0.0, 0.5, -1.0, 3.0), (100.0, -100.0, 40.0, -40.0)]
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "diagonal": -40},
    {"causal": True, "diagonal": -1000},  # every row is empty
    {"window": (20, 10), "diagonal": 100},
    {"causal": True, "prefix": 9, "window": (30, 3)},
    {"seqlens_k": (0, 0)},
    {"seqlens_q": (70, 3), "seqlens_k": (0, 90), "causal": True},
]


def problem(rng: np.random.Generator, dtype: str, **more: Any) -> oracle_backward.BackwardProblem:
    p = oracle_backward.make_problem(
        rng, dtype, batch=2, seqlen_q=90, seqlen_k=140, heads=4, kv_heads=2, d=32, with_dlse=True
    )
    return dataclasses.replace(p, **more)


@everywhere
@pytest.mark.parametrize("sink", SINKS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_forward_and_gradients(
    rng: np.random.Generator, where: str, dtype: str, sink: Any, mask: Any
) -> None:
    """A sink 100 above or below all scores overflows; rows without a key become NaN; the gradient of the sink is lost,
    or misses the rows without keys."""
    variants.check(rng, problem(rng, dtype, sink=np.array(sink), **mask), where)


@everywhere
def test_configurations(rng: np.random.Generator, where: str, dtype: str) -> None:
    """`forward` and `backward`, with gradients that are written to given memory."""
    p = problem(rng, dtype, sink=np.array(SINKS[0]), causal=True)
    arch = "cpu" if where == "cpu" else fc._core.driver_info().gpus[0].arch
    q, k, v, dout = (
        variants.strided(rng, getattr(p, n), dtype, where, 8) for n in ("q", "k", "v", "dout")
    )
    sink = torch.tensor(p.sink, device=where).to(q.dtype)
    variant = fc.Variant(causal=True, sink=sink)
    cfg = fc.default_config(32, dtype, arch)
    out, lse = fc.forward(cfg, q, k, v, variant=variant, return_lse=True)
    oracle.assert_accurate(p.forward, out, lse, tiny=True)
    dlse = torch.tensor(p.dlse, device=where).to(lse.dtype)
    backward = same_bits_under_any_mask(32, dtype, arch)
    tensors = (dout, q, k, v, out, lse)
    found = fc.backward(backward, *tensors, dlse=dlse, variant=variant)
    assert len(found) == 4
    assert (found[3].dtype, found[3].shape) == (sink.dtype, sink.shape)
    wide = dataclasses.replace(p, dtype=dtype)
    narrow = (*found[:3], found[3].double())
    if dtype in ("float32", "float64"):
        oracle_backward.assert_accurate(wide, narrow)
    dsink = torch.full_like(sink, NAN)
    again = fc.backward(backward, *tensors, dlse=dlse, variant=variant, dsink=dsink)
    assert again[3] is dsink
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_sink_of_float32_or_of_qs_dtype(device: str, dtype: str) -> None:
    """Both are the same numbers, and the gradient has the sink's dtype."""
    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(2, n, 4, 64, device=device).to(kind) for n in (40, 60, 60))
    narrow = torch.tensor(SINKS[0], device=device, dtype=kind).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    outs = [fc.flash_attention(q, k, v, True, sink=sink) for sink in (narrow, wide)]
    assert torch.equal(*outs)
    dnarrow, dwide = (
        torch.autograd.grad(out.float().sum(), sink)[0] for out, sink in zip(outs, (narrow, wide), strict=True)
    )  # fmt: skip
    assert (dnarrow.dtype, dwide.dtype) == (kind, torch.float32)
    torch.testing.assert_close(dnarrow.float(), dwide, rtol=0.02, atol=0.01)


@needs_torch
def test_infinite_and_nan(device: str) -> None:
    """+inf takes all of the weight, -inf none; NaN stays in its head."""
    q, k, v = (torch.randn(2, n, 4, 64, device=device) for n in (40, 60, 60))
    plain, plain_lse = fc.flash_attention(q, k, v, True, return_lse=True)
    sink = torch.tensor([INF, -INF, NAN, 0.5], device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
    out, lse = fc.flash_attention(*leaves[:3], True, sink=leaves[3], return_lse=True)
    assert not out[:, :, 0].any()
    assert (lse[:, 0] == INF).all()
    torch.testing.assert_close(out[:, :, 1], plain[:, :, 1])
    torch.testing.assert_close(lse[:, 1], plain_lse[:, 1])
    assert out[:, :, 2].isnan().all()
    assert lse[:, 2].isnan().all()
    assert out[:, :, 3].isfinite().all()
    expected = torch.logaddexp(plain_lse[:, 3], torch.tensor(0.5, device=device))
    torch.testing.assert_close(lse[:, 3], expected)
    dq, dk, dv, dsink = torch.autograd.grad(out.square().sum(), leaves)
    assert dsink[1] == 0
    assert dsink[3].isfinite()
    for gradient in (dq, dk, dv):
        assert gradient[:, :, [1, 3]].isfinite().all()
    (of_plain,) = torch.autograd.grad(
        fc.flash_attention(leaves[0], k, v, True).square().sum(), leaves[0]
    )
    torch.testing.assert_close(dq[:, :, 1], of_plain[:, :, 1])


@needs_torch
def test_rows_without_a_key(device: str) -> None:
    """Output 0 and LSE sink, whose gradient is that of the LSE; but -inf for a row that does not exist, and for a sink
    of -inf."""
    q, k, v = (torch.randn(2, n, 2, 64, device=device) for n in (9, 70, 70))
    sink = torch.tensor([1.5, -INF], device=device, requires_grad=True)
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=device)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    k.fill_(NAN)
    out, lse = fc.flash_attention(
        q, k, v, sink=sink, seqlens_q=lengths, seqlens_k=none, return_lse=True
    )
    assert not out.any()
    assert (lse[0, 0] == 1.5).all()
    assert (lse[1, 0, :4] == 1.5).all()
    assert (lse[1, 0, 4:] == -INF).all()
    assert (lse[:, 1] == -INF).all()
    dlse = torch.randn_like(lse)
    (dsink,) = torch.autograd.grad((out, lse), sink, (torch.randn_like(out), dlse))
    torch.testing.assert_close(dsink[0], dlse[0, 0].sum() + dlse[1, 0, :4].sum())
    assert dsink[1] == 0


@needs_torch
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_key_of_value_0(kv_heads: int) -> None:
    """The sink is one more key that all queries see, whose score is given: so are all gradients."""
    sq, sk, heads, d = 7, 9, 4, 8

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).double().requires_grad_()

    q, k, v, sink = random(2, sq, heads, d), *(random(2, sk, kv_heads, d) for _ in "kv"), random(4)
    found = fc.flash_attention(q, k, v, True, sink=sink, return_lse=True)
    wide_k, wide_v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, wide_k) * d**-0.5
    hidden = ~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    scores = scores.masked_fill(hidden, -INF)
    scores = torch.cat([scores, sink[None, :, None, None].expand(2, heads, sq, 1)], 3)
    values = torch.cat([wide_v, wide_v.new_zeros(2, 1, heads, d)], 1)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(3), values)
    expected = out, scores.logsumexp(3)
    gradients = [torch.randn_like(x) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    inputs = q, k, v, sink
    for a, b in zip(
        torch.autograd.grad(found, inputs, gradients),
        torch.autograd.grad(expected, inputs, gradients),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@needs_torch
@pytest.mark.parametrize(
    "mask",
    [{}, {"causal": True}, {"window": (1, 1)}, {"causal": True, "diagonal": -3}, {"causal": True, "prefix": 3}],
    ids=str,
)  # fmt: skip
def test_gradcheck(mask: Any) -> None:
    """The gradients are those of the function that was computed, also of each input alone."""
    inputs = [torch.randn(2, n, 2, 4).double() for n in (5, 6, 6)] + [torch.randn(2).double()]
    lengths = torch.tensor([5, 3], dtype=torch.int32)

    def attend(*x: torch.Tensor) -> Any:
        return fc.flash_attention(*x[:3], sink=x[3], seqlens_q=lengths, **mask)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in inputs])
    for alone in range(4):
        leaves = [x.detach().requires_grad_(n == alone) for n, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sink", SINKS, ids=str)
def test_reference(rng: np.random.Generator, sink: Any, mask: Any) -> None:
    """The plain array code means the same."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=2, seqlen_q=90, seqlen_k=140, heads=4, kv_heads=2, d=4, with_dlse=True
    )
    p = dataclasses.replace(p, sink=np.array(sink), **mask)
    q, k, v, dout = (variants.poisoned(p)[n] for n in ("q", "k", "v", "dout"))
    options = {
        n: np.int32(x) if n in ("seqlens_q", "seqlens_k") else x
        for n, x in {"diagonal": "end", "sink": p.sink, **mask}.items()
    }
    oracle.assert_accurate(p.forward, *reference.naive(q, k, v, return_lse=True, **options))
    blocks: dict[str, Any] = {"block_m": 16, "block_n": 32, "return_lse": True}
    oracle.assert_accurate(p.forward, *reference.chunked(q, k, v, **options, **blocks))
    oracle_backward.assert_accurate(
        p, reference.naive_gradients(dout, q, k, v, dlse=p.dlse, **options)
    )


@pytest.mark.parametrize("of", ["naive", "chunked"])
def test_reference_of_infinite_sinks(of: str) -> None:
    """As the kernels: +inf takes all of the weight, -inf none; NaN stays in its head."""
    q, k, v = (np.random.default_rng(0).standard_normal((1, n, 3, 4)) for n in (5, 6, 6))
    attend = getattr(reference, of)
    sink = np.array([INF, -INF, NAN])
    out, lse = attend(q, k, v, sink=sink, return_lse=True)
    plain, plain_lse = attend(q, k, v, return_lse=True)
    assert not out[:, :, 0].any()
    assert (lse[:, 0] == INF).all()
    np.testing.assert_allclose(out[:, :, 1], plain[:, :, 1])
    np.testing.assert_allclose(lse[:, 1], plain_lse[:, 1])
    assert np.isnan(out[:, :, 2]).all()
    assert np.isnan(lse[:, 2]).all()
    with np.errstate(invalid="ignore"):  # of +inf the gradient is not defined
        *_, dsink = reference.naive_gradients(np.ones_like(out), q, k, v, sink=sink)
    assert dsink[1] == 0


@pytest.mark.parametrize("call", list(every_call(None)))
def test_sinks_reach_every_call(call: str) -> None:
    """Refused by name where they do not fit, and else taken."""
    q = np.ones((1, 4, 2, 8), np.float32)
    says = r"sink: expected .*\(heads,\) = "
    require_refused(call, every_call(q)[call], {"sink": np.ones(3, np.float32)}, says)
    every_call(q)[call](sink=np.ones(2, np.float32))


@needs_torch
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nan_gradient_of_a_row_without_a_key(device: str) -> None:
    """0 * NaN: the output of a row that sees no key is 0 whatever the sink is, so its gradient does not reach it."""
    lengths = torch.tensor([0, 7], dtype=torch.int32, device=device)
    q, k, v, dout = (torch.randn(2, n, 2, 16, device=device) for n in (5, 7, 7, 5))
    sink = torch.randn(2, device=device)
    grads = []
    for poison in (0.0, NAN):
        dout[0, 2] = poison
        leaf = sink.clone().requires_grad_()
        out, lse = fc.flash_attention(q, k, v, seqlens_k=lengths, sink=leaf, return_lse=True)
        torch.autograd.backward([out, lse], [dout, torch.ones_like(lse)])
        grads.append(leaf.grad)
    assert torch.isfinite(grads[0]).all()
    assert torch.equal(grads[0], grads[1])
