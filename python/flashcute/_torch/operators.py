"""The operators that torch.compile and torch.export see, with what torch asks of an operator: shapes, gradients, vmap,
FLOPs."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from .. import _core
from .._arrays import has_own_dispatch, library_of
from .._call import Options, rows_of_heads, run
from .._import_hook import when_imported
from .._masks import Rules
from ..block_mask import room_for, words_size
from .framework import Tensor, torch
from .gradients import (
    gradient_like,
    gradients,
    no_second_derivative,
    with_tensors,
    without_tensors,
)
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    prefix: int | None = None,
    prefixes: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_mask_sizes: list[int] | None = None,
) -> Any:
    options = _options(
        causal, scale, layout, diagonal, None, window_left, window_right,
        seqlens_q, seqlens_k, prefix, prefixes, sink, cu_seqlens_q, cu_seqlens_k, block_mask, block_mask_sizes,
        allow_tf32=allow_tf32,
    )  # fmt: skip
    return run(None, q, k, v, options, return_lse=True)


def _options(
    causal: bool,
    scale: float | None,
    layout: str,
    diagonal: int | None = None,
    deterministic: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    prefix: int | None = None,
    prefixes: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_mask_sizes: list[int] | None = None,
    allow_tf32: bool = False,
) -> Options:
    """From the arguments of the forward operator, in their order but for `allow_tf32`."""
    sizes: Any = None if block_mask_sizes is None else tuple(block_mask_sizes)
    return Options(
        causal, diagonal, scale, layout, None, allow_tf32, deterministic, False, window_left, window_right,
        seqlens_q, seqlens_k, prefix, prefixes, sink, cu_seqlens_q, cu_seqlens_k, block_mask, sizes,
    )  # fmt: skip


def _options_of_backward(sink: Tensor | None, *others: Any) -> Options:
    """From the arguments of a backward operator, whose sink is elsewhere."""
    given: list[Any] = [*others, *[None] * (BACKWARD_OPTIONS - len(others))]
    return _options(*(*given[:-4], sink, *given[-4:]))


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
    *others: Any,
) -> tuple[Tensor, ...]:
    return gradients(dout, q, k, v, out, lse, dlse, _options_of_backward(None, *others))


def _backward_with_sink_of(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sink: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    return gradients(dout, q, k, v, out, lse, dlse, _options_of_backward(sink, *others))


def forward_by_operator(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    o = options
    return forward_operator(
        q, k, v, o.causal, o.scale, o.layout, o.allow_tf32, *_appended(o), o.sink, *_appended_last(o),
    )  # fmt: skip


def _appended(o: Options) -> tuple[Any, ...]:
    """The first arguments of all operators that have defaults."""
    return (
        o.diagonal, o.deterministic, o.window_left, o.window_right,
        o.seqlens_q, o.seqlens_k, o.prefix, o.prefixes,
    )  # fmt: skip


def _appended_last(o: Options) -> tuple[Any, ...]:
    sizes = None if o.block_mask_sizes is None else list(o.block_mask_sizes)
    return o.cu_seqlens_q, o.cu_seqlens_k, o.block_mask, sizes


def backward_by_operator(*arguments: Any) -> Any:
    """Of tensors and Options, as `gradients`."""
    *tensors, o = arguments
    others = o.causal, o.scale, o.layout, *_appended(o), *_appended_last(o)
    if o.sink is None:
        return backward_operator(*tensors, *others)
    return backward_with_sink_operator(*tensors, o.sink, *others)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_like(q), gradient_like(k), gradient_like(v)


def _backward_with_sink_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, sink: Tensor,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return gradient_like(q), gradient_like(k), gradient_like(v), torch.empty_like(sink)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, layout, _, *appended = inputs
    ctx.options, tensors = without_tensors(_options(causal, scale, layout, *appended))
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    found: tuple[Tensor | None, ...] = (None, None, None)
    if dout is not None or dlse is not None:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout, dlse = as_placed(dout, out), as_placed(dlse, lse)
        options = with_tensors(ctx.options, tuple(tensors))
        found = backward_by_operator(dout, q, k, v, out, lse, dlse, options)
    dsink = found[3] if len(found) > 3 else None
    return (*found[:3], *[None] * 12, dsink, *[None] * 4)


# A vmapped dimension becomes part of the batch. Of what belongs to heads it cannot, and where there is no batch: a sink
# that is mapped, any gradient of a sink, and packed sequences make one call of each entry. So does a block mask that is
# mapped, or another for each batch entry: its words have no dimensions.


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Copies what has no such dimension only where there is a batch to repeat."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return library_of(type(x)).with_unit_stride(x.flatten(0, 1))


def unfold(found: tuple[Tensor, ...], size: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    unfolded = tuple(x.unflatten(0, (size, -1)) for x in found)
    return unfolded, (0,) * len(found)


def _folded(arguments: Any, dims: Any, size: int, shared: tuple[int, ...] = ()) -> list[Any]:
    """All tensors with the mapped dimension in their batch, all else as it is, and what is at the places `shared`."""
    return [
        fold(x, dim, size) if isinstance(x, torch.Tensor) and place not in shared else x
        for place, (x, dim) in enumerate(zip(arguments, dims, strict=True))
    ]


def _one_by_one(operator: Any, info: Any, dims: Any, arguments: Any) -> Any:
    calls = [
        operator(
            *(
                x if dim is None or not isinstance(x, torch.Tensor) else x.select(dim, i)
                for x, dim in zip(arguments, dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(x) for x in zip(*calls, strict=True)), (0,) * len(calls[0])


SINK, CU_SEQLENS, BLOCK_MASK = 15, 16, 18  # of the forward's arguments
LSE = 5  # of the backward's arguments the one that is read as contiguous
BACKWARD_CU_SEQLENS, BACKWARD_BLOCK_MASK = 18, 20
BACKWARD_OPTIONS = 15  # arguments of the backward after its tensors


def _is_given(arguments: Any, place: int) -> bool:
    # torch leaves out last arguments that are defaults.
    return len(arguments) > place and arguments[place] is not None


def _is_of_all(arguments: Any, dims: Any, place: int) -> bool:
    """Whether a block mask, if there is one at the place, serves any batch."""
    return not _is_given(arguments, place) or (dims[place] is None and arguments[place + 1][0] == 1)


def _forward_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    mapped_sink = _is_given(arguments, SINK) and dims[SINK] is not None
    packed = _is_given(arguments, CU_SEQLENS)
    if packed or mapped_sink or not _is_of_all(arguments, dims, BLOCK_MASK):
        return _one_by_one(forward_operator, info, dims, arguments)
    folded = _folded(arguments, dims, info.batch_size, shared=(SINK, BLOCK_MASK))
    return unfold(forward_operator(*folded), info.batch_size)


def _backward_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    packed = _is_given(arguments, BACKWARD_CU_SEQLENS)
    if packed or not _is_of_all(arguments, dims, BACKWARD_BLOCK_MASK):
        return _one_by_one(_of_contiguous_lse(backward_operator), info, dims, arguments)
    folded = _folded(arguments, dims, info.batch_size, shared=(BACKWARD_BLOCK_MASK,))
    folded[LSE] = folded[LSE].contiguous()
    return unfold(backward_operator(*folded), info.batch_size)


def _backward_with_sink_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    return _one_by_one(_of_contiguous_lse(backward_with_sink_operator), info, dims, arguments)


def _of_contiguous_lse(operator: Any) -> Any:
    def call(*entry: Any) -> Any:
        ready = list(entry)
        ready[LSE] = ready[LSE].contiguous()
        return operator(*ready)

    return call


# ---- block masks -----------------------------------------------------------------------------------


def block_mask_by_operator(rules: Rules) -> Tensor:
    """The words of what `make` makes."""
    first, sizes = rules.block_mask, list(rules.sizes)
    words, sizes_of_first = (None, None) if first is None else (first.words, list(first.sizes))
    return block_mask_operator(
        rules.attn_mask, *(rules.documents or (None, None)), words, sizes_of_first, sizes
    )


def _words(
    attn_mask: Tensor | None,
    documents_q: Tensor | None,
    documents_k: Tensor | None,
    block_mask: Tensor | None,
    block_mask_sizes: list[int] | None,
    sizes: list[int],
) -> Tensor:
    """New ones that nobody has written."""
    like = next(x for x in (attn_mask, documents_q, block_mask) if x is not None)
    room = room_for(
        sizes,
        attn_mask=attn_mask is not None,
        documents=documents_q is not None,
        first=None if block_mask is None else (block_mask.shape[0], block_mask_sizes),
        smaller=torch.sym_min,
        larger=torch.sym_max,
    )
    return like.new_empty((words_size(sizes, room),), dtype=torch.int32)


def _block_mask(
    attn_mask: Tensor | None,
    documents_q: Tensor | None,
    documents_k: Tensor | None,
    block_mask: Tensor | None,
    block_mask_sizes: list[int] | None,
    sizes: list[int],
) -> Tensor:
    words = _words(attn_mask, documents_q, documents_k, block_mask, block_mask_sizes, sizes)
    of_first: Any = (block_mask, tuple(block_mask_sizes or ()))
    of_words: Any = tuple(sizes)
    _core.build_block_mask(
        words, of_words, dense=attn_mask, documents_q=documents_q, documents_k=documents_k,
        first=None if block_mask is None else of_first,
    )  # fmt: skip
    return words


def _block_mask_vmap(info: Any, dims: Any, *arguments: Any) -> Any:
    (words,), (dim,) = _one_by_one(
        lambda *entry: (block_mask_operator(*entry),), info, dims, arguments
    )
    return words, dim


# ---- registration ----------------------------------------------------------------------------------

# importlib.reload defines the operators again. torch forgets an operator's packet, also that of the new definition,
# when the Library of a former one is collected as garbage, and FlopCounterMode does not know the packet that follows.
_former_operators = [
    *globals().get("_former_operators", ()),
    *(
        globals().get(f"{name}_operator")
        for name in ("forward", "backward", "backward_with_sink", "block_mask")
    ),
]

_APPENDED = (
    " SymInt? diagonal=None, bool? deterministic=None, SymInt? window_left=None, SymInt? window_right=None,"
    " Tensor? seqlens_q=None, Tensor? seqlens_k=None, SymInt? prefix=None, Tensor? prefixes=None"
)
_APPENDED_LAST = (
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " Tensor? block_mask=None, SymInt[]? block_mask_sizes=None"
)
_BACKWARD = "Tensor? dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"

forward_operator = torch.library.custom_op(
    "flashcute::flash_attention_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, float? scale, str layout, bool allow_tf32,"
    f"{_APPENDED}, Tensor? sink=None,{_APPENDED_LAST}) -> (Tensor, Tensor)",
)
forward_operator.register_fake(_forward_fake)
forward_operator.register_autograd(_backward, setup_context=_save)
forward_operator.register_vmap(_forward_vmap)

backward_operator = torch.library.custom_op(
    "flashcute::flash_attention_backward",
    _backward_of,
    mutates_args=(),
    schema=f"({_BACKWARD} bool causal, float? scale, str layout,{_APPENDED},{_APPENDED_LAST})"
    " -> (Tensor, Tensor, Tensor)",
)
backward_operator.register_fake(_backward_fake)
backward_operator.register_autograd(no_second_derivative)
backward_operator.register_vmap(_backward_vmap)

# An operator of its own: the number of tensors that an operator returns is fixed.
backward_with_sink_operator = torch.library.custom_op(
    "flashcute::flash_attention_backward_with_sink",
    _backward_with_sink_of,
    mutates_args=(),
    schema=f"({_BACKWARD} Tensor sink, bool causal, float? scale, str layout,{_APPENDED},{_APPENDED_LAST})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
backward_with_sink_operator.register_fake(_backward_with_sink_fake)
backward_with_sink_operator.register_autograd(no_second_derivative)
backward_with_sink_operator.register_vmap(_backward_with_sink_vmap)

block_mask_operator = torch.library.custom_op(
    "flashcute::block_mask",
    _block_mask,
    mutates_args=(),
    schema="(Tensor? attn_mask, Tensor? documents_q, Tensor? documents_k, Tensor? block_mask,"
    " SymInt[]? block_mask_sizes, SymInt[] sizes) -> Tensor",
)
block_mask_operator.register_fake(_words)
block_mask_operator.register_vmap(_block_mask_vmap)


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *others: Any, **_: object) -> int:
    """As torch counts its own attention: of the whole matrix, whatever masks hide; packed, of each sequence's."""
    layout = others[2]
    scores = _scores(q, k, layout, *others[CU_SEQLENS - 3 : BLOCK_MASK - 3])
    return scores * 2 * int(q.shape[-1] + v.shape[-1])


def _backward_flops(
    dout: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, dlse: Any, *others: Any, **_: object
) -> int:  # fmt: skip
    """The scores again, dP and dV, dQ and dK."""
    layout = others[2]
    scores = _scores(
        q, k, layout, *others[BACKWARD_CU_SEQLENS - LSE - 2 : BACKWARD_BLOCK_MASK - LSE - 2]
    )
    return scores * 2 * int(3 * q.shape[-1] + 2 * v.shape[-1])


def _backward_with_sink_flops(*arguments: Any, **_: object) -> int:
    tensors, _sink, others = arguments[: LSE + 2], arguments[LSE + 2], arguments[LSE + 3 :]
    return _backward_flops(*tensors, *others)


def _scores(
    q: Tensor,
    k: Tensor,
    layout: str,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
) -> int:
    row = -3 if layout == "bshd" else -2
    whole: int = math.prod(q.shape[:-1]) * k.shape[row]
    if starts_q is None or has_own_dispatch(type(starts_q)) or starts_q.is_meta:
        return whole  # also where there are no numbers
    rows = starts_q.diff()
    keys = rows if starts_k is None else starts_k.diff()
    heads: int = math.prod(q.shape[:-1]) // max(q.shape[row], 1)
    return heads * int((rows.long() * keys).sum())


def _register_flops() -> None:
    counter, operators = import_module("torch.utils.flop_counter"), torch.ops.flashcute
    for operator, formula in (
        (operators.flash_attention_forward, _forward_flops),
        (operators.flash_attention_backward, _backward_flops),
        (operators.flash_attention_backward_with_sink, _backward_with_sink_flops),
    ):
        if operator not in counter.flop_registry:  # it is, where this module is loaded again
            counter.register_flop_formula(operator, get_raw=True)(formula)


when_imported("torch.utils.flop_counter", _register_flops)
