"""What torch wants of a call beside its result: gradients, operators to trace, autocast, its own attention.

Loaded as soon as torch is, so that saved programs find the operators. Eager calls go through an autograd.Function;
torch.compile and torch.export see the operators `flashcute::flash_attention_forward` and
`flashcute::flash_attention_backward`, which cost more per call.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from . import _core
from ._arrays import (
    differentiates_forward,
    has_own_dispatch,
    library_of,
    remember_torch,
    stream_number,
    torch_observers,
)
from ._call import (
    SDPA,
    Options,
    checked_window,
    missing_feature,
    require_arrays,
    require_kind,
    rows_of_heads,
    run,
    same_bits,
    unsupported,
    with_copies,
)
from ._core import ArgumentError, ConfigError, Explanation, UnsupportedError
from ._import_hook import when_imported

torch: Any = import_module("torch")
Tensor = Any
remember_torch(torch.Tensor)


class Problem(NamedTuple):
    """The arguments of a call that say what to compute."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    attn_mask: Tensor | None
    dropout_p: float
    window: tuple[int, int] | None

    @property
    def recording(self) -> bool:
        # In what explain is asked about, k and v may be another library's.
        inputs = (self.q, self.k, self.v, self.attn_mask)
        return bool(
            torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
        )

    @property
    def stranger(self) -> str | None:
        """What is wrong with an input that is no torch tensor."""
        for name in ("q", "k", "v"):
            if not isinstance(getattr(self, name), torch.Tensor):
                got = type(getattr(self, name)).__qualname__
                return f"{name}: expected a torch tensor as q, got {got}"
        return None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, heads, seqlen_q, seqlen_k."""
        row = 1 if self.options.layout == "bshd" else 2
        return *rows_of_heads(self.q, self.options.layout), self.k.shape[row]

    @property
    def diagonal(self) -> int:
        """Of the causal mask and the window."""
        _, _, rows, keys = self.sizes
        return self.options.offset(rows, keys)

    @property
    def missing(self) -> str | None:
        """Why no kernel can do it, if the features say so already."""
        return missing_feature(self.attn_mask, self.dropout_p, self.window)

    def require_kinds(self, traced: bool) -> None:
        """Raises ArgumentError for nested, sparse and other tensors that no road serves."""
        require_kind(traced, q=self.q, k=self.k, v=self.v)
        if self.attn_mask is not None:
            require_kind(traced, attn_mask=self.attn_mask)

    def without_causal_bias(self) -> Problem:
        """With what torch's CausalBias means, a mask whose elements are not there, said in our words."""
        module, mask = sys.modules.get("torch.nn.attention.bias"), self.attn_mask
        if module is None or not isinstance(mask, module.CausalBias):
            return self
        lower_right = mask.variant == module.CausalVariant.LOWER_RIGHT
        if self.q.dim() != 4 or self.k.dim() != 4:  # who computes will say so
            return self.causal_at(None if lower_right else 0)
        _, _, rows, keys = self.sizes
        if (mask.seq_len_q, mask.seq_len_kv) != (rows, keys):
            raise ArgumentError(
                f"attn_mask: expected a CausalBias of q's and k's lengths, ({rows}, {keys}), got one of "
                f"({mask.seq_len_q}, {mask.seq_len_kv})"
            )
        bias = keys - rows if lower_right else 0
        if self.options.causal:  # both masks hold
            bias = min(bias, self.diagonal)
        if bias == self.diagonal:
            return self.causal_at(self.options.diagonal)
        if checked_window(self.window) == (-1, -1):
            return self.causal_at(bias)
        # The window has a diagonal of its own.
        seen = torch.ones(rows, keys, dtype=torch.bool, device=self.q.device).tril(bias)
        return self._replace(attn_mask=seen)

    def causal_at(self, diagonal: int | None) -> Problem:
        """Without a mask of elements."""
        options = self.options._replace(causal=True, diagonal=diagonal)
        return self._replace(options=options, attn_mask=None)

    def autocast(self) -> Problem:
        """With inputs as torch.amp.custom_fwd casts them: all but float64, to autocast's dtype."""
        kind = self.q.device.type
        if not has_autocast(kind) or not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)

        def cast(x: Any) -> Any:
            narrow = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.to(dtype) if narrow and x.dtype != torch.float64 else x

        q, k, v, mask = (cast(x) for x in (self.q, self.k, self.v, self.attn_mask))
        return self._replace(q=q, k=k, v=v, attn_mask=mask)


def attend(problem: Problem, out: Tensor | None, return_lse: bool, fallback: str) -> Any:
    """flash_attention where it is more than one call of the library. fallback: "warn", "error" or "silent"."""
    if problem.stranger:
        for name in ("q", "k", "v"):
            if not isinstance(getattr(problem, name), torch.Tensor):
                require_arrays({name: getattr(problem, name)})
        raise ArgumentError(problem.stranger)
    stream = problem.options.stream
    traced = is_traced(problem)
    problem.require_kinds(traced)
    problem = problem.without_causal_bias().autocast()
    require_no_recorded_output(out, problem)
    if traced and (out is not None or stream is not None):
        raise ArgumentError("out, stream: expected None in a traced call: the tracer plans both")
    missing = problem.missing or missing_gradient(problem, traced)
    if missing:
        require_fallback(problem, out, return_lse, fallback, missing)
        if fallback == "warn":
            warn(f"computed by {SDPA}: {missing}. on_unsupported='silent' accepts that")
        result = sdpa(problem)
        return result if out is None else out.copy_(result)
    q, k, v, options, *_ = problem
    if traced:
        out, lse = forward_by_operator(q, k, v, options)
        return (out, lse) if return_lse else out
    if problem.recording:
        return FlashAttention.apply(q, k, v, options, return_lse)
    return run(None, q, k, v, options, out, return_lse)


def is_traced(problem: Problem) -> bool:
    """Whether the call is recorded as an operator. Raises UnsupportedError for derivatives that the operator
    does not have: forward-mode ones, and those of torch.func."""
    if torch.compiler.is_compiling():
        return True
    transforms = torch._C._functorch.get_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    unpack = torch.autograd.forward_ad.unpack_dual
    if (transforms and any(t.key() in (kinds.Grad, kinds.Jvp) for t in transforms)) or (
        differentiates_forward() and any(unpack(x).tangent is not None for x in problem[:3])
    ):
        raise UnsupportedError(
            "flash_attention has no forward-mode derivative and none of torch.func: use requires_grad and "
            f"backward, or {SDPA}"
        )
    return is_observed(*problem[:3])


def is_observed(*tensors: Tensor | None) -> bool:
    """Whether something stands between the tensors and their memory, to which a call must show itself as an operator:
    a tracer, a dispatch mode, a transform, a tensor class of its own."""
    if torch.compiler.is_compiling() or any(observes() for observes in torch_observers()):
        return True
    for x in tensors:
        if x is None:
            continue
        # is_grads_batched is a vmap of its own, which is on no stack.
        if torch._C._functorch.is_legacy_batchedtensor(x) or has_own_dispatch(type(x)):
            return True
    return False


def require_no_recorded_output(out: Tensor | None, problem: Problem) -> None:
    wanted = torch.is_grad_enabled() and getattr(out, "requires_grad", False)
    if out is not None and (problem.recording or wanted):
        raise ArgumentError(
            "out: expected None where gradients are recorded (requires_grad=True), got a tensor. Call "
            "flash_attention under torch.no_grad(), or omit out"
        )


def require_fallback(
    problem: Problem, out: Tensor | None, return_lse: bool, fallback: str, missing: str
) -> None:
    """Raises where torch's own attention may not, or cannot, take the place of a kernel."""
    if fallback == "error":
        raise UnsupportedError(missing)
    if problem.options.stream is not None:
        raise ArgumentError(
            f"stream: expected None where {SDPA} computes, got {problem.options.stream!r}"
        )
    require_like_output(out, problem)
    if return_lse:
        raise UnsupportedError(f"return_lse=True: {SDPA} gives no LSE, and {missing}")


def require_like_output(out: Tensor | None, problem: Problem) -> None:
    """What the fallback is to write to must be what it computes."""
    if out is None:
        return
    q = problem.q
    expected = (*q.shape[:-1], problem.v.shape[-1])
    if not isinstance(out, torch.Tensor) or (out.shape, out.dtype, out.device) != (
        expected,
        q.dtype,
        q.device,
    ):
        got = type(out).__qualname__
        if isinstance(out, torch.Tensor):
            got = f"{tuple(out.shape)} of {out.dtype} on {out.device}"
        raise ArgumentError(
            f"out: expected a torch tensor {expected} of {q.dtype} on {q.device}, got {got}"
        )


def warn(text: str) -> None:
    """To the caller of flash_attention; in a traced call once, when it is traced."""
    warnings.warn(text, stacklevel=4)


def has_autocast(kind: str) -> bool:
    """torch's own question, which Dynamo does not trace in every version."""
    return bool(torch.amp.is_autocast_available(kind))


def missing_gradient(problem: Problem, traced: bool) -> str | None:
    """Why no kernel computes the gradients that a call records."""
    q, k, v = problem[:3]
    if not (problem.recording and q.is_cuda):
        return None
    if traced:  # there is no memory to look at
        d, d_v = as_constant(q.shape[-1]), as_constant(v.shape[-1])
        if has_gradients(q.dtype, q.device, d, d_v, same_bits(problem.options.deterministic)):
            return None
        return (
            f"gradients (requires_grad=True) of {q.dtype} with head dimensions {d} and {d_v} on this GPU have no "
            f"kernel: train with {SDPA}"
        )
    try:
        _core.backward_config_for(q, k, v, decided(problem.options, stream=None))
    except UnsupportedError as error:
        return f"gradients (requires_grad=True): {error}"
    return None


def as_constant(head_dim: int) -> int:
    """The number behind what torch.compile may hold for a symbol, found by comparisons, on which it can guard."""
    low, high = 0, 257
    while low < high:
        middle = (low + high) // 2
        if head_dim <= middle:
            high = middle
        else:
            low = middle + 1
    return low


def has_gradients(
    dtype: Any, device: Any, head_dim: int, head_dim_v: int, deterministic: bool
) -> bool:
    """Whether a GPU has kernels for gradients."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        _core.default_backward_config(
            dtype, head_dim, 10 * major + minor, head_dim_v, deterministic
        )
    except (ConfigError, UnsupportedError):
        return False
    except ArgumentError:  # no call takes such a head dimension: the operator names the tensor
        return True
    return True


def decided(options: Options, **changes: Any) -> Options:
    """With a yes or no for what follows torch's switch, as it is now, and with changes."""
    return options._replace(deterministic=same_bits(options.deterministic), **changes)


def _keep_out_of_the_trace() -> None:
    """Not as decorators: torch.compiler.assume_constant_result imports torch._dynamo, which takes seconds."""
    for function in (warn, has_autocast, has_gradients):
        torch.compiler.assume_constant_result(function)


when_imported("torch._dynamo", _keep_out_of_the_trace)


# ---- gradients ---------------------------------------------------------------------------------


def gradients(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, in the memory order of q, k and v, on the current stream."""
    if dout is None:  # only the LSE was used
        dout = out.new_zeros(out.shape[-1:]).expand(out.shape)
    # A negated view is none to DLPack, and neighbours of an expanded gradient are not adjacent.
    dout = library_of(type(dout)).with_unit_stride(plain(dout))
    dlse = None if dlse is None else plain(dlse)
    dq, dk, dv = (gradient_like(x) for x in (q, k, v))
    options, workspace = decided(options, stream=None), None
    if q.is_cuda:
        size = _core.backward_workspace_size(None, q, v, options)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    _core.backward(None, dout, q, k, v, out, lse, dlse, dq, dk, dv, workspace, options)
    return dq, dk, dv


def gradients_on_stream(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]], *tensors: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """`compute`, which is `gradients` or their operator, on the stream that the forward call was given, if any. Its
    order with the current stream, on which autograd works, is kept in both directions."""
    address = stream_number(options.stream)
    if address is None:
        return compute(*tensors, options)
    q: Tensor = tensors[1]
    current = torch.cuda.current_stream(q.device)
    used = [x for x in tensors if x is not None]
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


class Gradients(torch.autograd.Function):  # type: ignore[misc]
    """`gradients` where they are recorded in turn (create_graph=True): as a constant they would make a loss that
    depends on them silently wrong."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> Any:
        return gradients_on_stream(gradients, *tensors, options=options)

    backward = staticmethod(no_second_derivative)


class FlashAttention(torch.autograd.Function):  # type: ignore[misc]
    """The eager road."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        return_lse: bool,
    ) -> Any:
        out, lse = run(None, q, k, v, decided(options, gradients_follow=True), return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        found = (None, None, None)
        if dout is not None or dlse is not None:
            tensors = (dout, *ctx.saved_tensors, dlse)
            if is_observed(dout, dlse):  # a batch of gradients, a counter of FLOPs
                found = gradients_on_stream(backward_by_operator, *tensors, options=ctx.options)
            elif torch.is_grad_enabled():
                found = Gradients.apply(ctx.options, *tensors)
            else:
                found = gradients_on_stream(gradients, *tensors, options=ctx.options)
        return (*found, None, None)


# ---- operators, for what traces ----------------------------------------------------------------


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
) -> Any:
    options = Options(causal, diagonal, scale, layout, None, allow_tf32)
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
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(causal, diagonal, scale, layout, deterministic=deterministic)
    return gradients(dout, q, k, v, out, lse, dlse, options)


def forward_by_operator(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    o = options
    return forward_operator(
        q, k, v, o.causal, o.scale, o.layout, o.allow_tf32, o.diagonal, o.deterministic
    )


def backward_by_operator(*arguments: Any) -> Any:
    """Of tensors and Options, as `gradients`."""
    *tensors, o = arguments
    return backward_operator(*tensors, o.causal, o.scale, o.layout, o.diagonal, o.deterministic)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_like(q), gradient_like(k), gradient_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, layout, _, diagonal, deterministic = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.options = Options(causal, diagonal, scale, layout, deterministic=deterministic)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    found = (None, None, None)
    if dout is not None or dlse is not None:
        found = backward_by_operator(dout, *ctx.saved_tensors, dlse, ctx.options)
    return (*found, *[None] * 6)


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
    " SymInt? diagonal=None, bool? deterministic=None) -> (Tensor, Tensor)",
)
forward_operator.register_fake(_forward_fake)
forward_operator.register_autograd(_backward, setup_context=_save)
forward_operator.register_vmap(_forward_vmap)

backward_operator = torch.library.custom_op(
    "flashcute::flash_attention_backward",
    _backward_of,
    mutates_args=(),
    schema="(Tensor? dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, bool causal,"
    " float? scale, str layout, SymInt? diagonal=None, bool? deterministic=None) -> (Tensor, Tensor, Tensor)",
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


# ---- torch's own attention, with what a call means here ----------------------------------------


def sdpa(problem: Problem) -> Tensor:
    """The output by scaled_dot_product_attention."""
    check_sizes(problem)
    q, k, v = problem[:3]
    if problem.options.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, is_causal = mask_for_sdpa(problem)
    empty = None
    if mask is not None:
        mask = torch.atleast_2d(mask)
        seen = mask if mask.dtype == torch.bool else mask != -math.inf
        # What no row sees may be NaN, and 0 * NaN is NaN.
        batch, heads, _, keys = problem.sizes
        unseen = ~seen.any(-2).broadcast_to(batch, heads, keys)
        unseen = unseen.unflatten(1, (k.shape[1], -1)).all(2)[..., None]  # by any head of the group
        k, v = (x.masked_fill(unseen, 0.0) for x in (k, v))
        # A row that sees nothing would be NaN, or make its gradient so: it sees all, and becomes 0.
        empty = ~seen.any(-1, keepdim=True)
        q = q.masked_fill(empty, 0.0)
        mask = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    checked_dropout(problem.dropout_p)
    grouped = False
    if q.shape[1] != k.shape[1]:  # symbolic in a traced call, where torch wants a plain bool
        grouped = True
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=problem.dropout_p,
        is_causal=is_causal,
        scale=problem.options.scale,
        enable_gqa=grouped,
    )
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
    return out.transpose(1, 2) if problem.options.layout == "bshd" else out


def mask_for_sdpa(problem: Problem) -> tuple[Tensor | None, bool]:
    """attn_mask and is_causal, which is torch's name for the diagonal 0."""
    _, _, rows, keys = problem.sizes
    causal, device = problem.options.causal, problem.q.device
    given, (left, right) = checked_mask(problem), checked_window(problem.window)
    if needs_no_mask(problem):
        return None, causal
    seen = None
    # How far after the diagonal a key lies. int64 holds it: the diagonal came as one, and counts up to 2^62.
    diagonal = problem.diagonal
    if problem.options.diagonal is not None:
        diagonal = max(-(2**62), min(diagonal, 2**62))
    distance = torch.arange(keys, device=device) - diagonal
    distance = distance[None, :] - torch.arange(rows, device=device)[:, None]
    if causal or right >= 0:
        seen = distance <= (0 if causal else right)
    if left >= 0:
        seen = distance >= -left if seen is None else seen & (distance >= -left)
    if given is None or seen is None:
        return (seen if given is None else given), False
    if given.dtype == torch.bool:
        return given & seen, False
    return given.masked_fill(~seen, -math.inf), False


def check_sizes(problem: Problem) -> None:
    """Of q, k and v, as everywhere; in a traced call those that torch itself would broadcast away."""
    if not is_traced(problem):
        _core.check_problem(*problem[:3], problem.options)
        return
    batch, heads, _, keys = problem.sizes
    head, row = (2, 1) if problem.options.layout == "bshd" else (1, 2)
    for name, x in (("k", problem.k), ("v", problem.v)):
        if x.dim() != 4 or x.shape[0] != batch:
            raise ArgumentError(
                f"{name}: expected 4 dimensions and q's batch size {batch}, got {tuple(x.shape)}"
            )
        if x.shape[head] != problem.k.shape[head] or heads % x.shape[head] != 0:
            raise ArgumentError(
                f"{name}: expected a number of heads that divides q's {heads}, got {x.shape[head]}"
            )
        if x.shape[row] != keys or x.dtype != problem.q.dtype:
            raise ArgumentError(
                f"{name}: expected seqlen {keys} and dtype {problem.q.dtype}, got {tuple(x.shape)}, {x.dtype}"
            )
    scale = problem.options.scale
    if scale is not None and not 0 <= scale < math.inf:
        raise ArgumentError(f"scale: expected a finite number >= 0, got {scale}")


def checked_dropout(probability: object) -> None:
    if (
        isinstance(probability, bool)
        or not isinstance(probability, int | float)
        or not 0.0 <= probability <= 1.0
    ):
        raise ArgumentError(f"dropout_p: expected a probability, got {probability!r}")


def needs_no_mask(problem: Problem) -> bool:
    """Whether torch's is_causal says it all. Keys that no row sees need a mask: they may hold NaN."""
    _, _, rows, keys = problem.sizes
    if problem.attn_mask is not None or checked_window(problem.window) != (-1, -1):
        return False
    return not problem.options.causal or (keys <= rows and problem.diagonal == 0)


def checked_mask(problem: Problem) -> Tensor | None:
    mask = problem.attn_mask
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ArgumentError(f"attn_mask: expected a torch tensor, got {type(mask).__qualname__}")
    if mask.device != problem.q.device:
        raise ArgumentError(
            f"attn_mask: expected a tensor on q's device {problem.q.device}, got one on {mask.device}"
        )
    if mask.dtype not in (torch.bool, problem.q.dtype):
        raise ArgumentError(
            f"attn_mask: expected dtype bool or {problem.q.dtype} as in q, got {mask.dtype}"
        )
    # Not `have in (1, want)`: Dynamo traces it as False where want is a symbol, whatever that stands for.
    fits = mask.dim() <= 4 and all(
        have == 1 or have == want
        for have, want in zip(reversed(mask.shape), reversed(problem.sizes), strict=False)
    )
    if not fits:
        raise ArgumentError(
            f"attn_mask: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = "
            f"{problem.sizes}, got {tuple(mask.shape)}"
        )
    return mask


# ---- what will happen --------------------------------------------------------------------------


def explained(problem: Problem, out: Tensor | None, return_lse: bool, fallback: str) -> Explanation:
    """What attend would do."""
    wrong = None
    if not problem.stranger:
        problem.require_kinds(traced=False)
        try:
            problem = problem.without_causal_bias().autocast()
        except ArgumentError as error:
            wrong = str(error)
    q, k, v, options, *_ = problem
    recorded = options.gradients_follow or problem.recording
    told = decided(options, stream=None, gradients_follow=recorded)
    address = stream_number(options.stream)
    found: Explanation = _core.explain(None, q, k, v, out, told)
    if wrong:
        return unsupported(found, wrong)
    missing = problem.missing
    if problem.stranger and (missing or problem.recording):
        return unsupported(found, problem.stranger)
    try:
        missing = missing or missing_gradient(problem, traced=False)
    except ArgumentError:
        return found  # which says what is wrong with the arguments
    try:
        require_no_recorded_output(out, problem)
        if missing:
            require_fallback(problem, out, return_lse, fallback, missing)
            _core.check_problem(q, k, v, told)
            checked_mask(problem)
            checked_dropout(problem.dropout_p)
        elif address is not None:
            library_of(type(q)).require_stream(
                address, [q, k, v] if out is None else [q, k, v, out]
            )
    except (ArgumentError, UnsupportedError) as error:
        return unsupported(found, str(error))
    if missing:
        return Explanation(
            backend="torch",
            config=None,
            kernel="scaled_dot_product_attention",
            image=f"torch {torch.__version__}",
            rejected=[(found.backend or "kernels", missing), *found.rejected],
            notes=[memory_of_sdpa(problem)],
            reasons=[
                "No kernel of flashcute serves the call, so torch's own attention computes it."
            ],
        )
    # torch's own attention knows what a negated view is.
    require_arrays({"q": q, "k": k, "v": v})
    return with_copies(found, q, v)


def memory_of_sdpa(problem: Problem) -> str:
    batch, heads, rows, keys = problem.sizes
    item = problem.q.element_size()
    parts = []
    if not needs_no_mask(problem):
        given = problem.attn_mask
        whole = rows * keys * (1 + item)
        if given is not None:
            whole += (
                2
                * math.prod(torch.broadcast_shapes(given.shape, (rows, keys)))
                * given.element_size()
            )
        parts.append(f"up to {whole} bytes for masks")
    scores = 2 * batch * heads * rows * keys * max(item, 4)
    parts.append(
        f"up to {scores} bytes for scores and probabilities, unless torch finds a fused kernel"
        + (" (with dropout_p, on the CPU it has none)" if problem.dropout_p else "")
    )
    return "needs " + ", and ".join(parts)
