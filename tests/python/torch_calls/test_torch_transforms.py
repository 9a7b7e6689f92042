"""What torch does around a call: it counts versions of what is written, batches gradients, maps over a dimension,
counts FLOPs, traces for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import Runner, backward_configurations_of_first_use
from flashcute._call import Options
from flashcute._torch import dispatch, operators, tracing
from flashcute._torch.problem import Problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())


def tensors(
    *,
    batch: int = 2,
    sq: int = 5,
    sk: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 8,
    d_v: int = 8,
    grad: bool = False,
    device: str = "cpu",
) -> list[torch.Tensor]:
    dtype = torch.float64 if device == "cpu" else torch.float16  # compiled ahead of time
    sizes = ((batch, sq, heads, d), (batch, sk, kv_heads, d), (batch, sk, kv_heads, d_v))
    return [torch.randn(s, dtype=dtype, device=device).requires_grad_(grad) for s in sizes]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    wide = {} if a.dtype == torch.float64 else {"rtol": 4e-3, "atol": 4e-3}
    torch.testing.assert_close(a, b, **wide)


# ---- versions of what is written to --------------------------------------------------------------


def forward_to(out: torch.Tensor, *inputs: torch.Tensor, **options: Any) -> None:
    cfg = fc.default_config(64, inputs[0].dtype, "cpu" if out.device.type == "cpu" else "sm_80")
    fc.forward(cfg, *inputs, out=out, **options)


def backward_to(**outputs: torch.Tensor) -> None:
    """Gradients of a call like that of `written`, some to memory that is given."""
    dout, q, k, v, out, lse = inputs_of_backward(next(iter(outputs.values())).device.type)
    arch = "cpu" if q.device.type == "cpu" else "sm_80"
    cfg = fc.default_backward_config(64, q.dtype, arch, deterministic=False)
    fc.backward(cfg, dout, q, k, v, out, lse, **outputs)


def inputs_of_backward(device: str) -> list[torch.Tensor]:
    q, k, v = tensors(device=device, d=64, d_v=64)
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    return [torch.randn_like(out), q, k, v, out, lse]


WRITES: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], object]] = {
    "flash_attention": lambda out, x: fc.flash_attention(*x, out=out),
    "forward": forward_to,
    "torch's attention": lambda out, x: fc.flash_attention(
        *x, out=out, dropout_p=1e-30, on_unsupported="silent"
    ),
    "dq": lambda out, x: backward_to(dq=out),
    "dk": lambda out, x: backward_to(dk=out),
    "dv": lambda out, x: backward_to(dv=out),
}


def target_of(write: str, device: str) -> torch.Tensor:
    q, k, _ = tensors(device=device, d=64, d_v=64)
    return torch.zeros_like(k if write in ("dk", "dv") else q)


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_noticed(device: str, write: str) -> None:
    """A tensor that autograd saved and that a call overwrites: the gradient was computed of the new contents."""
    out = target_of(write, device)
    weights = torch.ones_like(out, requires_grad=True)
    loss = (weights * out).sum()
    inputs = tensors(device=device, d=64, d_v=64)
    WRITES[write](out, *([inputs] if write != "forward" else inputs))
    assert out.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_inference_tensors(device: str, write: str) -> None:
    """They count no versions, so there is none to raise an error about; views and their bases count together."""
    with torch.inference_mode():
        out = target_of(write, device)
    inputs = tensors(device=device, d=64, d_v=64)
    with torch.inference_mode():
        WRITES[write](out, *([inputs] if write != "forward" else inputs))
    assert out.any()
    base = torch.stack([target_of(write, device)] * 2)
    WRITES[write](base[1], *([inputs] if write != "forward" else inputs))
    assert base._version > 0
    assert not base[0].any()


def test_writing_inference_tensors_outside_of_inference_mode() -> None:
    """As above: the library writes, torch would not."""
    with torch.inference_mode():
        out = target_of("flash_attention", "cpu")
    fc.flash_attention(*tensors(d=64, d_v=64), out=out)
    assert out.any()


@pytest.mark.gpu
def test_writing_to_the_workspace_is_noticed() -> None:
    """It is overwritten as an output is."""
    dout, q, k, v, out, lse = inputs_of_backward("cuda")
    cfg = fc.default_backward_config(64, q.dtype, "sm_80", deterministic=False)
    size = fc.backward_workspace_size(cfg, q, v)
    workspace = torch.empty(size, dtype=torch.float32, device="cuda")
    fc.backward(cfg, dout, q, k, v, out, lse, workspace=workspace)
    assert workspace._version == 1


def test_a_call_that_raises_wrote_nothing() -> None:
    """Its output counts no version: nothing changed."""
    q, k, v = tensors()
    for out in (torch.empty(2, 5, 4, 9, dtype=q.dtype), torch.empty_like(q)):
        with pytest.raises(fc.ArgumentError):
            fc.flash_attention(q, k, v if out.shape != q.shape else v[:, :3], out=out)
        assert out._version == 0


def test_writing_to_another_library() -> None:
    """NumPy counts no versions."""
    q, k, v = tensors()
    out = np.zeros(q.shape)
    fc.flash_attention(q, k, v, out=out)
    assert out.any()


# ---- batches of gradients ------------------------------------------------------------------------


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The definition, of which torch knows every derivative."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(k.shape[1] - q.shape[1]), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def by_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return operators.forward_operator(q, k, v, False, None, "bshd", False)[0]


@pytest.mark.parametrize("attend", [fc.flash_attention, by_operator], ids=["eager", "operator"])
def test_vectorized_jacobian(attend: Callable[..., torch.Tensor]) -> None:
    """Its batch of gradients has no memory that DLPack could describe."""
    inputs = tuple(tensors(batch=1, sq=3, sk=4))
    found = torch.autograd.functional.jacobian(attend, inputs, vectorize=True)
    expected = torch.autograd.functional.jacobian(plain, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradcheck_of_batched_gradients(return_lse: bool) -> None:
    """The gradient of the LSE in the batch, too."""
    inputs = tensors(batch=1, sq=3, sk=4, grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: fc.flash_attention(*x, return_lse=return_lse), inputs, check_batched_grad=True
    )


def test_batch_of_gradients(device: str) -> None:
    """Each is that of its own call; so on a GPU, where autograd works in another thread."""
    inputs = tensors(grad=True, device=device, d=64, d_v=64)
    out = fc.flash_attention(*inputs)
    many = torch.randn(3, *out.shape, dtype=out.dtype, device=device)
    found = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        for a, b in zip(found, torch.autograd.grad(out, inputs, one, retain_graph=True), strict=True):  # fmt: skip
            close(a[i], b)


def test_second_derivative_of_a_batch_raises() -> None:
    """As of a single gradient: a constant would be silently wrong."""
    inputs = tensors(batch=1, sq=3, sk=4, grad=True)
    found = torch.autograd.functional.jacobian(
        lambda q: fc.flash_attention(q, *inputs[1:]), inputs[0], vectorize=True, create_graph=True
    )
    with pytest.raises(fc.UnsupportedError, match="second derivative"):
        found.square().sum().backward()


# ---- vmap ----------------------------------------------------------------------------------------


@pytest.fixture
def no_slow_loop() -> Iterator[None]:
    """An error where torch.func.vmap falls back to a loop, which it warns of."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def stacked(x: torch.Tensor, dim: int | None, times: int = 3) -> torch.Tensor:
    return x if dim is None else torch.stack([x * (i - 1.5) for i in range(times)], dim)


@pytest.mark.usefixtures("no_slow_loop")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "dims",
    [(0, 0, 0), (0, None, None), (None, 0, None), (None, 2, 1), (-1, 1, -1)],
    ids=str,
)
def test_vmap(device: str, dims: tuple[int | None, ...], batch: int) -> None:
    """One call for the whole dimension, wherever it is, and for tensors that lack it; so of its gradients."""
    single = tensors(batch=batch, device=device, d=64, d_v=64)
    leaves = [stacked(x, dim).requires_grad_() for x, dim in zip(single, dims, strict=True)]
    found = torch.func.vmap(lambda *x: fc.flash_attention(*x, causal=True, return_lse=True), dims)(
        *leaves
    )
    dout = torch.randn_like(found[0])
    gradients = torch.autograd.grad(found[0], leaves, dout, retain_graph=True)
    rows = []
    for i in range(3):
        rows.append(
            [x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)]
        )
    contiguous = [[x.contiguous() for x in row] for row in rows]
    expected = [fc.flash_attention(*row, causal=True, return_lse=True) for row in contiguous]
    close(found[0], torch.stack([x for x, _ in expected]))
    close(found[1], torch.stack([x for _, x in expected]).to(found[1].dtype))
    wanted = torch.autograd.grad(torch.stack([x for x, _ in expected]), leaves, dout)
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b)


@pytest.mark.usefixtures("no_slow_loop")
@pytest.mark.parametrize("sizes", [{"sq": 0}, {"sk": 0}, {"batch": 0}], ids=str)
def test_vmap_of_nothing(sizes: dict) -> None:
    """Sizes of 0, of which no other can be inferred."""
    q, k, v = tensors(grad=True, **sizes)
    found = torch.func.vmap(fc.flash_attention, (0, None, None))(stacked(q, 0), k, v)
    assert found.shape == (3, *q.shape)
    assert not found.any()
    for x, gradient in zip((q, k, v), torch.autograd.grad(found.sum(), (q, k, v)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.usefixtures("no_slow_loop")
def test_nested_vmap() -> None:
    """A dimension over each tensor in turn."""
    q, k, v = tensors()
    queries, keys = stacked(q, 0), stacked(k, 0, 2)
    inner = torch.func.vmap(fc.flash_attention, (None, 0, None))
    found = torch.func.vmap(inner, (0, None, None))(queries, keys, v)
    assert found.shape == (3, 2, *q.shape)
    torch.testing.assert_close(found[2, 1], fc.flash_attention(queries[2], keys[1], v))


def test_a_single_tensor_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that all share cost no memory of their own where there is no batch to repeat them in."""
    q, k, v = tensors(batch=1)
    seen = []
    real = operators.run

    def run(
        cfg: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, **more: Any
    ) -> Any:
        seen.append((k, v))
        return real(cfg, q, k, v, *others, **more)

    monkeypatch.setattr(operators, "run", run)
    torch.func.vmap(fc.flash_attention, (0, None, None))(stacked(q, 0), k, v)
    assert [[x.data_ptr() for x in pair] for pair in seen] == [[k.data_ptr(), v.data_ptr()]]


@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad", "grad", "jacrev", "jvp"])
def test_derivatives_of_torch_func_raise(order: str) -> None:
    """Inside and outside of vmap, by name."""
    q, k, v = tensors()
    many = stacked(q, 0)

    def total(x: torch.Tensor) -> torch.Tensor:
        return fc.flash_attention(x, k, v).sum()

    calls: dict[str, Callable[[], object]] = {
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.func.vmap(total)(x).sum())(many),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(total))(many),
        "grad": lambda: torch.func.grad(total)(q),
        "jacrev": lambda: torch.func.jacrev(total)(q),
        "jvp": lambda: torch.func.jvp(total, (q,), (q,)),
    }
    with pytest.raises(fc.UnsupportedError, match=r"torch\.func"):
        calls[order]()


# ---- modes, and FLOPs ----------------------------------------------------------------------------


class Names(TorchDispatchMode):
    """Collects the names of the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("forward_too", [False, True])
def test_a_mode_sees_the_gradients(device: str, forward_too: bool) -> None:
    """Also one that is entered between a recorded call and its backward."""
    inputs = tensors(grad=True, device=device, d=64, d_v=64)
    dout = torch.randn_like(inputs[0], requires_grad=False)
    expected = torch.autograd.grad(fc.flash_attention(*inputs), inputs, dout)
    mode = Names()
    if forward_too:
        with mode:
            found = torch.autograd.grad(fc.flash_attention(*inputs), inputs, dout)
    else:
        out = fc.flash_attention(*inputs)
        with mode:
            found = torch.autograd.grad(out, inputs, dout)
    assert mode.names.count("flashcute::flash_attention_backward") == 1
    assert mode.names.count("flashcute::flash_attention_forward") == forward_too
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"sq": 9, "sk": 4, "d": 16, "d_v": 24}, {"heads": 6, "kv_heads": 1}, {"sq": 0}]
)
def test_flops(sizes: dict, causal: bool, layout: str) -> None:
    """What torch counts for its fused attention: of all scores, causal or not; and gradients 2.5 times that where the
    head dimensions are one."""
    inputs = tensors(grad=True, **sizes)
    if layout == "bhsd":
        inputs = [x.detach().transpose(1, 2).requires_grad_() for x in inputs]
    q, k, v = inputs
    batch, heads = q.shape[0], q.shape[1 if layout == "bhsd" else 2]
    rows, keys = (x.shape[2 if layout == "bhsd" else 1] for x in (q, k))
    d, d_v = q.shape[-1], v.shape[-1]
    with FlopCounterMode(display=False) as counter:
        out = fc.flash_attention(q, k, v, causal, layout=layout)
    scores = batch * heads * rows * keys
    assert counter.get_total_flops() == 4 * scores * (d + d_v) / 2
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * scores * (3 * d + 2 * d_v)
    if d == d_v:
        assert counter.get_total_flops() == 2.5 * 4 * scores * d


def test_flops_are_those_of_torch() -> None:
    """The two formulas beside torch's own for one kernel of its attention."""
    from torch.utils.flop_counter import flop_registry

    q, k, v = (x.transpose(1, 2) for x in tensors(kv_heads=4, d=16, d_v=24))
    out, lse = q.new_empty((*q.shape[:3], 24)), q.new_empty(q.shape[:3])
    ops, aten = torch.ops.flashcute, torch.ops.aten
    for ours, theirs, arguments, others in (
        (ops.flash_attention_forward, aten._scaled_dot_product_flash_attention, (q, k, v), ()),
        (
            ops.flash_attention_backward,
            aten._scaled_dot_product_flash_attention_backward,
            (out, q, k, v),
            (out, lse, None),
        ),
    ):
        found = flop_registry[ours](*arguments, *others, False, None, "bhsd")
        assert found == flop_registry[theirs](*arguments)


def test_flops_without_memory() -> None:
    """A model on the meta device, whose cost is asked for before there is memory for it."""
    q, k, v = (x.to("meta") for x in tensors())
    with FlopCounterMode(display=False) as counter:
        assert fc.flash_attention(q, k, v).shape == q.shape
    assert counter.get_total_flops() == 4 * 2 * 4 * 5 * 7 * 8


def test_operators_can_be_registered_again(fresh: Runner) -> None:
    """importlib.reload, as notebooks do it: no error, no warning, the same results."""
    fresh("""
        import importlib, warnings
        import torch, torch.utils.flop_counter, flashcute as fc
        inputs = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3)]
        expected = torch.vmap(fc.flash_attention)(*(x[None] for x in inputs))
        warnings.simplefilter("error")
        importlib.reload(fc)
        importlib.reload(fc._torch.operators)
        assert torch.equal(torch.vmap(fc.flash_attention)(*(x[None] for x in inputs)), expected)
    """)


def test_flops_after_operators_were_registered_again(fresh: Runner) -> None:
    """FLOPs that were not counted: the former operators were collected as garbage after the new ones were known to the
    counter, and torch made other packets of these at their first call."""
    fresh("""
        import gc, importlib
        import torch, flashcute as fc
        from torch.utils.flop_counter import FlopCounterMode
        for _ in range(2):
            importlib.reload(fc._torch.operators)
            gc.collect()
        inputs = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3)]
        with FlopCounterMode(display=False) as counter:
            fc.flash_attention(*inputs).sum().backward()
        assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 4 * 4) * 8, counter.get_flop_counts()
    """)


# ---- what a trace decides about a GPU ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "d", "d_v", "same_bits", "served"),
    [
        ((8, 6), 64, 64, False, True),
        ((8, 6), 128, 128, False, True),
        ((8, 6), 136, 64, False, False),
        ((8, 6), 64, 136, False, False),
        ((8, 6), 256, 256, True, False),
        ((9, 0), 256, 256, False, True),
    ],
)
def test_a_trace_asks_for_the_kernel_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
    arch: tuple[int, int],
    d: int,
    d_v: int,
    same_bits: bool,
    served: bool,
) -> None:
    """It asked for head dimension 64 whatever the call had: a compiled model of float32 with wide heads raised in its
    backward on GPUs whose thread blocks have 99 KB of shared memory, where the same eager call goes to torch's own
    attention. Fake tensors say that they are on a GPU without one."""
    asked: list[tuple[Any, ...]] = []
    real = fc._core.default_backward_config

    class Core:
        def __getattr__(self, name: str) -> Any:
            return getattr(fc._core, name)

        def default_backward_config(self, *arguments: Any) -> Any:
            asked.append(arguments)
            return real(*arguments)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: arch)
    monkeypatch.setattr(dispatch, "_core", Core())
    torch.use_deterministic_algorithms(same_bits, warn_only=True)  # conftest.py resets it
    with torch._subclasses.FakeTensorMode():
        q, k, v = (
            torch.empty(1, 4, 2, width, device="cuda", requires_grad=True) for width in (d, d, d_v)
        )
        problem = Problem(q, k, v, Options(), None, 0.0)
        missing = dispatch.missing_gradient(problem, traced=True)
    assert asked == [(torch.float32, d, 10 * arch[0] + arch[1], d_v, same_bits)]
    if served:
        assert missing is None
    else:
        assert f"float32 with head dimensions {d} and {d_v}" in missing


def test_a_trace_decides_for_any_head_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dynamic=True a head dimension is a symbol, which a function that is called while tracing does not take; and
    what was decided for one must not be used for another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    torch._dynamo.reset()

    def decide(x: torch.Tensor) -> torch.Tensor:
        d = tracing.as_constant(x.shape[-1])
        return x + 1 if dispatch.has_gradients(x.dtype, x.device, d, d, False) else x - 1

    compiled = torch.compile(decide, fullgraph=True, dynamic=True, backend="eager")
    for d, served in ((64, True), (128, True), (136, False), (256, False), (72, True), (2, True)):
        assert (compiled(torch.zeros(2, d)) == (1 if served else -1)).all()
    assert [tracing.as_constant(d) for d in range(300)] == [*range(257), *[257] * 43]
