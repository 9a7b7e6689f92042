"""The operators that torch.compile and torch.export see, with what torch asks of an operator: shapes, gradients, vmap,
FLOPs."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from .._arrays import library_of
from .._call import Options, rows_of_heads, run
from .._import_hook import when_imported
from .framework import Tensor, torch
from .gradients import gradient_like, gradients, no_second_derivative
from .worlds import as_placed

# Arguments were appended, with defaults that mean what the operators did before: programs that were saved without them
# load. An operator has no stream; its deterministic=None follows torch's switch when the gradients are computed.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    layout: str,
    allow_tf32: bool,
    diagonal: int | None = None,
    deterministic: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
) -> Any:
    window: dict[str, Any] = {"window_left": window_left, "window_right": window_right}
    options = Options(causal, diagonal, scale, layout, None, allow_tf32, **window)
    return run(None, q, k, v, options, return_lse=True)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, layout: str, *others: object
) -> Any:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(rows_of_heads(q, layout), dtype=lse_dtype)


def _backward_of(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float | None,
    layout: str,
    diagonal: int | None = None,
    deterministic: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    window: dict[str, Any] = {"window_left": window_left, "window_right": window_right}
    options = Options(causal, diagonal, scale, layout, deterministic=deterministic, **window)
    return gradients(dout, q, k, v, out, lse, dlse, options)


def forward_by_operator(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    o = options
    return forward_operator(q, k, v, o.causal, o.scale, o.layout, o.allow_tf32, *appended(o))


def appended(o: Options) -> tuple[Any, ...]:
    """The arguments of both operators that have defaults."""
    return o.diagonal, o.deterministic, o.window_left, o.window_right


def backward_by_operator(*arguments: Any) -> Any:
    """Of tensors and Options, as `gradients`."""
    *tensors, o = arguments
    return backward_operator(*tensors, o.causal, o.scale, o.layout, *appended(o))


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_like(q), gradient_like(k), gradient_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, layout, _, diagonal, deterministic, left, right = inputs
    ctx.save_for_backward(q, k, v, *output)
    window: dict[str, Any] = {"window_left": left, "window_right": right}
    ctx.options = Options(causal, diagonal, scale, layout, deterministic=deterministic, **window)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    found = (None, None, None)
    if dout is not None or dlse is not None:
        q, k, v, out, lse = ctx.saved_tensors
        dout, dlse = as_placed(dout, out), as_placed(dlse, lse)
        found = backward_by_operator(dout, q, k, v, out, lse, dlse, ctx.options)
    return (*found, *[None] * 8)


# A vmapped dimension becomes part of the batch.


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Copies what has no such dimension only where there is a batch to repeat."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return library_of(type(x)).with_unit_stride(x.flatten(0, 1))


def unfold(found: tuple[Tensor, ...], size: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    unfolded = tuple(x.unflatten(0, (size, -1)) for x in found)
    return unfolded, (0,) * len(found)


def _forward_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    size, options = info.batch_size, arguments[3:]
    tensors = (fold(x, dim, size) for x, dim in zip(arguments[:3], dims[:3], strict=True))
    return unfold(forward_operator(*tensors, *options), size)


def _backward_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    size, options = info.batch_size, arguments[7:]
    dout, q, k, v, out, lse, dlse = (
        fold(x, dim, size) for x, dim in zip(arguments[:7], dims[:7], strict=True)
    )
    # Unlike others, lse is read as contiguous.
    return unfold(backward_operator(dout, q, k, v, out, lse.contiguous(), dlse, *options), size)


# importlib.reload defines the operators again. torch forgets an operator's packet, also that of the new definition,
# when the Library of a former one is collected as garbage, and FlopCounterMode does not know the packet that follows.
_former_operators = [
    *globals().get("_former_operators", ()),
    *(globals().get(name) for name in ("forward_operator", "backward_operator")),
]

forward_operator = torch.library.custom_op(
    "flashcute::flash_attention_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, float? scale, str layout, bool allow_tf32,"
    " SymInt? diagonal=None, bool? deterministic=None, SymInt? window_left=None, SymInt? window_right=None)"
    " -> (Tensor, Tensor)",
)
forward_operator.register_fake(_forward_fake)
forward_operator.register_autograd(_backward, setup_context=_save)
forward_operator.register_vmap(_forward_vmap)

backward_operator = torch.library.custom_op(
    "flashcute::flash_attention_backward",
    _backward_of,
    mutates_args=(),
    schema="(Tensor? dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, bool causal,"
    " float? scale, str layout, SymInt? diagonal=None, bool? deterministic=None, SymInt? window_left=None,"
    " SymInt? window_right=None) -> (Tensor, Tensor, Tensor)",
)
backward_operator.register_fake(_backward_fake)
backward_operator.register_autograd(no_second_derivative)
backward_operator.register_vmap(_backward_vmap)


def _forward_flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], causal: bool, scale: Any, layout: str,
    *_: object, **__: object,
) -> int:  # fmt: skip
    """As torch counts its own attention: of the whole matrix, causal or not, wherever the diagonal is."""
    return _scores(q, k, layout) * 2 * (q[-1] + v[-1])


def _backward_flops(
    dout: Any, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], out: Any, lse: Any, dlse: Any,
    causal: bool, scale: Any, layout: str, *_: object, **__: object,
) -> int:  # fmt: skip
    """The scores again, dP and dV, dQ and dK."""
    return _scores(q, k, layout) * 2 * (3 * q[-1] + 2 * v[-1])


def _scores(q: tuple[int, ...], k: tuple[int, ...], layout: str) -> int:
    keys = k[1] if layout == "bshd" else k[2]
    return math.prod(q[:3]) * keys


def _register_flops() -> None:
    counter, operators = import_module("torch.utils.flop_counter"), torch.ops.flashcute
    for operator, formula in (
        (operators.flash_attention_forward, _forward_flops),
        (operators.flash_attention_backward, _backward_flops),
    ):
        if operator not in counter.flop_registry:  # it is, where this module is loaded again
            counter.register_flop_formula(operator)(formula)


when_imported("torch.utils.flop_counter", _register_flops)
