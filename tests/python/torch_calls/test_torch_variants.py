"""Lengths, prefixes and sinks on the roads through torch: what is recorded, traced, mapped, saved, cast or left to
torch's own attention."""

from __future__ import annotations

from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute import reference
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from flashcute._torch import operators
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

NAMES = ["seqlens_q", "seqlens_k", "prefix", "sink"]


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def qkv(sq: int = 9, sk: int = 14, batch: int = 3) -> list[torch.Tensor]:
    return [
        torch.randn(batch, n, h, 8).double().requires_grad_()
        for n, h in ((sq, 4), (sk, 2), (sk, 2))
    ]


def arrays(batch: int = 3) -> dict[str, torch.Tensor]:
    return {
        "seqlens_q": int32(9, 4, 0, 7)[:batch],
        "seqlens_k": int32(14, 8, 5, 2)[:batch],
        "prefix": int32(0, 6, 2, 9)[:batch],
        "sink": torch.tensor([0.5, -1.0, 2.0, 0.0]).double().requires_grad_(),
    }


def attend(*x: torch.Tensor, **options: Any) -> Any:
    return fc.flash_attention(*x, True, window=(7, 2), on_unsupported="error", **options)


def equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(out.square().sum(), inputs)


# ---- recorded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", ["q", "k", "v", "sink"])
def test_one_input_alone_requires_grad(alone: str) -> None:
    """The log-sum-exp is saved only if q, k or v require gradients: that of the sink is lost."""
    given = arrays()
    inputs = {**dict(zip("qkv", qkv(), strict=True)), "sink": given.pop("sink")}
    out = attend(*(inputs[n] for n in "qkv"), sink=inputs["sink"], **given)
    expected = torch.autograd.grad(out.square().sum(), inputs[alone])
    leaves = {n: x.detach().requires_grad_(n == alone) for n, x in inputs.items()}
    out = attend(*(leaves[n] for n in "qkv"), sink=leaves["sink"], **given)
    out.square().sum().backward()
    equal([leaves[alone].grad], expected)
    assert all(x.grad is None for n, x in leaves.items() if n != alone)
    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    out = traced(*(leaves[n] for n in "qkv"), sink=leaves["sink"], **given)
    equal(torch.autograd.grad(out.square().sum(), leaves[alone]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_that_change_before_the_gradients(name: str) -> None:
    """Gradients of another function than was computed: autograd has to notice, as of q, k and v."""
    given = arrays()
    out = attend(*qkv(), **given)
    with torch.no_grad():
        given[name] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_arrays_live_until_the_gradients_are_computed() -> None:
    """Memory that is gone, of NumPy too."""
    inputs = qkv()
    expected = gradients(attend(*inputs, **arrays()), inputs)
    out = attend(*inputs, **arrays())  # which nobody else holds
    equal(gradients(out, inputs), expected)
    out = attend(*inputs, **{n: x.detach().numpy().copy() for n, x in arrays().items()})
    torch.empty(1000).fill_(7.0)
    equal(gradients(out, inputs), expected)


def test_arrays_of_numpy_beside_tensors() -> None:
    """Any array of DLPack is taken where a kernel reads it; an operator takes tensors only, and says so."""
    given = {n: x.detach().numpy() for n, x in arrays().items()}
    plain = [x.detach() for x in qkv()]
    equal([attend(*plain, **given)], [attend(*plain, **arrays())])
    for name, x in given.items():
        with pytest.raises(fc.ArgumentError, match=rf"^{name}: expected a torch tensor where"):
            torch.vmap(lambda q, n=name, a=x: attend(q, *plain[1:], **{n: a}))(plain[0][None])


def test_a_sink_that_requires_a_gradient_beside_numpy() -> None:
    """Recorded by nobody."""
    q, k, v = (x.detach().numpy() for x in qkv())
    sink = arrays()["sink"]
    with pytest.raises(
        fc.UnsupportedError, match=r"^sink: gradients \(requires_grad=True\) need q"
    ):
        fc.flash_attention(q, k, v, sink=sink)
    cfg = fc.default_config(8, "float64", "cpu")
    variant = fc.Variant(sink=sink)
    with pytest.raises(fc.ArgumentError, match=r"^sink: expected a tensor without requires_grad"):
        fc.forward(cfg, q, k, v, variant=variant)
    with torch.no_grad():
        fc.forward(cfg, q, k, v, variant=variant)


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_of_gradients_are_refused(alone: bool) -> None:
    """As a constant the sink's gradient would make a loss silently wrong."""
    given = arrays()
    inputs = [*(x.requires_grad_(not alone) for x in qkv()), given["sink"]]
    out = attend(*inputs[:3], **given)
    wanted = inputs[3:] if alone else inputs
    *_, dsink = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    with pytest.raises(fc.UnsupportedError, match="second derivative"):
        dsink.sum().backward()


def test_checkpoint() -> None:
    """What is computed again has the same arguments."""
    given = arrays()
    inputs = [*qkv(), given["sink"]]
    expected = gradients(attend(*inputs[:3], **given), inputs)
    out = checkpoint(lambda *x: attend(*x, **given), *inputs[:3], use_reentrant=False)
    equal(gradients(out, inputs), expected)


# ---- traced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [None, *NAMES])
def test_compile(left_out: str | None) -> None:
    """An argument that the operators drop, forward or backward; a graph break where a value is read; one compilation
    for all values."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    given = {n: x for n, x in arrays().items() if n != left_out}
    inputs = qkv()
    leaves = [*inputs, *([given["sink"]] if "sink" in given else [])]
    traced = torch.compile(attend, fullgraph=True, backend=backend)
    real = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for shift in (0, 1, 2):
        now = {n: x if n == "sink" else x + shift for n, x in given.items()}
        expected = attend(*inputs, **now)
        assert torch.equal(traced(*inputs, **now), expected)
        found = real(*inputs, **now)
        assert torch.equal(found, expected)
        equal(gradients(found, leaves), gradients(expected, leaves))
    assert len(graphs) == 1


def test_compile_with_a_number() -> None:
    """A prefix that is a number is a symbol, not a constant of each compilation."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    inputs = qkv()
    traced = torch.compile(attend, fullgraph=True, backend=backend)
    real = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for prefix in (3, 5, 8, 11):
        expected = attend(*inputs, prefix=prefix)
        assert torch.equal(traced(*inputs, prefix=prefix), expected)
        found = real(*inputs, prefix=prefix)
        equal(gradients(found, inputs), gradients(expected, inputs))
    assert len(graphs) == 2  # for the first number, then for all


def test_export() -> None:
    """For any lengths and any batch, also where a prefix is computed of a length."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sink = torch.nn.Parameter(torch.randn(4).double())

        def forward(self, q: Any, k: Any, v: Any, queries: Any, keys: Any) -> Any:
            return fc.flash_attention(
                q, k, v, True, seqlens_q=queries, seqlens_k=keys, prefix=k.shape[1] // 2, sink=self.sink
            )  # fmt: skip

    batch, rows, keys = (torch.export.Dim(name, min=2) for name in ("batch", "rows", "keys"))
    shapes = {
        "q": {0: batch, 1: rows}, "k": {0: batch, 1: keys}, "v": {0: batch, 1: keys},
        "queries": {0: batch}, "keys": {0: batch},
    }  # fmt: skip
    module = Attention()

    def inputs(*sizes: int) -> tuple[torch.Tensor, ...]:
        given = arrays(sizes[-1])
        return (*(x.detach() for x in qkv(*sizes)), given["seqlens_q"], given["seqlens_k"])

    program = torch.export.export(module, inputs(9, 14, 3), dynamic_shapes=shapes)
    for sizes in ((9, 14, 3), (30, 31, 2), (31, 12, 4)):
        given = inputs(*sizes)
        assert torch.equal(program.module()(*given), module(*given))


@pytest.mark.parametrize("left_out", [None, *NAMES])
def test_opcheck(left_out: str | None) -> None:
    """Fakes whose shapes, dtypes or strides differ from the real ones; a wrong schema."""
    given = {n: x for n, x in arrays().items() if n != left_out}
    tensors = qkv()
    some = [given.get("seqlens_q"), given.get("seqlens_k"), None, given.get("prefix")]
    sink = given.get("sink")
    common = (True, None, "bshd")
    appended = (1, None, 7, 2, *some)
    torch.library.opcheck(operators.forward_operator, (*tensors, *common, False, *appended, sink))
    q, k, v = (x.detach() for x in tensors)
    sink = None if sink is None else sink.detach()
    out, lse = operators.forward_operator(q, k, v, *common, False, *appended, sink)
    for dlse in (None, torch.randn_like(lse)):
        saved = (torch.randn_like(out), q, k, v, out, lse, dlse)
        if sink is None:
            torch.library.opcheck(operators.backward_operator, (*saved, *common, *appended))
        else:
            torch.library.opcheck(
                operators.backward_with_sink_operator, (*saved, sink, *common, *appended)
            )


def test_fake_tensors_and_flops() -> None:
    """Shapes without memory; FLOPs of both backward operators, as without the arguments."""
    with torch._subclasses.FakeTensorMode():
        assert attend(*qkv(), **arrays()).shape == (3, 9, 4, 8)

    def count(**options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            fc.flash_attention(*qkv(), True, **options).sum().backward()
        return int(counter.get_total_flops())

    assert count(**arrays()) == count() > 0


# ---- mapped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [*NAMES, "all", "q alone"])
def test_vmap(mapped: str) -> None:
    """Lengths of another entry's batch, a sink that all entries share though each has its own, and gradients of it that
    are summed over the wrong ones."""
    given = arrays()
    names = [] if mapped == "q alone" else NAMES if mapped == "all" else [mapped]
    many = {n: torch.stack([x, x + 1, x - 1]) for n, x in given.items() if n in names}
    many = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in many.items()}
    q, k, v = qkv()
    queries = torch.stack([q, 2 * q, q + 1]).detach().requires_grad_()
    shared = {n: x for n, x in given.items() if n not in names}
    found = torch.vmap(lambda q, own: attend(q, k, v, **shared, **own))(queries, many)
    entries = [{n: x[i] for n, x in many.items()} for i in range(3)]
    expected = torch.stack(
        [attend(x, k, v, **shared, **own) for x, own in zip(queries, entries, strict=True)]
    )
    torch.testing.assert_close(found, expected)
    inputs = [queries, k, v, many["sink"] if "sink" in names else given["sink"]]
    close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("of_numbers", [False, True])
def test_vmap_over_a_batch_of_none(of_numbers: bool) -> None:
    """Where only lengths are mapped, q, k and v are repeated; where the mapped dimension is not the first."""
    q, k, v = (x.detach() for x in qkv())
    many = torch.stack([int32(9, 4, 0), int32(1, 2, 3)], 1)
    prefix: Any = 5 if of_numbers else int32(1, 2, 3)
    found = torch.vmap(
        lambda n: attend(q, k, v, seqlens_q=n, prefix=prefix, return_lse=True), in_dims=1
    )(many)
    for i in range(2):
        expected = attend(
            q, k, v, seqlens_q=many[:, i].contiguous(), prefix=prefix, return_lse=True
        )
        close([x[i] for x in found], expected)


@pytest.mark.parametrize("sink", [False, True])
def test_a_batch_of_gradients(sink: bool) -> None:
    """is_grads_batched: the sink has a gradient for each of the gradients that come in."""
    given = arrays()
    inputs = [*qkv(), given["sink"]]
    if not sink:
        del given["sink"], inputs[3]
    out = attend(*inputs[:3], **given)
    many = torch.randn(4, *out.shape).double()
    found = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        expected = torch.autograd.grad(out, inputs, many[i], retain_graph=True)
        close([x[i] for x in found], expected)


# ---- cast, and left to torch ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast(dtype: str) -> None:
    """A sink in a dtype that does not go with the one that q is cast to; its gradient comes back in its own."""
    q, k, v = (x.detach().float() for x in qkv())
    sink = arrays()["sink"].detach().float().to(getattr(torch, dtype)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fc.flash_attention(q, k, v, True, sink=sink)
    assert out.dtype == torch.bfloat16
    expected = fc.flash_attention(*(x.bfloat16() for x in (q, k, v)), True, sink=sink)
    assert torch.equal(out, expected)
    (dsink,) = torch.autograd.grad(out.float().sum(), sink)
    assert dsink.dtype == sink.dtype


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (7, 2), (0, 0), (2**63 - 1, 3)], ids=str)
@pytest.mark.parametrize("diagonal", ["end", "start", 3, -4], ids=str)
def test_torchs_own_attention(causal: bool, window: Any, diagonal: Any, compiled: bool) -> None:
    """What no kernel covers has lengths and prefixes too, and NaN beyond lengths stays there."""
    torch._dynamo.reset()
    q, k, v = (x.detach() for x in qkv())
    given = arrays()
    del given["sink"]
    lengths = given["seqlens_q"], given["seqlens_k"]
    if not causal:
        del given["prefix"]
    masked = causal or window is not None
    options = {"window": window, "diagonal": diagonal if masked else "end", **given}
    for x, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1])):
        for b in range(3):
            x[b, n[b] :] = torch.nan
    bias = torch.zeros(9, 14, dtype=q.dtype)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(*x, causal, attn_mask=bias, on_unsupported="silent", **options)

    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = fc.flash_attention(*leaves, causal, on_unsupported="error", **options)
    found = call(*leaves)
    torch.testing.assert_close(found, expected)
    close(gradients(found, leaves), gradients(expected, leaves))
    told = fc.explain(q, k, v, causal, attn_mask=bias, **options)
    assert told.backend == "torch"
    assert "for masks" in told.notes[0]


def test_torchs_own_attention_has_no_sink() -> None:
    """A sink that it would drop."""
    bias = torch.zeros(9, 14)
    sink = arrays()["sink"]
    with pytest.raises(fc.UnsupportedError, match=r"^sink: .*has none, and float attn_mask is not"):
        fc.flash_attention(*qkv(), attn_mask=bias, sink=sink, on_unsupported="silent")
    told = fc.explain(*qkv(), attn_mask=bias, sink=sink)
    assert told.backend == ""
    assert "sink" in told.rejected[0][1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seqlens_q": int32(1)}, "seqlens_q"),
        ({"seqlens_k": torch.ones(3)}, "seqlens_k"),
        ({"prefix": int32(1, 2)}, "prefix"),
        ({"prefix": torch.tensor(3, dtype=torch.int32)}, "prefix"),
    ],
    ids=["short", "floats", "short prefix", "no dimension"],
)
def test_bad_arrays_beside_what_no_kernel_covers(wrong: Any, says: str, compiled: bool) -> None:
    """Broadcast, or an error of torch's own that names no argument."""
    torch._dynamo.reset()
    bias = torch.zeros(9, 14, dtype=qkv()[0].dtype)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(*x, True, attn_mask=bias, on_unsupported="silent", **wrong)

    call = torch.compile(run, backend="aot_eager") if compiled else run
    with pytest.raises(fc.ArgumentError, match=f"^{says}: expected"):
        call(*qkv())


def test_a_causal_bias_is_of_the_tensors_lengths() -> None:
    """torch's mask without elements does not move with the lengths, and a prefix does not open it."""
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv()
    given = arrays()
    del given["sink"], given["prefix"]
    for make, bias in ((causal_lower_right, 14 - 9), (causal_upper_left, 0)):
        found = fc.flash_attention(q, k, v, attn_mask=make(9, 14), on_unsupported="silent", **given)
        wide = [x.detach().double() for x in (q, k, v)]
        expected = reference.naive(*wide, True, diagonal=bias, **given)
        torch.testing.assert_close(found, expected)
    seen = np.tri(9, 14, 5, dtype=bool)
    found = fc.flash_attention(
        q, k, v, True, diagonal=2, prefix=8, attn_mask=causal_lower_right(9, 14), on_unsupported="silent"
    )  # fmt: skip
    expected = fc.flash_attention(
        q, k, v, True, diagonal=2, prefix=8, attn_mask=torch.tensor(seen), on_unsupported="silent"
    )
    torch.testing.assert_close(found, expected)
