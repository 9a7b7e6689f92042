"""flash_attention inside torch: autograd, compile, autocast, and torch's own attention where no kernel serves.
Each test names the failure that it guards against."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner, backward_configurations_of_first_use
from optional_torch import REASON, torch
from oracle_backward import assert_accurate, make_problem

operators = pytest.importorskip("flashcute._torch.operators", reason=REASON, exc_type=ImportError)
sdpa = torch.nn.functional.scaled_dot_product_attention
pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def qkv(
    *,
    batch: int = 2,
    sq: int = 17,
    sk: int = 23,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 8,
    d_v: int | None = None,
    layout: str = "bshd",
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """On a GPU in float16, whose kernels are compiled ahead of time."""
    if device == "cuda" and dtype in (torch.float32, torch.float64):
        dtype = torch.float16
    d_v = d if d_v is None else d_v
    sizes = [(batch, sq, heads, d), (batch, sk, kv_heads, d), (batch, sk, kv_heads, d_v)]
    if layout == "bhsd":
        sizes = [(b, h, s, d) for b, s, h, d in sizes]
    return [torch.randn(size, dtype=dtype, device=device).requires_grad_(grad) for size in sizes]


def gradients(function: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum with weights that differ from element to element."""
    out = function(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    total = sum(
        (x.double() * torch.linspace(-1, 2, x.numel(), device=x.device).view(x.shape)).sum()
        for x in outs
    )
    return list(torch.autograd.grad(total, tensors))


def assert_same(
    found: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float
) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, check_stride=False, **tolerance)


# ---- eager ---------------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"sq": 9, "sk": 4}, {"sk": 1}, {"d": 3, "d_v": 5, "kv_heads": 1}]
)
def test_gradcheck(sizes: dict, layout: str, causal: bool, return_lse: bool) -> None:
    """Gradients of the output and of the LSE against finite differences, in fp64. More queries than keys: rows
    that see nothing."""
    options = {"layout": layout, "return_lse": return_lse, "scale": 0.3}
    seen = slice(max(0, sizes.get("sq", 17) - sizes.get("sk", 23)) if causal else 0, None)

    def attend(*tensors: torch.Tensor) -> Any:
        result = fc.flash_attention(*tensors, causal, **options)
        if not return_lse:
            return result
        return result[0], result[1][..., seen]  # -inf has no difference quotient

    assert torch.autograd.gradcheck(attend, qkv(batch=1, layout=layout, **sizes))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_accuracy(rng: np.random.Generator, dtype: str) -> None:
    """The road through autograd is the road that the accuracy rule was tested on."""
    p = make_problem(rng, dtype, seqlen_q=150, seqlen_k=170, kv_heads=2, d=64, causal=True)
    q, k, v, dout = (torch.tensor(x, dtype=getattr(torch, dtype)) for x in (p.q, p.k, p.v, p.dout))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    assert_accurate(p, torch.autograd.grad(fc.flash_attention(*tensors, True), tensors, dout))


on_gpu_both_ways = pytest.mark.parametrize(
    "deterministic", [False, True], ids=["atomics", "deterministic"]
)


@pytest.mark.gpu
@on_gpu_both_ways
@both_masks
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), (128, 128), (256, 256), (40, 72), (96, 64), (136, 40), (128, 192)]
)
def test_accuracy_on_a_gpu(
    rng: np.random.Generator,
    d: int,
    d_v: int,
    dtype: str,
    traced: bool,
    causal: bool,
    deterministic: bool,
) -> None:
    """Both ways of the kernels, by autograd and by the operators; the LSE is differentiated too."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)  # conftest.py resets it
    p = make_problem(
        rng, dtype, seqlen_q=150, seqlen_k=170, kv_heads=2, d=d, d_v=d_v, causal=causal, with_dlse=True
    )  # fmt: skip
    q, k, v, dout = (
        torch.tensor(x, dtype=getattr(torch, dtype), device="cuda") for x in (p.q, p.k, p.v, p.dout)
    )
    dlse = torch.tensor(p.dlse, dtype=torch.float32, device="cuda")
    tensors = [x.requires_grad_() for x in (q, k, v)]
    if traced:
        results = operators.forward_operator(*tensors, causal, None, "bshd", False)
    else:
        results = fc.flash_attention(*tensors, causal, return_lse=True, on_unsupported="error")
    assert_accurate(p, torch.autograd.grad(results, tensors, [dout, dlse]))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.compiles(
    [
        fc.default_backward_config(64, "float16", "sm_80", deterministic=deterministic).replace(
            copy_bytes=copy_bytes, async_copy=copy_bytes >= 4
        )
        for copy_bytes in (8, 2)
        for deterministic in (False, True)
    ]
)
@on_gpu_both_ways
@pytest.mark.parametrize("d", [20, 5])
@pytest.mark.usefixtures("prebuilt")
def test_misalignment_on_a_gpu(rng: np.random.Generator, d: int, deterministic: bool) -> None:
    """Rows of 40 and of 10 bytes need kernels that copy fewer bytes at once."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    p = make_problem(rng, "float16", seqlen_q=150, seqlen_k=170, kv_heads=2, d=d, causal=True)
    tensors = [torch.tensor(x, device="cuda").half().requires_grad_() for x in (p.q, p.k, p.v)]
    out = fc.flash_attention(*tensors, True, on_unsupported="error")
    dout = torch.tensor(p.dout, device="cuda").half()
    assert_accurate(p, torch.autograd.grad(out, tensors, dout))


def test_forward_is_the_same_with_and_without_gradients(device: str) -> None:
    """Two roads, one result, bit for bit."""
    tensors = qkv(dtype=torch.float32, device=device)
    recorded, lse = fc.flash_attention(*tensors, return_lse=True)
    assert recorded.requires_grad
    assert lse.requires_grad
    with torch.no_grad():
        plain, plain_lse = fc.flash_attention(*tensors, return_lse=True)
    assert not plain.requires_grad
    assert torch.equal(recorded, plain)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(which: tuple[int, ...]) -> None:
    """A gradient that is given to the wrong input, or missing where others need none."""
    tensors = qkv()
    expected = gradients(fc.flash_attention, tensors)
    some = [x.detach().requires_grad_(i in which) for i, x in enumerate(tensors)]
    out = fc.flash_attention(*some)
    (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in which)
        if i in which:
            torch.testing.assert_close(x.grad, expected[i])


def test_only_the_lse_is_used() -> None:
    """No gradient of the output: taken for zeros, not for garbage."""
    tensors = qkv()
    _, lse = fc.flash_attention(*tensors, return_lse=True)
    found = torch.autograd.grad(lse.sum(), tensors, allow_unused=True)
    q, k, _ = (x.detach().requires_grad_() for x in tensors)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), [q, k])
    assert_same(list(found[:2]), list(expected))
    assert (found[2] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:1, :1, :1, :1].expand(x.shape),  # sum().backward()
        lambda x: x[:, :, :, :1].expand(x.shape),
        lambda x: x[:1].expand(x.shape),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch._neg_view(x),
    ],
    ids=["all expanded", "last expanded", "batch expanded", "permuted", "every second", "negated view"],
)  # fmt: skip
def test_strides_of_dout(device: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """An expanded or otherwise strided gradient read as if it were contiguous."""
    tensors = qkv(dtype=torch.float32, device=device)
    out = fc.flash_attention(*tensors)
    dout = make(torch.randn_like(out))
    found = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    expected = torch.autograd.grad(out, tensors, dout.resolve_neg().contiguous())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_allow_tf32_with_gradients(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are recorded of the output that was allowed to be rounded, not of another."""
    monkeypatch.setenv("FLASHCUTE_JIT", "fastest")
    tensors = [x.detach().cuda().requires_grad_() for x in qkv(dtype=torch.float32)]
    with torch.no_grad():
        rounded, exact = (fc.flash_attention(*tensors, allow_tf32=x) for x in (True, False))
    assert not torch.equal(rounded, exact)
    assert torch.equal(fc.flash_attention(*tensors, allow_tf32=True), rounded)
    assert torch.equal(compiled(partial(fc.flash_attention, allow_tf32=True))(*tensors), rounded)


@pytest.mark.parametrize(
    "make",
    [lambda x: x[:1, :1, :1].expand(x.shape), torch._neg_view],
    ids=["expanded", "negated view"],
)
def test_strides_of_dlse(device: str, make: Callable[..., torch.Tensor]) -> None:
    """lse.sum().backward() gives a gradient of stride 0; others may be negated views."""
    tensors = qkv(dtype=torch.float32, device=device)
    _, lse = fc.flash_attention(*tensors, return_lse=True)
    dlse = make(torch.randn_like(lse))
    found = torch.autograd.grad(lse, tensors, dlse, retain_graph=True)
    expected = torch.autograd.grad(lse, tensors, dlse.resolve_neg().contiguous())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["packed", "transposed", "expanded", "strided rows"])
def test_strides_of_inputs(kind: str) -> None:
    """Views in, gradients of the views' bases out."""
    make: dict[str, Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]] = {
        "packed": lambda: (x := torch.randn(2, 9, 3, 4, 8).requires_grad_(), list(x.unbind(2))),
        "transposed": lambda: (
            x := torch.randn(3, 2, 4, 9, 8).requires_grad_(),
            [y.transpose(1, 2) for y in x],
        ),
        "expanded": lambda: (
            x := torch.randn(3, 1, 9, 4, 8).requires_grad_(),
            [y.expand(2, -1, -1, -1) for y in x],
        ),
        "strided rows": lambda: (
            x := torch.randn(3, 2, 18, 4, 11).requires_grad_(),
            [y[:, ::2, :, 1:9] for y in x],
        ),
    }
    base, views = make[kind]()
    (found,) = torch.autograd.grad(fc.flash_attention(*views, True).sin().sum(), base)
    _, views = base, [y.contiguous() for y in views]
    (expected,) = torch.autograd.grad(fc.flash_attention(*views, True).sin().sum(), base)
    torch.testing.assert_close(found, expected)


def attend_by_operator(*tensors: torch.Tensor) -> torch.Tensor:
    return operators.forward_operator(*tensors, False, None, "bshd", False)[0]


@pytest.mark.parametrize("attend", [fc.flash_attention, attend_by_operator])
def test_second_derivative_raises(device: str, attend: Callable[..., torch.Tensor]) -> None:
    """Gradients taken for constants in a loss that depends on them: silently wrong (pytorch 116350). A graph
    that is asked for and not used is no error."""
    tensors = qkv(device=device)
    first = torch.autograd.grad(attend(*tensors).sum(), tensors, create_graph=True)
    assert_same(list(first), list(torch.autograd.grad(attend(*tensors).sum(), tensors)))
    with pytest.raises(
        fc.UnsupportedError, match=r"second derivative.*scaled_dot_product_attention"
    ):
        (attend(*tensors).sum() + first[1].square().sum()).backward()


def test_changed_inputs_are_noticed(device: str) -> None:
    """An input or output that is written between forward and backward would give wrong gradients."""
    for change in (0, 3):
        tensors = [x.clone() for x in qkv(device=device)]
        out = fc.flash_attention(*tensors)
        [*tensors, out][change].data.add_(0)  # .data: not noticed, and nothing changed
        [*tensors, out][change].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_runs_are_the_same_bits(device: str) -> None:
    """Gradients that depend on the order in which threads finish, on a GPU where torch is told so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    tensors = qkv(sq=200, sk=200, d=64, dtype=torch.bfloat16, device=device)
    first = gradients(fc.flash_attention, tensors)
    for _ in range(20 if device == "cpu" else 100):
        for a, b in zip(gradients(fc.flash_attention, tensors), first, strict=True):
            assert torch.equal(a, b)


def test_memory_grows_with_the_length_only(fresh: Runner) -> None:
    """A backward that stores seqlen_q x seqlen_k anything: 1 GiB here, in fp32."""
    fresh("""
        import resource, torch, flashcute as fc
        def train(s):
            q, k, v = (torch.randn(1, s, 1, 16, requires_grad=True) for _ in range(3))
            fc.flash_attention(q, k, v, True).sum().backward()
        train(256)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train(16384)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100 * 1024, f"{grown} kB"
    """)


def test_import_loads_no_torch(fresh: Runner) -> None:
    """torch is optional, and slow to import."""
    fresh("""
        import sys, numpy as np, flashcute as fc
        x = np.ones((1, 4, 1, 8), np.float32)
        fc.explain(x, x, x)
        out, lse = fc.flash_attention(x, x, x, return_lse=True)
        fc.backward(fc.default_backward_config(8, "float32", "cpu"), out, x, x, x, out, lse)
        assert "torch" not in sys.modules
    """)


def test_mixed_libraries_are_refused() -> None:
    """Gradients cannot be recorded through another library's arrays."""
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(fc.ArgumentError, match=r"^k: expected a torch tensor as q, got ndarray"):
        fc.flash_attention(q, k.detach().numpy(), v)
    with pytest.raises(fc.ArgumentError, match=r"^v: expected an array .*got .*list"):
        fc.flash_attention(q, k, [1.0])


# ---- streams and graphs --------------------------------------------------------------------------

SPIN = 200_000_000  # clock cycles: about a tenth of a second


@pytest.mark.gpu
@on_gpu_both_ways
@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_first_call_inside_a_capture(fresh: Runner, backward: bool, deterministic: bool) -> None:
    """The kernels of the gradients are loaded while a graph is captured, in the strictest mode; a replay computes
    with what the tensors hold then."""
    fresh(f"""
        import torch, flashcute as fc
        torch.use_deterministic_algorithms({deterministic})
        torch.utils.deterministic.fill_uninitialized_memory = False
        options = dict(dtype=torch.float16, device="cuda", requires_grad={backward})
        q, k, v = (torch.randn(2, 200, 4, 64, **options) for _ in range(3))
        dout = torch.randn_like(q, requires_grad=False)
        x = torch.ones(1, device="cuda", requires_grad=True)
        (2 * x).sum().backward()  # autograd's thread is there

        def attend():
            out = fc.flash_attention(q, k, v, causal=True, on_unsupported="error")
            return [out, *torch.autograd.grad(out, (q, k, v), dout)] if {backward} else [out]

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            found = attend()
        for _ in range(3):
            with torch.no_grad():
                for x in (q, k, v, dout):
                    x.copy_(torch.randn_like(x))
                for x in found:
                    x.fill_(float("nan"))
            graph.replay()
            for a, b in zip(found, attend(), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
                assert not {deterministic} or torch.equal(a, b)
    """)


@pytest.mark.gpu
@on_gpu_both_ways
@pytest.mark.parametrize("stream_of", ["current", "argument"])
def test_gradients_run_on_the_stream_of_the_forward(stream_of: str, deterministic: bool) -> None:
    """On another one they would read an output that is not there yet; and who reads them on the current stream waits
    for them, though the host does not."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors = qkv(sq=200, sk=300, d=64, device="cuda")
    dout = torch.randn_like(tensors[0], requires_grad=False)
    expected = torch.autograd.grad(fc.flash_attention(*tensors), tensors, dout)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        late = dout.clone() if stream_of == "current" else dout
        if stream_of == "current":
            out = fc.flash_attention(*tensors)
            found = torch.autograd.grad(out, tensors, late)
    if stream_of == "argument":
        out = fc.flash_attention(*tensors, stream=side)
        found = torch.autograd.grad(out, tensors, late)
    else:
        torch.cuda.current_stream().wait_stream(side)
    assert not side.query(), "the call waited for the GPU, or the spin was too short"
    copies = [x.clone() for x in found]  # on the current stream
    del found
    garbage = [torch.full_like(x, math.nan) for x in tensors]
    for a, b in zip(copies, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        assert not deterministic or torch.equal(a, b)
    del garbage


def test_stream_of_tensors_on_the_cpu() -> None:
    """There is none."""
    with pytest.raises(fc.ArgumentError, match=r"^stream: expected None for arrays on the CPU"):
        fc.flash_attention(*qkv(), stream=7)


@pytest.mark.gpu
def test_memory_of_training_grows_with_the_length_only() -> None:
    """A backward that stores seqlen_q x seqlen_k anything: 2 GiB here in float16."""
    q, k, v = qkv(batch=1, sq=32768, sk=32768, heads=1, kv_heads=1, d=64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fc.flash_attention(q, k, v, True, on_unsupported="error").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(device: str, grad: bool) -> None:
    """Inputs are cast as custom_fwd casts them; gradients come back in the inputs' dtype."""
    tensors = [
        x.detach().to(device).requires_grad_(grad) for x in qkv(dtype=torch.float32, grad=grad)
    ]
    tensors[1] = tensors[1].detach().bfloat16().requires_grad_(grad)  # as a linear layer gives it
    with torch.autocast(device, torch.bfloat16):
        out = fc.flash_attention(*tensors)
        assert out.dtype == torch.bfloat16
        assert out.dtype == sdpa(*(x.transpose(1, 2) for x in tensors), enable_gqa=True).dtype
    expected = fc.flash_attention(*(x.bfloat16() for x in tensors))
    assert torch.equal(out, expected)
    if grad:
        out.float().sum().backward()
        assert [x.grad.dtype for x in tensors] == [torch.float32, torch.bfloat16, torch.float32]


def test_autocast_leaves_float64_and_disabled_regions_alone() -> None:
    """As custom_fwd does."""
    wide, narrow = qkv(), qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fc.flash_attention(*wide).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert fc.flash_attention(*narrow).dtype == torch.float32


# ---- operators, compile, export ------------------------------------------------------------------

CASES = {
    "plain": {},
    "one head, d_v": {"heads": 1, "kv_heads": 1, "d": 5, "d_v": 9},
    "no rows": {"sq": 0},
    "no keys": {"sk": 0},
    "bhsd": {"layout": "bhsd"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
}


def case(name: str, device: str) -> tuple[list[torch.Tensor], str]:
    sizes = {"dtype": torch.float32, **CASES[name]}
    if device == "cuda" and "d_v" in sizes:
        sizes |= {"d": 8, "d_v": 16}  # what is aligned otherwise has to be compiled
    return qkv(device=device, **sizes), sizes.get("layout", "bshd")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(device: str, name: str, strided: bool) -> None:
    """Fakes whose shapes, dtypes or strides differ from the real ones; a wrong schema; autograd that is
    registered in the wrong place."""
    tensors, layout = case(name, device)
    if strided:
        tensors = [
            x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for x in tensors
        ]
    torch.library.opcheck(operators.forward_operator, (*tensors, True, None, layout, False))
    detached = [x.detach() for x in tensors]
    out, lse = operators.forward_operator(*detached, True, None, layout, False)
    for dlse in (None, torch.randn_like(lse)):
        options = (True, 0.5, layout)
        torch.library.opcheck(
            operators.backward_operator,
            (torch.randn_like(out), *detached, out, lse, dlse, *options),
        )


@pytest.fixture
def compiled() -> Any:
    """compiled(function): for the whole graph at once, and for any size."""
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()


@both_masks
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile_with_dynamic_shapes(
    device: str, compiled: Any, causal: bool, return_lse: bool
) -> None:
    """A graph break, or a recompilation for every length."""
    graphs = []

    def attend(*tensors: torch.Tensor) -> Any:
        result = fc.flash_attention(*tensors, causal, return_lse=return_lse, layout="bhsd")
        return tuple(x.cos() for x in result) if return_lse else result.cos()

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    fast = compiled(attend)
    for sq, sk in ((17, 23), (40, 41), (65, 129)):
        tensors = qkv(sq=sq, sk=sk, layout="bhsd", device=device)
        assert_same(gradients(fast, tensors), gradients(attend, tensors))
    counted = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for sq, sk in ((17, 23), (40, 41), (65, 129)):
        counted(*qkv(sq=sq, sk=sk, layout="bhsd", device=device))
    assert len(graphs) == 1


MADE_MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "square": lambda: torch.ones(7, 7, dtype=torch.bool).tril(),
    "whole": lambda: torch.ones(2, 4, 7, 7, dtype=torch.bool).tril(),
    "keys": lambda: torch.arange(7) < 5,
}


@pytest.mark.parametrize("mask", MADE_MASKS)
def test_compile_with_a_mask_of_its_own(compiled: Any, mask: str) -> None:
    """A mask whose sizes are numbers, because the function makes it, beside tensors whose sizes are symbols: it was
    refused as one of another shape."""

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        made = MADE_MASKS[mask]()
        return fc.flash_attention(*tensors, attn_mask=made, on_unsupported="silent")

    tensors = qkv(sq=7, sk=7, heads=4, kv_heads=2)
    assert_same(gradients(compiled(attend), tensors), gradients(attend, tensors))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a shape that broadcasts"):
        compiled(attend)(*qkv(sq=7, sk=8, heads=4, kv_heads=2))


@pytest.mark.gpu
def test_compile_where_a_gpu_has_no_gradients(compiled: Any) -> None:
    """torch's own attention in the graph, as in an eager call; without gradients the operator."""
    tensors = [x.detach().cuda().requires_grad_() for x in qkv(dtype=torch.float64)]
    with pytest.warns(UserWarning, match=r"gradients \(requires_grad=True\).*have no kernel"):
        out = compiled(lambda *x: fc.flash_attention(*x) * 2)(*tensors)
    with pytest.warns(
        UserWarning, match=r"gradients \(requires_grad=True\).*float64 has no GPU kernel"
    ):
        torch.testing.assert_close(out, fc.flash_attention(*tensors) * 2)


@pytest.mark.slow
def test_compile_a_module() -> None:
    """The whole road, code generation included: a layer around attention, its parameters' gradients."""
    torch._dynamo.reset()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
            return self.out(fc.flash_attention(q, k, v, causal=True).flatten(2))

    layer = Layer()
    x = torch.randn(2, 19, 32)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    fast = torch.compile(layer, fullgraph=True)
    found = torch.autograd.grad(fast(x).square().sum(), list(layer.parameters()))
    assert_same(list(found), list(expected), rtol=1e-4, atol=1e-4)


def test_compile_without_gradients(compiled: Any) -> None:
    """Inference, where the operator is all that is traced."""
    tensors = qkv(grad=False, dtype=torch.float32)
    assert torch.equal(compiled(fc.flash_attention)(*tensors), fc.flash_attention(*tensors))


def test_compile_under_autocast(compiled: Any) -> None:
    """The cast is part of the graph."""
    tensors = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(fc.flash_attention)(*tensors)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, fc.flash_attention(*tensors))


def test_compile_takes_the_fallback_too(compiled: Any) -> None:
    """What no kernel covers is torch's own attention in the graph."""
    tensors = qkv()

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(*tensors, dropout_p=1e-30, on_unsupported="silent")

    torch.testing.assert_close(compiled(attend)(*tensors), attend(*tensors))
    with pytest.warns(UserWarning, match="dropout_p=1e-30 is not supported"):
        compiled(lambda *x: fc.flash_attention(*x, dropout_p=1e-30))(*tensors)


def test_export() -> None:
    """The operator is in the exported program, for any length."""

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fc.flash_attention(q, k, v, causal=True)

    tensors = tuple(qkv(dtype=torch.float32, grad=False))
    rows, keys = torch.export.Dim("rows", min=2), torch.export.Dim("keys", min=2)
    shapes = {"q": {1: rows}, "k": {1: keys}, "v": {1: keys}}
    program = torch.export.export(Attention(), tensors, dynamic_shapes=shapes)
    assert "flashcute.flash_attention_forward" in str(program.graph)
    other = qkv(sq=30, sk=31, dtype=torch.float32, grad=False)
    assert torch.equal(program.module()(*other), fc.flash_attention(*other, causal=True))


def test_out_in_a_traced_call_is_refused(compiled: Any) -> None:
    """It would have to be copied."""
    tensors = qkv(grad=False, dtype=torch.float32)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(*tensors, out=torch.empty_like(tensors[0]))

    with pytest.raises(Exception, match="out, stream: expected None in a traced call"):
        compiled(attend)(*tensors)


# ---- torch's own attention where no kernel serves ------------------------------------------------


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masked attention, bshd, in plain operations; rows that see nothing are 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p.masked_fill(empty, 0.0), v)


def band(sq: int, sk: int, causal: bool, window: tuple[int, int] | None) -> torch.Tensor:
    left, right = window or (-1, -1)
    seen = torch.zeros(sq, sk, dtype=torch.bool)
    for i in range(sq):
        for j in range(sk):
            distance = j - (i + sk - sq)
            seen[i, j] = (
                (not causal or distance <= 0)
                and (right < 0 or distance <= right)
                and (left < 0 or distance >= -left)
            )
    return seen


# Dropout of nothing: no kernel has it.
BY_TORCH: dict[str, Any] = {"dropout_p": 1e-30, "on_unsupported": "silent"}


@both_masks
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("window", [None, (-1, -1), (3, 0), (2, 4), (-1, 1), (0, -1)], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (9, 14), (14, 9), (1, 9), (9, 1)])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_fallback_means_the_same(
    mask: str, sq: int, sk: int, window: tuple[int, int] | None, layout: str, causal: bool
) -> None:
    """torch aligns causal masks to the first key, and makes NaN of rows that see nothing."""
    q, k, v = qkv(sq=sq, sk=sk, layout=layout)
    attn_mask, seen, bias = None, band(sq, sk, causal, window)[None, None], None
    if mask == "bool":
        attn_mask = torch.rand(2, 1, sq, sk) < 0.6
        seen = seen & attn_mask
    elif mask == "float":
        attn_mask = bias = torch.randn(4, sq, sk, dtype=torch.float64)
    options = {"attn_mask": attn_mask, "window": window, "layout": layout, **BY_TORCH}

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(*tensors, causal, **options)

    def expected(*tensors: torch.Tensor) -> torch.Tensor:
        if layout == "bshd":
            return definition(*tensors, seen, bias)
        return definition(*(x.transpose(1, 2) for x in tensors), seen, bias).transpose(1, 2)

    torch.testing.assert_close(attend(q, k, v), expected(q, k, v))
    assert_same(gradients(attend, [q, k, v]), gradients(expected, [q, k, v]))


def test_fallback_drops_weights() -> None:
    """dropout_p is passed on: some weights are 0, the others larger."""
    v = torch.eye(64).view(1, 64, 1, 64)
    q = torch.zeros(1, 64, 1, 64)
    weights = fc.flash_attention(q, q, v, dropout_p=0.5, on_unsupported="silent")
    assert 0.4 < (weights == 0).double().mean() < 0.6
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 2 / 64))


def test_fallback_tells() -> None:
    """A silent detour through an O(S^2) path: it warns unless told not to, and explain says so beforehand."""
    q, k, v = qkv(grad=False)
    with pytest.warns(
        UserWarning, match=r"scaled_dot_product_attention: dropout_p=1e-30 is not supported"
    ):
        fc.flash_attention(q, k, v, dropout_p=1e-30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.flash_attention(q, k, v, dropout_p=1e-30, on_unsupported="silent")
    told = fc.explain(q, k, v, dropout_p=1e-30, window=(3, 0))
    assert told.backend == "torch"
    assert told.config is None
    assert "dropout_p" in dict(told.rejected)["cpu"]
    mask, scores = 17 * 23 * 9, 2 * 2 * 4 * 17 * 23 * 8
    assert f"{mask} bytes for masks" in told.notes[0]
    assert f"{scores} bytes for scores" in told.notes[0]
    told = fc.explain(q, k, v, dropout_p=1e-30, on_unsupported="error")
    assert told.backend == ""
    assert "dropout_p" in dict(told.rejected)["cpu"]
    assert fc.explain(q.numpy(), k.numpy(), v.numpy(), dropout_p=0.5).backend == ""
    assert fc.explain(q, k, v).notes == []
    told = fc.explain(q[0], k, v, dropout_p=0.5)
    assert told.backend == ""
    assert "expected 4 dimensions" in dict(told.rejected)["cpu"]
    assert fc.explain(q, k.numpy(), v.numpy()).backend == "cpu"
    with pytest.raises(fc.ArgumentError, match=r"^cfg: expected None"):
        fc.explain(q, k, v, cfg=fc.default_config(8, "float64", "cpu"), dropout_p=0.5)


def test_explain_tells_how_gradients_are_computed() -> None:
    """And that a strided gradient of the output is copied."""
    q, k, v = qkv(dtype=torch.float32)
    told = fc.explain(q, k, v)
    assert told.backend == told.gradients.backend == "cpu"
    assert told.gradients.config == fc.default_backward_config(8, "float32", "cpu")
    assert told.gradients.same_bits
    assert told.gradients.workspace_bytes == 0
    copied = f"last stride is not 1 is copied first ({4 * q.numel()} bytes)"
    assert copied in told.gradients.notes[0]
    with torch.no_grad():
        assert fc.explain(q, k, v).gradients is None
        assert fc.explain(q, k, v, gradients=True).gradients == told.gradients
    assert fc.explain(q[0], k, v).backend == ""
    assert (
        fc.explain(q, k, v, dropout_p=1e-30).gradients is None
    )  # autograd's own, of torch's attention


def test_explain_refuses_what_the_call_refuses() -> None:
    """An argument beside the tensors that torch's attention, or a call that records, does not take."""
    recorded, plain = qkv(), [x.detach() for x in qkv()]
    out = torch.empty_like(plain[0])
    masked = {"dropout_p": 1e-30, "on_unsupported": "silent"}
    cases: list[tuple[list[torch.Tensor], dict[str, Any]]] = [
        (recorded, {"out": out}),
        (recorded, {"stream": 7}),
        (plain, {"stream": 7}),
        (plain, {**masked, "stream": 7}),
        (plain, {**masked, "return_lse": True}),
        (plain, {**masked, "out": out[..., 1:]}),
    ]
    for tensors, given in cases:
        with pytest.raises(fc.FlashcuteError) as raised:
            fc.flash_attention(*tensors, **given)
        told = fc.explain(*tensors, **given)
        assert told.backend == ""
        assert told.rejected[0] in [(x, str(raised.value)) for x in ("cpu", "kernels")]
    assert fc.explain(*plain, **masked, out=out).backend == "torch"
    assert fc.explain(*plain, return_lse=True, out=out).backend == "cpu"
    cfg = fc.default_config(8, "float64", "cpu")
    with pytest.raises(fc.ArgumentError) as refused:
        fc.forward(cfg, *recorded)
    told = fc.explain(*recorded, cfg=cfg)
    assert (told.backend, told.rejected[0]) == ("", ("cpu", str(refused.value)))


@pytest.mark.gpu
@on_gpu_both_ways
def test_explain_tells_how_gradients_are_computed_on_a_gpu(deterministic: bool) -> None:
    """The configuration that runs, and the memory that the call takes beside its results."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    tensors = qkv(sq=1000, sk=1000, d=64, dtype=torch.bfloat16, device="cuda")
    told = fc.explain(*tensors)
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    assert told.backend == fc.default_config(64, "bfloat16", arch).kernel
    cfg = fc.default_backward_config(64, "bfloat16", arch, deterministic=deterministic)
    assert told.gradients.config == cfg
    assert told.gradients.same_bits == deterministic
    size = fc.backward_workspace_size(cfg, tensors[0].detach(), tensors[2].detach())
    assert told.gradients.workspace_bytes == 4 * size
    # Hopper's deterministic ones are five products in three launches, those of mma.sync seven in two.
    two_passes = deterministic and cfg.kernel == "sm80"
    assert len(told.gradients.kernels) == (2 if two_passes else 3)


def test_fallback_writes_out() -> None:
    """`out` is where the result goes on every road."""
    q, k, v = qkv(grad=False)
    out = torch.empty_like(q)
    options = {"dropout_p": 1e-30, "on_unsupported": "silent"}
    assert fc.flash_attention(q, k, v, out=out, **options) is out
    assert torch.equal(out, fc.flash_attention(q, k, v, **options))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"attn_mask": torch.ones(17, 22) == 1, "dropout_p": 0.5}, fc.ArgumentError,
         r"^attn_mask: expected a shape .* = \(2, 4, 17, 23\), got \(17, 22\)"),
        ({"attn_mask": torch.ones(1, 1, 1, 17, 23).double()}, fc.ArgumentError, r"^attn_mask: expected a shape"),
        ({"attn_mask": torch.ones(17, 23)}, fc.ArgumentError, r"^attn_mask: expected dtype bool or .*float64"),
        ({"attn_mask": np.ones((17, 23))}, fc.ArgumentError, r"^attn_mask: expected a torch tensor"),
        ({"documents": np.zeros(17, np.int32), "dropout_p": 0.5}, fc.ArgumentError,
         r"^documents: expected a torch tensor"),
        ({"documents": torch.zeros(17).int(), "dropout_p": 0.5}, fc.ArgumentError, r"^documents: expected a pair"),
        ({"window": (3,)}, fc.ArgumentError, r"^window: expected \(left, right\), two integers"),
        ({"window": (-2, 0)}, fc.ArgumentError, r"^window: expected \(left, right\), two integers"),
        ({"window": 5}, fc.ArgumentError, r"^window: expected \(left, right\), two integers"),
        ({"dropout_p": True}, fc.ArgumentError, r"^dropout_p: expected a probability, got True"),
        ({"dropout_p": 1.5}, fc.ArgumentError, r"^dropout_p: expected a probability, got 1.5"),
        ({"dropout_p": 0.5, "return_lse": True}, fc.UnsupportedError, r"^return_lse=True: .*no LSE"),
        ({"dropout_p": 0.5, "scale": -1.0}, fc.ArgumentError, r"^scale: expected a finite number >= 0"),
        ({"dropout_p": 0.5, "layout": "sbhd"}, fc.ArgumentError, r"^layout: expected 'bshd'"),
        ({"dropout_p": 0.5, "causal": "yes"}, fc.ArgumentError, r"^causal: expected True or False"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_fallback(options: dict, error: type[Exception], says: str) -> None:
    """Named like those of the kernels, before torch sees them."""
    with pytest.raises(error, match=says):
        fc.flash_attention(*qkv(), on_unsupported="silent", **options)


def test_bad_tensors_of_the_fallback() -> None:
    """The same checks as on the kernels' road."""
    q, k, v = qkv()
    with pytest.raises(fc.ArgumentError, match=r"^v: expected seqlen 23 as in k, got 22"):
        fc.flash_attention(q, k, v[:, :22], dropout_p=0.5, on_unsupported="silent")
    with pytest.raises(fc.ArgumentError, match=r"^k: expected dtype float64 as in q, got float32"):
        fc.flash_attention(q, k.float(), v, dropout_p=0.5, on_unsupported="silent")


SILENT: dict[str, Any] = {"on_unsupported": "silent"}
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fallback_keeps_nan_of_padding_out(kv_heads: int) -> None:
    """Keys that the mask hides from all rows may hold NaN: 0 * NaN would be NaN, also in gradients."""
    q, k, v = qkv(kv_heads=kv_heads)
    with torch.no_grad():
        k[:, 20:] = v[:, 20:] = NAN
    seen = (torch.arange(23) < 20)[None]

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return fc.flash_attention(q, k, v, attn_mask=seen, **BY_TORCH)

    def cut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return fc.flash_attention(q, k[:, :20], v[:, :20])

    torch.testing.assert_close(masked(q, k, v), cut(q, k, v))
    assert_same(gradients(masked, [q, k, v]), gradients(cut, [q, k, v]))


def test_fallback_rows_without_keys_have_no_gradient() -> None:
    """A query that sees nothing may hold NaN; it must not reach the gradients of keys."""
    q, k, v = qkv(sq=6, sk=3)
    with torch.no_grad():
        q[:, :3] = NAN
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = gradients(
        lambda *x: fc.flash_attention(*x, True, attn_mask=mask, **BY_TORCH), [q, k, v]
    )
    expected = gradients(lambda *x: fc.flash_attention(*x, True), [q, k, v])
    assert not any(x.isnan().any() for x in found)
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(), (23,), (17, 23), (4, 1, 23), (2, 1, 17, 1), (2, 4, 17, 23)])
@pytest.mark.parametrize("boolean", [False, True])
def test_fallback_masks_of_every_rank(shape: tuple[int, ...], boolean: bool) -> None:
    """What broadcasts is taken; torch's own function wants two dimensions at least."""
    q, k, v = qkv(grad=False)
    mask = torch.rand(shape) < 0.8 if boolean else torch.randn(shape, dtype=q.dtype)
    found = fc.flash_attention(q, k, v, attn_mask=mask, **BY_TORCH)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    scores = scores.masked_fill(~mask, -INF) if boolean else scores + mask
    p = torch.nan_to_num(scores.softmax(-1))
    torch.testing.assert_close(found, torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(2, 2)))


def test_fallback_of_a_mask_that_is_nan() -> None:
    """NaN in a mask is an input that is seen: it propagates."""
    q, k, v = qkv(grad=False)
    mask = torch.full((17, 23), NAN, dtype=q.dtype)
    assert fc.flash_attention(q, k, v, attn_mask=mask, **SILENT).isnan().all()


@pytest.mark.parametrize(
    ("out", "stream", "says"),
    [
        (torch.empty(3, 2, 17, 4, 8, dtype=torch.float64), None, "^out: expected a torch tensor"),
        (torch.empty(2, 17, 4, 8, dtype=torch.float16), None, "^out: expected .* got .*float16"),
        (np.empty((2, 17, 4, 8)), None, "^out: expected a torch tensor .* got ndarray"),
        (None, 7, "^stream: expected None"),
    ],
)
def test_fallback_checks_what_it_writes_to(out: Any, stream: Any, says: str) -> None:
    """An output that is silently broadcast, rounded or ignored."""
    q, k, v = qkv(grad=False)
    with pytest.raises(fc.ArgumentError, match=says):
        fc.flash_attention(q, k, v, dropout_p=1e-30, out=out, stream=stream, **SILENT)


def test_no_limit_is_no_window() -> None:
    """(-1, -1) says what None says: the kernel serves it, for all libraries."""
    q, k, v = qkv(grad=False)
    assert fc.explain(q, k, v, window=(-1, -1)).backend == "cpu"
    x = np.ones((1, 3, 1, 8), np.float32)
    assert (fc.flash_attention(x, x, x, window=(np.int64(-1), -1)) == 1).all()
    with pytest.raises(fc.ArgumentError, match=r"^window: expected \(left, right\), two integers"):
        fc.flash_attention(x, x, x, window="x")  # type: ignore[arg-type]


def test_explain_and_call_agree_under_autocast() -> None:
    """The dtype that runs is the dtype that is explained; a float mask is cast with the tensors."""
    q, k, v = qkv(grad=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fc.explain(q, k, v).config.dtype == "bfloat16"
        assert fc.flash_attention(q, k, v).dtype == torch.bfloat16
        mask = torch.zeros(17, 23)
        assert fc.flash_attention(q, k, v, attn_mask=mask, **SILENT).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.float64)},
        {"documents": torch.ones(5).int()},
        {"documents": torch.ones(5).int(), "dropout_p": 0.5},
        {"dropout_p": 7.0},
        {"dropout_p": "a"},
    ],
)
def test_explain_knows_what_the_fallback_refuses(wrong: dict) -> None:
    """It does not promise torch's attention for a call that raises."""
    q, k, v = qkv(grad=False)
    told = fc.explain(q, k, v, **wrong)
    assert told.backend == ""
    with pytest.raises(fc.ArgumentError) as raised:
        fc.flash_attention(q, k, v, **SILENT, **wrong)
    assert str(raised.value) in dict(told.rejected).values()


def test_the_warning_points_at_the_caller() -> None:
    """A line of this file, not one of the library."""
    q, k, v = qkv(grad=False)
    with pytest.warns(UserWarning, match="dropout_p") as caught:
        fc.flash_attention(q, k, v, dropout_p=1e-30)
    assert caught[0].filename == __file__


# ---- what else torch does with a call ------------------------------------------------------------


def test_overlapping_views() -> None:
    """Rows of a sliding window share memory: empty_like would lay the gradient out of order."""
    base = torch.randn(12, dtype=torch.float64, requires_grad=True)

    def attend(unfold: bool) -> torch.Tensor:
        rows = base.unfold(0, 8, 1) if unfold else torch.stack([base[i : i + 8] for i in range(5)])
        x = rows[None, :, None]
        return torch.autograd.grad(fc.flash_attention(x, x, x).square().sum(), base)[0]

    torch.testing.assert_close(attend(True), attend(False))


def test_forward_mode_raises() -> None:
    """A tangent that is dropped counts as zero, silently."""
    q, k, v = qkv(grad=False)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(fc.UnsupportedError, match="forward-mode"):
            fc.flash_attention(dual, k, v)
        assert fc.flash_attention(q, k, v).shape == q.shape


@pytest.mark.parametrize("transform", ["grad", "jacfwd"])
def test_functional_derivatives_raise(transform: str) -> None:
    """By name, not by torch's words about an autograd.Function."""
    q, k, v = qkv(grad=False)
    derivative = getattr(torch.func, transform)(lambda x: fc.flash_attention(x, k, v).sum())
    with pytest.raises(fc.UnsupportedError, match=r"torch\.func"):
        derivative(q)


def test_tracers_see_the_operator() -> None:
    """make_fx and torch.jit.trace would record memory that nobody wrote; fake tensors have none."""
    q, k, v = qkv(grad=False)
    expected = fc.flash_attention(q, k, v) * 2
    fx = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: fc.flash_attention(*x) * 2)(q, k, v)
    torch.testing.assert_close(fx(q, k, v), expected)
    traced = torch.jit.trace(lambda *x: fc.flash_attention(*x) * 2, (q, k, v))
    torch.testing.assert_close(traced(q + 1, k, v), fc.flash_attention(q + 1, k, v) * 2)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        assert fc.flash_attention(*fake).shape == q.shape
    many = torch.vmap(fc.flash_attention)(*(torch.stack([x, x + 1]) for x in (q, k, v)))
    torch.testing.assert_close(many[1], fc.flash_attention(q + 1, k + 1, v + 1))


def test_meta_tensors_are_refused() -> None:
    """As an argument that has no memory, not by an error of torch's dispatcher."""
    q = torch.empty(1, 4, 2, 8, device="meta")
    with pytest.raises(fc.ArgumentError, match=r"^q: "):
        fc.flash_attention(q, q, q)


def test_traced_fallback_checks_sizes() -> None:
    """torch's own function would broadcast a batch of 1."""
    q, k, v = qkv(grad=False)
    compiled = torch.compile(
        lambda *x: fc.flash_attention(*x, dropout_p=1e-30, **SILENT), backend="eager"
    )
    torch.testing.assert_close(
        compiled(q, k, v), fc.flash_attention(q, k, v, dropout_p=1e-30, **SILENT)
    )
    with pytest.raises(Exception, match="batch size 2"):
        compiled(q, k[:1], v[:1])
