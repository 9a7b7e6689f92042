"""What flashcute asks of an array library: a DLPack export, new arrays, the current stream.

One small class per library. None is imported here: a library is known by the arrays it made, so it has
been imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from ._core import ArgumentError, UnsupportedError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLPack device types

Array = Any


class Library:
    """The DLPack protocol and nothing more: inputs work, outputs must be passed with ``out=``."""

    immutable = False

    def export(self, array: Array, stream: int | None) -> tuple[object, str | None, int | None]:
        """(capsule, dtype name if DLPack cannot tell it, the library's current stream)."""
        device, index = array.__dlpack_device__()
        current = consumer = None
        if int(device) in (CUDA, CUDA_MANAGED):
            current = self.current_stream(int(index))
            # DLPack numbers the legacy default stream 1; 0 is ambiguous.
            consumer = (current if stream is None else stream) or 1
        try:
            capsule = array.__dlpack__(stream=consumer, max_version=(1, 0))
        except TypeError:  # before DLPack 1.0
            capsule = array.__dlpack__(stream=consumer)
        return capsule, None, current

    def current_stream(self, device: int) -> int | None:
        return None

    def empty(self, shape: Sequence[int], like: Array, dtype: str | None = None) -> Array:
        """A new array on the device of `like`, of its dtype or of the named one."""
        raise self.cannot_make("out", like)

    def cannot_make(self, name: str, like: Array) -> ArgumentError:
        return ArgumentError(
            f"{name}: expected an array to write to, got None. flashcute does not know how to make a "
            f"{type(like).__module__}.{type(like).__name__}"
        )

    def finish(self, array: Array, like: Array) -> Array:
        """Turns what `empty` returned into what the caller gets."""
        return array

    def wants_gradient(self, array: Array) -> bool:
        """Whether its library records what is computed from the array."""
        return False

    def problem(self, array: Array) -> str | None:
        """Why the memory of the array cannot be taken at face value, and what to do."""
        return None

    def kind_problem(self, array: Array, traced: bool = False) -> str | None:
        """Why the array is of no kind that flashcute takes, and what to do. DLPack says it less well, so this is asked
        where a call has failed or goes elsewhere. traced: no memory is needed."""
        return None

    def memory_problem(self, array: Array) -> str | None:
        """Why the memory of an array of the right kind is out of reach where the call stands, and what to do."""
        return None

    def wrote(self, array: Array) -> None:
        """Tells the library that the array was written to."""

    def with_unit_stride(self, array: Array) -> Array:
        """The array, or a copy if neighbours in its last dimension are not adjacent and the library can tell."""
        return array

    def use_stream(self, stream: int, arrays: Sequence[Array]) -> AbstractContextManager[object]:
        """Makes it safe to work with `arrays` on a stream that may not be the current one."""
        self.require_stream(stream, arrays)
        return nullcontext()

    def require_stream(self, stream: int, arrays: Sequence[Array]) -> None:
        """Raises ArgumentError where use_stream cannot."""
        device, index = arrays[0].__dlpack_device__()
        if int(device) not in (CUDA, CUDA_MANAGED):
            raise ArgumentError(f"stream: expected None for arrays on the CPU, got {stream}")
        current = self.current_stream(int(index))
        if (current or 0) != stream:
            raise ArgumentError(
                f"stream: expected the current stream {current}, got {stream}. "
                f"{type(arrays[0]).__module__.partition('.')[0]} cannot be told that another stream uses its "
                "memory: make the stream current, and pass none"
            )


class NumPy(Library):
    def problem(self, array: Array) -> str | None:
        if hasattr(array, "mask"):  # numpy.ma: DLPack would drop the mask
            return "a plain array, got a masked one. Pass its data, or filled()"
        return None

    def export(self, array: Array, stream: int | None) -> tuple[object, str | None, int | None]:
        name = None
        if array.dtype.name == "bfloat16":  # ml_dtypes' own, which DLPack of NumPy refuses
            array, name = array.view("uint16"), "bfloat16"
        try:
            capsule, _, current = super().export(array, stream)
        except BufferError:
            # Before 2.1 NumPy's DLPack cannot say that an array is read-only, and refuses it.
            if array.flags.writeable:
                raise
            return memoryview(array), name, None
        return capsule, name, current

    def empty(self, shape: Sequence[int], like: Array, dtype: str | None = None) -> Array:
        import numpy as np

        return np.empty(shape, dtype or like.dtype)

    def with_unit_stride(self, array: Array) -> Array:
        return array if array.strides[-1:] == (array.itemsize,) else array.copy(order="C")


class Torch(Library):
    def wants_more(self, q: Array, k: Array, v: Array, others: Collection[Array]) -> bool:
        """Whether a call is more than its result: recorded, traced, transformed or cast by autocast. others: what it
        reads beside q, k and v."""
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling():
            return True
        plain = type(q) is type(k) is type(v) is torch.Tensor
        if not plain and any(has_own_dispatch(type(x)) for x in (q, k, v)):
            return True
        if torch.is_grad_enabled() and (
            q.requires_grad
            or getattr(k, "requires_grad", False)
            or getattr(v, "requires_grad", False)
            or any(getattr(x, "requires_grad", False) for x in others)
        ):
            return True
        if others and any(has_own_dispatch(type(x)) for x in others):
            return True
        return any(state() for state in torch_states())

    def with_unit_stride(self, array: Array) -> Array:
        adjacent = array.dim() == 0 or array.shape[-1] < 2 or array.stride(-1) == 1
        return array if adjacent else array.contiguous()

    def export(self, array: Array, stream: int | None) -> tuple[object, str | None, int | None]:
        # Only without the exchange table (torch before 2.10), which knows no gradients to refuse.
        return super().export(array.detach(), stream)

    def current_stream(self, device: int) -> int | None:
        torch = sys.modules["torch"]
        return int(torch.cuda.current_stream(device).cuda_stream)

    def empty(self, shape: Sequence[int], like: Array, dtype: str | None = None) -> Array:
        torch = sys.modules["torch"]
        return torch.empty(
            shape, dtype=getattr(torch, dtype) if dtype else like.dtype, device=like.device
        )

    def wants_gradient(self, array: Array) -> bool:
        return bool(array.requires_grad) and sys.modules["torch"].is_grad_enabled()

    def problem(self, array: Array) -> str | None:
        kind = type(array)  # some classes export memory that is not all that they are
        if kind is not _tensor and has_own_dispatch(kind):
            return self.kind_problem(array)
        if array.is_neg():  # a view that negates when it is read; DLPack does not say so
            return "a tensor without the negative bit, got a negated view. Pass q.resolve_neg()"
        return None

    def kind_problem(self, array: Array, traced: bool = False) -> str | None:
        torch, kind = sys.modules["torch"], type(array)
        if array.is_nested:
            return (
                "a dense tensor, got a nested one. Pad it (torch.nested.to_padded_tensor), or call once for each "
                "sequence of its unbind()"
            )
        if kind.__name__ == "MaskedTensor":
            return "a plain tensor, got a masked one. Pass its get_data(), and what to see as attn_mask"
        if array.is_quantized:
            return f"a floating-point tensor, got one of {array.dtype}. Pass its dequantize()"
        if array.layout != torch.strided:
            return f"a dense tensor, got one of layout {array.layout}. Pass its to_dense()"
        if traced:
            return None
        if kind is not _tensor and has_own_dispatch(kind):
            inside = _insides.get(kind.__name__, "Pass the tensor that it wraps")
            return (
                f"a tensor whose memory a kernel can read, got one of the class {kind.__name__}, which computes "
                f"operators by itself: only flash_attention, without out and stream, takes it. {inside}"
            )
        if array.is_meta:
            return (
                "a tensor with memory, got one on the meta device. Shapes and dtypes without memory are computed "
                "under FakeTensorMode"
            )
        return None

    def memory_problem(self, array: Array) -> str | None:
        functorch = sys.modules["torch"]._C._functorch
        # The second is of is_grads_batched.
        if functorch.is_functorch_wrapped_tensor(array) or functorch.is_legacy_batchedtensor(array):
            return (
                "a tensor with memory, got one inside of a transform (torch.vmap, torch.func). Call it outside; "
                "torch.vmap takes flash_attention, without out and stream"
            )
        if active_fake_mode() is not None:
            return (
                "a tensor outside of FakeTensorMode, in which nothing has memory, got one inside. Only "
                "flash_attention, without out and stream, works there"
            )
        return None

    def wrote(self, array: Array) -> None:
        # Else autograd would take what it saved for unchanged.
        sys.modules["torch"].autograd.graph.increment_version(array)

    def use_stream(self, stream: int, arrays: Sequence[Array]) -> AbstractContextManager[object]:
        self.require_stream(stream, arrays)
        torch = sys.modules["torch"]
        device = arrays[0].device
        if stream == self.current_stream(device.index):
            return nullcontext()
        # The default stream has the address 0, which ExternalStream takes for "make a new one".
        other = (
            torch.cuda.ExternalStream(stream, device=device)
            if stream
            else torch.cuda.default_stream(device)
        )
        for array in arrays:
            array.record_stream(other)
        # What is allocated inside belongs to that stream.
        context: AbstractContextManager[object] = torch.cuda.stream(other)
        return context

    def require_stream(self, stream: int, arrays: Sequence[Array]) -> None:
        if not arrays[0].is_cuda:
            super().require_stream(stream, arrays)
        torch = sys.modules["torch"]
        for array in arrays:
            if not (isinstance(array, torch.Tensor) and array.is_cuda):
                raise ArgumentError(
                    f"stream: expected only torch tensors on the GPU beside it, got {type(array).__name__}"
                )


class CuPy(Library):
    def current_stream(self, device: int) -> int | None:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return int(cupy.cuda.get_current_stream().ptr)

    def empty(self, shape: Sequence[int], like: Array, dtype: str | None = None) -> Array:
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, dtype or like.dtype)

    def with_unit_stride(self, array: Array) -> Array:
        if array.strides[-1:] == (array.itemsize,):
            return array
        with array.device:
            return array.copy(order="C")


class Jax(Library):
    """JAX on the CPU. Its arrays are immutable, so NumPy memory is filled and handed over."""

    immutable = True

    def export(self, array: Array, stream: int | None) -> tuple[object, str | None, int | None]:
        device, _ = array.__dlpack_device__()
        if int(device) != CPU:
            raise UnsupportedError(
                "q, k, v: JAX arrays on a GPU are not supported yet: use jax.nn.dot_product_attention, "
                "or pass torch or CuPy arrays"
            )
        return array.__dlpack__(), None, None

    def empty(self, shape: Sequence[int], like: Array, dtype: str | None = None) -> Array:
        import numpy as np

        return np.empty(
            shape, dtype or like.dtype
        )  # JAX brings ml_dtypes, which NumPy's bfloat16 needs

    def finish(self, array: Array, like: Array) -> Array:
        return sys.modules["jax"].device_put(array, like.device)


def would_record(x: object) -> bool:
    """Whether torch would record what is computed from something that may be a tensor."""
    if isinstance(x, int | float):  # may be symbolic: torch.compile refuses getattr
        return False
    return bool(getattr(x, "requires_grad", False) and sys.modules["torch"].is_grad_enabled())


def has_own_dispatch(kind: type) -> bool:
    """Whether a class of torch tensors computes operators by itself (__torch_dispatch__), on memory of its own or none:
    fake tensors, distributed ones. False of other libraries' arrays."""
    torch = sys.modules["torch"]
    if kind is torch.Tensor:
        return False
    disabled = torch._C._disabled_torch_dispatch_impl
    return getattr(kind, "__torch_dispatch__", disabled) is not disabled


# Of classes that compute operators by themselves: how to get at what they hold.
_insides = {
    "DTensor": "Pass its to_local()",
    "AsyncCollectiveTensor": "Pass its wait()",
    "FakeTensor": "It has no memory, only a shape",
}


def active_fake_mode() -> Any:
    """The FakeTensorMode that is active, if any."""
    torch = sys.modules["torch"]
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


@cache
def torch_observers() -> tuple[Callable[[], object], ...]:
    """What tells, each by a truth, that something stands between tensors and their memory: a dispatch mode (fake
    tensors, make_fx, a counter of FLOPs), torch.jit.trace, torch.func and vmap."""
    torch = sys.modules["torch"]
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._get_tracing_state,
        torch._C._functorch.peek_interpreter_stack,
    )


@cache
def torch_states() -> tuple[Callable[[], object], ...]:
    """What tells, each by a truth, that torch does more in a call than to compute: observers, autocast on some device,
    forward-mode derivatives."""
    torch = sys.modules["torch"]
    return (*torch_observers(), torch._C._is_any_autocast_enabled, differentiates_forward)


def differentiates_forward() -> bool:
    """Whether torch is within forward_ad.dual_level."""
    return bool(sys.modules["torch"].autograd.forward_ad._current_level >= 0)


_libraries: dict[str, Library] = {
    "numpy": NumPy(),
    "torch": Torch(),
    "cupy": CuPy(),
    "jax": Jax(),
    "jaxlib": Jax(),
}
_other = Library()
_library_of_type: dict[type, Library] = {}
_tensor: type | tuple[()] = ()  # torch.Tensor, once it is there


def library_of(kind: type) -> Library:
    """The library that a class of arrays belongs to; subclasses count as their base."""
    known = _library_of_type.get(kind)
    if known is not None:
        return known
    if issubclass(kind, _tensor):
        return _libraries["torch"]
    names = [base.__module__.partition(".")[0] for base in kind.__mro__]
    found = next((_libraries[name] for name in names if name in _libraries), _other)
    if names[0] in _libraries:  # a class of a program may be one of many, and would be kept alive
        _library_of_type[kind] = found
    return found


def remember_torch(tensor: type) -> None:
    """Before the first call: torch.compile cannot trace how a class is looked up that is not known yet (__mro__ of
    torch.nn.Parameter, in torch 2.11 __module__.partition: "Unsupported method call ... getset_descriptor")."""
    global _tensor
    _library_of_type[tensor] = _libraries["torch"]
    _tensor = tensor


def export(array: Array, stream: int | None) -> tuple[object, str | None, int | None]:
    return library_of(type(array)).export(array, stream)


def stream_number(stream: object) -> int | None:
    """The address of a CUstream: an integer, or an object of torch, CuPy or ``__cuda_stream__``."""
    if stream is None:
        return None
    address: object = stream
    for attribute in ("cuda_stream", "ptr"):
        address = getattr(stream, attribute, address)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        address = protocol()[1]
    if isinstance(address, int) and not isinstance(address, bool) and 0 <= address < 2**64:
        return 0 if address == 1 else address  # 1: DLPack's name for the legacy default stream
    raise ArgumentError(
        f"stream: expected None, a CUstream address, or a stream of torch or CuPy, got {stream!r}"
    )
