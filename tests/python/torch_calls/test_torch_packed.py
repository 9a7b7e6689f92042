"""Packed sequences on the roads through torch: what is recorded, traced, mapped, saved or left to torch's own
attention."""

from __future__ import annotations

from typing import Any

import flashcute as fc
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from flashcute._torch import operators
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

LENGTHS, KEYS = (
    (5, 0, 7, 2, 1),
    (3, 6, 9, 1, 4),
)  # of another number than heads: torch takes equal sizes for one symbol


def starts(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def qkv(rows: int = sum(LENGTHS), keys: int = sum(KEYS)) -> list[torch.Tensor]:
    return [
        torch.randn(n, h, 8).double().requires_grad_() for n, h in ((rows, 4), (keys, 2), (keys, 2))
    ]


def arrays() -> dict[str, torch.Tensor]:
    return {
        "cu_seqlens_q": starts(),
        "cu_seqlens_k": starts(KEYS),
        "seqlens_k": torch.tensor([3, 4, 8, 1, 2]).int(),
        "sink": torch.tensor([0.5, -1.0, 2.0, 0.0]).double().requires_grad_(),
    }


def attend(*x: torch.Tensor, **options: Any) -> Any:
    return fc.flash_attention(*x, True, window=(7, 2), on_unsupported="error", **options)


def by_sequence(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
    parts = zip(*(x.split(n) for x, n in ((q, LENGTHS), (k, KEYS), (v, KEYS))), strict=True)
    return torch.cat([attend(*(x[None] for x in part), **options)[0] for part in parts])


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(out.square().sum(), inputs)


def test_gradients_are_those_of_the_sequences() -> None:
    """Gradients of a batch of one."""
    inputs = [*qkv(), arrays()["sink"]]
    options = {"cu_seqlens_q": starts(), "cu_seqlens_k": starts(KEYS)}
    found = attend(*inputs[:3], sink=inputs[3], **options)
    expected = by_sequence(*inputs[:3], sink=inputs[3])
    close([found], [expected])
    close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_that_change_before_the_gradients(name: str) -> None:
    """Gradients of other sequences than were computed."""
    given = arrays()
    out = attend(*qkv(), **given)
    given[name] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpoint() -> None:
    """What is computed again has the same sequences."""
    given = arrays()
    inputs = [*qkv(), given["sink"]]
    expected = gradients(attend(*inputs[:3], **given), inputs)
    out = checkpoint(lambda *x: attend(*x, **given), *inputs[:3], use_reentrant=False)
    close(gradients(out, inputs), expected)


@pytest.mark.parametrize("left_out", [None, "cu_seqlens_k", "seqlens_k", "sink"])
def test_compile(left_out: str | None) -> None:
    """A graph break where a start is read; a compilation for each total or number of sequences."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    given = {n: x for n, x in arrays().items() if n != left_out}
    traced = torch.compile(attend, fullgraph=True, backend=backend, dynamic=True)
    real = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for more in (0, 2, 5):
        inputs = qkv(sum(LENGTHS) + more, sum(KEYS) + more)
        leaves = [*inputs, *([given["sink"]] if "sink" in given else [])]
        fewer = int(more > 2)
        now = {n: x[: len(x) - fewer].clone() if "seqlens" in n else x for n, x in given.items()}
        expected = attend(*inputs, **now)
        assert torch.equal(traced(*inputs, **now), expected)
        found = real(*inputs, **now)
        assert torch.equal(found, expected)
        close(gradients(found, leaves), gradients(expected, leaves))
    assert len(graphs) == 1


def test_export() -> None:
    """For any total and any number of sequences."""

    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, cu_seqlens: Any) -> Any:
            return fc.flash_attention(
                q, k, v, True, cu_seqlens_q=cu_seqlens, max_seqlen_q=q.shape[0]
            )

    total, count = torch.export.Dim("total", min=2), torch.export.Dim("count", min=2)
    shapes = {name: {0: total} for name in "qkv"} | {"cu_seqlens": {0: count}}
    q, k, v = (x.detach() for x in qkv(sum(LENGTHS), sum(LENGTHS)))
    program = torch.export.export(Attention(), (q, k, v, starts()), dynamic_shapes=shapes)
    for cut in ((5, 0, 7), (20,), (1, 1, 1, 40)):
        q, k, v = (x.detach() for x in qkv(sum(cut), sum(cut)))
        given = (q, k, v, starts(cut))
        assert torch.equal(program.module()(*given), Attention()(*given))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("with_sink", [False, True])
def test_opcheck(layout: str, with_sink: bool) -> None:
    """Fakes whose shapes, dtypes or strides differ from the real ones; a wrong schema."""
    given = arrays()
    sink = given["sink"] if with_sink else None
    tensors = qkv()
    if layout == "bhsd":
        tensors = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in tensors]
    packed = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    common = (True, None, layout)
    appended = (None, None, 7, 2, None, given["seqlens_k"], None, None)
    torch.library.opcheck(
        operators.forward_operator, (*tensors, *common, False, *appended, sink, *packed)
    )
    q, k, v = (x.detach() for x in tensors)
    sink = None if sink is None else sink.detach()
    out, lse = operators.forward_operator(q, k, v, *common, False, *appended, sink, *packed)
    for dlse in (None, torch.randn_like(lse)):
        saved = (torch.randn_like(out), q, k, v, out, lse, dlse)
        others = (*common, *appended, *packed)
        if sink is None:
            torch.library.opcheck(operators.backward_operator, (*saved, *others))
        else:
            torch.library.opcheck(operators.backward_with_sink_operator, (*saved, sink, *others))


def test_fake_tensors_and_flops() -> None:
    """Shapes without memory; FLOPs of the matrix of all rows, of which most are of no sequence."""
    with torch._subclasses.FakeTensorMode():
        assert attend(*qkv(), **arrays()).shape == (sum(LENGTHS), 4, 8)
    pairs = sum(a * b for a, b in zip(LENGTHS, KEYS, strict=True))
    for sink in (None, arrays()["sink"]):
        with FlopCounterMode(display=False) as counter:
            out = fc.flash_attention(
                *qkv(), cu_seqlens_q=starts(), cu_seqlens_k=starts(KEYS), sink=sink
            )
        assert counter.get_total_flops() == 4 * pairs * 2 * 16
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 4 * pairs * 2 * 40


@pytest.mark.parametrize("sink", [False, True])
def test_vmap_and_a_batch_of_gradients(sink: bool) -> None:
    """A mapped dimension that becomes rows of a sequence."""
    given = arrays()
    if not sink:
        del given["sink"]
    q, k, v = qkv()
    queries = torch.stack([q, 2 * q]).detach().requires_grad_()
    found = torch.vmap(lambda x: attend(x, k, v, **given))(queries)
    expected = torch.stack([attend(x, k, v, **given) for x in queries])
    close([found], [expected])
    close(gradients(found, [queries, k]), gradients(expected, [queries, k]))
    inputs = [q, k, v, *([given["sink"]] if sink else [])]
    out = attend(q, k, v, **given)
    many = torch.randn(3, *out.shape).double()
    batched = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(out, inputs, many[i], retain_graph=True)
        close([x[i] for x in batched], one)


def test_torchs_own_attention_has_no_packed_sequences() -> None:
    """Sequences that see each other."""
    del (given := arrays())["sink"]
    with pytest.raises(fc.UnsupportedError, match=r"^cu_seqlens_q: .* dropout_p=0.5"):
        fc.flash_attention(*qkv(), **given, dropout_p=0.5, on_unsupported="silent")
    told = fc.explain(*qkv(), **given, dropout_p=0.5)
    assert told.backend == ""
    assert any("has no packed sequences" in why for _, why in told.rejected)


def test_explain() -> None:
    """An explanation of a call that is another one."""
    told = fc.explain(*qkv(), True, **arrays())
    assert told.backend == "cpu"
    assert told.gradients is not None
    wrong = fc.explain(*(x[None] for x in qkv()), True, **arrays())
    assert wrong.backend == ""
    assert any("3 dimensions" in why for _, why in wrong.rejected)
