"""Masks by element (attn_mask, documents, block_mask) on the roads through torch: what is recorded, traced, mapped or
left to torch's own attention."""

from __future__ import annotations

import io
import itertools
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from flashcute import _core
from flashcute._torch import operators
from flashcute.block_mask import room_for, words_size
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

BATCH, HEADS, ROWS, KEYS = (
    3,
    4,
    70,
    135,
)  # lengths that are no multiples of a cell's, and several cells
SIZES = BATCH, HEADS, ROWS, KEYS


def qkv(rows: int = ROWS, keys: int = KEYS, batch: int = BATCH, d: int = 8) -> list[torch.Tensor]:
    return [
        torch.randn(batch, n, h, d).double().requires_grad_()
        for n, h in ((rows, HEADS), (keys, 2), (keys, 2))
    ]


def some_mask(*shape: int) -> torch.Tensor:
    """With cells that are whole, partial and empty, and rows that see nothing."""
    mask = torch.rand(shape) < 0.6
    mask[..., 64:128] = True
    mask[..., : shape[-2] // 3, :64] = False
    mask[..., 5, :] = False
    return mask


def textbook(
    q: Any, k: Any, v: Any, seen: torch.Tensor, sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, from the definition."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        logits = sink[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    lse = scores.logsumexp(-1)
    empty = lse == -torch.inf
    weights = (scores - lse.masked_fill(empty, 0.0)[..., None]).exp()[..., : k.shape[1]]
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def attend(*x: torch.Tensor, **options: Any) -> Any:
    return fc.flash_attention(*x, on_unsupported="error", **options)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(out.square().sum(), inputs)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def numbers(length: int, documents: int = 3) -> torch.Tensor:
    """Of one document for each of some runs of rows."""
    return torch.randint(0, documents, (length,)).sort().values.int()


# ---- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", itertools.product([True, False], repeat=4))
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_all_broadcasts_of_attn_mask(whole: tuple[bool, ...], layout: str) -> None:
    """A dimension of size 1 that stands for the first entry alone; a head that takes another one's mask; gradients of
    another mask than that of the output; the log-sum-exp of all keys."""
    torch.manual_seed(1)
    shape = tuple(n if all_of_it else 1 for n, all_of_it in zip(SIZES, whole, strict=True))
    mask = torch.rand(shape) < 0.5
    inputs = qkv()
    given = [x.transpose(1, 2) if layout == "bhsd" else x for x in inputs]
    out, lse = attend(*given, attn_mask=mask, layout=layout, return_lse=True)
    expected, expected_lse = textbook(*inputs, mask)
    close([out.transpose(1, 2) if layout == "bhsd" else out, lse], [expected, expected_lse])
    close(gradients(out, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_first_dimensions_may_be_left_out(rank: int) -> None:
    mask = some_mask(*SIZES)[(0,) * (4 - rank)]
    q, k, v = qkv()
    close([attend(q, k, v, attn_mask=mask)], [textbook(q, k, v, mask)[0]])


STRIDES = {
    "keys outside": lambda m: m.movedim(-1, 0).contiguous().movedim(0, -1),
    "heads inside": lambda m: m.movedim(1, -1).contiguous().movedim(-1, 1),
    "part of a larger": lambda m: torch.nn.functional.pad(m, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "every other": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda m: m[:1, :, :1].expand(*SIZES),
}


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_attn_mask(kind: str) -> None:
    """A mask that is read as if it were contiguous."""
    mask = STRIDES[kind](some_mask(*SIZES))
    q, k, v = qkv()
    close([attend(q, k, v, attn_mask=mask)], [textbook(q, k, v, mask)[0]])


@pytest.mark.parametrize("name", ["one", "of each entry", "a pair", "strided", "negative", "mixed"])
def test_documents(name: str) -> None:
    """Documents of another batch entry; of queries taken for those of keys; one below 0 that sees others below 0."""
    torch.manual_seed(2)
    keys = ROWS if name in ("one", "of each entry") else KEYS
    many = [torch.stack([numbers(n) for _ in range(BATCH)]) for n in (ROWS, keys)]
    queries, of_keys = {
        "one": (many[0][0], many[0][0]),
        "of each entry": (many[0], many[0]),
        "a pair": tuple(many),
        "strided": (many[0].t().contiguous().t(), many[1].repeat_interleave(2, 1)[:, ::2]),
        "negative": tuple(x - 1 for x in many),
        "mixed": (many[0][:1], many[1]),
    }[name]
    inputs = qkv(ROWS, keys)
    out = attend(*inputs, documents=queries if keys == ROWS else (queries, of_keys))
    own, other = torch.atleast_2d(queries), torch.atleast_2d(of_keys)
    seen = (own[:, None, :, None] == other[:, None, None, :]) & (own >= 0)[:, None, :, None]
    expected, _ = textbook(*inputs, seen)
    close([out], [expected])
    close(gradients(out, inputs), gradients(expected, inputs))


def everything() -> dict[str, Any]:
    """Arguments that all hide something that no other hides."""
    torch.manual_seed(3)
    return {
        "causal": True,
        "window": (60, -1),
        "seqlens_q": torch.tensor([70, 50, 66]).int(),
        "seqlens_k": torch.tensor([135, 130, 99]).int(),
        "documents": (torch.zeros(ROWS).int(), (torch.arange(KEYS) % 17 == 3).int()),
        "attn_mask": torch.rand(BATCH, 1, ROWS, KEYS) < 0.8,
        "block_mask": fc.BlockMask.from_dense(torch.rand(1, HEADS, ROWS, KEYS) < 0.8),
        "sink": torch.tensor([0.5, -1.0, 2.0, 0.0]).double().requires_grad_(),
    }


def seen_of(given: dict[str, Any], shown_by_block_mask: torch.Tensor) -> torch.Tensor:
    """What `everything`, or a part of it, shows."""
    i, j = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None, :]
    rows = given.get("seqlens_q", torch.full((BATCH,), ROWS))[:, None, None, None]
    keys = given.get("seqlens_k", torch.full((BATCH,), KEYS))[:, None, None, None]
    diagonal = keys - rows
    seen = (i < rows) & (j < keys)
    if "causal" in given:
        seen = seen & (j <= i + diagonal)
    if "window" in given:
        seen = seen & (j >= i + diagonal - 60)
    if "documents" in given:
        queries, of_keys = given["documents"]
        seen = seen & (queries[:, None] == of_keys)
    if "attn_mask" in given:
        seen = seen & given["attn_mask"]
    if "block_mask" in given:
        seen = seen & shown_by_block_mask
    return seen


@pytest.mark.parametrize(
    "left_out", [None, "causal", "window", "seqlens_q", "seqlens_k", "documents", "attn_mask", "block_mask", "sink"]
)  # fmt: skip
@pytest.mark.parametrize("road", ["eager", "operator"])
def test_masks_and(left_out: str | None, road: str) -> None:
    """An argument that switches another one off, or is lost on its way: without it the result is another one."""
    given = everything()
    torch.manual_seed(4)
    shown = torch.rand(1, HEADS, ROWS, KEYS) < 0.8
    given["block_mask"] = fc.BlockMask.from_dense(shown)
    inputs = qkv()
    whole = attend(*inputs, **given)
    given.pop(left_out, None)
    leaves = [*inputs, *([given["sink"]] if "sink" in given else [])]
    seen = seen_of(given, shown)
    expected, expected_lse = textbook(*inputs, seen, given.get("sink"))
    call = attend
    if road == "operator":
        torch._dynamo.reset()
        call = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, lse = call(*inputs, return_lse=True, **given)
    exist = torch.arange(ROWS) < given.get("seqlens_q", torch.full((BATCH,), ROWS))[:, None]
    # A query that does not exist has no sink either.
    expected = expected * exist[..., None, None]
    expected_lse = expected_lse.masked_fill(~exist[:, None], -torch.inf)
    close([out, lse], [expected, expected_lse])
    close(gradients(out, leaves), gradients(expected, leaves))
    assert left_out is None or (out - whole).abs().max() > 1e-3


def test_gradcheck() -> None:
    """Gradients that leave a mask out: by finite differences, of q, k, v and the sink, through output and LSE."""
    torch.manual_seed(5)
    q, k, v = qkv(4, 5, batch=1, d=3)
    sink = torch.randn(HEADS).double().requires_grad_()
    mask = torch.rand(1, HEADS, 4, 5) < 0.6
    documents = torch.tensor([0, 0, 1, 1]).int(), torch.tensor([0, 1, 0, 1, 1]).int()
    block_mask = fc.BlockMask.from_dense(torch.rand(4, 5) < 0.9)
    given = {"attn_mask": mask, "documents": documents, "block_mask": block_mask}

    def function(q: Any, k: Any, v: Any, sink: Any) -> Any:
        return attend(q, k, v, sink=sink, return_lse=True, **given)

    assert torch.autograd.gradcheck(function, (q, k, v, sink))


def test_what_no_query_of_a_group_sees_reaches_nothing() -> None:
    """NaN of a key or value that some queries do not see."""
    q, k, v = qkv()
    mask = torch.ones(ROWS, KEYS, dtype=torch.bool)
    mask[:50, 100:] = False
    expected = attend(q, k, v, attn_mask=mask)[:, :50]
    with torch.no_grad():
        for x in (k, v):
            x[:, 100:] = torch.nan
    out = attend(q, k, v, attn_mask=mask)
    assert torch.equal(out[:, :50], expected)
    assert out[:, 50:].isnan().all()


# ---- the mask of the forward call ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attn_mask", "documents"])
def test_a_mask_that_changes_before_the_gradients(name: str) -> None:
    """Gradients of another function than was computed."""
    inputs = qkv(ROWS, ROWS)
    given = {
        "attn_mask": some_mask(*SIZES)[..., :ROWS].contiguous(),
        "documents": numbers(ROWS),
    }[name]
    expected = gradients(attend(*inputs, **{name: given}), inputs)
    out = attend(*inputs, **{name: given})
    given.copy_(given.flip(-1))
    close(gradients(out, inputs), expected)
    assert (gradients(attend(*inputs, **{name: given}), inputs)[1] - expected[1]).abs().max() > 1e-3


def test_words_that_change_before_the_gradients() -> None:
    mask = fc.BlockMask.from_dense(some_mask(ROWS, KEYS))
    out = attend(*qkv(), block_mask=mask)
    mask.words[4:].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_map_serves_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is made again for the gradients."""
    made = []
    build = _core.build_block_mask
    monkeypatch.setattr(_core, "build_block_mask", lambda *x, **y: (made.append(1), build(*x, **y)))
    inputs = qkv()
    gradients(attend(*inputs, attn_mask=some_mask(ROWS, KEYS)), inputs)
    assert len(made) == 1
    mask = fc.BlockMask.from_dense(some_mask(ROWS, KEYS))
    del made[:]
    gradients(attend(*inputs, block_mask=mask), inputs)
    assert not made  # a mask that is alone is used as it is


def test_checkpoint() -> None:
    """What is computed again has the same masks."""
    mask, inputs = some_mask(ROWS, KEYS), qkv()
    expected = gradients(attend(*inputs, attn_mask=mask), inputs)
    out = checkpoint(lambda *x: attend(*x, attn_mask=mask), *inputs, use_reentrant=False)
    close(gradients(out, inputs), expected)


# ---- traces ----------------------------------------------------------------------------------------

KINDS = ["attn_mask", "of all heads", "documents", "pair", "both"]


def masks_of(kind: str, rows: int, keys: int, batch: int = BATCH) -> dict[str, Any]:
    mask = torch.rand(batch, 1, rows, keys) < 0.5
    pair = numbers(rows), torch.stack([numbers(keys)] * batch)
    return {
        "attn_mask": {"attn_mask": mask},
        "of all heads": {"attn_mask": torch.rand(HEADS, rows, 1) < 0.5},
        "documents": {"documents": numbers(rows)},
        "pair": {"documents": pair},
        "both": {"attn_mask": mask, "documents": pair},
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(kind: str, backend: str) -> None:
    """A graph break where a mask is checked; a compilation for each length; words of another size than in the trace."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    traced = torch.compile(attend, fullgraph=True, backend=count, dynamic=True)
    real = torch.compile(attend, fullgraph=True, backend=backend, dynamic=True)
    for rows, keys in ((70, 135), (129, 200), (64, 192)):
        keys = rows if kind == "documents" else keys
        inputs, given = qkv(rows, keys), masks_of(kind, rows, keys)
        expected = attend(*inputs, **given)
        assert torch.equal(traced(*inputs, **given), expected)
        found = real(*inputs, **given)
        assert torch.equal(found, expected)
        close(gradients(found, inputs), gradients(expected, inputs))
    assert len(graphs) == 1


def test_compile_with_a_block_mask() -> None:
    """A graph break where a BlockMask is opened."""
    torch._dynamo.reset()
    mask, inputs = fc.BlockMask.from_dense(some_mask(ROWS, KEYS)), qkv()
    call = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    found, expected = call(*inputs, block_mask=mask), attend(*inputs, block_mask=mask)
    assert torch.equal(found, expected)
    close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str) -> None:
    """A program that holds the lengths, or the mask, of its example; one that does not load."""

    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, given: Any) -> Any:
            return fc.flash_attention(q, k, v, True, **given)

    rows = torch.export.Dim("rows", min=2)
    keys = rows if kind == "documents" else torch.export.Dim("keys", min=2)
    sizes = {
        "attn_mask": {2: rows, 3: keys},
        "of all heads": {1: rows},
        "documents": {0: rows},
        "pair": ({0: rows}, {1: keys}),
    }
    names = {"of all heads": "attn_mask", "pair": "documents"}
    parts = ["attn_mask", "pair"] if kind == "both" else [kind]
    shapes = {
        "q": {1: rows}, "k": {1: keys}, "v": {1: keys},
        "given": {names.get(part, part): sizes[part] for part in parts},
    }  # fmt: skip

    def example(rows: int, keys: int) -> tuple[Any, ...]:
        keys = rows if kind == "documents" else keys
        return *(x.detach() for x in qkv(rows, keys)), masks_of(kind, rows, keys)

    program = torch.export.export(Attention(), example(70, 135), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for lengths in ((5, 7), (200, 64)):
        given = example(*lengths)
        assert torch.equal(loaded(*given), Attention()(*given))


@pytest.mark.parametrize("with_sink", [False, True])
def test_opcheck(with_sink: bool) -> None:
    """Fakes whose shapes, dtypes or strides differ from the real ones; a wrong schema."""
    sink = torch.randn(HEADS).double() if with_sink else None
    tensors = qkv()
    mask, documents = some_mask(BATCH, 1, ROWS, KEYS), (numbers(ROWS)[None], numbers(KEYS)[None])
    first = fc.BlockMask.from_dense(some_mask(1, HEADS, ROWS, KEYS))
    of_first = first.words, list(first.sizes)
    for given in (
        (mask, None, None, None, None, [BATCH, 1, ROWS, KEYS]),
        (None, *documents, None, None, [1, 1, ROWS, KEYS]),
        (mask, *documents, *of_first, list(SIZES)),
    ):
        # Without those that compare the words of two calls: what has room and is not there was never written.
        tests = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(operators.block_mask_operator, given, test_utils=tests)
    words = operators.block_mask_operator(mask, *documents, *of_first, list(SIZES))
    common, appended = (False, None, "bshd"), (None,) * 8
    last = (None, None, words, list(SIZES))
    torch.library.opcheck(
        operators.forward_operator, (*tensors, *common, False, *appended, sink, *last)
    )
    q, k, v = (x.detach() for x in tensors)
    out, lse = operators.forward_operator(q, k, v, *common, False, *appended, sink, *last)
    saved = (torch.randn_like(out), q, k, v, out, lse, None)
    if sink is None:
        torch.library.opcheck(operators.backward_operator, (*saved, *common, *appended, *last))
    else:
        torch.library.opcheck(
            operators.backward_with_sink_operator, (*saved, sink, *common, *appended, *last)
        )


@pytest.mark.parametrize("seqlen_q", [0, 1, 64, 65, 4097])
@pytest.mark.parametrize("seqlen_k", [0, 63, 128, 2049, 100_000])
def test_words_of_a_trace_are_as_many(seqlen_q: int, seqlen_k: int) -> None:
    """A trace that plans memory of another size than the library writes."""
    for maps in ((1, 1), (3, 1), (2, 5), (0, 1)):
        sizes = (*maps, seqlen_q, seqlen_k)
        most = room_for(sizes, attn_mask=True, documents=True)
        assert words_size(sizes, most) == _core.block_mask_size(sizes)
        for room in (0, 1):
            assert words_size(sizes, min(room, most)) == _core.block_mask_size(sizes, room)


def test_room_for_documents() -> None:
    """Memory for all cells where few can be partial; a trace that plans another size than is written."""
    length = 64 * 300  # cells of 64 x 64, more than there is room for
    inputs = (None, numbers(length)[None], numbers(length)[None])
    one, two = (1, 1, length, length), (2, 1, length, length)
    words = operators.block_mask_operator(*inputs, None, None, list(one))
    assert len(words) == _core.block_mask_size(one, 2**16)
    assert len(words) < _core.block_mask_size(one)
    assert int(words[0]) == int(words[1]) > 0
    # A block mask without partial cells, alone: for two batch entries it needs no room either.
    nothing = torch.zeros(_core.block_mask_size(one, 0)).int()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [None, *(mode.from_tensor(x) for x in inputs[1:])]
        assert operators.block_mask_operator(*fakes, None, None, list(one)).shape == words.shape
        alone = operators.block_mask_operator(
            None, None, None, mode.from_tensor(nothing), list(one), list(two)
        )
        assert alone.shape == (_core.block_mask_size(two, 0),)


def test_fake_tensors_and_flops() -> None:
    """Shapes without memory; FLOPs that depend on a mask."""
    given = masks_of("both", ROWS, KEYS)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            "attn_mask": mode.from_tensor(given["attn_mask"]),
            "documents": tuple(mode.from_tensor(x) for x in given["documents"]),
        }
        out = attend(*qkv(), **fakes)
        assert out.shape == (BATCH, ROWS, HEADS, 8)
        out.sum().backward()
    whole = BATCH * HEADS * ROWS * KEYS
    for sink in (None, torch.zeros(HEADS).double().requires_grad_()):
        with FlopCounterMode(display=False) as counter:
            out = attend(*qkv(), sink=sink, **given)
        assert counter.get_total_flops() == whole * 2 * 16
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == whole * 2 * 40


# ---- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", ["mask", "queries", "all"])
def test_vmap(kind: str, mapped: str) -> None:
    """A mask of another entry; a mapped dimension that is taken for one of the mask's own."""
    rows, keys = (ROWS, ROWS) if kind == "documents" else (ROWS, KEYS)
    torch.manual_seed(6)
    one = masks_of(kind, rows, keys)
    q, k, v = (x.detach() for x in qkv(rows, keys))
    queries = torch.stack([q, 2 * q]).requires_grad_()
    flipped = torch.utils._pytree.tree_map(lambda x: x.flip(-1), one)
    stacked = torch.utils._pytree.tree_map(lambda x, y: torch.stack([x, y], -1), one, flipped)
    maps_queries, maps_masks = mapped != "mask", mapped != "queries"
    found = torch.vmap(
        lambda q, given: attend(q, k, v, **given),
        in_dims=(0 if maps_queries else None, -1 if maps_masks else None),
    )(queries if maps_queries else q, stacked if maps_masks else one)
    expected = torch.stack(
        [
            attend(
                queries[i] if maps_queries else q, k, v, **(flipped if maps_masks and i else one)
            )
            for i in range(2)
        ]
    )
    close([found], [expected])
    if maps_queries:
        close(gradients(found, [queries]), gradients(expected, [queries]))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_gradients(kind: str, sink: bool) -> None:
    rows, keys = (ROWS, ROWS) if kind == "documents" else (ROWS, KEYS)
    inputs, given = qkv(rows, keys), masks_of(kind, rows, keys)
    if sink:
        given["sink"] = torch.randn(HEADS).double().requires_grad_()
        inputs.append(given["sink"])
    out = attend(*inputs[:3], **given)
    many = torch.randn(3, *out.shape).double()
    batched = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda dout: torch.autograd.grad(out, inputs, dout, retain_graph=True))(
        many
    )
    for i in range(3):
        one = torch.autograd.grad(out, inputs, many[i], retain_graph=True)
        close([x[i] for x in batched], one)
        close([x[i] for x in mapped], one)


def test_autocast() -> None:
    """A mask that is cast as if it were numbers."""
    q, k, v = (x.detach().float() for x in qkv())
    given = masks_of("both", ROWS, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, **given)
    expected = attend(*(x.bfloat16() for x in (q, k, v)), **given)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


# ---- torch's own attention -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["documents", "pair"])
def test_documents_beside_a_bias(kind: str) -> None:
    """Documents that are lost where torch's own attention computes a call."""
    rows, keys = (ROWS, ROWS) if kind == "documents" else (ROWS, KEYS)
    inputs = qkv(rows, keys)
    documents = masks_of(kind, rows, keys)["documents"]
    seen = torch.rand(BATCH, 1, rows, keys) < 0.5
    bias = torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)
    found = fc.flash_attention(
        *inputs, attn_mask=bias, documents=documents, on_unsupported="silent"
    )
    expected = attend(*inputs, attn_mask=seen, documents=documents)
    close([found], [expected])
    close(gradients(found, inputs), gradients(expected, inputs))


def test_torchs_own_attention_has_no_block_mask() -> None:
    """A block mask that is lost where torch's own attention computes a call."""
    mask = fc.BlockMask.from_dense(some_mask(ROWS, KEYS))
    with pytest.raises(fc.UnsupportedError, match=r"^block_mask: .*dropout_p=0.5"):
        fc.flash_attention(*qkv(), block_mask=mask, dropout_p=0.5, on_unsupported="silent")
    told = fc.explain(*qkv(), block_mask=mask, dropout_p=0.5)
    assert told.backend == ""
    assert any(why.startswith("block_mask: ") for _, why in told.rejected)


# ---- arguments -------------------------------------------------------------------------------------

TRUE = torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_mask": TRUE.expand(5, 5)}, r"^attn_mask: .*\(3, 4, 70, 135\), got \(5, 5\)"),
        ({"attn_mask": TRUE.expand(2, 1, 1, 1)}, r"^attn_mask: .*got \(2, 1, 1, 1\)"),
        ({"attn_mask": TRUE.expand(1, 2, 1, 1)}, r"^attn_mask: .*got \(1, 2, 1, 1\)"),
        ({"attn_mask": TRUE.expand(1, 1, 1, 1, 1)}, r"^attn_mask: .*got \(1, 1, 1, 1, 1\)"),
        ({"attn_mask": TRUE.expand(70, 135).to(torch.int8)}, r"^attn_mask: .*bool.*int8"),
        ({"attn_mask": True}, r"^attn_mask: .*"),
        ({"documents": torch.zeros(70).int()}, r"^documents: expected a pair .*70.*135"),
        ({"documents": (torch.zeros(70).int(),) * 2}, r"^documents\[1\]: .*135.*\(70,\)"),
        ({"documents": (torch.zeros(135).int(),) * 2}, r"^documents\[0\]: .*70.*\(135,\)"),
        ({"documents": (torch.zeros(70), torch.zeros(135))}, r"^documents\[0\]: .*int32.*float32"),
        ({"documents": (torch.zeros(2, 70).int(), torch.zeros(135).int())}, r"^documents\[0\]: .*\(2, 70\)"),
        ({"documents": (torch.zeros(70).int(),) * 3}, r"^documents: .*pair.*3"),
        ({"documents": 7}, r"^documents: "),
        ({"attn_mask": TRUE, "block_mask": fc.BlockMask.from_dense(TRUE.expand(70, 64))}, r"^block_mask: .*135.*64"),
        ({"attn_mask": TRUE, "block_mask": fc.BlockMask.from_dense(TRUE.expand(2, 1, 70, 135))}, r"^block_mask: .*3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("recorded", [False, True])
def test_what_does_not_fit(options: dict[str, Any], words: str, recorded: bool) -> None:
    """An access outside of a mask; an error of an argument that nobody has passed."""
    inputs = [x.detach().requires_grad_(recorded) for x in qkv()]
    with pytest.raises(fc.ArgumentError, match=words):
        attend(*inputs, **options)


@pytest.mark.parametrize("name", ["attn_mask", "documents"])
def test_beside_packed_sequences(name: str) -> None:
    q, k, v = (x[0] for x in qkv())
    given = {"attn_mask": TRUE.expand(70, 135), "documents": (torch.zeros(70).int(),) * 2}[name]
    starts = torch.tensor([0, 70]).int()
    with pytest.raises(fc.ArgumentError, match=rf"^{name}: .*cu_seqlens_q.*grid"):
        attend(q, k, v, cu_seqlens_q=starts, **{name: given})


def test_on_another_device() -> None:
    """An access to memory of another device."""
    mask = torch.ones(ROWS, KEYS, dtype=torch.bool, device="meta")
    with pytest.raises(fc.ArgumentError, match=r"^attn_mask: .*meta"):
        attend(*qkv(), attn_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_explain(kind: str) -> None:
    """An explanation of a call that is another one; one that makes the mask, or takes a wrong one."""
    rows, keys = (ROWS, ROWS) if kind == "documents" else (ROWS, KEYS)
    given = masks_of(kind, rows, keys)
    told = fc.explain(*qkv(rows, keys), True, **given)
    assert told.backend == "cpu"
    assert told.gradients is not None
    maps = {"of all heads": (1, HEADS), "documents": (1, 1)}.get(kind, (BATCH, 1))
    size = 4 * _core.block_mask_size((*maps, rows, keys))
    assert any(f"block mask of up to {size} bytes" in note for note in told.notes)
    wrong = fc.explain(*qkv(rows + 1, keys), True, **given)
    assert wrong.backend == ""
    assert any(next(iter(given)) in why for _, why in wrong.rejected)


def test_arrays_of_other_libraries() -> None:
    """A NumPy mask beside tensors, which kernels read, and operators do not."""
    q, k, v = qkv()
    mask = some_mask(ROWS, KEYS)
    assert torch.equal(attend(q, k, v, attn_mask=mask.numpy()), attend(q, k, v, attn_mask=mask))
    flipped = np.flip(mask.numpy(), (0, 1))  # with negative strides
    close(
        [attend(q, k, v, attn_mask=flipped)],
        [attend(q, k, v, attn_mask=torch.from_numpy(flipped.copy()))],
    )
    with pytest.raises(fc.ArgumentError, match=r"^attn_mask: expected a torch tensor"):
        torch.vmap(lambda q: attend(q, k, v, attn_mask=mask.numpy()))(q[None])
