"""The backward call: gradients of attention as a function of arrays, for every library."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from . import _core
from ._arrays import Array, Library, library_of, stream_number
from ._core import ArgumentError, BackwardConfig
from .attention import integer, number, optional_integer, require_arrays, require_options


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
    scale: float | None = None,
    layout: str = "bshd",
    deterministic: bool = False,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    stream: object = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `forward` with a configuration of your choice. Runs on the CPU; see `default_backward_config`.

    dout: gradient of out, (batch, seqlen_q, heads, d_v). Copied if its last stride is not 1; no other array is.
    q, k, v, out, lse: what `forward` took and, with return_lse=True, gave; lse contiguous.
    dlse: gradient of lse, (batch, heads, seqlen_q), of lse's dtype, any strides; default none.
    causal, scale, layout: as in the forward call.
    deterministic: the same bits in every run, whatever cfg.deterministic says; the CPU always gives them.
    dq, dk, dv: where to write, shaped like q, k and v; default new arrays of q's library.
    stream: CUDA stream; None for arrays on the CPU.

    Returns (dq, dk, dv): with P = exp(scale q kᵀ - lse) and dS = P * (dout vᵀ - rowsum(dout * out) + dlse)

        dq = scale dS k        dk = scale dSᵀ q        dv = Pᵀ dout

    summed over the query heads that share a key head. Sums are float32 (float64 for float64 arrays). A query
    that sees no key and a key that no query sees have gradient 0.

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a NotImplementedError: GPU
    arrays) or DeviceError before anything is written.

    Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
    """
    if not isinstance(cfg, BackwardConfig):
        raise ArgumentError(f"cfg: expected a BackwardConfig, got {type(cfg).__qualname__}")
    inputs = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    if dlse is not None:
        inputs["dlse"] = dlse
    gradients = {name: x for name, x in (("dq", dq), ("dk", dk), ("dv", dv)) if x is not None}
    require_arrays(**inputs, **gradients)
    require_options(causal, layout)
    for name, array in {**inputs, **gradients}.items():
        library = library_of(type(array))
        if library.wants_gradient(array):
            raise ArgumentError(
                f"{name}: expected a tensor without requires_grad, got requires_grad=True. backward records "
                "no gradient: call it under torch.no_grad(), or detach the tensor"
            )
        if name in gradients and library.immutable:
            raise ArgumentError(
                f"{name}: expected a writable array, got an immutable one of JAX. Omit it"
            )
    library = library_of(type(q))
    for name in ("dq", "dk", "dv"):
        if name not in gradients and type(library) is Library:
            raise library.cannot_make(name, q)
    address = stream_number(stream)
    arrays = [*inputs.values(), *gradients.values()]
    with nullcontext() if address is None else library.use_stream(address, arrays):
        dout = library_of(type(dout)).with_unit_stride(dout)
        to_dq, to_dk, to_dv = (
            library.empty(like.shape, q) if given is None else given
            for given, like in ((dq, q), (dk, k), (dv, v))
        )
        chosen = cfg.replace(deterministic=True) if deterministic else cfg
        _core.backward(
            chosen, dout, q, k, v, out, lse, dlse, to_dq, to_dk, to_dv, bool(causal), number(scale), layout, address
        )  # fmt: skip
    return (
        library.finish(to_dq, q) if dq is None else dq,
        library.finish(to_dk, q) if dk is None else dk,
        library.finish(to_dv, q) if dv is None else dv,
    )


def default_backward_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int = "cpu",
    *,
    head_dim_v: int | None = None,
) -> BackwardConfig:
    """The configuration that gradients of `flash_attention` take for a head dimension on `arch`.

    head_dim_v: of v, if it is another. Raises ConfigError for GPUs, which have no backward kernel yet.
    """
    return _core.default_backward_config(
        dtype,
        integer("head_dim", head_dim),
        arch,
        optional_integer("head_dim_v", head_dim_v),
    )
