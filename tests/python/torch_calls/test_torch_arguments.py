"""Arguments of torch that are more than numbers and dense tensors: each is honoured or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

SILENT = {"on_unsupported": "silent"}


def tensors(*, sq: int = 6, sk: int = 6, grad: bool = False) -> list[torch.Tensor]:
    sizes = ((2, sq, 4, 8), (2, sk, 2, 8), (2, sk, 2, 8))
    return [torch.randn(s, dtype=torch.float64).requires_grad_(grad) for s in sizes]


# ---- scale ---------------------------------------------------------------------------------------


def temperature() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))


def direct_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = fc.forward(fc.default_config(8, "float64", "cpu"), q, k, v, return_lse=True)
    cfg = fc.default_backward_config(8, "float64", "cpu")
    return fc.backward(cfg, torch.ones_like(out), q, k, v, out, lse, **options)


SCALED: dict[str, Callable[..., Any]] = {
    "flash_attention": fc.flash_attention,
    "torch's attention": lambda *x, **options: fc.flash_attention(
        *x, dropout_p=1e-30, **SILENT, **options
    ),
    "forward": lambda *x, **options: fc.forward(
        fc.default_config(8, "float64", "cpu"), *(y.detach() for y in x), **options
    ),
    "backward": direct_backward,
    "explain": fc.explain,
}


@pytest.mark.parametrize("grad", [False, True], ids=["scale alone", "scale and q"])
@pytest.mark.parametrize("call", SCALED)
def test_scale_that_is_trained_is_refused(call: str, grad: bool) -> None:
    """Its gradient would be dropped: the temperature of a model that never changes."""
    with pytest.raises(
        fc.ArgumentError, match=r"^scale: .*flash_attention\(q \* scale, k, v, scale=1\.0"
    ):
        SCALED[call](*tensors(grad=grad), scale=temperature())  # fmt: skip


def test_scale_that_is_trained_is_refused_in_a_traced_call() -> None:
    """By the same sentence."""
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match="scale: expected a number or None, got a tensor that requires"
    ):
        torch.compile(fc.flash_attention, fullgraph=True, backend="aot_eager")(
            *tensors(), scale=temperature()
        )  # fmt: skip


def test_what_the_refusal_of_a_scale_advises() -> None:
    """The gradients of a scale that is multiplied to q are those of the definition."""
    q, k, v = tensors(grad=True)
    scale, again = temperature(), temperature()
    found = fc.flash_attention(q * scale, k, v, scale=1.0)
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * again
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(scale.grad, again.grad)


@pytest.mark.parametrize("call", SCALED)
@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.3), torch.tensor([[0.3]]), np.float32(0.3), np.float64(0.3), np.array(0.3), 1],
    ids=lambda scale: type(scale).__name__,
)
def test_scale_is_taken_by_value(call: str, scale: Any) -> None:
    """Where no gradient is asked for, whatever holds one number is that number."""
    inputs = tensors(grad=True)
    found, expected = (SCALED[call](*inputs, scale=x) for x in (scale, float(scale)))
    if call == "explain":
        assert repr(found) == repr(expected)
        return
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", SCALED)
def test_scale_that_is_trained_is_a_number_where_nothing_is_recorded(call: str) -> None:
    """As in an evaluation of that model."""
    with torch.no_grad():
        SCALED[call](*tensors(), scale=temperature())


@pytest.mark.parametrize(
    "scale", ["x", torch.ones(2), torch.tensor(1j), [1.0], object()], ids=lambda x: type(x).__name__
)
def test_scale_that_is_no_number(scale: Any) -> None:
    """The argument's name, not torch's words about a conversion."""
    with pytest.raises(fc.ArgumentError, match=r"^scale: expected a number or None"):
        fc.flash_attention(*tensors(), scale=scale)


def test_dropout_that_is_trained_is_refused() -> None:
    """A probability of 0 would be taken for none, and its gradient for none, too."""
    p = torch.nn.Parameter(torch.tensor(0.0))
    for call in (fc.flash_attention, fc.explain):
        with pytest.raises(fc.ArgumentError, match=r"^dropout_p: .*requires gradients"):
            call(*tensors(), dropout_p=p)


def test_gradient_of_a_float_mask() -> None:
    """Torch's attention computes it: not dropped."""
    q, k, v = tensors()
    bias = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda b: fc.flash_attention(q, k, v, attn_mask=b, **SILENT), bias
    )


# ---- tensors of other kinds ----------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "a nested one.*to_padded_tensor"),
    "jagged": (
        lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        "a nested one.*to_padded_tensor",
    ),
    "sparse": (lambda t: t.to_sparse(), r"layout torch\.sparse_coo.*to_dense"),
    "sparse rows": (lambda t: t.to_sparse(2), r"layout torch\.sparse_coo.*to_dense"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), r"layout torch\._mkldnn.*to_dense"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        r"torch\.qint8.*dequantize",
    ),
    "masked": (lambda t: torch.masked.masked_tensor(t, t > 0), "a masked one.*get_data"),
    "meta": (lambda t: t.to("meta"), "the meta device.*FakeTensorMode"),
}
NEGATED = {"negated view": (torch._neg_view, r"a negated view.*resolve_neg")}
CALLS: dict[str, Callable[..., Any]] = {
    "flash_attention": fc.flash_attention,
    "torch's attention": lambda q, k, v: fc.flash_attention(q, k, v, dropout_p=1e-30, **SILENT),
    "recorded": lambda q, k, v: fc.flash_attention(*(_recorded(x) for x in (q, k, v))),
    "forward": lambda q, k, v: fc.forward(fc.default_config(8, "float64", "cpu"), q, k, v),
    "backward": lambda q, k, v: fc.backward(
        fc.default_backward_config(8, "float64", "cpu"), q, q, k, v, q, torch.zeros(2, 4, 6)
    ),
    "explain": fc.explain,
    "count_blocks": lambda q, k, v: fc.count_blocks(
        fc.default_config(8, "float64", "cpu"), q, k, v
    ),
}


def _recorded(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_() if x.dtype == torch.float64 else x


@pytest.mark.filterwarnings("ignore")  # torch calls most of these kinds prototypes
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("position", ["q", "k"])
@pytest.mark.parametrize("kind", [*KINDS, *NEGATED])
def test_kinds_of_tensors_are_refused(kind: str, position: str, call: str) -> None:
    """By the name of the argument and what to do; not by torch's internal errors, nor by results of what is stored
    behind such a tensor."""
    make, says = {**KINDS, **NEGATED}[kind]
    q, k, v = tensors()
    if kind in ("mkldnn", "quantized"):
        q, k, v = q.float(), k.float(), v.float()
    named = {"q": q, "k": k, "v": v}
    named[position] = make(named[position])
    if kind in NEGATED and call == "torch's attention":
        expected = CALLS[call](**{**named, position: -{"q": q, "k": k, "v": v}[position]})
        torch.testing.assert_close(CALLS[call](**named), expected)
        assert fc.explain(**named, dropout_p=1e-30).backend == "torch"
        return
    with pytest.raises(fc.ArgumentError, match=rf"(?s)^(dout|{position}): expected .*{says}"):
        CALLS[call](**named)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["out", "attn_mask"])
@pytest.mark.parametrize("kind", ["nested", "sparse", "masked", "meta"])
def test_kinds_of_other_arguments_are_refused(kind: str, name: str) -> None:
    """What is written to, and a mask."""
    make, says = KINDS[kind]
    q, k, v = tensors()
    other = make(torch.zeros(2, 6, 4, 8 if name == "out" else 6, dtype=torch.float64))
    with pytest.raises(fc.ArgumentError, match=rf"(?s)^{name}: expected .*{says}"):
        fc.flash_attention(q, k, v, **{name: other}, **SILENT)


def test_explain_refuses_what_the_call_refuses() -> None:
    """NumPy's masked arrays: explain promised a backend."""
    x = np.ma.masked_array(np.ones((1, 4, 1, 8), np.float32), mask=False)
    for call in (fc.flash_attention, fc.explain):
        with pytest.raises(fc.ArgumentError, match=r"^q: .*masked"):
            call(x, x, x)


def test_a_mask_on_another_device() -> None:
    """The name of the argument."""
    q, k, v = tensors()
    mask = torch.ones(6, 6, dtype=torch.bool, device="meta")
    with pytest.raises(fc.ArgumentError, match=r"^attn_mask: "):
        fc.flash_attention(q, k, v, attn_mask=mask, **SILENT)


# ---- torch's own causal masks --------------------------------------------------------------------


def bias_of(make: Callable[[int, int], torch.Tensor], sq: int, sk: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: rows that see nothing. They are 0 here
        return make(sq, sk)


@pytest.mark.parametrize(("sq", "sk"), [(6, 6), (4, 9), (9, 4), (1, 5)])
@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left])
def test_causal_bias(make: Callable[[int, int], torch.Tensor], sq: int, sk: int) -> None:
    """A tensor without elements was read as a mask of garbage. Aligned to the last key it is causal=True, to the first
    it is torch's is_causal."""
    q, k, v = tensors(sq=sq, sk=sk)
    found = fc.flash_attention(q, k, v, attn_mask=bias_of(make, sq, sk), **SILENT)
    offset = sk - sq if make is causal_lower_right else 0
    seen = torch.ones(sq, sk, dtype=torch.bool).tril(offset)
    torch.testing.assert_close(found, fc.flash_attention(q, k, v, attn_mask=seen, **SILENT))


@pytest.mark.parametrize(
    ("make", "sq", "sk"),
    [(causal_lower_right, 4, 9), (causal_lower_right, 6, 6), (causal_upper_left, 6, 6)],
)
def test_causal_bias_that_a_kernel_serves(
    make: Callable[[int, int], torch.Tensor], sq: int, sk: int
) -> None:
    """No torch attention where causal=True means the same, its LSE included."""
    q, k, v = tensors(sq=sq, sk=sk)
    mask = make(sq, sk)
    assert fc.explain(q, k, v, attn_mask=mask).backend == "cpu"
    options = {"return_lse": True, "on_unsupported": "error"}
    found = fc.flash_attention(q, k, v, attn_mask=mask, **options)
    for a, b in zip(found, fc.flash_attention(q, k, v, True, return_lse=True), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, mask: fc.flash_attention(q, k, v, attn_mask=mask, on_unsupported="error"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(q, k, v, mask), found[0])


def test_causal_bias_of_other_lengths() -> None:
    """It says how many rows and keys it is for."""
    q, k, v = tensors(sq=4, sk=9)
    for wrong in (bias_of(causal_lower_right, 9, 4), causal_upper_left(4, 8)):
        with pytest.raises(
            fc.ArgumentError, match=r"^attn_mask: expected a CausalBias of .*\(4, 9\)"
        ):
            fc.flash_attention(q, k, v, attn_mask=wrong, **SILENT)
        assert fc.explain(q, k, v, attn_mask=wrong).backend == ""
