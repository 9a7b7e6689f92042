"""The gradients of a call, as a function of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _core
from .._arrays import library_of, stream_number
from .._call import SDPA, Options, same_bits
from .._core import UnsupportedError
from .framework import Tensor, torch

# The members of Options that are arrays, in the order of the operators' arguments.
ARRAYS = (
    "seqlens_q", "seqlens_k", "prefixes", "sink", "cu_seqlens_q", "cu_seqlens_k", "block_mask",
)  # fmt: skip


def without_tensors(options: Options) -> tuple[Options, tuple[Tensor | None, ...]]:
    """The options without their tensors, which autograd saves as it saves q, k and v: it notices what is written to
    them until gradients are computed. Arrays of other libraries stay."""
    arrays = (getattr(options, name) for name in ARRAYS)
    tensors = tuple(x if isinstance(x, torch.Tensor) else None for x in arrays)
    taken: dict[str, Any] = {
        name: None for name, x in zip(ARRAYS, tensors, strict=True) if x is not None
    }
    return options._replace(**taken) if taken else options, tensors


def with_tensors(options: Options, tensors: tuple[Tensor | None, ...]) -> Options:
    """Undoes without_tensors."""
    given = {name: x for name, x in zip(ARRAYS, tensors, strict=True) if x is not None}
    return options._replace(**given) if given else options


def decided(options: Options, **changes: Any) -> Options:
    """With a yes or no for what follows torch's switch, as it is now, and with changes."""
    return options._replace(deterministic=same_bits(options.deterministic), **changes)


def gradients(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, on the current stream: written to `into`, or new ones in the memory order of q, k and v. If the
    options have a tensor as sink, then dsink, which is new."""
    if dout is None:  # only the LSE was used
        dout = out.new_zeros(out.shape[-1:]).expand(out.shape)
    # A negated view is none to DLPack, and neighbours of an expanded gradient are not adjacent.
    dout = library_of(type(dout)).with_unit_stride(plain(dout))
    dlse = None if dlse is None else plain(dlse)
    dq, dk, dv = into or (gradient_like(x) for x in (q, k, v))
    sink = options.sink  # of another library's nobody wants a gradient
    dsink = torch.empty_like(sink) if isinstance(sink, torch.Tensor) else None
    options, workspace = decided(options, stream=None), None
    if q.is_cuda:
        size = _core.backward_workspace_size(None, q, v, options)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    _core.backward(None, dout, q, k, v, out, lse, dlse, dq, dk, dv, dsink, workspace, options)
    return (dq, dk, dv) if dsink is None else (dq, dk, dv, dsink)


def gradients_on_stream(
    compute: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """`compute`, which is `gradients` or their operator, on the stream that the forward call was given, if any. Its
    order with the current stream, on which autograd works, is kept in both directions."""
    address = stream_number(options.stream)
    if address is None:
        return compute(*tensors, options)
    q: Tensor = tensors[1]
    current = torch.cuda.current_stream(q.device)
    used = [x for x in (*tensors, *options.arrays.values()) if x is not None]
    with library_of(type(q)).use_stream(address, used):
        other = torch.cuda.current_stream(q.device)
        other.wait_stream(current)
        found = compute(*tensors, options)
    current.wait_stream(other)
    for x in found:
        x.record_stream(current)
    return found


def plain(x: Tensor) -> Tensor:
    """With memory that says what the tensor is."""
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


def gradient_like(x: Tensor) -> Tensor:
    """In the memory order of x, unless its strides overlap and the order leaves the last not 1."""
    like = torch.empty_like(x)
    adjacent = like.shape[-1] < 2 or like.stride(-1) == 1
    return like if adjacent else x.new_empty(x.shape)


def no_second_derivative(ctx: Any, *_: object) -> Any:
    raise UnsupportedError(
        f"the second derivative of flash_attention is not supported: use {SDPA} with the backend MATH"
    )
