"""Everything that a caller can get wrong: which exception, that its message names the argument,
what came and what is allowed, and that `out` is untouched. Nothing here may leak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner
from flashcute._cli.options import config_options
from optional_torch import torch
from tensors import VARIANT, with_variant

SENTINEL = 7.0
NAN = float("nan")


def full(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, SENTINEL, dtype=dtype, device=device)


def good_arguments(device: str) -> SimpleNamespace:
    """A call that works: q (2, 5, 4, 8), k and v (2, 7, 2, 8), out filled with the sentinel."""
    torch.manual_seed(0)
    q = torch.randn(2, 5, 4, 8).half().to(device)
    k, v = (torch.randn(2, 7, 2, 8).half().to(device) for _ in range(2))
    return SimpleNamespace(q=q, k=k, v=v, out=full(2, 5, 4, 8, device=device), options={})


def arch_of(device: str) -> str | int:
    return "cpu" if device == "cpu" else fc._core.driver_info().gpus[0].arch


def call(name: str, device: str, a: SimpleNamespace) -> object:
    # Arrays as functions of a tensor that is on their device.
    made = {n: x(a.q) if callable(x) else x for n, x in a.options.items()}
    options = {"out": a.out, **made}
    if name == "flash_attention":
        return fc.flash_attention(a.q, a.k, a.v, **options)
    if any(name in options for name in VARIANT):
        options = with_variant(**options)
    cfg = options.pop("cfg", None) or fc.default_config(8, "float16", arch_of(device))
    return fc.forward(cfg, a.q, a.k, a.v, **options)


both_calls = pytest.mark.parametrize("name", ["flash_attention", "forward"])


@both_calls
def test_the_good_call_is_good(device: str, name: str) -> None:
    """What the cases below change one thing of works, and writes `out`."""
    a = good_arguments(device)
    call(name, device, a)
    assert not (a.out == SENTINEL).any()


# ---- tensors -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bad:
    """One mistake. `says` are regular expressions that the message must match, all of them."""

    name: str
    change: Callable[[SimpleNamespace], Any]
    says: list[str]
    error: type[Exception] | tuple[type[Exception], ...] = fc.ArgumentError


def change(**tensors: Callable[[torch.Tensor], Any]) -> Callable[[SimpleNamespace], None]:
    """Replaces arguments by functions of themselves."""

    def apply(a: SimpleNamespace) -> None:
        for name, function in tensors.items():
            setattr(a, name, function(getattr(a, name)))

    return apply


def option(**options: Any) -> Callable[[SimpleNamespace], None]:
    return lambda a: a.options.update(options)


def int32(like: torch.Tensor, n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.int32, device=like.device)


def widen(x: torch.Tensor, d: int) -> torch.Tensor:
    return full(*x.shape[:3], d, device=str(x.device))


def overlap(a: SimpleNamespace) -> None:
    """out starts inside q."""
    memory = full(2 * a.q.numel(), device=str(a.q.device))
    a.q = memory[: a.q.numel()].view(a.q.shape)
    a.out = memory[16 : 16 + a.q.numel()].view(a.q.shape)


def unequal_head_dim(a: SimpleNamespace) -> None:
    a.k, a.v = widen(a.k, 16), widen(a.v, 16)


ALL_DTYPES = "float16, bfloat16, float32 or float64"
TENSORS = [
    # rank
    *(
        Bad(f"{t} of rank 3", change(**{t: lambda x: x[0]}),
            [rf"^{t}: expected 4 dimensions", r"got 3", r"shape \(\d+, \d+, 8\)"])
        for t in ("q", "k", "v", "out")
    ),
    Bad("q of rank 5", change(q=lambda x: x[None]), ["^q: expected 4 dimensions", "got 5"]),
    Bad("q of rank 0", change(q=lambda x: x[0, 0, 0, 0]), ["^q: expected 4 dimensions", "got 0"]),
    # dtype
    *(
        Bad(f"q of {got}", change(q=lambda x, dtype=dtype: x.to(dtype)),
            [f"^q: expected dtype {ALL_DTYPES}, got {got}"])
        for dtype, got in [(torch.int32, "int32"), (torch.uint8, "uint8"), (torch.bool, "bool"),
                           (torch.complex64, "complex64")]
    ),
    Bad("q of float8", change(q=lambda x: x.to(torch.float8_e4m3fn)),
        [f"^q: expected dtype {ALL_DTYPES}, got .*8"]),
    *(
        Bad(f"{t} of another dtype", change(**{t: lambda x: x.bfloat16()}),
            [rf"^{t}: expected dtype float16 as in q, got bfloat16"])
        for t in ("k", "v", "out")
    ),
    # shape
    Bad("head_dim 0", change(q=lambda x: x[..., :0], k=lambda x: x[..., :0], v=lambda x: x[..., :0],
                             out=lambda x: x[..., :0]),
        ["head_dim", "between 1 and 256", "got 0"]),
    Bad("head_dim 257", change(q=lambda x: widen(x, 257), k=lambda x: widen(x, 257),
                               v=lambda x: widen(x, 257), out=lambda x: widen(x, 257)),
        ["head_dim", "between 1 and 256", "got 257"]),
    Bad("k of another head_dim", unequal_head_dim, ["^k: expected head_dim 8 as in q, got 16"]),
    Bad("v of head_dim 257", change(v=lambda x: widen(x, 257)),
        ["^v: expected head_dim between 1 and 256, got 257"]),
    Bad("v of a head_dim that out does not have", change(v=lambda x: x[..., :4]),
        [r"^out: expected shape \(2, 5, 4, 4\) as q, with v's head_dim, got \(2, 5, 4, 8\)"]),
    Bad("heads that do not divide", change(k=lambda x: torch.cat([x, x], 2)[:, :, :3],
                                           v=lambda x: torch.cat([x, x], 2)[:, :, :3]),
        ["^k: expected a number of heads that divides q's 4, got 3"]),
    Bad("no key heads", change(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0]),
        ["^k: expected a number of heads that divides q's 4, got 0"]),
    Bad("v of other heads", change(v=lambda x: x[:, :, :1]),
        ["^v: expected number of heads 2 as in k, got 1"]),
    Bad("v of another length", change(v=lambda x: x[:, :6]),
        ["^v: expected seqlen 7 as in k, got 6"]),
    Bad("k of another batch", change(k=lambda x: x[:1]),
        ["^k: expected batch size 2 as in q, got 1"]),
    Bad("v of another batch", change(v=lambda x: x[:1]),
        ["^v: expected batch size 2 as in q, got 1"]),
    Bad("out of another shape", change(out=lambda x: x[:, :4]),
        [r"^out: expected shape \(2, 5, 4, 8\) as q, with v's head_dim, got \(2, 4, 4, 8\)"]),
    # strides
    *(
        Bad(f"{t} with last stride 2", change(**{t: lambda x: torch.cat([x, x], 3)[..., ::2]}),
            [rf"^{t}: expected last stride 1, got 2", "contiguous"])
        for t in ("q", "k", "v", "out")
    ),
    Bad("k with last stride 0", change(k=lambda x: x[..., :1].expand_as(x)),
        ["^k: expected last stride 1, got 0"]),
    Bad("out with stride 0", change(out=lambda x: x[:1].expand_as(x)),
        ["^out: expected every element at an address of its own, got stride 0 in dimension 0"]),
    Bad("out with rows on top of each other",
        change(out=lambda x: full(1000, device=str(x.device)).as_strided(x.shape, (160, 16, 8, 1))),
        ["^out: expected every element at an address of its own"]),
    # memory
    Bad("out is q", lambda a: setattr(a, "out", a.q.fill_(SENTINEL)),
        ["^out: expected memory of its own, got memory that q uses too"]),
    Bad("out overlaps q", overlap, ["^out: expected memory of its own, got .*q"]),
    # what is no tensor
    *(
        Bad(f"{t} is {got}", change(**{t: lambda x, value=value: value}),
            [rf"^{t}: expected an array", rf"got .*{got}"])
        for t in ("q", "k", "v")
        for value, got in [([1.0], "list"), (None, "None"), (3, "int"), ("text", "str")]
    ),
    Bad("out is a list", lambda a: a.options.update(out=[1]),
        ["^out: expected an array", "got .*list"]),
    # options
    Bad("scale is NaN", option(scale=NAN), ["^scale: expected a finite number >= 0, got nan"]),
    Bad("scale is inf", option(scale=float("inf")),
        ["^scale: expected a finite number.* got inf"]),
    Bad("scale < 0", option(scale=-0.5), ["^scale: expected a finite number >= 0, got -0.5"]),
    *(
        Bad(f"layout {text!r}", option(layout=text),
            [rf"^layout: expected 'bshd' or 'bhsd', got '{text}'"])
        for text in ("bsdh", "BSHD", "", "bshd ")
    ),
    # options of the wrong type
    *(
        Bad(f"{key} is {value!r}", option(**{key: value}), [rf"^{key}: expected ", rf"got .*{got}"],
            (fc.ArgumentError, TypeError))
        for key, value, got in [("scale", "x", "'x'|str"), ("layout", None, "None"),
                                ("layout", 3, "3|int"), ("causal", "yes", "'yes'|str"),
                                ("causal", "False", "'False'|str"), ("causal", None, "None")]
    ),
    # arrays beside q, k and v
    *(
        Bad(f"{key} {what}", option(**{key: made}, causal=True), [rf"^{key}: expected .*\(batch,\)", got])
        for key in ("seqlens_q", "seqlens_k", "prefix")
        for what, made, got in [
            ("of another batch", lambda t: int32(t, 3), "got .*3"),
            ("of no dimension", lambda t: int32(t, 2)[0], r"got .*\(\)"),
            ("of two dimensions", lambda t: int32(t, 2)[None], r"got .*\(1, 2\)"),
            ("with a stride", lambda t: int32(t, 4)[::2], "contiguous"),
            ("with stride 0", lambda t: int32(t, 1).expand(2), "contiguous"),
        ]
    ),
    *(
        Bad(f"{key} of {got}", option(**{key: lambda t, d=dtype: int32(t, 2).to(d)}, causal=True),
            [rf"^{key}: expected dtype int32.*got {got}"])
        for key in ("seqlens_q", "seqlens_k", "prefix")
        for dtype, got in [(torch.int64, "int64"), (torch.float32, "float32"), (torch.bool, "bool")]
    ),
    *(
        Bad(f"{key} is {value!r}", option(**{key: value}), [rf"^{key}: expected an array that supports DLPack", got])
        for key in ("seqlens_q", "seqlens_k", "sink")
        for value, got in [([3, 4], "got builtins.list"), (3, "got builtins.int")]
    ),
    Bad("prefix is a list", option(prefix=[3, 4], causal=True), ["^prefix: expected an integer >= 0 .*got .3, 4"]),
    Bad("prefix < 0", option(prefix=-1, causal=True), ["^prefix: expected an integer >= 0 of 64 bits, .*got -1"]),
    Bad("prefix without causal", option(prefix=3), ["^prefix: expected causal=True with it, got causal=False"]),
    Bad("sink of another number of heads", option(sink=lambda t: torch.zeros(2, device=t.device)),
        [r"^sink: expected .*\(heads,\) = \(4\)", "got .*2"]),
    Bad("sink of two dimensions", option(sink=lambda t: torch.zeros(4, 1, device=t.device)),
        [r"^sink: expected .*\(heads,\)", r"got .*\(4, 1\)"]),
    Bad("sink with a stride", option(sink=lambda t: torch.zeros(8, device=t.device)[::2]),
        [r"^sink: expected a contiguous tensor"]),
    *(
        Bad(f"sink of {got}", option(sink=lambda t, d=dtype: torch.zeros(4, device=t.device).to(d)),
            [rf"^sink: expected .*float32.* got {got}"])
        for dtype, got in [(torch.bfloat16, "bfloat16"), (torch.float64, "float64"), (torch.int32, "int32")]
    ),
    Bad("out is where the sink is", lambda a: a.options.update(sink=a.out.view(-1)[:4]),
        ["^out: expected memory of its own, got memory that sink uses too"]),
    # streams
    *(
        Bad(f"stream is {value!r}", option(stream=value),
            [r"^stream: expected None, a CUstream address, or a stream", rf"got .*{value}"])
        for value in ("text", 1.5, True)
    ),
]  # fmt: skip


def check_refused(bad: Bad, name: str, device: str, a: SimpleNamespace) -> None:
    with pytest.raises(bad.error) as caught:
        call(name, device, a)
    message = str(caught.value)
    for pattern in bad.says:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
    assert "Traceback" not in message
    if device == "cuda":
        torch.cuda.synchronize()
    out = a.options.get("out", a.out)
    if isinstance(out, torch.Tensor):
        assert (out.double() == SENTINEL).all(), "out was written before the error was raised"


@both_calls
@pytest.mark.parametrize("bad", TENSORS, ids=lambda b: b.name)
def test_bad_argument(device: str, name: str, bad: Bad) -> None:
    """Each mistake alone, in an otherwise good call: named, and nothing is launched or written."""
    a = good_arguments(device)
    bad.change(a)
    check_refused(bad, name, device, a)


def test_integers_that_are_no_stream(device: str, fresh: Runner) -> None:
    """Negative and too large addresses. In a process of its own: torch, told of such a stream,
    may crash later."""
    printed = fresh(
        f"""
        import os, torch, flashcute as fc
        q = torch.ones(1, 8, 1, 8, dtype=torch.float16, device={device!r})
        out = torch.full_like(q, 7)
        for stream in (-1, 2**70):
            try:
                fc.flash_attention(q, q, q, out=out, stream=stream)
            except Exception as error:
                print(type(error).__name__, error)
            else:
                print("accepted")
        print("untouched" if (out == 7).all() else "written", flush=True)
        os._exit(0)
        """
    ).stdout.splitlines()
    assert [line.partition(", got")[0] for line in printed] == [
        "ArgumentError stream: expected None, a CUstream address, or a stream of torch or CuPy",
        "ArgumentError stream: expected None, a CUstream address, or a stream of torch or CuPy",
        "untouched",
    ]


@both_calls
@pytest.mark.parametrize("key", ["foo", "mask", "is_causal", "softmax_scale"])
def test_unknown_option(name: str, key: str) -> None:
    """A misspelled option is not swallowed."""
    a = good_arguments("cpu")
    a.options[key] = True
    with pytest.raises(TypeError, match=key):
        call(name, "cpu", a)
    assert (a.out == SENTINEL).all()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_dimensions_are_named_in_the_order_of_the_layout(layout: str) -> None:
    """The message about the rank spells the order that was asked for."""
    q = torch.ones(2, 5, 8)
    order = {"bshd": "batch, seqlen, heads, head_dim", "bhsd": "batch, heads, seqlen, head_dim"}
    with pytest.raises(fc.ArgumentError, match=rf"^q: expected 4 dimensions \({order[layout]}\)"):
        fc.flash_attention(q, q, q, layout=layout)
    with pytest.raises(fc.ArgumentError, match=r"^q: expected 4 dimensions"):
        fc.flash_attention(q, q, q, layout=layout, return_lse=True)


def test_length_over_the_limit() -> None:
    """2^31 rows, by a stride of 0: refused, not truncated to 32 bits."""
    x = torch.ones(1, 1, 1, 8)
    long = x.expand(1, 2**31, 1, 8)
    with pytest.raises(fc.ArgumentError, match=r"^q: expected seqlen at most \d+, got 2147483648"):
        fc.flash_attention(long, x, x, out=long)
    with pytest.raises(fc.ArgumentError, match=r"^k: expected seqlen at most \d+, got 2147483648"):
        fc.flash_attention(x, long, long)


@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (5, 5)}], ids=["causal", "window"])
def test_lengths_over_the_limit_together(mask: dict[str, Any]) -> None:
    """2^31 queries and keys: the number of a query and that of a diagonal, whose sum does not fit 32 bits."""
    long = torch.ones(1, 1, 1, 8).expand(1, 2**30, 1, 8)
    with pytest.raises(
        fc.ArgumentError,
        match=r"^k: expected with these options a seqlen that is, with q's, at most \d+, got 2147483648",
    ):
        fc.flash_attention(long, long, long, out=long, **mask)


def test_more_elements_than_memory_has_addresses() -> None:
    """By strides of 0: products of sizes must not wrap, which would pass a tensor off as empty or as small."""
    x = torch.ones(1, 1, 1, 8).half()
    shape = (2**29, 2**29, 2, 8)
    refused = r"^{}: expected at most \d+ elements, got shape \(536870912, 536870912, 2, 8\)"
    with pytest.raises(fc.ArgumentError, match=refused.format("q")):
        fc.flash_attention(x.expand(shape), x, x, out=x)
    with pytest.raises(fc.ArgumentError, match=refused.format("k")):
        fc.flash_attention(x, x.expand(shape), x)
    for like in (x.expand(shape), np.broadcast_to(np.float16(1), (2**28, 2**28, 2, 8))):
        told = fc.explain(like, like, like)
        assert told.backend == ""
        assert any("q: expected at most" in reason for _, reason in told.rejected)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradients_are_not_dropped(device: str, which: str) -> None:
    """An array interface silently cuts the graph: `forward` refuses a tensor that requires a gradient."""
    a = good_arguments(device)
    getattr(a, which).requires_grad_()
    message = rf"^{which}: expected a tensor without requires_grad, got requires_grad=True.*no_grad"
    with pytest.raises(fc.ArgumentError, match=message):
        call("forward", device, a)
    with pytest.raises(fc.ArgumentError, match=r"^out: expected None where gradients are recorded"):
        call("flash_attention", device, a)
    assert (a.out == SENTINEL).all()
    with torch.no_grad():
        call("flash_attention", device, a)
    assert not (a.out == SENTINEL).any()


@pytest.mark.gpu
def test_gradients_of_float64_on_a_gpu_have_no_kernel() -> None:
    """Raises where that is asked for, else torch computes; explain says so beforehand."""
    a = good_arguments("cuda")
    q, k, v = (x.double().requires_grad_() for x in (a.q, a.k, a.v))
    with pytest.raises(
        fc.UnsupportedError, match=r"gradients.* float64 has no .*scaled_dot_product_attention"
    ):
        fc.flash_attention(q, k, v, on_unsupported="error")
    with pytest.warns(UserWarning, match="gradients"):
        fc.flash_attention(q, k, v).sum().backward()
    assert fc.explain(q, k, v).backend == "torch"
    assert fc.explain(q, k, v, on_unsupported="error").backend == ""


@both_calls
def test_out_that_requires_a_gradient(device: str, name: str) -> None:
    """Writing into a leaf behind autograd's back would cut the graph there; torch's own out=
    refuses it too."""
    a = good_arguments(device)
    a.out.requires_grad_()
    with pytest.raises((fc.ArgumentError, fc.UnsupportedError), match=r"^out: .*requires_grad"):
        call(name, device, a)
    assert (a.out == SENTINEL).all()


@both_calls
def test_gradients_of_k_are_not_dropped_when_q_is_numpy(name: str) -> None:
    """The same where q belongs to a library that knows no gradients."""
    a = good_arguments("cpu")
    a.q, a.out = a.q.numpy(), a.out.numpy()
    a.k.requires_grad_()
    with pytest.raises((fc.ArgumentError, fc.UnsupportedError), match="grad"):
        call(name, "cpu", a)
    assert (a.out == SENTINEL).all()


# ---- features that are not there yet -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attn_mask": torch.ones(5, 7)}, "^float attn_mask is not supported yet.*scaled_dot_product_attention"),
        ({"dropout_p": 0.1}, "dropout_p=0.1.*scaled_dot_product_attention"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_unsupported_feature(device: str, library: str, options: dict, says: str) -> None:
    """Refused by name, with what to use instead; never accepted and ignored. torch tensors may go to torch's
    own attention instead: see test_torch.py."""
    if library == "numpy" and device != "cpu":
        pytest.skip("NumPy has no GPU arrays")
    a = good_arguments(device)
    a.options = dict(options)
    if library == "torch":
        a.options["on_unsupported"] = "error"
    else:
        a.q, a.k, a.v, a.out = (x.numpy() for x in (a.q, a.k, a.v, a.out))
    with pytest.raises(fc.UnsupportedError, match=says):
        call("flash_attention", device, a)
    assert (a.out == SENTINEL).all()


@pytest.mark.parametrize("value", ["ignore", "", True, 0])
def test_on_unsupported(value: object) -> None:
    """Spelled as documented."""
    a = good_arguments("cpu")
    a.options = {"on_unsupported": value}
    with pytest.raises(fc.ArgumentError, match=r"^on_unsupported: expected 'warn', .*got"):
        call("flash_attention", "cpu", a)
    assert (a.out == SENTINEL).all()


# ---- configurations at call time -----------------------------------------------------------------


def test_configuration_for_another_dtype(device: str) -> None:
    """A configuration is compiled for one dtype."""
    a = good_arguments(device)
    a.options["cfg"] = fc.default_config(8, "bfloat16", arch_of(device))
    with pytest.raises(fc.ConfigError, match=r"^cfg: dtype bfloat16 does not fit .* float16"):
        call("forward", device, a)
    assert (a.out == SENTINEL).all()


def test_configuration_for_a_smaller_head_dim(device: str) -> None:
    """A kernel compiled for 64 columns would compute 64 of 72."""
    a = good_arguments(device)
    a.q, a.k, a.v, a.out = (widen(x, 72) for x in (a.q, a.k, a.v, a.out))
    a.options["cfg"] = fc.default_config(64, "float16", arch_of(device))
    with pytest.raises(fc.ConfigError, match=r"^cfg: head_dim 64 is smaller than the tensors' 72"):
        call("forward", device, a)
    assert (a.out == SENTINEL).all()


def test_mixed_dtypes_of_a_narrow_head_dim() -> None:
    """16-bit rows that are aligned to less than an element of another tensor's dtype: an exception,
    not a division by zero."""
    q = np.ones((1, 4, 2, 6), np.float16)
    wide = q.astype(np.float64)
    with pytest.raises(fc.ArgumentError, match=r"^k: expected dtype float16 as in q, got float64"):
        fc.flash_attention(q, wide, q)
    with pytest.raises(
        fc.ArgumentError, match=r"^out: expected dtype float16 as in q, got float64"
    ):
        fc.flash_attention(q, q, q, out=wide)
    assert fc.explain(q, q, wide).backend == ""


def test_outputs_that_are_too_large_are_not_allocated() -> None:
    """v's head dim is checked before memory for an output of that width is asked for."""
    q = np.ones((1, 4, 2, 8), np.float16)
    endless = np.broadcast_to(np.float16(1), (1, 4, 2, 2**45))
    with pytest.raises(fc.ArgumentError, match=r"^v: "):
        fc.flash_attention(q, q, endless)
    with pytest.raises(fc.ArgumentError, match=r"^v: expected 4 dimensions"):
        fc.flash_attention(q, q, np.array(1, np.float16))


@pytest.mark.parametrize("cfg", ["fast", 3, {"head_dim": 8}], ids=repr)
def test_configuration_of_the_wrong_type(cfg: object) -> None:
    """Named like every other argument."""
    a = good_arguments("cpu")
    with pytest.raises(
        (fc.ArgumentError, fc.ConfigError, TypeError), match=r"^cfg: expected .*got"
    ):
        fc.forward(cfg, a.q, a.k, a.v, out=a.out)  # type: ignore[arg-type]
    assert (a.out == SENTINEL).all()


# ---- the rules of configurations -----------------------------------------------------------------

GPU = fc.ForwardConfig(dtype="float16", head_dim=64, block_m=128, block_n=128)
HOPPER = fc.default_config(128, "float16", "sm_90")
RULES = {
    "arch_too_old": [(GPU, "sm_75"), (GPU, "sm_70")],
    "gpu_dtype": [(GPU.replace(dtype="float64"), "sm_90")],
    "gpu_head_dim": [
        (GPU.replace(**{option: d}), "sm_80")
        for option in ("head_dim", "head_dim_v") for d in (0, 8, 72, 272)
    ],
    "cpu_head_dim": [
        (GPU.replace(**{option: d}), "cpu")
        for option in ("head_dim", "head_dim_v") for d in (0, -1, 257)
    ],
    "cpu_block_m": [(GPU.replace(block_m=m), "cpu") for m in (0, -64, 72, 512)],
    "num_warps": [(GPU.replace(num_warps=n), "sm_80") for n in (0, -4, 3, 16)],
    "block_m": [(GPU.replace(block_m=m), "sm_80") for m in (0, -64, 32, 72, 512)],
    "block_n": [
        (GPU.replace(block_n=n), a) for n in (0, -16, 24, 512) for a in ("cpu", "sm_80")
    ],
    "blocks_per_sm": [(GPU.replace(blocks_per_sm=n), "sm_80") for n in (0, 17)],
    "copy_bytes": [
        *((GPU.replace(copy_bytes=n), "sm_80") for n in (0, 1, 12, 32)),
        (GPU.replace(dtype="float32", copy_bytes=2), "sm_80"),
    ],
    "async_copy": [(GPU.replace(copy_bytes=2), "sm_80")],
    "copy_rows": [
        (GPU.replace(block_n=16, num_warps=8), "sm_80"), (GPU.replace(head_dim=16, block_n=32), "sm_80")
    ],
    "fragments": [
        (GPU.replace(math="cuda_core", q_in_registers=True), "sm_80"),
        (GPU.replace(math="cuda_core", k_tiles_per_load=1), "sm_80"),
        (GPU.replace(dtype="float32", math="tf32x3", q_in_registers=True), "sm_80"),
    ],
    "tf32x3": [(GPU.replace(math="tf32x3"), "sm_80")],
    "stages": [
        *((GPU.replace(stages=n), "sm_80") for n in (0, 3)),
        (GPU.replace(stages=2, eager_load_blocks=False), "sm_80"),
    ],
    "rescale_threshold": [
        (cfg.replace(rescale_threshold=t), "sm_90") for cfg in (GPU, HOPPER) for t in (-1, 9)
    ],
    "k_tiles_per_load": [
        (GPU.replace(k_tiles_per_load=-1), "sm_80"), (GPU.replace(k_tiles_per_load=3), "sm_80"),
        (GPU.replace(k_tiles_per_load=2, block_n=48), "sm_80"),
        (GPU.replace(k_tiles_per_load=2, head_dim=80), "sm_80"),
    ],
    "sm90_arch": [(HOPPER, arch) for arch in ("sm_80", "sm_100")],
    "sm90_dtype": [(HOPPER.replace(dtype=t), "sm_90") for t in ("float32", "float64")],
    "sm90_math": [(HOPPER.replace(math=m), "sm_90") for m in ("tf32x3", "cuda_core")],
    "sm90_head_dim": [
        (HOPPER.replace(**{option: d}), "sm_90")
        for option in ("head_dim", "head_dim_v") for d in (0, 32, 72, 320)
    ],
    "sm90_block_m": [
        (HOPPER.replace(block_m=m, num_warps=w), "sm_90") for m, w in ((128, 4), (96, 6), (256, 16), (0, 0))
    ],
    "sm90_stages": [(HOPPER.replace(stages=n), "sm_90") for n in (0, 1, 9)],
    "cluster": [(HOPPER.replace(cluster=n), "sm_90") for n in (0, 3, 4)],
    "other_kernel": [
        *((HOPPER.replace(**change), "sm_90")
          for change in (
            {"blocks_per_sm": 1}, {"copy_bytes": 8}, {"async_copy": False}, {"eager_load_blocks": False},
            {"swizzled": False}, {"q_in_registers": True}, {"k_tiles_per_load": 1}, {"mma_double_buffer": False},
        )),
        *((GPU.replace(**{option: value}), arch)
          for option, value in (
            ("pingpong", False), ("overlap", False), ("stale_max", False), ("scores_ahead", True), ("late_store", True),
            ("cluster", 2),
        )
        for arch in ("sm_80", "sm_90")),
    ],
    "stale_max": [
        (HOPPER.replace(**change), "sm_90")
        for change in ({"overlap": False}, {"optimized_softmax": False}, {"rescale_threshold": 0})
    ],
    "scores_ahead": [(HOPPER.replace(scores_ahead=True, stale_max=False), "sm_90")],
    "late_store": [(HOPPER.replace(late_store=True, stale_max=False, overlap=False), "sm_90")],
    "smem": [
        (HOPPER.replace(stages=4), "sm_90"),
        (GPU.replace(head_dim=128, block_m=256, block_n=256), "sm_80"),
        (GPU.replace(head_dim=128, block_m=256, block_n=256), "sm_86"),
        (GPU.replace(head_dim=128, block_m=256, block_n=128), "sm_89"),
        (GPU.replace(head_dim=128, block_m=256, block_n=128, num_warps=8), "sm_120"),
    ],
}  # fmt: skip


def sentences() -> dict[str, str]:
    """Rule -> sentence, from the header that is shipped for run-time compilation."""
    header = Path(fc.__file__).parent / "include" / "flashcute" / "core" / "forward_config.hpp"
    return dict(re.findall(r'RULE\((\w+), "([^"]+)"\)', header.read_text()))


def test_every_rule_is_tested() -> None:
    """A new rule without a line above would go unnoticed."""
    assert sentences().keys() == RULES.keys()


@pytest.mark.parametrize(
    ("rule", "cfg", "arch"), [(r, *case) for r, cases in RULES.items() for case in cases],
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_rules_without_a_gpu(rule: str, cfg: fc.ForwardConfig, arch: str) -> None:
    """check() tells the rule, the values that it names, and on a GPU those that are not the default, on any machine."""
    with pytest.raises(fc.ConfigError) as caught:
        cfg.check(arch)
    message = str(caught.value)
    assert message.startswith(f"cfg: {sentences()[rule]} (got ")
    for name in config_options(fc.ForwardConfig):
        named = name in sentences()[rule]
        changed = name != "head_dim_v" and getattr(cfg, name) != getattr(fc.ForwardConfig(), name)
        if named or (changed and arch != "cpu"):
            assert f"{name}={getattr(cfg, name)!r}" in message
    for name in ("dtype", "head_dim", "block_m", "block_n"):
        assert f"{name}={getattr(cfg, name)!r}" in message
    if arch != "cpu":
        number = int(arch.removeprefix("sm_"))
        assert f"GPU of compute capability {number // 10}.{number % 10}" in message


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", 90])
@pytest.mark.parametrize("d", [8, 64, 72, 128, 256])
def test_defaults_keep_the_rules_everywhere(arch: str, d: int) -> None:
    """One default tile serves every GPU, also those with 99 KB of shared memory."""
    for dtype in ("float16", "bfloat16", "float32"):
        fc.default_config(d, dtype, arch).check(arch)


@pytest.mark.parametrize(
    "cfg",
    [GPU.replace(head_dim=0), GPU.replace(block_m=72), GPU.replace(block_n=24)],
    ids=lambda c: c.name,
)
def test_check_and_the_call_say_the_same(device: str, cfg: fc.ForwardConfig) -> None:
    """One sentence per rule, wherever it is met."""
    a = good_arguments(device)
    with pytest.raises(fc.ConfigError) as checked:
        cfg.check(arch_of(device))
    a.options["cfg"] = cfg
    with pytest.raises(fc.ConfigError) as called:
        call("forward", device, a)
    assert str(called.value) == str(checked.value)
    assert (a.out == SENTINEL).all()


@pytest.mark.parametrize("arch", ["sm_9x", "", "gpu", "90a", "sm_", -5, 9, None, 1.5])
def test_bad_arch(arch: object) -> None:
    """Architectures are spelled 'cpu', 'sm_80' or 80."""
    with pytest.raises((fc.ArgumentError, TypeError), match=r"^arch: expected .*got"):
        GPU.check(arch)  # type: ignore[arg-type]


# ---- NumPy ---------------------------------------------------------------------------------------


def numpy_arguments() -> SimpleNamespace:
    a = good_arguments("cpu")
    for name in ("q", "k", "v", "out"):
        setattr(a, name, getattr(a, name).numpy())
    return a


def byte_swapped(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder())


@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        pytest.param(byte_swapped, "byte order", id="byte-swapped"),
        pytest.param(lambda x: x.astype(object), "", id="object"),
        pytest.param(lambda x: x.astype(str), "", id="text"),
        pytest.param(lambda x: x.astype("datetime64[s]"), "", id="dates"),
        pytest.param(lambda x: x.astype([("a", "f2"), ("b", "f2")]), "", id="records"),
        pytest.param(lambda x: x.astype(np.longdouble), "", id="longdouble"),
    ],
)
def test_numpy_arrays_that_dlpack_cannot_describe(
    which: str, make: Callable[[np.ndarray], np.ndarray], got: str
) -> None:
    """An ArgumentError that names the argument and the reason, in one line."""
    a = numpy_arguments()
    setattr(a, which, make(getattr(a, which)))
    with pytest.raises(fc.ArgumentError, match=rf"^{which}: expected .*got .*{got}") as caught:
        call("flash_attention", "cpu", a)
    assert "Traceback" not in str(caught.value)


def test_read_only_arrays() -> None:
    """Inputs may be read-only; `out` may not."""
    a = numpy_arguments()
    for x in (a.q, a.k, a.v):
        x.flags.writeable = False
    call("flash_attention", "cpu", a)
    assert not (a.out == SENTINEL).any()
    a.out[...] = SENTINEL
    a.out.flags.writeable = False
    with pytest.raises(
        fc.ArgumentError, match=r"^out: expected a writable tensor, got a read-only"
    ):
        call("flash_attention", "cpu", a)
    assert (a.out == SENTINEL).all()


@pytest.mark.parametrize("stream", [0, 5])
def test_stream_with_numpy(stream: int) -> None:
    """NumPy has no streams: the message is about `stream`, not about q."""
    a = numpy_arguments()
    a.options["stream"] = stream
    with pytest.raises(fc.ArgumentError, match=r"^stream: expected .*got"):
        call("flash_attention", "cpu", a)
    assert (a.out == SENTINEL).all()


class OnlyDlpack:
    """Some other library's array: the protocol, and what Python needs to look at it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()


class Broken(OnlyDlpack):
    def __dlpack__(self, **options: object) -> object:
        raise RuntimeError("this array is broken")


class NoCapsule(OnlyDlpack):
    def __dlpack__(self, **options: object) -> object:
        return "no capsule"


class OnAnotherDevice(OnlyDlpack):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 10, 0  # ROCm


def test_arrays_of_an_unknown_library() -> None:
    """Inputs need nothing but the protocol; an output cannot be made for them, so it must be
    passed."""
    a = numpy_arguments()
    expected = fc.flash_attention(a.q, a.k, a.v)
    a.q, a.k, a.v = map(OnlyDlpack, (a.q, a.k, a.v))
    with pytest.raises(
        fc.ArgumentError, match=r"^out: expected an array to write to, got None.*OnlyDlpack"
    ):
        fc.flash_attention(a.q, a.k, a.v)
    call("flash_attention", "cpu", a)
    assert a.out.tobytes() == expected.tobytes()


def test_arrays_that_break_the_protocol() -> None:
    """Whatever a foreign __dlpack__ does, the error is ours and names the argument."""
    for kind, says in ((Broken, "this array is broken"), (NoCapsule, "str")):
        a = numpy_arguments()
        a.k = kind(a.k)
        with pytest.raises(fc.ArgumentError, match=rf"(?s)^k: expected .*got .*{says}"):
            call("flash_attention", "cpu", a)
        assert (a.out == SENTINEL).all()


# ---- exceptions ----------------------------------------------------------------------------------


def test_exceptions_fit_python() -> None:
    """Each is a FlashcuteError and the built-in that code which knows nothing of flashcute would
    catch."""
    pairs = {
        fc.ArgumentError: ValueError,
        fc.ConfigError: ValueError,
        fc.UnsupportedError: NotImplementedError,
        fc.DeviceError: RuntimeError,
        fc.DriverError: RuntimeError,
        fc.CompileError: RuntimeError,
        fc.CacheError: OSError,
    }
    for error, builtin in pairs.items():
        assert issubclass(error, fc.FlashcuteError)
        assert issubclass(error, builtin)
        assert error.__doc__
        assert error.__module__ == "flashcute"


# ---- leaks ---------------------------------------------------------------------------------------


def failing_numpy() -> tuple[Callable[[], object], object]:
    a = numpy_arguments()
    a.v = a.v[:, :6]
    return (lambda: call("flash_attention", "cpu", a)), a.q


def failing_torch() -> tuple[Callable[[], object], object]:
    a = good_arguments("cpu")
    a.v = a.v[:, :6]
    return (lambda: call("forward", "cpu", a)), a.q


def failing_protocol() -> tuple[Callable[[], object], object]:
    a = numpy_arguments()
    a.k = Broken(a.k)
    return (lambda: call("flash_attention", "cpu", a)), a.q


def failing_options() -> tuple[Callable[[], object], object]:
    key = "an_option_that_does_not_exist"
    return (lambda: fc.ForwardConfig(**{key: 1})), key


def working_numpy() -> tuple[Callable[[], object], object]:
    a = numpy_arguments()
    return (lambda: fc.flash_attention(a.q, a.k, a.v, return_lse=True)), a.q


def working_torch() -> tuple[Callable[[], object], object]:
    a = good_arguments("cpu")
    return (lambda: fc.flash_attention(a.q, a.k, a.v, return_lse=True)), a.k


@pytest.mark.parametrize(
    "make",
    [failing_numpy, failing_torch, failing_protocol, failing_options, working_numpy, working_torch],
)
def test_calls_do_not_leak(make: Callable) -> None:
    """2000 calls, most of which fail midway: neither references, nor Python memory, nor the
    process grow."""
    attempt, watched = make()

    def repeat(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(fc.FlashcuteError):
                attempt()

    repeat(200)
    gc.collect()
    references = sys.getrefcount(watched)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        repeat(10)
        # A leak grows in every round. CPython's cache of attribute look-ups, which keeps up to 4096
        # names, is full after some.
        for _ in range(5):
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            repeat(2000)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
            if grown < 20_000:
                break
    finally:
        tracemalloc.stop()
    assert sys.getrefcount(watched) == references
    assert grown < 20_000, f"{grown} bytes of Python memory in 2000 calls"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    assert resident < 4096, f"the process grew by {resident} kB in 2000 calls"
