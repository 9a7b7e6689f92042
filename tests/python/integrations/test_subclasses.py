"""Tensors of classes of their own, or seen through a transform: each call takes them as what they are, or says by the
name of the argument why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flashcute as fc
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import backward_configurations_of_first_use
from flashcute import reference
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())

SHAPE = (2, 6, 4, 64)


class Wrapper(torch.Tensor):
    """A program's own class: without memory, and with operators of its own, which it counts."""

    held: torch.Tensor
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.held = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, cls) else x, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, found)


class WithMemory(torch.Tensor):
    """A class that computes by itself and yet exports memory: what a kernel read there, the class would not know."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda x: x.as_subclass(torch.Tensor) if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Named(torch.Tensor):
    """A class without operators of its own."""


class Overriding(torch.Tensor):
    """A class that overrides functions of torch, and no operator."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def fake(x: torch.Tensor) -> torch.Tensor:
    return torch._subclasses.FakeTensorMode().from_tensor(x)


PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "buffer": lambda x: torch.nn.Buffer(x),
    "class": lambda x: x.as_subclass(Named),
    "class with functions": lambda x: x.as_subclass(Overriding),
}
OWN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "wrapper": (Wrapper, "class Wrapper.*that it wraps"),
    "with memory": (lambda x: x.as_subclass(WithMemory), "class WithMemory"),
    "fake": (fake, "class FakeTensor.*no memory"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "a nested one.*unbind"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "a nested one.*unbind",
    ),
    "meta": (lambda x: x.to("meta"), "meta device"),
}
DISPATCHING = ("wrapper", "with memory", "fake")


def tensors(device: str = "cpu") -> list[torch.Tensor]:
    dtype = torch.float64 if device == "cpu" else torch.float16
    return [torch.randn(SHAPE, dtype=dtype, device=device) for _ in range(3)]


def lse_like(q: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros(SHAPE[0], SHAPE[2], SHAPE[1], dtype=wide, device=q.device)


def configurations(q: torch.Tensor) -> tuple[Any, Any]:
    arch = "sm_80" if q.device.type == "cuda" else "cpu"
    return (
        fc.default_config(64, q.dtype, arch),
        fc.default_backward_config(64, q.dtype, arch, deterministic=False),
    )


# What reads memory. Each takes tensors as flash_attention does, by name.
READS: dict[str, Callable[..., Any]] = {
    "forward": lambda q, k, v: fc.forward(configurations(q)[0], q, k, v),
    "backward": lambda q, k, v: fc.backward(configurations(q)[1], v, q, k, v, k, lse_like(q)),
    "backward_workspace_size": lambda q, k, v: fc.backward_workspace_size(
        configurations(q)[1], q, v
    ),
    "explain": fc.explain,
    "count_blocks": lambda q, k, v: fc.count_blocks(configurations(q)[0], q, k, v),
}


# ---- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_classes_without_operators_are_their_memory(device: str, kind: str) -> None:
    """A parameter, or a class that a program named: refused, or computed on another road."""
    inputs = tensors(device)
    cfg, _ = configurations(inputs[0])
    made = [PLAIN[kind](x) for x in inputs]
    for attend in (
        lambda *x: fc.flash_attention(*x),
        lambda *x: fc.forward(cfg, *x),
        lambda *x: fc.flash_attention(x[0], inputs[1], x[2]),
    ):
        found = attend(*made)
        assert type(found) is torch.Tensor
        assert torch.equal(found, attend(*inputs))
    recorded = [x.detach().clone().requires_grad_() for x in made]
    fc.flash_attention(*recorded).sum().backward()
    assert all(x.grad is not None for x in recorded)


@pytest.mark.filterwarnings("ignore")  # torch calls some of these kinds prototypes
@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("position", ["q", "v"])
@pytest.mark.parametrize("kind", OWN)
def test_what_reads_memory_refuses_by_name(
    device: str, kind: str, position: str, call: str
) -> None:
    """A kernel at the address 0, or on memory of which the class makes something else; torch's own error."""
    make, says = OWN[kind]
    named = dict(zip("qkv", tensors(device), strict=True))
    named[position] = make(named[position])
    names = rf"({position}|dout)"
    with pytest.raises(fc.ArgumentError, match=rf"(?s)^{names}: expected .*{says}"):
        READS[call](**named)


@pytest.mark.parametrize("kind", ["wrapper", "with memory", "fake"])
def test_an_output_of_such_a_class_is_refused(kind: str) -> None:
    """Its memory would be written, of which the class does not know."""
    make, says = OWN[kind]
    inputs = tensors()
    out = make(torch.empty(SHAPE, dtype=inputs[0].dtype))
    for call in (
        lambda: fc.flash_attention(*inputs, out=out),
        lambda: fc.forward(configurations(inputs[0])[0], *inputs, out=out),
    ):
        with pytest.raises(fc.ArgumentError, match=rf"(?s)^out: expected .*{says}"):
            call()


@pytest.mark.parametrize("kind", DISPATCHING)
@pytest.mark.parametrize("argument", ["out", "stream"])
def test_an_operator_has_no_output_to_write_to(kind: str, argument: str) -> None:
    """Said by name: of tensors that nobody traces."""
    inputs = [OWN[kind][0](x) for x in tensors()]
    if kind == "fake":
        with torch._subclasses.FakeTensorMode() as mode:
            inputs = [mode.from_tensor(x) for x in tensors()]
    given = {"out": torch.empty(SHAPE)} if argument == "out" else {"stream": 0}
    with pytest.raises(fc.ArgumentError, match=rf"^{argument}: expected None beside"):
        fc.flash_attention(*inputs, **given)


@pytest.mark.parametrize("position", [0, 1, 2, None])
def test_a_class_with_operators_sees_ours(device: str, position: int | None) -> None:
    """Any of q, k and v: only q's class was looked at."""
    inputs = tensors(device)
    made = [Wrapper(x) if position in (None, i) else x for i, x in enumerate(inputs)]
    Wrapper.seen.clear()
    out, lse = fc.flash_attention(*made, causal=True, return_lse=True)
    assert Wrapper.seen == ["flashcute.flash_attention_forward.default"]
    expected = fc.flash_attention(*inputs, causal=True, return_lse=True)
    assert torch.equal(out.held, expected[0])
    assert torch.equal(lse.held, expected[1])


def test_gradients_of_a_class_with_operators(device: str) -> None:
    """It sees those as well, and they are of its class."""
    inputs = [x.requires_grad_() for x in tensors(device)]
    made = [Wrapper(x) for x in inputs]
    Wrapper.seen.clear()
    fc.flash_attention(*made).sum().backward()
    assert "flashcute.flash_attention_backward.default" in Wrapper.seen
    fc.flash_attention(*inputs).sum().backward()
    for x, expected in zip(made, inputs, strict=True):
        assert torch.equal(x.grad.held, expected.grad)


def test_a_class_in_torchs_attention() -> None:
    """Where no kernel serves: the class sees torch's operators."""
    inputs = tensors()
    options = {"dropout_p": 1e-30, "on_unsupported": "silent"}  # drops nothing
    out = fc.flash_attention(*map(Wrapper, inputs), **options)
    expected = fc.flash_attention(*inputs, **options)
    torch.testing.assert_close(out.held, expected)


@pytest.mark.parametrize("shape", [(6, 4, 64), (6,), (1, 2, 6, 4, 64)])
@pytest.mark.parametrize("kind", ["wrapper", "fake"])
def test_shapes_of_other_classes(kind: str, shape: tuple[int, ...]) -> None:
    """By name, not by an index that is out of range."""
    with pytest.raises(fc.ArgumentError, match=r"^q: expected 4 dimensions"):
        fc.flash_attention(*[OWN[kind][0](torch.zeros(shape))] * 3)


# ---- tensors without memory ----------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_fake_tensors_give_shapes(device: str, layout: str, active: bool) -> None:
    """Inside of the mode that made them, and after it."""
    mode = torch._subclasses.FakeTensorMode()
    q, k, v = (mode.from_tensor(x).requires_grad_() for x in tensors(device))
    v = v[..., :32]
    with mode if active else torch.no_grad():
        out, lse = fc.flash_attention(q, k, v, layout=layout, return_lse=True)
    assert out.shape == (*SHAPE[:3], 32)
    assert out.dtype == q.dtype
    assert out.device == q.device
    assert lse.shape == ((2, 4, 6) if layout == "bshd" else (2, 6, 4))
    if active:
        out.sum().backward()
        assert q.grad.shape == q.shape


@pytest.mark.parametrize("position", ["q", "k", "v", "attn_mask"])
def test_fake_tensors_beside_others(position: str) -> None:
    """An assertion of torch's, which names no argument."""
    named = dict(zip("qkv", tensors(), strict=True))
    named["attn_mask"] = torch.ones(6, 6, dtype=torch.bool)
    mode = torch._subclasses.FakeTensorMode()
    mixed = {name: x if name == position else mode.from_tensor(x) for name, x in named.items()}
    says = rf"^{position}: expected a FakeTensor .*got a Tensor with memory"
    with pytest.raises(fc.ArgumentError, match=says):
        fc.flash_attention(**mixed, on_unsupported="silent")
    mixed[position] = fake(named[position])
    with pytest.raises(fc.ArgumentError, match="another mode"):
        fc.flash_attention(**mixed, on_unsupported="silent")


def test_tensors_with_memory_inside_of_fake_mode() -> None:
    """What a call allocates there has no memory: an output that nobody passed was complained of."""
    inputs = tensors()
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(fc.ArgumentError, match=r"^q: expected a FakeTensor .*FakeTensorMode"):
            fc.flash_attention(*inputs)
        with pytest.raises(fc.ArgumentError, match=r"^q: expected .*outside of FakeTensorMode"):
            fc.forward(configurations(inputs[0])[0], *inputs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(fc.flash_attention(*inputs), torch._subclasses.FakeTensor)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_operators_of_meta_tensors(layout: str) -> None:
    """A program that was traced runs on the meta device: shapes, dtypes and strides of what the kernels return."""
    inputs = tensors()
    ops = torch.ops.flashcute
    expected = ops.flash_attention_forward(*inputs, True, None, layout, False)
    meta = [x.to("meta") for x in inputs]
    found = ops.flash_attention_forward(*meta, True, None, layout, False)
    dout = torch.ones_like(expected[0])
    gradients = [
        ops.flash_attention_backward(dout.to(q.device), q, k, v, *of, None, True, None, layout)
        for (q, k, v), of in ((inputs, expected), (meta, found))
    ]
    for x, y in zip((*found, *gradients[1]), (*expected, *gradients[0]), strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


# ---- transforms ----------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
}


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_reads_memory_inside_of_a_transform(transform: str, call: str) -> None:
    """ "Cannot access data pointer of Tensor that doesn't have storage", of torch."""
    says = r"^(q|dout): expected a tensor (with memory, got one inside of a transform|without requires_grad)"
    with pytest.raises(fc.ArgumentError, match=says):
        TRANSFORMS[transform](lambda x: READS[call](x, x, x), tensors()[0])


def test_functionalize(device: str) -> None:
    """It only rewrites what is written in place."""
    q, k, v = tensors(device)
    found = torch.func.functionalize(lambda *x: fc.flash_attention(*x, causal=True))(q, k, v)
    assert torch.equal(found, fc.flash_attention(q, k, v, causal=True))


# ---- the reference functions ---------------------------------------------------------------------


REFERENCES: dict[str, Callable[..., Any]] = {
    "naive": lambda q, k, v: reference.naive(q, k, v, True),
    "chunked": lambda q, k, v: reference.chunked(q, k, v, True),
    "naive_gradients": lambda q, k, v: reference.naive_gradients(q, q, k, v, True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", REFERENCES)
@pytest.mark.parametrize("kind", OWN)
def test_reference_functions_refuse_by_name(function: str, kind: str) -> None:
    """Torch's own error of a transpose, of a mask that is no DTensor, of a value on the meta device."""
    make, says = OWN[kind]
    with pytest.raises(fc.ArgumentError, match=rf"(?s)^q: expected .*{says}"):
        REFERENCES[function](*map(make, tensors()))


@pytest.mark.parametrize("function", REFERENCES)
@pytest.mark.parametrize("kind", PLAIN)
def test_reference_functions_of_classes_without_operators(function: str, kind: str) -> None:
    """The module of a program's class was taken for its array library."""
    inputs = tensors()
    found = REFERENCES[function](*map(PLAIN[kind], inputs))
    expected = REFERENCES[function](*inputs)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.as_subclass(torch.Tensor), y)


# ---- arrays beside q, k and v ----------------------------------------------------------------------

ARRAYS = {
    "seqlens_q": torch.tensor([6, 2], dtype=torch.int32),
    "seqlens_k": torch.tensor([5, 6], dtype=torch.int32),
    "prefix": torch.tensor([3, 0], dtype=torch.int32),
    "sink": torch.tensor([0.5, -1.0, 2.0, 0.0]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_class_of_an_array_beside_tensors(name: str) -> None:
    """Its memory would be read past the class: the class gets the operator, or the call names the array."""
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    given = {name: ARRAYS[name]}
    expected = fc.flash_attention(q, k, v, True, **given)
    Wrapper.seen.clear()
    found = fc.flash_attention(q, k, v, True, **{name: Wrapper(ARRAYS[name])})
    assert Wrapper.seen == ["flashcute.flash_attention_forward.default"]
    assert torch.equal(found.held, expected)
    says = (
        rf"^{name}: expected a tensor whose memory a kernel can read, got one of the class Wrapper"
    )
    with pytest.raises(fc.ArgumentError, match=says):
        fc.Variant(causal=True, **{name: Wrapper(ARRAYS[name])})
    with pytest.raises(fc.ArgumentError, match=says):
        fc.explain(q, k, v, True, **{name: Wrapper(ARRAYS[name])})
    mode = torch._subclasses.FakeTensorMode()
    made = [mode.from_tensor(x) for x in (q, k, v)]
    with pytest.raises(fc.ArgumentError, match=rf"^{name}: expected a FakeTensor beside others"):
        fc.flash_attention(*made, True, **given)
