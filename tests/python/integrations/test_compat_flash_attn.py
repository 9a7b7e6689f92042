"""flashcute.compat's functions of flash-attn 2 and 3: their signatures, what each argument means, and what they return.
Each test names the failure that it guards against."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
from conftest import backward_configurations_of_first_use
from optional_torch import REASON, torch

fa2 = pytest.importorskip("flashcute.compat.flash_attn", reason=REASON, exc_type=ImportError)
fa3 = pytest.importorskip("flashcute.compat.flash_attn_interface", reason=REASON)
compat = pytest.importorskip("flashcute.compat")
padding = pytest.importorskip("flashcute.compat.bert_padding", reason=REASON)

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())
both_versions = pytest.mark.parametrize("fa", [fa2, fa3], ids=["fa2", "fa3"])


# ---- signatures ------------------------------------------------------------------------------------

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU_SEQLENS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALE = "q_descale=None, k_descale=None, v_descale=None"
TUNING = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"

# As flash-attn 2.8 writes them. What flashcute adds, it adds at the end.
SIGNATURES_2 = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {CU_SEQLENS}, {TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {CU_SEQLENS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}
SIGNATURES_3 = {
    "flash_attn_func": (
        f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALE}, window_size=(-1, -1), attention_chunk=0, "
        f"softcap=0.0, {TUNING}"
    ),
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        f"q, k, v, {CU_SEQLENS}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALE}, "
        f"window_size=(-1, -1), attention_chunk=0, softcap=0.0, {TUNING}"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {DESCALE}, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
}
FIXED_2 = {
    "_flash_attn_forward": (
        "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
        "return_softmax"
    ),
    "_flash_attn_backward": (
        "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
        "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
    ),
    "_flash_attn_varlen_forward": (
        f"q, k, v, {CU_SEQLENS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
        "zero_tensors=False"
    ),
    "_flash_attn_varlen_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {CU_SEQLENS}, dropout_p, softmax_scale, causal, "
        "window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
    ),
}
FIXED_3 = {
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, "
        "num_splits=0, pack_gqa=None, sm_margin=0"
    ),
}


def written(function: Any) -> str:
    """The signature without annotations."""
    parameters = inspect.signature(function).parameters.values()
    assert all(x.kind is x.POSITIONAL_OR_KEYWORD for x in parameters)
    return ", ".join(str(x.replace(annotation=x.empty)) for x in parameters)


@both_versions
def test_signatures(fa: Any) -> None:
    """A position or a default that differs, and calls that mean something else without an error; a name that
    transformers does not find in the signature, and a feature that it turns off."""
    new, fixed = (SIGNATURES_2, FIXED_2) if fa is fa2 else (SIGNATURES_3, FIXED_3)
    found = {name: written(getattr(fa, name)) for name in (*new, *fixed)}
    assert found == {k: f"{v}, learnable_sink=None" for k, v in new.items()} | fixed


def test_private_names_are_plain_functions() -> None:
    """ring-flash-attn makes keyword arguments of the signature, which it takes from functions only; diffusers imports
    the wrapped names."""
    for name in FIXED_2:
        assert inspect.isfunction(getattr(fa2, name))
        assert getattr(fa2, f"_wrapped{name}") is getattr(fa2, name)
    assert fa2.__version__ == "2.8.3"


# ---- what is computed --------------------------------------------------------------------------------


def tensors(p: oracle.Problem, device: str, *, grad: bool = False) -> list[Any]:
    dtype = getattr(torch, p.dtype)
    return [
        torch.tensor(x, dtype=dtype, device=device).requires_grad_(grad) for x in (p.q, p.k, p.v)
    ]


def dtype_on(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


# (causal, window_size): how many keys before and after its own a query sees; -1: no limit.
# seqlen_q = 9, seqlen_k = 14, so that what hides nothing differs between the versions.
MASKS_2 = {
    (False, (-1, -1)): (-1, -1),
    (True, (-1, -1)): (-1, 0),
    (True, (-1, 7)): (-1, 0),  # causal clamps the right bound
    (True, (14, 14)): (-1, 0),  # no shorter than the keys: off; then causal
    (True, (100, 3)): (-1, 0),
    (True, (3, 5)): (3, 0),
    (True, (0, -1)): (0, 0),
    (False, (-1, 0)): (-1, 0),
    (False, (-1, 4)): (-1, 4),
    (False, (-1, 13)): (-1, 13),
    (False, (-1, 14)): (-1, -1),
    (False, (-7, -2)): (-1, -1),  # any negative number is off
    (False, (14, 2)): (-1, 2),
    (False, (2, 1)): (2, 1),
    (False, (4, -3)): (4, -1),
}
MASKS_3 = {
    (False, (-1, -1)): (-1, -1),
    (True, (-1, 7)): (-1, 0),
    (True, (13, 13)): (-1, 0),  # hides nothing, off
    (True, (12, 13)): (12, 0),
    (False, (-1, 0)): (-1, 0),
    (False, (-1, 7)): (-1, 7),
    (False, (-1, 8)): (-1, -1),
    (False, (13, 2)): (-1, 2),
    (False, (2, 1)): (2, 1),
}


@pytest.mark.parametrize(
    ("fa", "causal", "window", "means"),
    [
        (fa, *key, means)
        for fa, masks in ((fa2, MASKS_2), (fa3, MASKS_3))
        for key, means in masks.items()
    ],
    ids=lambda x: getattr(x, "__name__", None) and x.__name__.rpartition(".")[2],
)
def test_masks(
    rng: np.random.Generator,
    device: str,
    fa: Any,
    causal: bool,
    window: tuple[int, int],
    means: tuple[int, int],
) -> None:
    """A window bound off by one, one that is not clamped, a mask aligned to the first key; grouped heads. The
    gradients too: the backward has the mask from elsewhere."""
    p = oracle_backward.make_problem(
        rng, dtype_on(device), seqlen_q=9, seqlen_k=14, heads=4, kv_heads=2, d=24
    )
    p = dataclasses.replace(p, window=means)
    q, k, v = tensors(p, device, grad=True)
    out, lse = fa.flash_attn_func(
        q, k, v, causal=causal, window_size=window, return_attn_probs=True
    )[:2]
    forward = oracle.Problem(p.q, p.k, p.v, p.dtype, window=means)
    oracle.assert_accurate(forward, out, lse, tiny=True)
    out.backward(torch.tensor(p.dout, dtype=out.dtype, device=device))
    oracle_backward.assert_accurate(p, (q.grad, k.grad, v.grad))


def test_right_bound_with_more_queries_than_keys() -> None:
    """flash-attn 2 takes a right bound of seqlen_k for off, also where it would leave rows empty; flash-attn 3 does
    not."""
    q, k = torch.randn(1, 9, 1, 8), torch.randn(1, 3, 1, 8)
    lse_2 = fa2.flash_attn_func(q, k, k, window_size=(-1, 3), return_attn_probs=True)[1]
    lse_3 = fa3.flash_attn_func(q, k, k, window_size=(-1, 3), return_attn_probs=True)[1]
    assert torch.isfinite(lse_2).all()
    # i + 3 - 9 + 3 >= 0 from row 3 on
    assert torch.isneginf(lse_3).squeeze().tolist() == [True] * 3 + [False] * 6
    # With a left bound flash-attn 2 takes a right one that is off for seqlen_k.
    lse_2 = fa2.flash_attn_func(q, k, k, window_size=(2, -1), return_attn_probs=True)[1]
    lse_3 = fa3.flash_attn_func(q, k, k, window_size=(1, -1), return_attn_probs=True)[1]
    assert torch.isposinf(lse_2).squeeze().tolist() == [True] * 3 + [False] * 6
    assert torch.isfinite(lse_3).all()


@both_versions
def test_scale_and_value_dimension(rng: np.random.Generator, device: str, fa: Any) -> None:
    """The scale in another position of the signature; a head dimension of v that is not q's."""
    p = oracle.make_problem(
        rng, dtype_on(device), seqlen_q=6, seqlen_k=11, d=16, d_v=40, scale=0.5, causal=True
    )
    before = (0.0, 0.5, True) if fa is fa2 else (0.5, True)
    out = fa.flash_attn_func(*tensors(p, device), *before)
    oracle.assert_accurate(p, out, None, tiny=True)


def test_results_of_2(device: str) -> None:
    """A tuple of another length; +inf and -inf taken for each other when partial results are merged."""
    q = torch.randn(2, 7, 4, 8, device=device).to(getattr(torch, dtype_on(device)))
    k = torch.randn_like(q[:, :3, :2])
    found = fa2.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert isinstance(found, tuple)
    out, lse, s_dmask = found
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)
    assert torch.isposinf(lse[..., :4]).all()
    assert torch.isfinite(lse[..., 4:]).all()
    assert (out[:, :4] == 0).all()
    assert (s_dmask.shape, s_dmask.dtype, s_dmask.device) == ((0,), q.dtype, q.device)
    assert torch.equal(fa2.flash_attn_func(q, k, k, causal=True), out)


def test_results_of_3(device: str) -> None:
    q = torch.randn(2, 7, 4, 8, device=device).to(getattr(torch, dtype_on(device)))
    k = torch.randn_like(q[:, :3, :2])
    found = fa3.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert isinstance(found, tuple)
    out, lse = found
    assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)
    assert torch.isneginf(lse[..., :4]).all()
    assert torch.isfinite(lse[..., 4:]).all()
    assert torch.equal(fa3.flash_attn_func(q, k, k, causal=True), out)


def test_gradient_through_the_log_sum_exp() -> None:
    """Dropped, as flash-attn does; or NaN where empty rows were marked with +inf."""
    q, k = (torch.randn(1, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    _, lse, _ = fa2.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    lse[..., 2:].sum().backward()
    got = q.grad.clone(), k.grad.clone()
    q.grad = k.grad = None
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    hidden = torch.ones(5, 3, dtype=torch.bool).triu(-1)
    scores.masked_fill(hidden, -torch.inf)[..., 2:, :].logsumexp(-1).sum().backward()
    torch.testing.assert_close(got, (q.grad, k.grad), rtol=1e-12, atol=1e-13)


def numbers(*shape: int, device: str, dtype: Any = None) -> Any:
    return torch.randn(*shape, device=device).to(dtype or getattr(torch, dtype_on(device)))


@both_versions
@pytest.mark.parametrize("sink_dtype", ["float32", "as q"])
def test_sinks(device: str, fa: Any, sink_dtype: str) -> None:
    """A sink that is dropped, scaled or not learned: dense, packed and half-packed calls, with a window and a mask of
    which some rows see no key."""
    wide = torch.float32 if sink_dtype == "float32" else None
    q, kv = numbers(2, 9, 4, 16, device=device), numbers(2, 6, 2, 2, 16, device=device)
    k, v = kv.unbind(2)
    sink = numbers(4, device=device, dtype=wide)
    options = {"causal": True, "window_size": (3, 0), "softmax_scale": 0.5, "deterministic": True}
    meant = {"causal": True, "window": (3, 0), "scale": 0.5, "deterministic": True}
    cases = [(fa.flash_attn_func, (q, k, v), lambda q, k, v: (q, k, v))]
    if fa is fa2:
        cases += [(fa2.flash_attn_kvpacked_func, (q, kv), lambda q, kv: (q, *kv.unbind(2)))]
    qkv = numbers(2, 9, 3, 4, 16, device=device)
    cases += [(fa.flash_attn_qkvpacked_func, (qkv,), lambda qkv: qkv.unbind(2))]
    for call, given, split in cases:
        leaves = [x.detach().clone().requires_grad_() for x in (*given, sink)]
        *inputs, learned = leaves
        found = call(*inputs, **options, return_attn_probs=True, learnable_sink=learned)[:2]
        expected = fc.flash_attention(*split(*inputs), **meant, sink=learned, return_lse=True)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])  # also of empty rows, in both versions: the sink
        assert torch.isfinite(found[1]).all()
        weights = [torch.randn_like(x) for x in found]
        got = torch.autograd.grad(found, leaves, weights)
        want = torch.autograd.grad(expected, leaves, weights)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert got[-1].abs().min() > 0
        assert torch.equal(
            call(*given, **options, learnable_sink=sink), found[0]
        )  # without gradients
        # Of the sink alone, by the road of packed tensors too.
        (alone,) = torch.autograd.grad(
            call(*given, **options, learnable_sink=learned).float().pow(2).sum(), learned
        )
        assert alone.abs().min() > 0
        plain = call(*given, **options)
        far = torch.full_like(sink, -torch.inf)
        torch.testing.assert_close(call(*given, **options, learnable_sink=far), plain)


@both_versions
def test_rows_of_an_infinite_sink(fa: Any) -> None:
    """An empty row's mark that another call takes for a number: a sink of -inf is none."""
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8)
    sink = torch.tensor([-torch.inf, 2.0])
    lse = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True, learnable_sink=sink)[1]
    none = torch.inf if fa is fa2 else -torch.inf
    assert lse[0, 0, :2].tolist() == [none, none]
    assert lse[0, 1, :2].tolist() == [2.0, 2.0]


@both_versions
def test_wrong_sinks(fa: Any) -> None:
    """A message about an argument that flash-attn has under another name, or not at all."""
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    qkv = torch.stack((q, q, q), 2)
    for sink, text in {
        torch.zeros(3): r".*\(2,?\)|.*heads",
        torch.zeros(2, dtype=torch.float16): "expected dtype float32",
        0.5: "expected a torch tensor, got float",
    }.items():
        for call, given in (
            (fa.flash_attn_func, (q, q, q)),
            (fa.flash_attn_qkvpacked_func, (qkv,)),
        ):
            with pytest.raises(fc.ArgumentError, match=f"^learnable_sink: {text}"):
                call(*given, learnable_sink=sink)


@both_versions
def test_last_stride_is_copied(fa: Any, device: str) -> None:
    """Users of flash-attn pass transposed tensors; flash_attention refuses them."""
    dtype = getattr(torch, dtype_on(device))
    q, k, v = (torch.randn(1, 16, 4, 6, device=device).to(dtype).requires_grad_() for _ in range(3))
    turned = [x.transpose(1, 3) for x in (q, k, v)]  # (batch, 6, heads, 16)
    with pytest.raises(fc.ArgumentError, match="stride"):
        fc.flash_attention(*turned)
    out = fa.flash_attn_func(*turned)
    assert torch.equal(out, fc.flash_attention(*(x.contiguous() for x in turned)))
    out.sum().backward()
    assert v.grad.shape == v.shape
    assert v.grad.abs().sum() > 0


@both_versions
def test_deterministic(fa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that is accepted and ignored; False, the default, that overrules torch's own switch."""
    asked = []

    def seen(*args: Any, deterministic: bool | None, **kwargs: Any) -> Any:
        asked.append(deterministic)
        return fc.flash_attention(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr("flashcute.compat._attention.flash_attention", seen)
    q = torch.randn(1, 4, 1, 8)
    fa.flash_attn_func(q, q, q)
    fa.flash_attn_func(q, q, q, deterministic=True)
    assert asked == [None, True]


def test_tuning_arguments_of_3() -> None:
    """Arguments that tune flash-attn's kernels, refused."""
    q = torch.randn(1, 4, 2, 8)
    found = fa3.flash_attn_func(q, q, q, num_splits=4, pack_gqa=True, sm_margin=8)
    assert torch.equal(found, fa3.flash_attn_func(q, q, q))
    lengths = torch.ones(1, dtype=torch.int32)
    assert fa3.get_scheduler_metadata(1, 4, 4, 2, 2, 8, lengths) is None


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.fixture
def _configured() -> Iterator[None]:
    yield
    compat.configure(on_unsupported="error")


SLOPES = "torch.ones(2)"


@pytest.mark.parametrize(
    ("fa", "argument", "value", "shown"),
    [
        (fa2, "dropout_p", 0.1, "0.1"),
        (fa2, "softcap", 30.0, "30.0"),
        (fa2, "alibi_slopes", SLOPES, r"a tensor \(2,\)"),
        (fa3, "softcap", 30.0, "30.0"),
        (fa3, "qv", SLOPES, r"a tensor \(2,\)"),
        (fa3, "v_descale", SLOPES, r"a tensor \(2,\)"),
        (fa3, "attention_chunk", 4, "4"),
    ],
)
def test_what_is_refused(fa: Any, argument: str, value: Any, shown: str) -> None:
    """An argument that is ignored; one that torch's own attention computes unasked."""
    if value is SLOPES:
        value = torch.ones(2)
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(fc.UnsupportedError, match=f"^{argument}: {shown} is not supported yet"):
        fa.flash_attn_func(q, q, q, **{argument: value})


def test_what_does_not_exist_yet() -> None:
    """A name that is missing at import, where a program may never call it."""
    q, lse = torch.randn(4, 2, 8), torch.zeros(2, 4)
    for call, what in {
        lambda: fa2.flash_attn_with_kvcache(q, q, q): "caches",
        lambda: fa3.flash_attn_with_kvcache(q, q, q): "caches",
        lambda: fa3.flash_attn_combine(q, lse): "the merge of partial results",
    }.items():
        with pytest.raises(fc.UnsupportedError, match=rf"^flash_attn_\w+: {what}"):
            call()


@pytest.mark.usefixtures("_configured")
def test_configure() -> None:
    """A fallback with another mask; a setting that only some functions look at."""
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    drops_nothing = 2.0**-24
    compat.configure(on_unsupported="warn")
    with pytest.warns(UserWarning, match="dropout_p=.* is not supported yet"):
        out = fa2.flash_attn_func(q, k, v, drops_nothing, causal=True, window_size=(1, 4))
    expected = fa2.flash_attn_func(q, k, v, causal=True, window_size=(1, 4))
    torch.testing.assert_close(out, expected)
    compat.configure(on_unsupported="silent")
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fa2.flash_attn_qkvpacked_func(qkv, 0.5, window_size=(1, 1))
    out.sum().backward()
    assert qkv.grad.abs().sum() > 0
    with pytest.raises(fc.UnsupportedError, match="softcap"):
        fa2.flash_attn_func(q, k, v, softcap=1.0)
    with pytest.raises(fc.UnsupportedError, match=r"^learnable_sink: .* dropout_p=0.5"):
        fa2.flash_attn_func(q, k, v, 0.5, learnable_sink=torch.zeros(2))
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(fc.UnsupportedError, match=r"^cu_seqlens_q: .* dropout_p=0.5"):
        fa2.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 4, 4, 0.5)
    compat.configure(on_unsupported="error")
    with pytest.raises(fc.UnsupportedError, match="dropout_p"):
        fa2.flash_attn_qkvpacked_func(qkv, 0.5)
    with pytest.raises(fc.ArgumentError, match=r"on_unsupported: expected 'error', .* got 'no'"):
        compat.configure(on_unsupported="no")


def test_wrong_arguments() -> None:
    """Errors of Python or torch that do not name the argument."""
    q, numpy = torch.randn(1, 4, 2, 8), np.zeros((1, 4, 2, 8), np.float32)
    qkv = torch.randn(1, 4, 7, 8)
    for call, text in {
        lambda: fa2.flash_attn_func(q, numpy, q): "k: expected a torch tensor, got ndarray",
        lambda: fa2.flash_attn_func(q, q, q, window_size=3): "window_size: expected two integers",
        lambda: fa2.flash_attn_func(q, q, q, window_size=(1.0, 2)): "window_size: expected two",
        lambda: fa2.flash_attn_qkvpacked_func(q): r"qkv: expected a tensor \(batch, seqlen, 3,",
        lambda: fa2.flash_attn_kvpacked_func(q, q): r"kv: expected a tensor \(batch, seqlen, 2,",
        lambda: fa2.flash_attn_kvpacked_func(numpy, q): "q: expected a torch tensor",
        lambda: fa3.flash_attn_qkvpacked_func(qkv): "num_heads_q: expected the number",
        lambda: fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=4): "num_heads_q: expected to",
        lambda: fa2.flash_attn_func(q[0], q[0], q[0], causal=True): "q: ",
        lambda: fa2.flash_attn_varlen_qkvpacked_func(qkv[0, :, :3, None], None, 4): "cu_seqlens: ",
        lambda: fa2._flash_attn_backward(
            q, None, q, q, q, q, q, q, q, 0.0, None, False, -1, -1, 0.0, None, False
        ): "q: expected a torch tensor, got NoneType",
        lambda: fa2._flash_attn_varlen_backward(
            q, q, None, q, q, q, None, None, None, None, None, 4, 4, 0.0, None, False, -1, -1, 0.0, None, False
        ): "k: expected a torch tensor, got NoneType",
    }.items():  # fmt: skip
        with pytest.raises(fc.ArgumentError, match=f"^{text}"):
            call()


# ---- packed tensors ------------------------------------------------------------------------------------


def packed_cases(device: str, dtype: Any) -> Iterator[tuple[Any, list[Any], Any, dict[str, Any]]]:
    """(a call of packed tensors, these, how q, k and v are taken from them, what flash_attention is told)."""

    def like(*shape: int) -> Any:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    yield fa2.flash_attn_qkvpacked_func, [like(2, 7, 3, 4, 16)], lambda qkv: qkv.unbind(2), {}
    yield fa3.flash_attn_qkvpacked_func, [like(2, 7, 3, 4, 16)], lambda qkv: qkv.unbind(2), {}
    yield (
        fa2.flash_attn_kvpacked_func,
        [like(2, 7, 4, 16), like(2, 9, 2, 2, 16)],
        lambda q, kv: (q, *kv.unbind(2)),
        {},
    )
    yield (
        lambda qkv, **kw: fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=4, **kw),
        [like(2, 7, 8, 16)],
        lambda qkv: qkv.split((4, 2, 2), 2),
        {},
    )
    rows, keys = starts_of([5, 0, 9], device), starts_of([7, 3, 12], device)
    yield (
        lambda qkv, **kw: fa2.flash_attn_varlen_qkvpacked_func(qkv, rows, 9, **kw),
        [like(14, 3, 4, 16)],
        lambda qkv: qkv.unbind(1),
        {"cu_seqlens_q": rows},
    )
    yield (
        lambda q, kv, **kw: fa2.flash_attn_varlen_kvpacked_func(q, kv, rows, keys, 9, 12, **kw),
        [like(14, 4, 16), like(22, 2, 2, 16)],
        lambda q, kv: (q, *kv.unbind(1)),
        {"cu_seqlens_q": rows, "cu_seqlens_k": keys},
    )


def starts_of(lengths: list[int], device: str) -> Any:
    """cu_seqlens."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_is_apart(device: str, causal: bool) -> None:
    """q, k and v taken in another order; a part of the gradient that is not written."""
    for call, given, split, options in packed_cases(device, getattr(torch, dtype_on(device))):
        out, lse = call(*given, causal=causal, deterministic=True, return_attn_probs=True)[:2]
        expected, expected_lse = fc.flash_attention(
            *split(*given), causal, return_lse=True, deterministic=True, **options
        )
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        got = torch.autograd.grad((out, lse), given, (dout, dlse))
        want = torch.autograd.grad((expected, expected_lse), given, (dout, dlse))
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


def test_packed_gradient_is_one_allocation() -> None:
    """Autograd's way: each slice's gradient in zeros of the packed size, and their sum."""
    from torch.profiler import profile

    for call, given, *_ in packed_cases("cpu", torch.float32):
        out = call(*given)
        dout = torch.randn_like(out)
        with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            gradients = torch.autograd.grad(out, given, dout)
        names = {x.key for x in found.key_averages()}
        assert "PackedAttentionBackward" in names
        copies = {
            "aten::stack",
            "aten::cat",
            "aten::copy_",
            "aten::zeros",
            "aten::add",
            "aten::add_",
        }
        assert not names & copies
        assert [x.stride() for x in gradients] == [x.stride() for x in given]


def test_packed_with_other_strides() -> None:
    """(3, batch, heads, seqlen, d) as some models have it, seen as (batch, seqlen, 3, heads, d); and one whose last
    stride is not 1."""
    for base, order in (((3, 2, 4, 7, 16), (1, 3, 0, 2, 4)), ((16, 2, 7, 3, 4), (1, 2, 3, 4, 0))):
        qkv = torch.randn(*base).permute(order).requires_grad_()
        dout = torch.randn(2, 7, 4, 16)
        (got,) = torch.autograd.grad(fa2.flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
        apart = fc.flash_attention(*(x.contiguous() for x in qkv.unbind(2)), causal=True)
        (want,) = torch.autograd.grad(apart, qkv, dout)
        assert torch.equal(got, want)


def test_only_a_part_of_the_gradients() -> None:
    """q, or kv, that requires none; the log-sum-exp alone."""
    q, kv = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 2, 8)
    for wanted in (q, kv):
        wanted.requires_grad_()
        fa2.flash_attn_kvpacked_func(q, kv).sum().backward()
        assert wanted.grad.abs().sum() > 0
        wanted.requires_grad_(False)
    assert not fa2.flash_attn_kvpacked_func(q, kv).requires_grad
    qkv = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    _, lse, _ = fa2.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    lse.sum().backward()
    assert qkv.grad[:, :, :2].abs().sum() > 0
    assert (qkv.grad[:, :, 2] == 0).all()


def test_packed_under_torch() -> None:
    """What looks at more than the result: a second derivative, a batch of gradients, a tensor changed before the
    backward, autocast, a trace, vmap."""
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    out = fa2.flash_attn_qkvpacked_func(qkv)
    (found,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(fc.UnsupportedError, match="second derivative"):
        found.sum().backward()

    douts = torch.randn(3, *out.shape)
    out = fa2.flash_attn_qkvpacked_func(qkv)
    (batch,) = torch.autograd.grad(out, qkv, douts, is_grads_batched=True, retain_graph=True)
    for dout, one in zip(douts, batch, strict=True):
        (alone,) = torch.autograd.grad(out, qkv, dout, retain_graph=True)
        torch.testing.assert_close(one, alone)

    twice = qkv * 2
    out = fa2.flash_attn_qkvpacked_func(twice)
    twice.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

    with torch.autocast("cpu", torch.bfloat16):
        out = fa2.flash_attn_qkvpacked_func(qkv)
    assert out.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(out.float().sum(), qkv)
    assert found.dtype == torch.float32

    sink = torch.zeros(2, requires_grad=True)
    out = fa2.flash_attn_qkvpacked_func(qkv, learnable_sink=sink)
    batch = torch.autograd.grad(out, (qkv, sink), douts, is_grads_batched=True, retain_graph=True)
    for dout, *one in zip(douts, *batch, strict=True):
        alone = torch.autograd.grad(out, (qkv, sink), dout, retain_graph=True)
        torch.testing.assert_close(tuple(one), alone)
    with torch.no_grad():
        sink.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

    mapped = torch.vmap(fa2.flash_attn_qkvpacked_func)(qkv.detach()[:, None])
    torch.testing.assert_close(mapped[:, 0], fa2.flash_attn_qkvpacked_func(qkv.detach()))


@pytest.mark.parametrize("call", ["flash_attn_func", "flash_attn_qkvpacked_func"])
def test_compiled(call: str) -> None:
    """A break in the graph: a program that was compiled whole with flash-attn."""
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    given = qkv.unbind(2) if call == "flash_attn_func" else [qkv]
    function = getattr(fa2, call)

    sink = torch.randn(2, requires_grad=True)

    def step(*given: Any) -> Any:
        options = {"causal": True, "window_size": (-1, 3), "learnable_sink": sink}
        return function(*given, **options, return_attn_probs=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*given), step(*given), strict=True):
        torch.testing.assert_close(got, want)
    dout = torch.randn(2, 5, 2, 8)
    got = torch.autograd.grad(compiled(*given)[0], (qkv, sink), dout)
    torch.testing.assert_close(got, torch.autograd.grad(step(*given)[0], (qkv, sink), dout))


# ---- packed sequences ----------------------------------------------------------------------------------

# Sequences without queries, without keys, with one of each, and with more queries than keys: under a causal mask some
# rows of the last see no key.
ROWS, KEYS = [5, 0, 9, 1, 12], [7, 4, 0, 1, 8]


def packed_sequences(device: str, *, grad: bool = False) -> list[Any]:
    """q, k and v of sequences with ROWS and KEYS, one after the other."""
    shapes = (sum(ROWS), 4, 16), (sum(KEYS), 2, 16), (sum(KEYS), 2, 16)
    return [numbers(*shape, device=device).requires_grad_(grad) for shape in shapes]


def places(device: str, longest_q: Any = 12, longest_k: Any = 8) -> tuple[Any, ...]:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
    return starts_of(ROWS, device), starts_of(KEYS, device), longest_q, longest_k


def one_by_one(fa: Any, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """The output and the log-sum-exp of flash_attn_func for each sequence, one after the other."""
    found = [
        fa.flash_attn_func(x[None], y[None], z[None], return_attn_probs=True, **options)[:2]
        for x, y, z in zip(q.split(ROWS), k.split(KEYS), v.split(KEYS), strict=True)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat([x[0] for x in outs]), torch.cat([x[0] for x in lses], -1)


def require_close(found: Any, expected: Any) -> None:
    """Of float32, or of bfloat16, of which several roundings are allowed."""
    limit = 2e-5 if expected.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@both_versions
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (-1, -1)), (True, (-1, -1)), (True, (3, -1)), (False, (3, 2)), (False, (-1, 4))],
)
def test_varlen_is_a_loop(
    device: str, fa: Any, causal: bool, window: tuple[int, int], with_sink: bool
) -> None:
    """Sequences that see each other; a mask aligned to the last key of all; a log-sum-exp in another order, or with
    another mark of rows that see no key; gradients of another sequence."""
    q, k, v = leaves = packed_sequences(device, grad=True)
    options = {"causal": causal, "window_size": window, "softmax_scale": 0.4, "deterministic": True}
    if with_sink:
        options["learnable_sink"] = torch.randn(4, device=device, requires_grad=True)
        leaves.append(options["learnable_sink"])
    found = fa.flash_attn_varlen_func(q, k, v, *places(device), return_attn_probs=True, **options)
    assert len(found) == (3 if fa is fa2 else 2)
    out, lse = found[:2]
    expected = one_by_one(fa, q, k, v, **options)
    assert (lse.shape, lse.dtype) == ((4, sum(ROWS)), torch.float32)
    assert torch.isfinite(lse[:, :5]).all()
    empty = lse[:, 5:14]  # of the sequence without keys
    if with_sink:
        assert torch.equal(empty, options["learnable_sink"][:, None].expand(4, 9))
    else:
        assert torch.equal(empty, torch.full_like(empty, torch.inf if fa is fa2 else -torch.inf))
    assert (out[5:14] == 0).all()
    for mine, theirs in zip((out, lse), expected, strict=True):
        require_close(mine, theirs)
    weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, weights)
    want = torch.autograd.grad(expected, leaves, weights)
    for mine, theirs in zip(got, want, strict=True):
        require_close(mine, theirs)
    plain = fa.flash_attn_varlen_func(q, k, v, *places(device), **options)
    assert torch.equal(plain, out)


@both_versions
def test_max_seqlen_has_no_effect(device: str, fa: Any) -> None:
    """A window or a grid that is taken from a number that is too small, or read from a GPU."""
    q, k, v = packed_sequences(device)
    expected = fa.flash_attn_varlen_func(q, k, v, *places(device), causal=True, window_size=(3, 0))
    for longest in (0, 1, 1000, None, torch.tensor(12, device=device)):
        given = places(device, longest, longest)
        found = fa.flash_attn_varlen_func(q, k, v, *given, causal=True, window_size=(3, 0))
        assert torch.equal(found, expected)


def test_bounds_of_packed_sequences() -> None:
    """A right bound is off from the number of all keys on, in flash-attn 2, not from max_seqlen_k on: it hides
    something where a sequence has more queries than keys."""
    q, k = torch.randn(9, 1, 8), torch.randn(3, 1, 8)
    one = starts_of([9], "cpu"), starts_of([3], "cpu"), 9, 3
    lse = fa2.flash_attn_varlen_func(q, k, k, *one, window_size=(-1, 3), return_attn_probs=True)[1]
    assert torch.isfinite(lse).all()
    k = torch.cat((k, k))
    two = starts_of([9, 0], "cpu"), starts_of([3, 3], "cpu"), 9, 3
    for fa, window in ((fa2, (-1, 3)), (fa3, (-1, 3)), (fa2, (-1, 5))):
        lse = fa.flash_attn_varlen_func(q, k, k, *two, window_size=window, return_attn_probs=True)[
            1
        ]
        assert torch.isinf(lse).sum() == 6 - window[1]


@both_versions
def test_rows_of_no_sequence(device: str, fa: Any) -> None:
    """Memory that nobody wrote, after the last sequence, in results and in gradients."""
    q, k, v = packed_sequences(device, grad=True)
    rows, keys = starts_of([5, 9], device), starts_of([7, 4], device)
    out, lse = fa.flash_attn_varlen_func(
        q, k, v, rows, keys, 9, 7, causal=True, return_attn_probs=True
    )[:2]
    assert (out[14:] == 0).all()
    assert (lse[:, 14:] == (torch.inf if fa is fa2 else -torch.inf)).all()
    for gradient, end in zip(
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), (14, 11, 11), strict=True
    ):
        assert (gradient[end:] == 0).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_seqused(device: str, causal: bool) -> None:
    """Rows after those that count: seen by others, written to, or a mask that is aligned to the last of them. They
    are NaN here."""
    counts_q, counts_k = [3, 0, 9, 1, 12], [7, 2, 0, 0, 5]
    used_q, used_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (counts_q, counts_k)
    )
    q, k, v = leaves = packed_sequences(device)
    there_q, there_k = (
        torch.cat([torch.arange(n) < count for n, count in zip(sizes, counts, strict=True)])
        for sizes, counts in ((ROWS, counts_q), (KEYS, counts_k))
    )
    for x, there in ((q, there_q), (k, there_k), (v, there_k)):
        x[~there.to(device)] = torch.nan
        x.requires_grad_()
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, *places(device), used_q, used_k, causal=causal, deterministic=True,
        return_attn_probs=True,
    )  # fmt: skip
    weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, weights)
    assert (out[~there_q.to(device)] == 0).all()
    assert torch.isneginf(lse[:, ~there_q.to(device)]).all()
    sequences = zip(q.split(ROWS), k.split(KEYS), v.split(KEYS), counts_q, counts_k, strict=True)
    parts = [
        fa3.flash_attn_func(
            x[None, :rows], y[None, :keys], z[None, :keys], causal=causal, deterministic=True,
            return_attn_probs=True,
        )
        for x, y, z, rows, keys in sequences
    ]  # fmt: skip
    expected = torch.cat([x[0] for x, _ in parts]), torch.cat([x[0] for _, x in parts], -1)
    found = out[there_q.to(device)], lse[:, there_q.to(device)]
    for mine, theirs in zip(found, expected, strict=True):
        require_close(mine, theirs)
    kept = weights[0][there_q.to(device)], weights[1][:, there_q.to(device)]
    want = torch.autograd.grad(expected, leaves, kept)
    for mine, theirs in zip(got, want, strict=True):
        require_close(mine, theirs)

    # The keys' alone, of flash-attn 2's private function.
    with torch.no_grad():
        q = torch.nan_to_num(q)
        only_keys = fa2._flash_attn_varlen_forward(
            q, k, v, *places(device), 0.0, None, causal, seqused_k=used_k
        )
        both = fa3.flash_attn_varlen_func(
            q, k, v, *places(device), None, used_k, causal=causal, return_attn_probs=True
        )
    assert torch.equal(only_keys[0], both[0])
    assert torch.equal(torch.isposinf(only_keys[1]), torch.isneginf(both[1]))


def test_varlen_compiles_as_one_graph() -> None:
    """A break in the graph, one graph for each number of tokens, or lengths that are read while it is traced."""

    def step(q: Any, k: Any, v: Any, rows: Any, keys: Any, sink: Any, longest: int) -> Any:
        options = {"causal": True, "window_size": (6, 3)}
        out_2, lse, _ = fa2.flash_attn_varlen_func(
            q, k, v, rows, keys, longest, longest, **options, return_attn_probs=True,
            learnable_sink=sink,
        )  # fmt: skip
        out_3 = fa3.flash_attn_varlen_func(q, k, v, rows, keys, longest, longest, **options)
        qkv = fa2.flash_attn_varlen_qkvpacked_func(
            torch.stack((k, k, v), 1), keys, longest, causal=True
        )
        return out_2, lse, out_3, qkv

    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    after_each = []
    for lengths_q, lengths_k in (([5, 9, 3], [7, 8, 12]), ([1, 30, 2], [9, 4, 30])):
        rows, keys = starts_of(lengths_q, "cpu"), starts_of(lengths_k, "cpu")
        shapes = (sum(lengths_q), 4, 16), (sum(lengths_k), 2, 16), (sum(lengths_k), 2, 16)
        leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
        leaves.append(torch.randn(4, requires_grad=True))
        given = *leaves[:3], rows, keys, leaves[3], max(*lengths_q, *lengths_k)
        found, expected = compiled(*given), step(*given)
        for mine, theirs in zip(found, expected, strict=True):
            require_close(mine, theirs)
        weights = [torch.randn_like(x) for x in expected]
        got = torch.autograd.grad(found, leaves, weights)
        for mine, theirs in zip(got, torch.autograd.grad(expected, leaves, weights), strict=True):
            require_close(mine, theirs)
        after_each.append(len(graphs))
    assert after_each[0] == after_each[1] > 0


@both_versions
def test_wrong_sequences(fa: Any) -> None:
    """A message about an argument that flash-attn has under another name; offsets of 64 bits that are read as 32."""
    q, k = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
    right = {"cu_seqlens_q": starts_of([3, 4], "cpu"), "cu_seqlens_k": starts_of([5, 4], "cpu")}
    for name, value, text in (
        ("cu_seqlens_q", right["cu_seqlens_q"].long(), "expected dtype int32, got int64"),
        ("cu_seqlens_k", right["cu_seqlens_k"].long(), "expected dtype int32, got int64"),
        ("cu_seqlens_k", starts_of([9], "cpu"), r"expected .*\(3\), got shape \(2\)"),
        ("cu_seqlens_q", None, "expected a torch tensor, got NoneType"),
        ("cu_seqlens_k", None, "expected a torch tensor, got NoneType"),
        ("cu_seqlens_q", [0, 3, 7], "expected a torch tensor, got list"),
        ("cu_seqlens_q", torch.zeros(0, dtype=torch.int32), "expected shape"),
        ("learnable_sink", torch.zeros(3), r"expected .*\(4\), got shape \(3\)"),
        ("q", q[None], "expected 3 dimensions"),
    ):
        given = {"q": q, **right, name: value}
        with pytest.raises(fc.ArgumentError, match=f"^{name}: {text}"):
            fa.flash_attn_varlen_func(k=k, v=k, max_seqlen_q=4, max_seqlen_k=5, **given)


def test_wrong_arguments_of_one_version() -> None:
    q, k = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
    starts = starts_of([3, 4], "cpu"), starts_of([5, 4], "cpu")
    given = q, k, k, *starts, 4, 5
    short, wide = torch.ones(1, dtype=torch.int32), torch.ones(2, dtype=torch.int64)
    lse, fixed = torch.zeros(4, 7), (0.0, None, False, -1, -1, 0.0, None, False)
    recorded = torch.randn(7, 3, 2, 8, requires_grad=True)
    for call, text in {
        lambda: fa3.flash_attn_varlen_func(*given, None, short): r"seqused_k: expected .*\(2\), got",
        lambda: fa3.flash_attn_varlen_func(*given, wide): "seqused_q: expected dtype int32, got int64",
        lambda: fa3.flash_attn_varlen_func(*given, [1, 2]): "seqused_q: expected a torch tensor, got list",
        lambda: fa2._flash_attn_varlen_forward(
            *given, 0.0, None, False, seqused_k=short
        ): r"seqused_k: expected .*\(2\), got",
        lambda: fa2._flash_attn_varlen_backward(
            q, q, k, k, q, lse, None, None, None, starts[0].long(), starts[1], 4, 5, *fixed
        ): "cu_seqlens_q: expected dtype int32",
        lambda: fa2.flash_attn_varlen_qkvpacked_func(q, starts[0], 4): r"qkv: expected a tensor \(total, 3,",
        lambda: fa2.flash_attn_varlen_kvpacked_func(q, k, *starts, 4, 5): r"kv: expected a tensor \(total_k, 2,",
        lambda: fa2.flash_attn_varlen_qkvpacked_func(recorded, starts[0].long(), 4): r"cu_seqlens\w*: expected dtype",
    }.items():  # fmt: skip
        with pytest.raises(fc.ArgumentError, match=f"^{text}"):
            call()
    tables = torch.zeros(2, 2, dtype=torch.int32)
    for call, text in {
        lambda: fa2.flash_attn_varlen_func(*given, block_table=tables): "block_table: a tensor",
        lambda: fa2._flash_attn_varlen_forward(
            *given, 0.0, None, False, leftpad_k=short
        ): "leftpad_k: a tensor",
        lambda: fa2.flash_attn_varlen_func(*given, 0.1): "dropout_p: 0.1",
        lambda: fa2._flash_attn_varlen_backward(
            q, q, k, k, q, lse, None, None, None, *given[3:], 0.1, *fixed[1:]
        ): "dropout_p: 0.1",
    }.items():
        with pytest.raises(fc.UnsupportedError, match=f"^{text}"):
            call()


# ---- private names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [9, 14, 20], ids=lambda rows: f"{rows} queries")
def test_forward_and_backward(rng: np.random.Generator, device: str, rows: int) -> None:
    """What ring attention is made of: results in an order of their own, gradients beside the buffer, rows that see no
    key (20 queries, 14 keys) whose +inf makes NaN, a log-sum-exp that is not contiguous."""
    p = oracle_backward.make_problem(
        rng, dtype_on(device), seqlen_q=rows, seqlen_k=14, heads=4, kv_heads=2, d=16, causal=True
    )
    q, k, v = tensors(p, device)
    dout = torch.tensor(p.dout, dtype=q.dtype, device=device)
    out, lse, s_dmask, rng_state = fa2._flash_attn_forward(
        q, k, v, 0.0, 16**-0.5, True, -1, -1, 0.0, None, False
    )
    expected = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert s_dmask.numel() == 0
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)

    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    buffers = [x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 7.0) for x in (q, k, v)]
    dq, dk, dv = (b[:, :-3] for b in buffers)
    versions = [b._version for b in buffers]
    softmax_d = fa2._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, 0.0, 16**-0.5, True, -1, -1, 0.0, None, False
    )
    oracle_backward.assert_accurate(p, (dq, dk, dv))
    assert all((b[:, -3:] == 7).all() for b in buffers)
    assert all(b._version > before for b, before in zip(buffers, versions, strict=True))
    assert (softmax_d.shape, softmax_d.dtype) == ((2, 4, 128), torch.float32)
    sums = np.einsum("bihd,bihd->bhi", p.dout, oracle.to_numpy(out))
    oracle.assert_close(softmax_d[..., :rows], sums, 1e-5 * np.abs(sums).max(), "softmax_d")


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_varlen_forward_and_backward(device: str, causal: bool) -> None:
    """Results in an order of their own, gradients beside the buffer or not at all where it is None, rows that see no
    key whose +inf makes NaN."""
    q, k, v = leaves = packed_sequences(device, grad=True)
    options = causal, 3, -1, 0.0, None
    given = places(device)
    out, lse, s_dmask, rng_state = fa2._flash_attn_varlen_forward(
        q, k, v, *given, 0.0, 0.4, *options, False
    )
    expected = fa2.flash_attn_varlen_func(
        q, k, v, *given, 0.0, 0.4, causal, (3, -1), deterministic=True, return_attn_probs=True
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert torch.isposinf(lse).any()
    assert s_dmask.numel() == 0
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)

    dout = torch.randn_like(out)
    want = torch.autograd.grad(expected[0], leaves, dout)
    buffers = [x.detach().new_full((x.shape[0] + 3, *x.shape[1:]), 7.0) for x in leaves]
    into = [b[:-3] for b in buffers]
    versions = [b._version for b in buffers]

    def backward(*gradients: Any) -> Any:
        with torch.no_grad():
            return fa2._flash_attn_varlen_backward(
                dout, q, k, v, out, lse, *gradients, *given, 0.0, 0.4, *options, True
            )

    softmax_d = backward(*into)
    for mine, theirs in zip(into, want, strict=True):
        require_close(mine, theirs)
    assert all((b[-3:] == 7).all() for b in buffers)
    assert all(b._version > before for b, before in zip(buffers, versions, strict=True))
    rows = sum(ROWS)
    assert (softmax_d.shape, softmax_d.dtype) == ((4, rows + 128 * len(ROWS)), torch.float32)
    assert (softmax_d[:, rows:] == 0).all()
    require_close(softmax_d[:, :rows], (dout.float() * out.float()).sum(-1).T)

    dk = torch.full_like(k, 7.0)
    assert torch.equal(backward(None, dk, None), softmax_d)
    require_close(dk, want[1])


def test_gradients_of_misaligned_tensors(rng: np.random.Generator, device: str) -> None:
    """Kernels that are chosen by the addresses of q, k and v alone: on a GPU the others must be multiples of what they
    copy at once, too."""
    p = oracle_backward.make_problem(
        rng, dtype_on(device), seqlen_q=9, seqlen_k=9, heads=4, kv_heads=4, d=16
    )
    q, k, v = tensors(p, device)

    def one_element_in(x: Any) -> Any:
        moved = x.new_empty(x.numel() + 1)[1:].view_as(x)
        return moved.copy_(x)

    dout = one_element_in(torch.tensor(p.dout, dtype=q.dtype, device=device))
    out, lse, *_ = fa2._flash_attn_forward(q, k, v, 0.0, None, False, -1, -1, 0.0, None, False)
    found = [one_element_in(torch.zeros_like(x)) for x in (q, k, v)]
    fa2._flash_attn_backward(
        dout, q, k, v, out, lse, *found, 0.0, None, False, -1, -1, 0.0, None, False
    )
    oracle_backward.assert_accurate(p, found)

    qkv = torch.stack((q, k, v), 2).requires_grad_()
    (found,) = torch.autograd.grad(fa2.flash_attn_qkvpacked_func(qkv), qkv, dout)
    oracle_backward.assert_accurate(p, found.unbind(2))


def test_forward_records_gradients() -> None:
    """A constant where autograd is on: a loss that is silently wrong."""
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = fa2._flash_attn_forward(q, q, q, 0.0, None, False, -1, -1, 0.0, None, False)[0]
    out.sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [4, 9], ids=lambda rows: f"{rows} queries")
def test_as_diffusers_calls(rng: np.random.Generator, rows: int) -> None:
    """To get a log-sum-exp it asks for dropout of 1e-30 and for its mask, and it hands the log-sum-exp back transposed,
    of which flash-attn sees the memory alone; with as many queries as heads the shape does not tell."""
    p = oracle_backward.make_problem(rng, "float32", seqlen_q=rows, seqlen_k=rows, heads=4, d=16)
    q, k, v = tensors(p, "cpu")
    dout = torch.tensor(p.dout, dtype=torch.float32)
    common = 1e-30, 16**-0.5, False, -1, -1, 0.0, None
    out, lse, _, rng_state = fa2._wrapped_flash_attn_forward(q, k, v, *common, True)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    given = dout, q, k, v, out, lse.permute(0, 2, 1), *gradients
    fa2._wrapped_flash_attn_backward(*given, *common, False, rng_state)
    oracle_backward.assert_accurate(p, gradients)


def test_what_private_names_refuse() -> None:
    q = torch.randn(1, 4, 2, 8)
    lse = torch.zeros(1, 2, 4)

    def gradients(dq: Any = q, dropout_p: float = 0.0, softcap: float = 0.0) -> Any:
        return fa2._flash_attn_backward(
            q, q, q, q, q, lse, dq, q, q, dropout_p, None, False, -1, -1, softcap, None, False
        )

    with pytest.raises(fc.ArgumentError, match=r"^dq: expected a torch tensor, got NoneType"):
        gradients(dq=None)
    for changes, name in (
        ({"dropout_p": 0.1}, "dropout_p: 0.1"),
        ({"softcap": 2.0}, "softcap: 2.0"),
    ):
        with pytest.raises(fc.UnsupportedError, match=f"^{name}"):
            gradients(**changes)


# ---- bert_padding --------------------------------------------------------------------------------------


def test_unpad_and_pad(device: str) -> None:
    """Tokens of another sequence; lengths that count what is not there; a gradient that padding receives."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], device=device)
    hidden = torch.randn(3, 4, 2, 5, device=device, requires_grad=True)
    packed, indices, cu_seqlens, longest, used = padding.unpad_input(hidden, mask)
    assert torch.equal(packed, hidden[mask.bool()])
    assert indices.tolist() == [0, 1, 5, 6, 7]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 5, 5], torch.int32)
    assert longest == 3
    assert type(longest) is int
    assert (used.tolist(), used.dtype) == ([2, 3, 0], torch.int32)
    padded = padding.pad_input(packed, indices, 3, 4)
    assert torch.equal(padded, hidden * mask[..., None, None])
    padded.sum().backward()
    assert torch.equal(hidden.grad, mask[..., None, None].expand_as(hidden).to(hidden.dtype))


def test_unpad_with_unused_tokens() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    unused = torch.tensor([[0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    hidden = torch.randn(2, 3, 4)
    packed, indices, cu_seqlens, longest, used = padding.unpad_input(hidden, mask, unused)
    assert indices.tolist() == [0, 1, 3, 4]
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 4], 2, [1, 2])


def test_unpad_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.randn(3, 6, 4)
    packed, indices, cu_seqlens, longest = padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 5, 8, 10, 16], torch.int32)
    assert longest == 6


def test_index_first_axis_residual() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    indices = torch.tensor([1, 4])
    chosen, residual = padding.index_first_axis_residual(x, indices)
    (chosen.sum() + 2 * residual.sum()).backward()
    assert x.grad[:, 0].tolist() == [2, 3, 2, 2, 3]
