"""flash_attention where it is more than one call of the library, and what it would do."""

from __future__ import annotations

from typing import Any

from .. import _core
from .._arrays import library_of, stream_number
from .._call import SDPA, run, same_bits, unsupported, with_copies
from .._checks import require_arrays
from .._core import ArgumentError, ConfigError, Explanation, UnsupportedError
from .._import_hook import when_imported
from .._masks import checked_rules, with_masks
from ..inspection import explained_with_masks
from .autograd import FlashAttention
from .fallback import (
    checked_dropout,
    checked_mask,
    checked_numbers,
    memory_of_sdpa,
    require_fallback,
    sdpa,
)
from .framework import Tensor, has_autocast, torch, warn
from .gradients import decided
from .operators import block_mask_by_operator, forward_by_operator
from .problem import Problem, require_tensors
from .tracing import as_constant, is_traced, require_own_memory
from .worlds import require_one_world


def attend(problem: Problem, out: Tensor | None, return_lse: bool, fallback: str) -> Any:
    """flash_attention where it is more than one call of the library. fallback: "warn", "error" or "silent"."""
    if problem.stranger:
        for name in ("q", "k", "v"):
            if not isinstance(getattr(problem, name), torch.Tensor):
                require_arrays({name: getattr(problem, name)})
        raise ArgumentError(problem.stranger)
    traced = is_traced(problem)
    problem.require_kinds(traced)
    if traced:
        require_tensors(problem.options, problem.masks)
        require_one_world(problem)
    problem = problem.without_causal_bias().autocast()
    require_no_recorded_output(out, problem)
    if traced:
        require_own_memory(out, problem)
    missing = problem.missing or missing_gradient(problem, traced)
    if missing:
        require_fallback(problem, out, return_lse, fallback, missing)
        if fallback == "warn":
            warn(f"computed by {SDPA}: {missing}. on_unsupported='silent' accepts that")
        result = sdpa(problem)
        return result if out is None else out.copy_(result)
    q, k, v, options, *_ = with_block_mask(problem, traced)
    if traced:
        out, lse = forward_by_operator(q, k, v, options)
        return (out, lse) if return_lse else out
    if problem.recording:
        return FlashAttention.apply(q, k, v, options.sink, options, return_lse)
    return run(None, q, k, v, options, out, return_lse)


def with_block_mask(problem: Problem, traced: bool) -> Problem:
    """With one mask in place of those by element. Where gradients are recorded it serves them too."""
    q, k, v, options, attn_mask, _, documents = problem
    if attn_mask is None and documents is None:
        return problem
    if not traced:
        options = with_masks(options, q, k, v, attn_mask, documents)
        return problem._replace(options=options, attn_mask=None, documents=None)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ArgumentError(f"{name}: expected 4 dimensions, got shape {tuple(x.shape)}")
    for name, x in problem.masks.items():
        if x.device != q.device:
            raise ArgumentError(
                f"{name}: expected a tensor on q's device {q.device}, got one on {x.device}"
            )
    rules = checked_rules(attn_mask, documents, options, problem.sizes)
    words = block_mask_by_operator(rules)
    options = options._replace(block_mask=words, block_mask_sizes=rules.sizes)
    return problem._replace(options=options, attn_mask=None, documents=None)


def require_no_recorded_output(out: Tensor | None, problem: Problem) -> None:
    wanted = torch.is_grad_enabled() and getattr(out, "requires_grad", False)
    if out is not None and (problem.recording or wanted):
        raise ArgumentError(
            "out: expected None where gradients are recorded (requires_grad=True), got a tensor. Call "
            "flash_attention under torch.no_grad(), or omit out"
        )


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


def _keep_out_of_the_trace() -> None:
    """Not as decorators: torch.compiler.assume_constant_result imports torch._dynamo, which takes seconds."""
    for function in (warn, has_autocast, has_gradients):
        torch.compiler.assume_constant_result(function)


when_imported("torch._dynamo", _keep_out_of_the_trace)


def explained(problem: Problem, out: Tensor | None, return_lse: bool, fallback: str) -> Explanation:
    """What attend would do."""
    wrong = None
    if not problem.stranger:
        problem.require_kinds(traced=False)
        try:
            problem = problem.without_causal_bias().autocast()
        except ArgumentError as error:
            wrong = str(error)
    q, k, v, options, attn_mask, _, documents = problem
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
            checked_numbers(problem)
            checked_dropout(problem.dropout_p)
        elif attn_mask is not None or documents is not None:
            found = explained_with_masks(
                q, k, v, out, told, attn_mask=attn_mask, documents=documents
            )
        if not missing and address is not None:
            library_of(type(q)).require_stream(
                address,
                [x for x in (q, k, v, out, *options.arrays.values()) if x is not None],
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
    require_arrays({"q": q, "k": k, "v": v, **options.arrays})
    return with_copies(found, q, v)
