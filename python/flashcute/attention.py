"""The calls: attention and its gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from . import _core
from ._arrays import Array, Library, Torch, library_of, stream_number
from ._call import (
    checked_fallback,
    checked_options,
    missing_feature,
    require_torch_to_record,
    require_unrecorded,
    run,
)
from ._checks import require_arrays, require_kind, require_memory, require_mutable
from ._core import ArgumentError, BackwardConfig, ForwardConfig, UnsupportedError
from ._masks import Documents, arrays_of, with_masks
from .block_mask import BlockMask
from .variant import Variant, options_of, with_masks_of


def forward(
    cfg: ForwardConfig,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    variant: Variant | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    out: Array | None = None,
    return_lse: bool = False,
    stream: object = None,
) -> Any:
    """Attention, softmax(scale * q kᵀ) v, with a kernel configuration of your choice.

    Shapes are those of calls without packed sequences, which have no batch dimension; see `Variant`.

    cfg: the static configuration; see `default_config` and `configs`.
    q: (batch, seqlen_q, heads, d).  k: (batch, seqlen_k, kv_heads, d).  v: (batch, seqlen_k, kv_heads, d_v).
        heads is a multiple of kv_heads; d and d_v are at most 256. All have one dtype: float16, bfloat16 or float32, on
        the CPU also float64. The last stride is 1, the others are free; on a GPU they, d and d_v must be multiples of
        cfg.copy_bytes bytes.
    causal: query i sees key j if and only if j <= i + seqlen_k - seqlen_q: the last query sees all keys.
    variant: in place of `causal`, all that can be said of which keys a query sees, and of the softmax; see `Variant`.
    scale: factor of the scores, >= 0; default d**-0.5. A tensor is taken by its value, and refused if it requires a
        gradient.
    layout: "bshd" as above, or "bhsd" with heads before seqlen, for all arrays.
    out: an array to write to, (batch, seqlen_q, heads, d_v); default a new array of q's library.
    return_lse: also return the log-sum-exp of each row, log(sum(exp(scores))), by the natural logarithm: (batch, heads,
        seqlen_q), float32 (float64 for float64 inputs). A row that sees no key has -inf there, and output 0. With a
        sink its logit is one of the scores.
    stream: the CUDA stream to launch on; default the library's current one. The call does not synchronise.

    Returns out, or (out, lse).

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a NotImplementedError) or
    DeviceError (a RuntimeError) before anything is launched.

    Source: Dao, FlashAttention-2, arXiv 2307.08691.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    options = options_of(variant, causal, scale, layout, stream)
    require_unrecorded(q=q, k=k, v=v, out=out, sink=options.sink)
    return run(cfg, q, k, v, with_masks_of(variant, options, q, k, v), out, return_lse)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    diagonal: str | int = "end",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: object = None,
    max_seqlen_k: object = None,
    documents: Documents | None = None,
    block_mask: BlockMask | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    stream: object = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    on_unsupported: str | None = None,
) -> Any:
    """Attention, softmax(scale * q kᵀ) v, with the configuration that suits the arrays.

    q, k, v, scale, layout, return_lse, out and stream, their shapes and the exceptions are those of `forward`. causal,
    diagonal, window, prefix, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, documents, block_mask and sink are those
    of `Variant`, and so is a boolean attn_mask. All can be combined, but for packed sequences, which have no masks by
    element. `explain` tells which configuration a call takes and why.

    max_seqlen_q, max_seqlen_k: what other libraries need to be told of packed sequences. They have no effect here.

    On a GPU every head dimension and alignment runs; addresses and strides that are multiples of 16 bytes are fastest.
    If the build has GPU kernels, such calls compile nothing. Exceptions are windows that hide keys before the diagonal,
    prefixes, lengths, sinks and masks by element of another dtype than bfloat16, gradients of float32, and
    deterministic gradients, and gradients of head dimensions above 128 on compute capability 8.6, 8.9 and 12.0: their
    kernels are compiled at the first call.

    allow_tf32: let a GPU round float32 inputs to TF32 (10 bits of fraction), once that kernel is compiled (`prebuild`,
        or FLASHCUTE_JIT=fastest). Without it, and always for gradients, three TF32 products take the place of one,
        which is about as exact as float32.
    attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k). bool: True means that the key is seen. It becomes a
        block mask of the call, with room for all cells of 64 x 64 to be partial: 1 KB each. Or a torch CausalBias,
        which is causal=True with the diagonal "start" or "end". Or, for torch, a float that is added to the scaled
        scores, which no kernel has; see below.
    deterministic: whether the gradients have the same bits in every run. On a GPU atomic additions sum the gradient of
        q, so its last bits differ from run to run; True takes two passes instead, or fixes the order of additions. The
        CPU always gives the same bits, and so does the output everywhere. None: as torch.use_deterministic_algorithms
        says when they are computed.

    Gradients: torch tensors, q, k, v and sink, are differentiated once, not twice, through the output and, if it is
    returned, the log-sum-exp. Under torch.autocast tensors are cast as for torch's own attention.
    Gradients are those of the masks as they were in the forward call, whatever is written to attn_mask or documents
    afterwards.
    torch.compile and torch.export see the operators flashcute::flash_attention_forward,
    flashcute::flash_attention_backward and flashcute::block_mask. torch.vmap and batched gradients (is_grads_batched)
    fold the mapped dimension into the batch, or make one call of each entry where the sink, its gradient or a mask is
    mapped, or the mask is another for each batch entry. torch.func.grad and other derivatives of torch.func are
    refused.
    Tensors of a class that computes operators by itself (DTensor, FakeTensor, your own) get the operator too; a DTensor
    must be replicated, or sharded over the batch or the heads. docs/start/train.md lists all kinds.

    On a GPU no kernel covers yet gradients of float64, nor gradients of float32 with head dimensions above 128 where a
    thread block has at most 99 KB of shared memory. On no device do they cover an attn_mask of floats, nor dropout:

    dropout_p: the probability with which a weight is dropped.

    on_unsupported: what to do then. "warn" (the default for torch tensors) and "silent" call torch's
        scaled_dot_product_attention, with or without a warning. It may need memory for seqlen_q * seqlen_k scores;
        `explain` says how much. Masks mean there what they mean here, and a row that sees no key is 0. But a NaN in a
        key or value that only some rows see reaches the others too (0 * NaN); one that no row sees reaches none. It
        has neither a sink nor a block_mask: with one such a call raises UnsupportedError.
        "error" raises UnsupportedError, as arrays of other libraries always do.

    torch's own attention has no packed sequences: with them such a call raises UnsupportedError too.
    """
    options = checked_options(
        causal, diagonal, scale, layout, stream, allow_tf32, deterministic, window,
        prefix, seqlens_q, seqlens_k, sink, cu_seqlens_q, cu_seqlens_k, block_mask,
    )  # fmt: skip
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    missing = missing_feature(attn_mask, dropout_p, options, documents)
    others = options.arrays
    masked = attn_mask is not None or documents is not None
    if masked:
        others = others | arrays_of(attn_mask, documents)
    if isinstance(library, Torch) and (missing or library.wants_more(q, k, v, others.values())):
        from . import _torch

        problem = _torch.Problem(q, k, v, options, attn_mask, dropout_p, documents)
        return _torch.attend(problem, out, return_lse, fallback)
    require_torch_to_record(k=k, v=v, out=out, sink=sink)  # of q, torch's have been asked for above
    if missing:
        raise UnsupportedError(missing)
    if masked:
        options = with_masks(options, q, k, v, attn_mask, documents)
    return run(None, q, k, v, options, out, return_lse)


def backward(
    cfg: BackwardConfig,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    causal: bool = False,
    variant: Variant | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    dsink: Array | None = None,
    workspace: Array | None = None,
    stream: object = None,
) -> tuple[Any, ...]:
    """Gradients of `forward`, with a configuration of your choice; see `default_backward_config`.

    dout: the gradient of out, (batch, seqlen_q, heads, d_v). It is copied if its last stride is not 1; no other array
        ever is.
    q, k, v, out, lse: the arrays that `forward` took, and those that it returned with return_lse=True; lse contiguous.
    dlse: the gradient of lse, (batch, heads, seqlen_q), with lse's dtype and any strides; default none.
    causal, variant, scale, layout: as in the forward call.
    dq, dk, dv: arrays to write to, shaped like q, k and v; default new arrays of q's library.
    dsink: the same for the variant's sink, of its shape and dtype, contiguous; None without a sink.
    workspace: memory for a call on a GPU, float32, at least `backward_workspace_size` elements, which the call
        overwrites; default a new array of q's library.
    stream: the CUDA stream to launch on; default the library's current one. The call does not synchronise.

    With cfg.deterministic, and always on the CPU, the result is the same bit for bit in every call.

    Returns (dq, dk, dv), with a sink (dq, dk, dv, dsink): with P = exp(scale q kᵀ - lse) and
    dS = P * (dout vᵀ - rowsum(dout * out) + dlse)

        dq = scale dS k        dk = scale dSᵀ q        dv = Pᵀ dout
        dsink = -sum(exp(sink - lse) * (rowsum(dout * out) - dlse))

    where dk and dv are summed over the query heads that share a key head, dsink over the batch and the queries. Sums
    are float32 (float64 for float64 arrays). A query that sees no key and a key that no query sees have gradient 0. A
    GPU takes float16, bfloat16 and float32.

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a NotImplementedError) or
    DeviceError (a RuntimeError) before anything is written.

    Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
    """
    require_config(cfg)
    options = options_of(variant, causal, scale, layout, stream)
    sink = options.sink
    if sink is None and dsink is not None:
        raise ArgumentError("dsink: expected None without a sink in the variant, got an array")
    inputs = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, **options.arrays}
    if dlse is not None:
        inputs["dlse"] = dlse
    outputs = {"dq": dq, "dk": dk, "dv": dv, "dsink": dsink, "workspace": workspace}
    given = {name: x for name, x in outputs.items() if x is not None}
    require_arrays({**inputs, **given})
    require_kind(**inputs, **given)
    for name, array in {**inputs, **given}.items():
        library = library_of(type(array))
        if library.wants_gradient(array):
            raise ArgumentError(
                f"{name}: expected a tensor without requires_grad, got requires_grad=True. backward records "
                "no gradient: call it under torch.no_grad(), or detach the tensor"
            )
        if name in given:
            require_mutable(name, array)
    options = with_masks_of(variant, options, q, k, v)
    library = library_of(type(q))
    likes = (
        {"dq": q, "dk": k, "dv": v} if sink is None else {"dq": q, "dk": k, "dv": v, "dsink": sink}
    )
    for name in likes:
        if name not in given and type(library) is Library:
            raise library.cannot_make(name, q)
    address = stream_number(stream)
    options = options._replace(stream=address)
    arrays = [*inputs.values(), *given.values()]
    try:
        with nullcontext() if address is None else library.use_stream(address, arrays):
            dout = library_of(type(dout)).with_unit_stride(dout)
            size = _core.backward_workspace_size(cfg, q, v, options) if workspace is None else 0
            if size and type(library) is Library:
                raise library.cannot_make("workspace", q)
            made = {
                name: library.empty(like.shape, q, _other_dtype(like, q))
                for name, like in likes.items()
                if name not in given
            }
            to = {**made, **given}
            work = library.empty((size,), q, "float32") if size else workspace
            _core.backward(
                cfg, dout, q, k, v, out, lse, dlse, to["dq"], to["dk"], to["dv"], to.get("dsink"), work, options
            )  # fmt: skip
    except (ArgumentError, RuntimeError):
        require_memory(**inputs, **given)  # says it better, if that is the reason
        raise
    for array in given.values():
        library_of(type(array)).wrote(array)
    return tuple(given[x] if x in given else library.finish(made[x], q) for x in likes)


def _other_dtype(like: Array, q: Array) -> str | None:
    """The dtype of a gradient, if it is not q's: a sink may be float32 beside any q."""
    wide = str(like.dtype).endswith("float32")
    return "float32" if wide and not str(q.dtype).endswith("float32") else None


def require_config(cfg: object) -> None:
    if not isinstance(cfg, BackwardConfig):
        raise ArgumentError(f"cfg: expected a BackwardConfig, got {type(cfg).__qualname__}")


def backward_workspace_size(
    cfg: BackwardConfig, q: Array, v: Array, *, layout: str = "bshd", variant: Variant | None = None
) -> int:
    """How many float32 elements the workspace of a `backward` call with `cfg` must have: 0 on the CPU.

    variant: that of the call. Only the number of packed sequences matters.
    """
    require_config(cfg)
    options = options_of(variant, layout=layout)
    arrays = {"q": q, "v": v, **options.arrays}
    require_arrays(arrays)
    require_memory(**arrays)
    return int(_core.backward_workspace_size(cfg, q, v, options))
