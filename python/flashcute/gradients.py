"""The backward call: gradients of attention as a function of arrays, for every library."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from . import _core
from ._arrays import Array, Library, library_of, stream_number
from ._call import checked_options, require_arrays, require_kind, require_mutable, same_bits
from ._core import ArgumentError, BackwardConfig
from .attention import arch_or_default, integer, optional_integer


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
    diagonal: str | int = "end",
    scale: float | None = None,
    layout: str = "bshd",
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    workspace: Array | None = None,
    stream: object = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `forward`, with a configuration of your choice; see `default_backward_config`.

    dout: the gradient of out, (batch, seqlen_q, heads, d_v). It is copied if its last stride is not 1; no other array
        ever is.
    q, k, v, out, lse: the arrays that `forward` took, and those that it returned with return_lse=True; lse contiguous.
    dlse: the gradient of lse, (batch, heads, seqlen_q), with lse's dtype and any strides; default none.
    causal, diagonal, scale, layout: as in the forward call.
    dq, dk, dv: arrays to write to, shaped like q, k and v; default new arrays of q's library.
    workspace: memory for a call on a GPU, float32, at least `backward_workspace_size` elements, which the call
        overwrites; default a new array of q's library.
    stream: the CUDA stream to launch on; default the library's current one. The call does not synchronise.

    With cfg.deterministic, and always on the CPU, the result is the same bit for bit in every call.

    Returns (dq, dk, dv): with P = exp(scale q kᵀ - lse) and dS = P * (dout vᵀ - rowsum(dout * out) + dlse)

        dq = scale dS k        dk = scale dSᵀ q        dv = Pᵀ dout

    where dk and dv are summed over the query heads that share a key head. Sums are float32 (float64 for float64
    arrays). A query that sees no key and a key that no query sees have gradient 0. A GPU takes float16, bfloat16 and
    float32.

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a NotImplementedError) or
    DeviceError (a RuntimeError) before anything is written.

    Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
    """
    require_config(cfg)
    inputs = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    if dlse is not None:
        inputs["dlse"] = dlse
    outputs = {"dq": dq, "dk": dk, "dv": dv, "workspace": workspace}
    given = {name: x for name, x in outputs.items() if x is not None}
    require_arrays({**inputs, **given})
    require_kind(**inputs, **given)
    options = checked_options(causal, diagonal, scale, layout, stream)
    for name, array in {**inputs, **given}.items():
        library = library_of(type(array))
        if library.wants_gradient(array):
            raise ArgumentError(
                f"{name}: expected a tensor without requires_grad, got requires_grad=True. backward records "
                "no gradient: call it under torch.no_grad(), or detach the tensor"
            )
        if name in given:
            require_mutable(name, array)
    library = library_of(type(q))
    for name in ("dq", "dk", "dv"):
        if name not in given and type(library) is Library:
            raise library.cannot_make(name, q)
    address = stream_number(stream)
    options = options._replace(stream=address)
    arrays = [*inputs.values(), *given.values()]
    with nullcontext() if address is None else library.use_stream(address, arrays):
        dout = library_of(type(dout)).with_unit_stride(dout)
        size = _core.backward_workspace_size(cfg, q, v, options) if workspace is None else 0
        if size and type(library) is Library:
            raise library.cannot_make("workspace", q)
        to_dq, to_dk, to_dv = (
            library.empty(like.shape, q) if x is None else x
            for x, like in ((dq, q), (dk, k), (dv, v))
        )
        work = library.empty((size,), q, "float32") if size else workspace
        _core.backward(cfg, dout, q, k, v, out, lse, dlse, to_dq, to_dk, to_dv, work, options)
    for array in given.values():
        library_of(type(array)).wrote(array)
    return (
        library.finish(to_dq, q) if dq is None else dq,
        library.finish(to_dk, q) if dk is None else dk,
        library.finish(to_dv, q) if dv is None else dv,
    )


def require_config(cfg: object) -> None:
    if not isinstance(cfg, BackwardConfig):
        raise ArgumentError(f"cfg: expected a BackwardConfig, got {type(cfg).__qualname__}")


def backward_workspace_size(
    cfg: BackwardConfig, q: Array, v: Array, *, layout: str = "bshd"
) -> int:
    """How many float32 elements the workspace of a `backward` call with `cfg` must have: 0 on the CPU."""
    require_config(cfg)
    require_arrays({"q": q, "v": v})
    require_kind(q=q, v=v)
    return int(
        _core.backward_workspace_size(cfg, q, v, checked_options(False, "end", None, layout))
    )


def default_backward_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int | None = None,
    *,
    head_dim_v: int | None = None,
    deterministic: bool | None = None,
) -> BackwardConfig:
    """The configuration that gradients of `flash_attention` take for a head dimension on `arch` ("cpu", "sm_90",
    ...), if addresses and strides are multiples of 16 bytes.

    arch: default the architecture of GPU 0 or, where there is no GPU, "cpu".
    head_dim_v: the head dimension of v, if it differs.
    deterministic: choose among the configurations that give the same bits in every run. None: if
        torch.use_deterministic_algorithms is on.

    Raises UnsupportedError where no kernel computes gradients.
    """
    return _core.default_backward_config(
        dtype,
        integer("head_dim", head_dim),
        arch_or_default(arch),
        optional_integer("head_dim_v", head_dim_v),
        same_bits(deterministic),
    )
