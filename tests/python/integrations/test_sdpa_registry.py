"""flashcute.sdpa: torch's own scaled_dot_product_attention on flashcute's kernels, through torch's registry."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import flashcute
import pytest
from conftest import Runner
from flashcute import sdpa
from optional_torch import available, needs_torch, torch

has_registry = available and hasattr(torch.nn.attention, "restore_flash_attention_impl")
needs_registry = pytest.mark.skipif(not has_registry, reason="needs torch 2.11 or later")

FORWARD = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "cuda": "_scaled_dot_product_flash_attention",
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """A test that leaves an activation behind."""
    yield
    if has_registry:
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert not sdpa._live


def attention(*args: Any, **kwargs: Any) -> Any:
    """torch's function by flash attention."""
    with flash_only(args[0].device.type):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def flash_only(device: str) -> Any:
    """On a GPU, where cuDNN may come first. On the CPU torch chooses flash attention wherever it can."""
    backends = torch.nn.attention.SDPBackend
    chosen = [backends.FLASH_ATTENTION, *([] if device == "cuda" else [backends.MATH])]
    return torch.nn.attention.sdpa_kernel(chosen)


def tensors(device: str, *shapes: tuple[int, ...], dtype: Any = None, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def transposed(x: Any) -> Any:
    """(batch, heads, seqlen, d) in memory (batch, seqlen, heads, d), as models make it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def reference(q: Any, k: Any, v: Any, is_causal: bool, dout: Any) -> list[Any]:
    """The output and the gradients in fp64, for as many heads of query as of key or a multiple."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    more = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(more, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(more, 1)
    return [out, *torch.autograd.grad(out, (q, k, v), dout.double())]


def served(device: str) -> tuple[int, int]:
    """How many forwards and backwards flashcute has computed for SDPA."""
    counts = sdpa.served()
    return counts.get(FORWARD[device], 0), counts.get(FORWARD[device] + "_backward", 0)


# ---- what is computed ------------------------------------------------------------------------------


@needs_registry
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("seqlen", [1, 17, 130])
def test_output_and_gradients(
    device: str, is_causal: bool, heads: int, kv_heads: int, seqlen: int
) -> None:
    """Another function than torch's, or gradients that belong to another log-sum-exp or another branch."""
    shapes = [(2, heads, seqlen, 32), *[(2, kv_heads, seqlen, 32)] * 2]
    q, k, v = (transposed(x).requires_grad_() for x in tensors(device, *shapes))
    (dout,) = tensors(device, shapes[0], seed=1)
    before = served(device)
    with sdpa.activate(device):
        out = attention(q, k, v, is_causal=is_causal, enable_gqa=heads != kv_heads)
        found = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    assert served(device) == (before[0] + 1, before[1] + 1)
    most = 1e-5 if device == "cpu" else 2e-2
    for mine, expected in zip(found, reference(q, k, v, is_causal, dout), strict=True):
        error = (mine.double() - expected).norm().detach()
        assert error <= most * max(1.0, float(expected.detach().norm())), is_causal


@needs_registry
def test_causal_with_other_lengths_on_the_cpu() -> None:
    """Alignment to the last key, where torch's is to the first."""
    for rows, keys in ((4, 7), (7, 4)):
        q, k, v = tensors("cpu", (1, 2, rows, 8), (1, 2, keys, 8), (1, 2, keys, 8))
        before = served("cpu")[0]
        with sdpa.activate("cpu"):
            out = attention(q, k, v, is_causal=True)
        expected = reference(q, k, v, True, torch.zeros_like(out))[0]
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
        assert served("cpu")[0] == before + 1


def layouts() -> dict[str, Any]:
    """(2, 3, 130, 16) in several memory orders; in "columns" neighbours of the last dimension are not adjacent."""
    x = torch.randn(2, 3, 130, 16)
    return {
        "contiguous": x,
        "transposed": transposed(x),
        "sliced": torch.randn(2, 3, 130, 40)[..., 8:24],
        "expanded": torch.randn(2, 1, 130, 16).expand(2, 3, 130, 16),
        "columns": x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


def on_meta(x: Any) -> Any:
    """Without memory: what the dispatcher then computes is torch's shape function."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@needs_registry
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "columns"])
@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward"])  # fmt: skip
def test_strides_are_those_of_torchs_shape_functions(name: str, layout: str) -> None:
    """Compiled code that reads an output or a gradient by strides that it does not have. What an override computes does
    not depend on the device, so those of the GPU are asked here too."""
    from flashcute._torch.aten import TABLE

    q, k, v = (layouts()[x] for x in (layout, "contiguous", "transposed"))
    dout = layouts()["columns"]
    forward_options: tuple[Any, ...] = (0.0, True)
    backward_options: tuple[Any, ...] = (0.0, True)
    backward = f"{name}_backward"
    if name == "_flash_attention_forward":  # (batch, seqlen, heads, d)
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
        forward_options = (None, None, 130, 130, 0.0, True, False)
        backward = "_flash_attention_backward"
    found = TABLE[name].compute(q, k, v, *forward_options)
    if "cpu" not in name:
        none = torch.empty(0)
        backward_options = (none, none, 130, 130, 0.0, True, *found[-3:-1])
    arguments = (dout, q, k, v, *found[:2], *backward_options)
    gradients = TABLE[backward].compute(*arguments)

    aten = torch.ops.aten
    promised = getattr(aten, name)(*(on_meta(x) for x in (q, k, v)), *forward_options)
    promised += getattr(aten, backward)(*(on_meta(x) for x in arguments))
    for mine, theirs in zip((*found, *gradients), promised, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.shape == theirs.shape
            assert (mine.stride(), mine.dtype) == (theirs.stride(), theirs.dtype)
        else:
            assert mine == theirs
    # And memory that is not adjacent holds the right numbers.
    if name != "_flash_attention_forward":
        for mine, expected in zip(
            (found[0], *gradients), reference(q, k, v, True, dout), strict=True
        ):
            torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-4)


@needs_registry
def test_the_operator_that_writes_to_out() -> None:
    """An output that goes elsewhere, also where its last dimension is not adjacent."""
    from flashcute._torch.aten import TABLE

    q, k, v = (x.transpose(1, 2) for x in tensors("cpu", *[(2, 3, 40, 16)] * 3))
    options = (None, None, 40, 40, 0.0, True, False)
    expected, lse, *_ = TABLE["_flash_attention_forward"].compute(q, k, v, *options)
    for layout in ("contiguous", "columns"):
        out = torch.empty_like(layouts()[layout][:, :, :40].transpose(1, 2))
        same = TABLE["_flash_attention_forward_no_dropout_inplace"].compute(out, q, k, v, *options)
        assert torch.equal(out, expected)
        assert torch.equal(same, lse)


@needs_registry
@pytest.mark.parametrize(
    "window", [(2, 1), (3, None), (-1, 0), (0, 40), (40, -5), (39, 39)], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_the_operators(window: tuple[Any, Any], causal: bool) -> None:
    """A bound that is off by one, of the forward or the backward; one that FlashAttention-2 takes for off."""
    from flashcute._torch.aten import TABLE

    q, k, v, dout = (x.transpose(1, 2) for x in tensors("cpu", *[(2, 3, 30, 16)] * 4))
    k, v = k[:, :20], v[:, :20]
    left, right = window
    left = -1 if left is None or left >= 20 else left
    right = -1 if right is None or right < 0 or right >= 20 else right
    right = 20 if left >= 0 and right < 0 else right  # as FlashAttention-2 has it
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = flashcute.flash_attention(*leaves, causal, window=(left, 0 if causal else right))
    options = (None, None, 30, 20, 0.0, causal)
    sizes = {"window_size_left": window[0], "window_size_right": window[1]}
    out, lse, rng, unused, _ = TABLE["_flash_attention_forward"].compute(
        q, k, v, *options, False, **sizes
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    found = TABLE["_flash_attention_backward"].compute(
        dout, q, k, v, out, lse, *options, rng, unused, **sizes
    )
    for mine, theirs in zip(
        found, torch.autograd.grad(expected, leaves, dout.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-4)


def one_by_one(*tensors: Any, starts: tuple[Any, Any], **options: Any) -> tuple[Any, Any]:
    """flash_attention of each sequence, one after the other: the output and the log-sum-exp."""
    lengths_q, lengths_k = (x.diff().tolist() for x in starts)
    parts = zip(
        *(x.split(n) for x, n in zip(tensors, (lengths_q, lengths_k, lengths_k), strict=True)),
        strict=True,
    )
    found = [
        flashcute.flash_attention(*(x[None] for x in part), **options, return_lse=True)
        for part in parts
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat([x[0] for x in outs]), torch.cat([x[0] for x in lses], -1)


@needs_registry
@pytest.mark.parametrize("layout", ["contiguous", "columns"])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (None, None)), (True, (None, None)), (True, (3, 0)), (False, (2, 4))]
)  # fmt: skip
def test_packed_sequences_of_the_operators(
    causal: bool, window: tuple[Any, Any], layout: str
) -> None:
    """Sequences that see each other, a mask aligned to the end of all, gradients of another sequence, or results with
    shapes and strides that torch's shape functions do not promise. max_q and max_k say nothing here."""
    from flashcute._torch.aten import TABLE

    starts = torch.tensor([0, 5, 5, 14, 15, 27]).int(), torch.tensor([0, 7, 11, 11, 12, 20]).int()
    q, k, v, dout = tensors("cpu", (27, 4, 16), (20, 2, 16), (20, 2, 16), (27, 4, 16))
    if layout == "columns":
        q, dout = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, dout))
    bounds = dict(zip(("window_size_left", "window_size_right"), window, strict=True))
    options = (*starts, 1, 1, 0.0, causal)
    arguments = (q, k, v, *options, False)
    found = TABLE["_flash_attention_forward"].compute(*arguments, **bounds)
    out, lse, rng, unused, _ = found
    given = (dout, q, k, v, out, lse, *options, rng, unused)
    gradients = TABLE["_flash_attention_backward"].compute(*given, **bounds)

    leaves = [x.double().contiguous().requires_grad_() for x in (q, k, v)]
    meant = {"window": None if window == (None, None) else window}
    expected, expected_lse = one_by_one(*leaves, starts=starts, causal=causal, **meant)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    exact = torch.autograd.grad(expected, leaves, dout.double())
    for mine, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-4)

    aten = torch.ops.aten
    promised = aten._flash_attention_forward(*(on_meta(x) for x in arguments), **bounds)
    promised += aten._flash_attention_backward(*(on_meta(x) for x in given), **bounds)
    for mine, theirs in zip((*found, *gradients), promised, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.stride(), mine.dtype) == (theirs.stride(), theirs.dtype)

    target = torch.full_like(out, torch.nan)
    into = TABLE["_flash_attention_forward_no_dropout_inplace"].compute
    assert torch.equal(into(target, *arguments, **bounds), lse)
    assert torch.equal(target, out)


@needs_registry
def test_packed_sequences_that_stay_with_torch() -> None:
    """Offsets of 64 bits that are read as 32; a backward on another side than its forward; packed sequences of the
    operator that has none."""
    from flashcute._torch.aten import TABLE
    from flashcute._torch.served import NotServedError

    (q,) = tensors("cpu", (9, 2, 16))
    lse, starts = torch.zeros(2, 9), torch.tensor([0, 4, 9], dtype=torch.int32)

    def calls(x: Any, *packed: Any, dropout_p: float = 0.0, **options: Any) -> Iterator[Any]:
        rest = (*packed, 5, 5, dropout_p, False)
        yield lambda: TABLE["_flash_attention_forward"].compute(x, x, x, *rest, False, **options)
        yield lambda: TABLE["_flash_attention_forward_no_dropout_inplace"].compute(
            x, x, x, x, *rest, False, **options
        )
        yield lambda: TABLE["_flash_attention_backward"].compute(
            x, x, x, x, x, lse, *rest, lse, lse, **options
        )

    for all_three, reason in (
        (calls(q, starts, None), "packed queries or keys alone"),
        (calls(q, None, starts), "packed queries or keys alone"),
        (calls(q, starts.long(), starts.long()), "of other than 32 bits"),
        (calls(q[None], starts, starts), "of other than 3 dimensions"),
        (calls(q, None, None), "of other than 4 dimensions"),
        (calls(q, starts, starts, dropout_p=0.1), "dropout"),
        (calls(q, starts, starts, seqused_k=starts[1:]), "seqused_k"),
        (calls(q, starts, starts, scale=-1.0), "scale"),
    ):
        for call in all_three:
            with pytest.raises(NotServedError, match=reason):
                call()
    dense = q[None].transpose(1, 2)
    backward = TABLE["_scaled_dot_product_flash_attention_backward"].compute
    given = dense, dense, dense, dense, dense, lse[None], starts, starts, 9, 9, 0.0, False, lse, lse
    with pytest.raises(NotServedError, match="packed sequences of an operator that has none"):
        backward(*given)


# ---- what is left to torch -------------------------------------------------------------------------

LEFT = {
    "attn_mask": ({"attn_mask": True}, (1, 2, 9, 16)),
    "attn_mask of floats": ({"attn_mask": 0.5}, (1, 2, 9, 16)),
    "head dimension": ({}, (1, 2, 9, 264)),
    "scale": ({"scale": -1.0}, (1, 2, 9, 16)),
}


@needs_registry
@pytest.mark.parametrize("what", LEFT)
def test_the_rest_is_torchs_own(what: str) -> None:
    """A call that flash attention of torch takes and flashcute does not: it must not raise, nor change, and its
    gradients must come from where its output came from."""
    options, shape = LEFT[what]
    q, k, v = (x.requires_grad_() for x in tensors("cpu", shape, shape, shape))
    if options.get("attn_mask") is True:
        options = {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril(2)}
    elif "attn_mask" in options:
        options = {"attn_mask": torch.randn(9, 9)}

    def run() -> list[Any]:
        out = attention(q, k, v, **options)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected, before = run(), served("cpu")
    reason = what.split(" of ")[0]
    count = sum(n for text, n in sdpa.fallbacks().items() if reason in text)
    with sdpa.activate("cpu"):
        found = run()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert served("cpu") == before
    assert sum(n for text, n in sdpa.fallbacks().items() if reason in text) == count + 2


@needs_registry
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seqused_k", torch.ones(1)),
        ("alibi_slopes", torch.ones(1)),
        ("block_table", torch.ones(1)),
        ("an_argument_of_a_later_torch", 1),
    ],
)
def test_options_that_only_the_operators_have(name: str, value: object) -> None:
    """A bias or an argument that a later torch adds is ignored."""
    from flashcute._torch.aten import TABLE
    from flashcute._torch.served import NotServedError

    q, k, v = (x.transpose(1, 2) for x in tensors("cpu", *[(1, 2, 9, 16)] * 3))
    rest = (None, None, 9, 9, 0.0, False, False)
    compute = TABLE["_flash_attention_forward"].compute
    with pytest.raises(NotServedError, match=name):
        compute(q, k, v, *rest, **{name: value})
    off = {"window_size_left": -1, "window_size_right": None, "num_splits": 1}
    assert torch.equal(compute(q, k, v, *rest, **off)[0], compute(q, k, v, *rest)[0])
    lengths = torch.tensor([0, 9], dtype=torch.int32)
    for packed in ((lengths, None), (None, lengths)):
        with pytest.raises(NotServedError, match="packed queries or keys alone"):
            compute(q, k, v, *packed, *rest[2:])
    with pytest.raises(NotServedError, match="return_debug_mask"):
        compute(q, k, v, *rest[:-1], True)
    with pytest.raises(NotServedError, match="dropout"):
        compute(q, k, v, *rest[:4], 0.1, False, False)


@needs_registry
def test_why_not_says_what_happens(device: str) -> None:
    """An answer that differs from what a call does; one that depends on strides, which gradients need not share."""
    for shape, options in (
        ((2, 2, 9, 16), {}),
        ((2, 2, 9, 256), {}),
        ((1, 2, 9, 264 if device == "cpu" else 256), {"scale": -1.0}),
    ):
        q, k, v = tensors(device, shape, shape, shape)
        answer = sdpa.why_not(q, k, v, **options)
        assert answer == sdpa.why_not(transposed(q), k, transposed(v), **options)
        before = served(device)[0]
        with sdpa.activate(device):
            attention(q, k, v, **options)
        assert (answer is None) == (served(device)[0] == before + 1), answer


@needs_registry
def test_the_first_fallback_for_a_reason_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback that nobody can see, or a line for every layer of every step."""
    from flashcute._torch import served as counts

    monkeypatch.setattr(counts, "left", type(counts.left)())
    q, k, v = tensors("cpu", *[(1, 2, 9, 264)] * 3)
    with sdpa.activate("cpu"), caplog.at_level(logging.WARNING, "flashcute"):
        for _ in range(3):
            attention(q, k, v)
    assert [r.getMessage() for r in caplog.records if "head dimension" in r.getMessage()] != []
    assert len(caplog.records) == 1
    assert list(sdpa.fallbacks().values()) == [3]


@needs_registry
def test_other_backends_do_not_reach_it() -> None:
    """An activation that changes what sdpa_kernel chose."""
    q, k, v = tensors("cpu", *[(1, 2, 9, 16)] * 3)
    before = served("cpu")
    with sdpa.activate(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert served("cpu") == before


# ---- activation ------------------------------------------------------------------------------------


def dispatch_tables() -> dict[str, str]:
    """What the dispatcher calls for each operator, on every key."""
    from flashcute._torch.aten import TABLE

    names = [name for name in TABLE if hasattr(torch.ops.aten, name)]
    return {name: torch._C._dispatch_dump(f"aten::{name}") for name in names}


@needs_registry
def test_restoring_leaves_no_trace(recwarn: pytest.WarningsRecorder) -> None:
    """A kernel that stays, because an exception left the with statement or somebody holds a reference; a warning of the
    dispatcher about each override."""
    before = dispatch_tables()
    implementations, held = set(torch.library._impls), []
    assert "flashcute" in torch.nn.attention.list_flash_attention_impls()
    for _ in range(3):
        kept = None
        try:
            with sdpa.activate("cpu") as handle:
                assert handle.devices == ("cpu",)
                assert sdpa.is_active()
                assert dispatch_tables() != before
                _, overrides = torch.nn.attention._registry._FLASH_ATTENTION_ACTIVE
                held.extend(overrides.libraries)
                raise ZeroDivisionError
        except ZeroDivisionError as error:
            kept = error
        assert kept is not None
        assert dispatch_tables() == before
        assert set(torch.library._impls) == implementations
    assert not sdpa.is_active()
    assert [w for w in recwarn if "verrid" in str(w.message)] == []


@needs_registry
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_activations_overlap(order: tuple[int, int]) -> None:
    """The end of one that takes the other's device, in either order; a second end that does something."""
    q, k, v = tensors("cpu", *[(1, 2, 9, 16)] * 3)

    def is_served() -> bool:
        before = served("cpu")[0]
        attention(q, k, v)
        return served("cpu")[0] == before + 1

    handles = [sdpa.activate("cpu"), sdpa.activate()]
    assert is_served()
    for _ in range(2):
        handles[order[0]].restore()
        assert is_served()
    handles[order[1]].restore()
    assert not is_served()
    assert not sdpa.is_active()
    with sdpa.activate("cuda"):
        assert sdpa.is_active()
        assert not is_served()  # for the CPU it was not asked


class Other:
    """An implementation that does nothing but be active."""

    def remove(self) -> None:
        pass


@needs_registry
def test_another_implementation_in_between() -> None:
    """The end of an activation that throws out the one that replaced it, or does not put back the one before."""
    attention = torch.nn.attention
    attention.register_flash_attention_impl("other", register_fn=Other)
    current, untouched = attention.current_flash_attention_impl, dispatch_tables()
    try:
        with sdpa.activate() as outer:
            attention.activate_flash_attention_impl("other")
            assert not sdpa.is_active()
            assert dispatch_tables() == untouched
        assert current() == "other"  # replaced: theirs stays
        with sdpa.activate():
            assert sdpa.is_active()
            outer.restore()  # of the time before: over
            assert sdpa.is_active()
        assert current() == "other"  # it was there before
        attention.restore_flash_attention_impl()
        with sdpa.activate():
            attention.restore_flash_attention_impl()
            assert not sdpa.is_active()
        assert current() is None
    finally:
        if current() is not None:
            attention.restore_flash_attention_impl()
        del attention._registry._FLASH_ATTENTION_IMPLS["other"]


@needs_registry
def test_torchs_own_activation() -> None:
    """A program that activates the name by torch alone: on all devices, and an activation within changes nothing."""
    attention = torch.nn.attention
    attention.activate_flash_attention_impl("flashcute")
    try:
        everything = dispatch_tables()
        assert sdpa.is_active()
        with sdpa.activate("cuda"):
            assert dispatch_tables() == everything or torch.cuda.is_available()
        assert sdpa.is_active()
        q, k, v = tensors("cpu", *[(1, 2, 9, 16)] * 3)
        before = served("cpu")[0]
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert served("cpu")[0] == before + 1
    finally:
        attention.restore_flash_attention_impl()


@needs_registry
@pytest.mark.parametrize("first", ["flashcute", "torch"])
def test_a_change_between_forward_and_backward(device: str, first: str) -> None:
    """Gradients from a log-sum-exp of the other's meaning: an activation may end before the backward, or begin."""
    q, k, v = (x.requires_grad_() for x in tensors(device, *[(2, 3, 33, 32)] * 3))
    handle = sdpa.activate(device) if first == "flashcute" else None
    out = attention(q, k, v, is_causal=True)
    if handle is None:
        handle = sdpa.activate(device)
    else:
        handle.restore()
    (dout,) = tensors(device, tuple(out.shape), seed=1)
    found = torch.autograd.grad(out, (q, k, v), dout)
    handle.restore()
    most = 1e-5 if device == "cpu" else 2e-2
    for mine, expected in zip(found, reference(q, k, v, True, dout)[1:], strict=True):
        assert (mine.double() - expected).norm() <= most * expected.norm()


@needs_registry
def test_it_is_for_all_threads() -> None:
    q, k, v = tensors("cpu", *[(1, 2, 9, 16)] * 3)
    before = served("cpu")[0]
    with sdpa.activate("cpu"):
        threads = [
            threading.Thread(
                target=torch.nn.functional.scaled_dot_product_attention, args=(q, k, v)
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert served("cpu")[0] == before + 4


@needs_registry
def test_threads_may_activate_at_the_same_time() -> None:
    """An activation that is lost or stays because two threads changed the registry at once."""
    untouched, wrong = dispatch_tables(), []

    def work() -> None:
        for _ in range(20):
            with sdpa.activate("cpu"):
                if not sdpa.is_active():
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert dispatch_tables() == untouched


# ---- with the rest of torch ------------------------------------------------------------------------


@needs_registry
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device: str, backend: str) -> None:
    """Compiled code that bypasses the override, or that its strides break: inductor asserts them."""
    if backend == "inductor" and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on the CPU")
    q, k, v = (transposed(x).requires_grad_() for x in tensors(device, *[(2, 3, 33, 32)] * 3))

    def model(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q * 2, k, v, is_causal=True) + 1

    torch._dynamo.reset()
    before = served(device)
    with sdpa.activate(device), flash_only(device):
        out = torch.compile(model, backend=backend, fullgraph=True)(q, k, v)
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert served(device) == (before[0] + 1, before[1] + 1)
    expected = torch.autograd.grad(model(q, k, v).sum(), (q, k, v))
    most = 1e-5 if device == "cpu" else 2e-2
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= most * theirs.norm()


@needs_registry
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_and_modes(device: str) -> None:
    """Derivatives of torch.func, vmap, export and inference mode that the override breaks."""
    (x,) = tensors(device, (2, 3, 9, 16))
    dout = torch.ones_like(x)
    call = torch.nn.functional.scaled_dot_product_attention

    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return call(x, x, x)

    before = served(device)[0]
    with sdpa.activate(device), flash_only(device):
        derivative = torch.func.grad(lambda x: call(x, x, x).float().sum())(x)
        batched = torch.vmap(lambda x: call(x, x, x))(x[None].expand(2, *x.shape))
        exported = torch.export.export(Model(), (x,)).module()(x)
        with torch.inference_mode():
            inferred = call(x, x, x)
    assert served(device)[0] >= before + 4
    out, *gradients = reference(x, x, x, False, dout)
    most = 1e-5 if device == "cpu" else 2e-2
    for mine in (batched[1], exported, inferred):
        assert (mine.double() - out).norm() <= most * out.norm()
    total = sum(gradients)
    assert (derivative.double() - total).norm() <= most * total.norm()


@pytest.mark.gpu
@needs_registry
def test_memory_is_linear_in_the_length() -> None:
    """A road that stores the scores."""
    q, k, v = (x.requires_grad_() for x in tensors("cuda", *[(1, 2, 8192, 64)] * 3))
    with sdpa.activate("cuda"):
        attention(q, k, v).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        attention(q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - held < 2 * 8192 * 8192  # one byte for each score


@pytest.mark.gpu
@needs_registry
def test_cuda_graphs() -> None:
    """A synchronisation, or memory that is not of the graph's pool, in a captured training step."""
    q, k, v = (x.requires_grad_() for x in tensors("cuda", *[(2, 3, 130, 64)] * 3))
    (dout,) = tensors("cuda", (2, 3, 130, 64), seed=1)

    def step() -> tuple[Any, ...]:
        out = attention(q, k, v, is_causal=True)
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    with sdpa.activate("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        before = served("cuda")
        with torch.cuda.graph(graph):
            found = step()
        assert served("cuda") == (before[0] + 1, before[1] + 1)
    with torch.no_grad():
        for x, new in zip((q, k, v), tensors("cuda", *[(2, 3, 130, 64)] * 3, seed=2), strict=True):
            x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for mine, expected in zip(found, reference(q, k, v, True, dout), strict=True):
        assert (mine.double() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.gpu
@needs_registry
def test_deterministic_gradients_follow_torchs_switch() -> None:
    """Atomic additions in spite of torch.use_deterministic_algorithms, which the fixture of these tests has on."""
    assert torch.are_deterministic_algorithms_enabled()
    q, k, v = (x.requires_grad_() for x in tensors("cuda", *[(2, 4, 1000, 64)] * 3))
    with sdpa.activate("cuda"):
        out = attention(q, k, v)
        runs = [torch.autograd.grad(out.sum(), q, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def require_close_as_bfloat16(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs.double()).norm() <= 2e-2 * theirs.double().norm()


@pytest.mark.gpu
@needs_registry
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors(is_causal: bool) -> None:
    """Sequences of a nested tensor that see each other, or that stay with torch; gradients of another sequence."""
    lengths = (3, 50, 130)
    leaves = tensors("cuda", *[(sum(lengths), 2, 64)] * 3)
    (dout,) = tensors("cuda", (sum(lengths), 2, 64), seed=1)
    offsets = torch.tensor([0, 3, 53, 183], device="cuda")
    for x in leaves:
        x.requires_grad_()

    def run() -> list[Any]:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in leaves
        )
        with flash_only("cuda"):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        out = out.transpose(1, 2).values()
        return [out, *torch.autograd.grad(out, leaves, dout)]

    expected, before = run(), sdpa.served()
    with sdpa.activate("cuda"):
        found = run()
    after = sdpa.served()
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        assert after.get(name, 0) == before.get(name, 0) + 1
    require_close_as_bfloat16(found, expected)


@pytest.mark.gpu
@needs_registry
def test_varlen_attn() -> None:
    """torch's function for packed sequences: a window or a causal mask that is lost on the way, or a call that stays
    with torch."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    starts = torch.tensor([0, 3, 53, 183], dtype=torch.int32, device="cuda")
    leaves = [x.requires_grad_() for x in tensors("cuda", *[(183, 2, 64)] * 3)]
    (dout,) = tensors("cuda", (183, 2, 64), seed=1)

    def run(window: tuple[int, int]) -> list[Any]:
        out = varlen.varlen_attn(*leaves, starts, starts, 130, 130, window_size=window)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    for window in ((-1, -1), (-1, 0), (20, 0)):
        expected, before = run(window), sdpa.served()
        with sdpa.activate("cuda"):
            found = run(window)
        after = sdpa.served()
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            assert after.get(name, 0) == before.get(name, 0) + 1
        require_close_as_bfloat16(found, expected)


@pytest.mark.gpu
@needs_registry
def test_dropout_stays_with_torch() -> None:
    """Dropped weights, of dense or packed calls, that are computed as if none were."""
    values = [torch.randn(n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (3, 50, 130)]
    nested = torch.nested.nested_tensor(values, layout=torch.jagged).transpose(1, 2)
    (x,) = tensors("cuda", (1, 2, 200, 64))

    def run() -> tuple[Any, Any]:
        torch.manual_seed(3)
        with flash_only("cuda"):
            packed = torch.nn.functional.scaled_dot_product_attention(
                nested, nested, nested, dropout_p=0.5
            )
        return packed.transpose(1, 2).values(), attention(x, x, x, dropout_p=0.5)

    expected, before = run(), sdpa.fallbacks().get("dropout", 0)
    with sdpa.activate("cuda"):
        found = run()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert sdpa.fallbacks()["dropout"] >= before + 2


@pytest.mark.gpu
@needs_registry
@pytest.mark.filterwarnings("error:torch prefers cuDNN:UserWarning")
def test_a_preference_for_cudnn_is_said() -> None:
    """An activation that no call reaches, without a word."""
    (q,) = tensors("cuda", (1, 1, 128, 64), dtype=torch.float16)
    chosen = torch.ops.aten._fused_sdp_choice(q, q, q)
    cudnn = chosen == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value)
    if cudnn:
        with pytest.warns(UserWarning, match="cuDNN"):
            sdpa.activate("cuda").restore()
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        before = served("cuda")[0]
        with sdpa.activate("cuda"):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert served("cuda")[0] == before + 1
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


# ---- without it ------------------------------------------------------------------------------------


@needs_registry
def test_a_torch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    with pytest.raises(flashcute.UnsupportedError, match=r"torch 2\.11 or later.*this is torch"):
        sdpa.activate()
    assert not sdpa.is_active()


@needs_registry
def test_a_device_that_there_is_not() -> None:
    with pytest.raises(
        flashcute.ArgumentError, match=r"device: expected 'cpu', 'cuda' or None, got 'tpu'"
    ):
        sdpa.activate("tpu")


def test_no_torch(fresh: Runner) -> None:
    """An ImportError of torch's name, from a module of ours."""
    fresh("""
        import sys  # and no torch
        sys.modules["torch"] = None
        import flashcute  # it is not there
        assert not flashcute.sdpa.is_active()
        assert flashcute.sdpa.served() == flashcute.sdpa.fallbacks() == {}
        try:
            flashcute.sdpa.activate()
        except flashcute.UnsupportedError as error:
            assert "torch is not installed" in str(error)
        else:
            raise AssertionError("activated")
    """)


@needs_torch
def test_importing_it_activates_nothing(fresh: Runner) -> None:
    """An import that changes what torch computes, or that imports torch; a name that is missing where torch comes
    later."""
    fresh("""
        import sys, flashcute.sdpa
        assert "torch" not in sys.modules
        import torch
        names = getattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["flashcute"])
        assert "flashcute" in names()
        assert not flashcute.sdpa.is_active()
        current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
        assert current() is None
    """)
