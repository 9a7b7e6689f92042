"""The causal mask at any diagonal, in every call: key j is visible to query i iff j <= i + diagonal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
from block_counts import expected_block_counts
from conftest import backward_configurations_of_first_use
from flashcute import reference
from optional_torch import needs_torch, torch
from tensors import every_call

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())
DTYPES = ["float16", "bfloat16", "float32", "float64"]
LENGTHS = [(70, 70), (50, 131), (131, 50), (1, 40), (40, 1)]
SMALLEST, LARGEST = -(2**63), 2**63 - 1
everywhere = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in DTYPES),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in DTYPES[:3]),
    ],
)
lengths = pytest.mark.parametrize(("sq", "sk"), LENGTHS)


def diagonals(sq: int, sk: int) -> list[int]:
    """Before and after every corner of the matrix of scores, and where numbers end."""
    corners = {0, sk - sq, -sq, sk, -sq // 2, sk // 2}
    return sorted({c + step for c in corners for step in (-1, 0, 1)} | {SMALLEST, LARGEST})


def tensors(p: Any, where: str, *names: str) -> list[torch.Tensor]:
    dtype = getattr(torch, p.dtype)
    return [torch.tensor(getattr(p, name), dtype=dtype, device=where) for name in names]


def arch_of(where: str) -> str | int:
    return "cpu" if where == "cpu" else fc._core.driver_info().gpus[0].arch


@everywhere
@lengths
def test_forward(rng: np.random.Generator, where: str, dtype: str, sq: int, sk: int) -> None:
    """Against the definition in fp64, for rows that see no key, some, and all."""
    p = oracle.make_problem(
        rng, dtype, batch=1, seqlen_q=sq, seqlen_k=sk, kv_heads=2, d=16, causal=True
    )
    q, k, v = tensors(p, where, "q", "k", "v")
    for diagonal in diagonals(sq, sk):
        at = dataclasses.replace(p, diagonal=diagonal)
        found = fc.flash_attention(q, k, v, True, diagonal=diagonal, return_lse=True)
        # One row that sees few keys has so few elements that the naive error may be 0.
        oracle.assert_accurate(at, *found, tiny=True)
        cfg = fc.default_config(16, dtype, arch_of(where))
        variant = fc.Variant(causal=True, diagonal=diagonal)
        again = fc.forward(cfg, q, k, v, variant=variant, return_lse=True)
        oracle.assert_accurate(at, *again, tiny=True)


@everywhere
@lengths
def test_gradients(rng: np.random.Generator, where: str, dtype: str, sq: int, sk: int) -> None:
    """A diagonal that the forward has and the backward does not, by autograd and by `backward`."""
    p = oracle_backward.make_problem(
        rng, dtype, batch=1, seqlen_q=sq, seqlen_k=sk, kv_heads=2, d=16, causal=True, with_dlse=True
    )
    q, k, v, dout = tensors(p, where, "q", "k", "v", "dout")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for diagonal in diagonals(sq, sk):
        at = dataclasses.replace(p, diagonal=diagonal)
        options: dict[str, Any] = {"causal": True, "diagonal": diagonal}
        out, lse = fc.flash_attention(q, k, v, return_lse=True, **options)
        dlse = torch.tensor(p.dlse, dtype=lse.dtype, device=where)
        found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        oracle_backward.assert_accurate(at, found)
        cfg = fc.default_backward_config(16, dtype, arch_of(where), deterministic=True)
        inputs = (x.detach() for x in (dout, q, k, v, out, lse))
        again = fc.backward(cfg, *inputs, dlse=dlse, variant=fc.Variant(**options))
        for a, b in zip(again, found, strict=True):
            assert torch.equal(a, b)


@lengths
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_names_are_numbers(device: str, kind: str, sq: int, sk: int) -> None:
    """'start' and 'end', and all that lies beyond the ends, to the bit."""
    q, k, v = (
        torch.randn(1, n, 2, 16, device=device).to(getattr(torch, kind)) for n in (sq, sk, sk)
    )

    def at(diagonal: Any) -> torch.Tensor:
        return fc.flash_attention(q, k, v, True, diagonal=diagonal)

    same: list[tuple[Any, ...]] = [
        ("end", sk - sq, np.int64(sk - sq)),
        ("start", 0, np.int32(0), torch.tensor(0)),
        (sk, sk + 1, LARGEST, sk - 1),
        (-sq, -sq - 1, SMALLEST),
    ]
    for first, *others in same:
        for other in others:
            assert torch.equal(at(first), at(other)), (first, other)
    assert torch.equal(fc.flash_attention(q, k, v, True), at("end"))
    assert not at(-sq).any()


@lengths
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_arrays_of_numpy(rng: np.random.Generator, sq: int, sk: int, layout: str) -> None:
    """Without torch, and where rows are another dimension than heads."""
    p = oracle.make_problem(rng, "float64", seqlen_q=sq, seqlen_k=sk, d=8, causal=True)
    arrays = [x.swapaxes(1, 2) if layout == "bhsd" else x for x in (p.q, p.k, p.v)]
    for diagonal in (-3, 0, 2):
        out = fc.flash_attention(*arrays, True, diagonal=diagonal, layout=layout)
        out = out.swapaxes(1, 2) if layout == "bhsd" else out
        oracle.assert_accurate(dataclasses.replace(p, diagonal=diagonal), out, None)


@lengths
def test_reference(rng: np.random.Generator, sq: int, sk: int) -> None:
    """The plain array code means the same."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=1, seqlen_q=sq, seqlen_k=sk, heads=2, d=8, causal=True, with_dlse=True
    )
    for diagonal in diagonals(sq, sk):
        at = oracle.Problem(p.q, p.k, p.v, p.dtype, True, None, diagonal)
        options: dict[str, Any] = {"diagonal": diagonal, "return_lse": True}
        oracle.assert_accurate(at, *reference.naive(p.q, p.k, p.v, True, **options))
        blocks = {"block_m": 16, "block_n": 32}
        oracle.assert_accurate(at, *reference.chunked(p.q, p.k, p.v, True, **options, **blocks))
        oracle_backward.assert_accurate(
            dataclasses.replace(p, diagonal=diagonal),
            reference.naive_gradients(p.dout, p.q, p.k, p.v, True, diagonal=diagonal, dlse=p.dlse),
        )


@lengths
def test_count_blocks(device: str, sq: int, sk: int) -> None:
    """Blocks beyond the diagonal are skipped, not computed and masked."""
    q, k, v = (torch.ones(1, n, 1, 64, dtype=torch.float16, device=device) for n in (sq, sk, sk))
    cfg = fc.default_config(64, "float16", arch_of(device)).replace(block_n=16)
    if device == "cuda":
        cfg = fc.default_config(64, "float16", "sm_80")
    for diagonal in (-1000, -20, 0, 33, 1000):
        found = fc.count_blocks(cfg, q, k, v, variant=fc.Variant(causal=True, diagonal=diagonal))
        expected = expected_block_counts(cfg, sq, sk, True, diagonal)
        assert torch.equal(found.cpu()[0, 0], expected)


# ---- errors --------------------------------------------------------------------------------------


NAMES = list(every_call(None))


@pytest.mark.parametrize("call", NAMES)
@pytest.mark.parametrize(
    "wrong", ["", "END", None, True, np.bool_(True), 1.0, 2**63, -(2**63) - 1, np.zeros(2, int), [0]],
    ids=repr,
)  # fmt: skip
def test_no_diagonal(call: str, wrong: Any) -> None:
    """Refused by name; True is no 1, and a number that 64 bits cannot hold is not cut off."""
    q = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(
        fc.ArgumentError, match=r"^diagonal: expected 'end', 'start' or an integer of 64 bits, got"
    ):
        every_call(q)[call](causal=True, diagonal=wrong)


@pytest.mark.parametrize("call", NAMES)
@pytest.mark.parametrize("diagonal", ["start", 0, 7])
def test_diagonal_of_no_mask(call: str, diagonal: Any) -> None:
    """Accepted and ignored, it would let a caller who forgot causal=True believe in a mask."""
    q = np.ones((1, 4, 2, 8), np.float32)
    with pytest.raises(fc.ArgumentError, match=r"^diagonal: expected 'end' without causal=True"):
        every_call(q)[call](diagonal=diagonal)
    every_call(q)[call](diagonal="end")


# What libraries have for True.
TRUTHS: dict[str, Callable[[], object]] = {
    "Python": lambda: True,
    "NumPy": lambda: np.bool_(True),
    "an array": lambda: np.array(True),
    "torch": lambda: torch.tensor(True),
    "a tensor": lambda: torch.tensor([True]),
}


@pytest.mark.parametrize("whose", TRUTHS)
def test_a_boolean_is_no_number(whose: str) -> None:
    """Python takes booleans of some libraries for 0 or 1 where it asks for a number."""
    q, true = np.ones((1, 4, 2, 8), np.float32), TRUTHS[whose]()
    got = re.escape(f"got {true!r}")
    for name, call in every_call(q).items():
        with pytest.raises(fc.ArgumentError, match=rf"^diagonal: expected 'end', .*{got}"):
            call(causal=True, diagonal=true)
        if name in ("flash_attention", "forward", "backward", "explain"):
            with pytest.raises(
                fc.ArgumentError, match=rf"^scale: expected a number or None, {got}"
            ):
                call(scale=true)
    with pytest.raises(fc.ArgumentError, match=r"^window: expected \(left, right\), two integers"):
        fc.flash_attention(q, q, q, window=(true, 1))
    with pytest.raises(fc.ArgumentError, match=rf"^head_dim: expected an integer, {got}"):
        fc.default_config(true)
    with pytest.raises(fc.ArgumentError, match=rf"^block_m: expected an integer, {got}"):
        fc.ForwardConfig(block_m=true)


# ---- torch ---------------------------------------------------------------------------------------


def qkv(sq: int = 9, sk: int = 14, **kind: Any) -> list[torch.Tensor]:
    kind = {"dtype": torch.float64, **kind}
    return [torch.randn(2, n, h, 8, **kind) for n, h in ((sq, 4), (sk, 2), (sk, 2))]


def definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """In plain operations, which torch differentiates; rows that see nothing are 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen, -torch.inf).masked_fill(empty, 0.0).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p.masked_fill(empty, 0.0), v)


@pytest.fixture
def compiled() -> Callable[..., Any]:
    torch._dynamo.reset()
    return lambda f, **o: torch.compile(f, fullgraph=True, backend="aot_eager", **o)


@needs_torch
@pytest.mark.parametrize("diagonal", ["start", "end", -4, 3, 1000, -1000])
def test_gradcheck(diagonal: Any) -> None:
    """The gradients are those of the function that was computed."""
    inputs = [x.requires_grad_() for x in qkv(3, 4)]
    assert torch.autograd.gradcheck(
        lambda *x: fc.flash_attention(*x, True, diagonal=diagonal, return_lse=True)
        if diagonal in ("start", "end", 3)  # an LSE of -inf has no difference quotient
        else fc.flash_attention(*x, True, diagonal=diagonal),
        inputs,
    )


@needs_torch
@pytest.mark.parametrize("grad", [False, True])
def test_compile(compiled: Callable[..., Any], grad: bool) -> None:
    """A diagonal that the operator's arguments drop, and one compilation for all numbers."""
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    def attend(*x: torch.Tensor, diagonal: Any) -> torch.Tensor:
        return fc.flash_attention(*x, True, diagonal=diagonal)

    inputs = [x.requires_grad_(grad) for x in qkv()]
    traced = torch.compile(attend, fullgraph=True, backend=backend)
    real = compiled(attend)
    for diagonal in (3, -2, 7, 8, -40, 40):
        expected = attend(*inputs, diagonal=diagonal)
        assert torch.equal(traced(*inputs, diagonal=diagonal), expected)
        found = real(*inputs, diagonal=diagonal)
        assert torch.equal(found, expected)
        if grad:
            for a, b in zip(
                torch.autograd.grad(found.square().sum(), inputs),
                torch.autograd.grad(expected.square().sum(), inputs),
                strict=True,
            ):
                assert torch.equal(a, b)
    assert len(seen) == 2  # for the first number, then for all
    for name in ("start", "end"):
        assert torch.equal(real(*inputs, diagonal=name), attend(*inputs, diagonal=name))


@needs_torch
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """For any length, with a diagonal that depends on it: 'start', and a number that is computed of the lengths."""

    class Attention(torch.nn.Module):
        def __init__(self, diagonal: Any) -> None:
            super().__init__()
            self.diagonal = diagonal

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            diagonal = self.diagonal(q, k) if callable(self.diagonal) else self.diagonal
            return fc.flash_attention(q, k, v, causal=True, diagonal=diagonal)

    rows, keys = torch.export.Dim("rows", min=2), torch.export.Dim("keys", min=2)
    shapes = {"q": {1: rows}, "k": {1: keys}, "v": {1: keys}}
    for diagonal in ("start", -3, lambda q, k: k.shape[1] - q.shape[1] - 2):
        module = Attention(diagonal)
        program = torch.export.export(module, tuple(qkv()), dynamic_shapes=shapes, strict=strict)
        for other in (qkv(9, 14), qkv(30, 31), qkv(31, 12)):
            assert torch.equal(program.module()(*other), module(*other))


@needs_torch
def test_saved_programs_of_the_former_operators() -> None:
    """Programs that were saved before the operators had a diagonal call them without: they load, and mean the end."""
    q, k, v = (x.requires_grad_() for x in qkv())
    forward, backward = (
        getattr(torch.ops.flashcute, f"flash_attention_{name}").default
        for name in ("forward", "backward")
    )
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    call = graph.call_function(forward, (*inputs, True, None, "bshd", False))
    graph.output(graph.call_function(lambda pair: pair[0], (call,)))
    program = torch.fx.GraphModule(torch.nn.Module(), graph)
    out, expected = program(q, k, v), fc.flash_attention(q, k, v, True)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        out, lse = forward(q, k, v, True, None, "bshd", False)
        for a, b in zip(
            backward(dout, q, k, v, out, lse, None, True, None, "bshd"), found, strict=True
        ):
            assert torch.equal(a, b)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        assert forward(*fake, True, None, "bshd", False)[0].shape == out.shape


@needs_torch
def test_vmap() -> None:
    """The mapped dimension becomes part of the batch, whatever else the call says."""
    q, k, v = qkv()
    many = torch.stack([q, q + 1, q * 2])

    def attend(q: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(q, k, v, True, diagonal=-3)

    found = torch.func.vmap(attend)(many)
    for a, b in zip(found, many, strict=True):
        torch.testing.assert_close(a, attend(b))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fc.flash_attention(*leaves, True, diagonal=-3)
    batch = torch.randn(3, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(batch):
        for a, b in zip(
            found, torch.autograd.grad(out, leaves, dout, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a[i], b)


@needs_torch
def test_flops_do_not_depend_on_the_diagonal() -> None:
    """As those of torch's own attention do not depend on its mask."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(*options: Any, **more: Any) -> int:
        inputs = [x.requires_grad_() for x in qkv()]
        with FlopCounterMode(display=False) as counter:
            fc.flash_attention(*inputs, *options, **more).sum().backward()
        return int(counter.get_total_flops())

    whole = count()
    assert whole > 0
    for diagonal in ("start", "end", -1000, 3):
        assert count(True, diagonal=diagonal) == whole


@needs_torch
def test_autocast() -> None:
    """The cast inputs meet the same mask."""
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fc.flash_attention(q, k, v, True, diagonal="start")
    narrow = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(found, fc.flash_attention(*narrow, True, diagonal=0))


@needs_torch
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("window", [None, (3, 0), (2, 4), (0, -1)], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (9, 14), (14, 9), (9, 0), (0, 9)])
def test_torchs_own_attention(
    sq: int, sk: int, window: tuple[int, int] | None, layout: str
) -> None:
    """torch knows the diagonal 0 alone, and a NaN in keys that no row sees is none of its business."""
    for diagonal in (-1000, -20, -3, 0, 2, 5, 1000, LARGEST, SMALLEST):
        check_torchs_own_attention(sq, sk, window, layout, diagonal)


@needs_torch
@pytest.mark.parametrize("window", [None, (2, 4)], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(9, 14), (14, 9)])
def test_torchs_own_attention_in_a_trace(
    compiled: Callable[..., Any], sq: int, sk: int, window: tuple[int, int] | None
) -> None:
    """What decides whether a mask is needed is a symbol there."""
    for diagonal in (0, -3, 2):
        check_torchs_own_attention(sq, sk, window, "bshd", diagonal, compiled)


def check_torchs_own_attention(
    sq: int,
    sk: int,
    window: tuple[int, int] | None,
    layout: str,
    diagonal: int,
    wrap: Callable[..., Any] = lambda f: f,
) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(sq, sk))
    left = window[0] if window else -1
    distance = torch.arange(sk)[None, :] - torch.arange(sq)[:, None]
    options: dict[str, Any] = {"window": window, "layout": layout, "on_unsupported": "silent"}
    options["dropout_p"] = 1e-30  # no kernel serves it, and it drops nothing

    def attend(*x: torch.Tensor, diagonal: int) -> torch.Tensor:
        swapped = [t.transpose(1, 2) if layout == "bhsd" else t for t in x]
        out = fc.flash_attention(*swapped, True, diagonal=diagonal, **options)
        return out.transpose(1, 2) if layout == "bhsd" else out

    attend = wrap(attend)
    apart = distance - max(-(2**40), min(diagonal, 2**40))
    seen = (apart <= 0) & ((apart >= -left) if left >= 0 else True)
    expected = definition(q, k, v, seen)
    found = attend(q, k, v, diagonal=diagonal)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    poisoned = [x.detach().clone() for x in (k, v)]
    for x in poisoned:
        x[:, ~seen.any(0)] = torch.nan
    torch.testing.assert_close(attend(q, *poisoned, diagonal=diagonal), found)


@needs_torch
def test_explain_of_torchs_own_attention() -> None:
    """torch's is_causal is the diagonal 0: it needs no mask there, unless keys are left over."""
    common: dict[str, Any] = {"dropout_p": 0.5, "on_unsupported": "silent"}
    for sq, sk, diagonal, masks in (
        (9, 9, "end", False), (9, 9, "start", False), (9, 9, 1, True), (14, 9, "start", False),
        (14, 9, "end", True), (9, 14, "start", True),
    ):  # fmt: skip
        told = fc.explain(*qkv(sq, sk), True, diagonal=diagonal, **common)
        assert told.backend == "torch"
        assert ("for masks" in told.notes[0]) == masks, (sq, sk, diagonal)


@needs_torch
@pytest.mark.parametrize(("sq", "sk"), [(4, 9), (9, 4), (1, 5)])
@pytest.mark.parametrize("traced", [False, True])
def test_causal_bias(compiled: Callable[..., Any], sq: int, sk: int, traced: bool) -> None:
    """torch's mask without elements, aligned to the first key, is a diagonal: no torch attention, and the LSE. With a
    causal mask of the call's own both hold."""
    from torch.nn.attention.bias import causal_upper_left

    q, k, v = qkv(sq, sk)
    mask = causal_upper_left(sq, sk)
    wrap = compiled if traced else lambda f: f

    def attend(*x: torch.Tensor, **options: Any) -> Any:
        return fc.flash_attention(*x, return_lse=True, on_unsupported="error", **options)

    def with_bias(*x: torch.Tensor) -> Any:
        return attend(*x, attn_mask=mask)

    def with_both(*x: torch.Tensor) -> Any:
        return attend(*x, causal=True, diagonal=-2, attn_mask=mask)

    assert fc.explain(q, k, v, attn_mask=mask).backend == "cpu"
    for a, b in zip(
        wrap(with_bias)(q, k, v), attend(q, k, v, causal=True, diagonal=0), strict=True
    ):
        assert torch.equal(a, b)
    for a, b in zip(
        wrap(with_both)(q, k, v), attend(q, k, v, causal=True, diagonal=-2), strict=True
    ):
        assert torch.equal(a, b)
    # A window stays at the diagonal of the call.
    options: dict[str, Any] = {"window": (2, 0), "on_unsupported": "error"}
    seen = torch.ones(sq, sk, dtype=torch.bool).tril()
    torch.testing.assert_close(
        fc.flash_attention(q, k, v, attn_mask=mask, **options),
        fc.flash_attention(q, k, v, attn_mask=seen, **options),
    )
