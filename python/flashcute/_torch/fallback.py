"""torch's own attention, with what a call means here."""

from __future__ import annotations

import math
from typing import Any

from .. import _core
from .._call import SDPA
from .._core import ArgumentError, UnsupportedError
from .._masks import arrays_of, checked_documents
from .framework import Tensor, torch
from .problem import Problem, require_tensors
from .tracing import is_traced
from .worlds import is_distributed


def require_fallback(
    problem: Problem, out: Tensor | None, return_lse: bool, fallback: str, missing: str
) -> None:
    """Raises where torch's own attention may not, or cannot, take the place of a kernel."""
    if fallback == "error":
        raise UnsupportedError(missing)
    if any(is_distributed(x) for x in problem[:3]):
        raise UnsupportedError(
            f"q, k, v: of DTensors only kernels compute attention, and {missing}"
        )
    if problem.options.sink is not None:
        raise UnsupportedError(f"sink: {SDPA} has none, and {missing}")
    if problem.options.is_packed:
        raise UnsupportedError(f"cu_seqlens_q: {SDPA} has no packed sequences, and {missing}")
    if problem.options.block_mask is not None:
        raise UnsupportedError(f"block_mask: {SDPA} has none, and {missing}")
    require_tensors(problem.options, problem.masks)
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
    given, causal = checked_mask(problem), problem.options.causal
    if needs_no_mask(problem):
        return None, causal
    seen = visible(problem)
    if given is None or seen is None:
        return (seen if given is None else given), False
    if given.dtype == torch.bool:
        return given & seen, False
    return given.masked_fill(~seen, -math.inf), False


def visible(problem: Problem) -> Tensor | None:
    """What the options let each query see, (seqlen_q, seqlen_k), or (batch, 1, seqlen_q, seqlen_k) where it depends on
    the batch entry. None: everything."""
    _, _, rows, keys = problem.sizes
    options, device = problem.options, problem.q.device
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    queries_exist, keys_exist = of_batch(options.seqlens_q, rows), of_batch(options.seqlens_k, keys)
    diagonal: Any = problem.diagonal
    if options.diagonal is None and options.has_lengths:
        diagonal = (keys if keys_exist is None else keys_exist) - (
            rows if queries_exist is None else queries_exist
        )
    left, right, distance = options.window_left, options.window_right, j - i
    conditions = []
    if options.causal and not options.has_prefix:
        conditions.append(distance <= held(diagonal))
    elif right is not None:
        conditions.append(distance <= moved(diagonal, right))
    if left is not None:
        conditions.append(distance >= moved(diagonal, -left))
    if options.has_prefix:
        prefix: Any = options.prefix
        of_each = options.prefixes
        first = min(prefix, keys) if of_each is None else of_each[:, None, None, None]
        conditions.append((distance <= held(diagonal)) | (j < first))
    if keys_exist is not None:
        conditions.append(j < keys_exist)
    if queries_exist is not None:
        conditions.append((i < queries_exist) & (j >= 0))
    numbers = checked_numbers(problem)
    if numbers is not None:
        own, other = numbers[0][:, None, :, None], numbers[1][:, None, None, :]
        conditions.append((own == other) & (own >= 0))
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return seen


def of_batch(lengths: Tensor | None, most: int) -> Tensor | None:
    """As (batch, 1, 1, 1), held between 0 and the tensor's own length. Not read on the host."""
    return None if lengths is None else lengths.long().clamp(0, most)[:, None, None, None]


def moved(diagonal: Any, by: int) -> Any:
    """A diagonal, a number or one for each batch entry, moved by a bound of the window."""
    return diagonal + held(by) if isinstance(diagonal, torch.Tensor) else held(diagonal + by)


def held(distance: Any) -> Any:
    """In 64 bits, further than any key from any query. In a trace it may be a symbol. The difference of lengths that
    tensors hold is small."""
    if isinstance(distance, torch.Tensor):
        return distance
    return max(-(2**62), min(distance, 2**62))


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
    for name, x in problem.options.arrays.items():
        if x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] != batch:
            raise ArgumentError(
                f"{name}: expected int32 (batch,) = ({batch},), got {x.dtype} {tuple(x.shape)}"
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
    options = problem.options
    if problem.attn_mask is not None or options.has_window:
        return False
    if options.has_lengths or options.has_prefix or problem.documents is not None:
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


def checked_numbers(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """The documents of the queries and of the keys."""
    if problem.documents is None:
        return None
    for name, x in arrays_of(None, problem.documents).items():
        if x.device != problem.q.device:
            raise ArgumentError(
                f"{name}: expected a tensor on q's device {problem.q.device}, got one on {x.device}"
            )
    return checked_documents(problem.documents, problem.sizes)


def memory_of_sdpa(problem: Problem) -> str:
    batch, heads, rows, keys = problem.sizes
    item = problem.q.element_size()
    parts = []
    if not needs_no_mask(problem):
        given = problem.attn_mask
        of_each = problem.options.has_lengths or problem.options.prefixes is not None
        of_each = of_each or problem.documents is not None
        whole = rows * keys * (1 + item) * (batch if of_each else 1)
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
