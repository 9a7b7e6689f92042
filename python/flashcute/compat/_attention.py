"""The calls of flash_attention that all of flash-attn's functions come down to."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._arrays import has_own_dispatch, torch_states
from .._call import Options, checked_options, run
from .._core import ArgumentError, UnsupportedError
from .._torch.autograd import Gradients
from .._torch.dispatch import missing_gradient
from .._torch.framework import Tensor, torch
from .._torch.gradients import (
    decided,
    gradient_like,
    gradients,
    with_tensors,
    without_tensors,
)
from .._torch.operators import backward_by_operator
from .._torch.problem import Problem
from .._torch.tracing import is_observed
from ..attention import flash_attention
from . import _settings
from ._arguments import (
    NOT_PACKED,
    MaskOf,
    Sequences,
    adjacent,
    deterministic_or_default,
    in_names_of_flash_attn,
    require_tensors,
)

Three = tuple[Tensor, Tensor, Tensor]


class Rest(NamedTuple):
    """The arguments that mean the same in both versions."""

    mask_of: MaskOf
    causal: bool
    window_size: object
    scale: float | None
    deterministic: bool
    return_lse: bool
    dropout_p: float = 0.0
    sink: Tensor | None = None  # as checked_sink gives it
    sequences: Sequences = NOT_PACKED  # as checked_sequences gives them


# ---- q, k and v apart --------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, rest: Rest) -> Any:
    """out, or (out, lse), where a row that sees no key has the log-sum-exp -inf."""
    require_tensors(q=q, k=k, v=v)
    mask = rest.mask_of(q, k, rest.causal, rest.window_size)
    try:
        return flash_attention(
            adjacent(q),
            adjacent(k),
            adjacent(v),
            mask.causal,
            scale=rest.scale,
            return_lse=rest.return_lse,
            deterministic=deterministic_or_default(rest.deterministic),
            dropout_p=rest.dropout_p,
            window=mask.window,
            sink=rest.sink,
            **rest.sequences._asdict(),
            on_unsupported=_settings.on_unsupported,
        )
    except (ArgumentError, UnsupportedError) as error:
        raise in_names_of_flash_attn(error) from None


# ---- q, k and v, or k and v, in one tensor -----------------------------------------------------------


class Packing(NamedTuple):
    """How one tensor holds several, in the dimension after that of the rows."""

    # Of each, in (..., their sum, d); None: (..., how many there are, heads, d).
    heads: tuple[int, ...] | None = None

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Views."""
        return tuple(packed.unbind(-3) if self.heads is None else packed.split(self.heads, -2))

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """A copy."""
        return torch.stack(parts, -3) if self.heads is None else torch.cat(parts, -2)


def attend_packed(q: Tensor | None, packed: Tensor, packing: Packing, rest: Rest) -> Any:
    """`attend`, where the gradient of the packed tensor is one allocation that the kernels write to."""
    packed = adjacent(packed)
    q_k_v = with_parts(None if q is None else adjacent(q), packing.split(packed))
    mask = rest.mask_of(q_k_v[0], q_k_v[1], rest.causal, rest.window_size)
    options = checked_options(
        mask.causal,
        "end",
        rest.scale,
        "bshd",
        deterministic=deterministic_or_default(rest.deterministic),
        window=mask.window,
        sink=rest.sink,
        **rest.sequences._asdict(),
    )
    problem = Problem(*q_k_v, options, None, rest.dropout_p)
    if not _is_plain(problem) or problem.missing or missing_gradient(problem, traced=False):
        return attend(*q_k_v, rest)
    given = None if q is None else q_k_v[0]
    try:
        return PackedAttention.apply(given, packed, rest.sink, packing, options, rest.return_lse)
    except (ArgumentError, UnsupportedError) as error:
        raise in_names_of_flash_attn(error) from None


def with_parts(q: Tensor | None, parts: tuple[Tensor, ...]) -> Three:
    """q, k and v, where q may be the first of the parts."""
    first, *others = parts if q is None else (q, *parts)
    k, v = others
    return first, k, v


def _is_plain(problem: Problem) -> bool:
    """Whether autograd records the call and nothing else of torch has a part in it."""
    if torch.compiler.is_compiling() or any(state() for state in torch_states()):
        return False
    return problem.recording and not any(has_own_dispatch(type(x)) for x in problem.tensors)


class PackedAttention(torch.autograd.Function):  # type: ignore[misc]
    """As FlashAttention, of packed tensors. Autograd's own gradient of the slices would be zeros, three times, and
    their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        packed: Tensor,
        sink: Tensor | None,
        packing: Packing,
        options: Options,
        return_lse: bool,
    ) -> Any:
        """The sink is also in the options, as in FlashAttention."""
        q_k_v = with_parts(q, packing.split(packed))
        out, lse = run(None, *q_k_v, decided(options, gradients_follow=True), return_lse=True)
        ctx.packing = packing
        ctx.options, tensors = without_tensors(options)
        ctx.save_for_backward(q, packed, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        if dout is None and dlse is None:
            return (None,) * 6
        q, packed, out, lse, *arrays = ctx.saved_tensors
        options = with_tensors(ctx.options, tuple(arrays))
        tensors = (dout, *with_parts(q, ctx.packing.split(packed)), out, lse, dlse)
        into = None
        if is_observed(dout, dlse):
            found = backward_by_operator(*tensors, options)
        elif torch.is_grad_enabled():
            found = Gradients.apply(options, *tensors)
        else:
            dpacked = gradient_like(packed)
            dq = None if q is None else gradient_like(q)
            into = with_parts(dq, ctx.packing.split(dpacked))
            found = gradients(*tensors, options, into)
        dsink = found[3] if options.sink is not None and ctx.needs_input_grad[2] else None
        if into is None:
            dq, parts = (None, found[:3]) if q is None else (found[0], found[1:3])
            dpacked = ctx.packing.join(parts)
        return dq, dpacked, dsink, None, None, None


def require_packed(name: str, packed: object, number: int, rows: str = "batch, seqlen") -> None:
    """(..., number, heads, d), where the first dimensions are `rows`."""
    require_tensors(**{name: packed})
    shape = tuple(packed.shape)  # type: ignore[attr-defined]
    if len(shape) != rows.count(",") + 4 or shape[-3] != number:
        raise ArgumentError(
            f"{name}: expected a tensor ({rows}, {number}, heads, head_dim), got {shape}"
        )
