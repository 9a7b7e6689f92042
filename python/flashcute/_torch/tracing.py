"""What stands between a call and the memory of its tensors."""

from __future__ import annotations

from .._arrays import differentiates_forward, has_own_dispatch, torch_observers
from .._call import SDPA
from .._core import ArgumentError, UnsupportedError
from .framework import Tensor, torch
from .problem import Problem


def is_traced(problem: Problem) -> bool:
    """Whether the call is recorded as an operator. Raises UnsupportedError for derivatives that the operator
    does not have: forward-mode ones, and those of torch.func."""
    if torch.compiler.is_compiling():
        return True
    if differentiates_as_function(*problem.tensors):
        raise UnsupportedError(
            "flash_attention has no forward-mode derivative and none of torch.func: use requires_grad and "
            f"backward, or {SDPA}"
        )
    return is_observed(*problem.tensors)


def differentiates_as_function(*tensors: Tensor) -> bool:
    """Whether a derivative is asked for that is no recorded gradient: of torch.func, or in forward mode."""
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    unpack = torch.autograd.forward_ad.unpack_dual
    return bool(
        (transforms and any(t.key() in (kinds.Grad, kinds.Jvp) for t in transforms))
        or (differentiates_forward() and any(unpack(x).tangent is not None for x in tensors))
    )


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


def require_own_memory(out: Tensor | None, problem: Problem) -> None:
    """Of a call that is an operator, which has neither out nor stream."""
    stream = problem.options.stream
    if out is None and stream is None:
        return
    own = next((type(x) for x in problem[:3] if has_own_dispatch(type(x))), None)
    if own is None or torch.compiler.is_compiling():
        raise ArgumentError("out, stream: expected None in a traced call: the tracer plans both")
    name, got = ("stream", repr(stream)) if out is None else ("out", f"a {type(out).__name__}")
    raise ArgumentError(
        f"{name}: expected None beside tensors of the class {own.__name__}, which computes operators by itself, "
        f"got {got}"
    )


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
