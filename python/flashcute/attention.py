"""The calls: forward, flash_attention, and what tells about them."""

from __future__ import annotations

import operator
from typing import Any

from . import _core
from ._arrays import Array, Library, library_of, stream_number
from ._core import ArgumentError, Explanation, ForwardConfig, UnsupportedError

SDPA = "torch.nn.functional.scaled_dot_product_attention"


def forward(
    cfg: ForwardConfig,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "bshd",
    out: Array | None = None,
    return_lse: bool = False,
    stream: object = None,
) -> Any:
    """softmax(scale * q kᵀ) v with a kernel configuration of your choice.

    cfg: the static configuration; see `default_config` and `configs`.
    q: (batch, seqlen_q, heads, d).  k, v: (batch, seqlen_k, kv_heads, d), kv_heads dividing heads.
        float16 or bfloat16, on the CPU also float32 and float64; last stride 1, other strides free
        (on a GPU multiples of 16 bytes; d a multiple of 8, at most 128; on the CPU any d to 256).
    causal: query i sees key j iff j <= i + seqlen_k - seqlen_q.
    scale: of the scores, >= 0; default d**-0.5.
    layout: "bshd" as above, or "bhsd" with heads before seqlen, for all tensors.
    out: where to write, shaped like q; default a new array of q's library.
    return_lse: also return log(sum(exp(scores))), natural logarithm, (batch, heads, seqlen_q), float32
        (float64 for float64 inputs); -inf for a row that sees no key, whose output is 0.
    stream: CUDA stream to launch on; default the library's current one. Nothing is synchronised.

    Returns out, or (out, lse).

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a
    NotImplementedError) or DeviceError before anything is launched.

    Source: Dao, FlashAttention-2, arXiv 2307.08691.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    recording = _wanting_gradients(q=q, k=k, v=v, out=out)
    if recording:
        raise ArgumentError(
            f"{recording}: expected a tensor without requires_grad, got requires_grad=True. forward records "
            f"no gradient: call it under torch.no_grad(), detach the tensor, or train with {SDPA}"
        )
    return _run(cfg, q, k, v, causal, scale, layout, out, return_lse, stream)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    stream: object = None,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int, int] | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> Any:
    """softmax(scale * q kᵀ) v, with the configuration that suits the tensors.

    The arguments, their shapes and the exceptions are those of `forward`; `explain` tells what was chosen
    and why. Gradients, attn_mask, dropout_p, window and cu_seqlens_* are not supported yet and raise
    UnsupportedError, which names what to use instead.
    """
    recording = _wanting_gradients(q=q, k=k, v=v, out=out)
    if recording:
        raise UnsupportedError(
            f"{recording}: gradients (requires_grad=True) are not supported yet. Train with {SDPA}, "
            "or call flash_attention under torch.no_grad()"
        )
    if attn_mask is not None:
        raise UnsupportedError(f"attn_mask is not supported yet: use {SDPA}(attn_mask=...)")
    if dropout_p != 0.0:
        raise UnsupportedError(
            f"dropout_p={dropout_p} is not supported yet: use {SDPA}(dropout_p=...)"
        )
    if window is not None:
        raise UnsupportedError(
            "window is not supported yet: use torch.nn.attention.flex_attention with a block mask"
        )
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise UnsupportedError(
            "cu_seqlens_q, cu_seqlens_k: packed sequences are not supported yet: call flash_attention "
            "per sequence, or use torch.nn.attention.varlen"
        )
    return _run(None, q, k, v, causal, scale, layout, out, return_lse, stream)


def _wanting_gradients(**arrays: Array) -> str | None:
    """The first of the arrays of which a gradient would be expected."""
    for name, array in arrays.items():
        if library_of(type(array)).wants_gradient(array):
            return name
    return None


def _run(
    cfg: ForwardConfig | None,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    scale: float | None,
    layout: str,
    out: Array | None,
    return_lse: bool,
    stream: object,
) -> Any:
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out)):
        if array is None and name == "out":
            continue
        if not hasattr(array, "__dlpack__"):
            raise ArgumentError(
                f"{name}: expected an array that supports DLPack (NumPy, torch, CuPy, JAX, ...), got "
                f"{type(array).__module__}.{type(array).__qualname__}"
            )
        problem = library_of(type(array)).problem(array)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")
    if layout not in ("bshd", "bhsd"):
        raise ArgumentError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}")
    if not isinstance(causal, bool) and str(causal) not in (
        "True",
        "False",
    ):  # numpy.bool has its own
        raise ArgumentError(f"causal: expected True or False, got {causal!r}")
    if out is not None and library_of(type(out)).immutable:
        raise ArgumentError("out: expected a writable array, got an immutable one of JAX. Omit out")
    library = library_of(type(q))
    number = stream_number(stream)
    if number is None:
        return _run_on(library, cfg, q, k, v, causal, scale, layout, out, return_lse, None)
    with library.use_stream(number, [q, k, v] if out is None else [q, k, v, out]):
        return _run_on(library, cfg, q, k, v, causal, scale, layout, out, return_lse, number)


def _run_on(
    library: Library,
    cfg: ForwardConfig | None,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    scale: float | None,
    layout: str,
    out: Array | None,
    return_lse: bool,
    stream: int | None,
) -> Any:
    target = library.empty(q.shape, q) if out is None else out
    lse = None
    if return_lse and len(q.shape) == 4:
        batch, rows, heads = q.shape[0], q.shape[1], q.shape[2]
        if layout == "bhsd":
            rows, heads = heads, rows
        double = str(q.dtype).endswith("float64")
        lse = library.empty((batch, heads, rows), q, "float64" if double else "float32")
    _core.forward(cfg, q, k, v, target, lse, bool(causal), _number(scale), layout, stream)
    result = library.finish(target, q) if out is None else out
    return (result, library.finish(lse, q)) if return_lse else result


def _number(scale: object) -> float | None:
    if scale is None:
        return None
    try:
        return float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ArgumentError(f"scale: expected a number or None, got {scale!r}") from None


def explain(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    cfg: ForwardConfig | None = None,
    scale: float | None = None,
    layout: str = "bshd",
) -> Explanation:
    """What `flash_attention` (or `forward` with `cfg`) would run for these arguments, and why.

    Returns the backend, the configuration, the kernel, where its image comes from, and for every other
    backend and ahead-of-time configuration the reason it was not taken. Launches nothing. If no backend
    can run the call, `backend` is '' and `rejected` says why; ArgumentError is raised only for what cannot
    be described at all: no DLPack, a dtype that no kernel could have, an unknown layout.
    """
    return _core.explain(cfg, q, k, v, bool(causal), _number(scale), layout)


def default_config(
    head_dim: int, dtype: object = "bfloat16", arch: str | int = "sm_80"
) -> ForwardConfig:
    """The configuration that `flash_attention` takes for a head dimension on `arch` ("cpu", "sm_90", ...)."""
    try:
        number = operator.index(head_dim)
    except TypeError:
        raise ArgumentError(f"head_dim: expected an integer, got {head_dim!r}") from None
    return _core.default_config(dtype, number, arch)


def configs() -> list[ForwardConfig]:
    """The configurations whose GPU kernels are compiled ahead of time."""
    return list(_core.configs())


def prebuild(
    cfgs: ForwardConfig | list[ForwardConfig] | None = None, arch: str | int | None = None
) -> dict[str, str]:
    """Makes kernels available before their first call, which would otherwise compile them (10 to 30 s each).

    cfgs: one configuration or several; default `configs()`.
    arch: "sm_90" and the like; default the architecture of GPU 0. With `arch` no GPU is needed.
    Returns where each kernel came from: "ahead of time", "disk cache" or "compiled by NVRTC ...".
    """
    chosen = configs() if cfgs is None else [cfgs] if isinstance(cfgs, ForwardConfig) else cfgs
    if not isinstance(chosen, list) or not all(isinstance(cfg, ForwardConfig) for cfg in chosen):
        raise ArgumentError(f"cfgs: expected a ForwardConfig or a list of them, got {cfgs!r}")
    if arch is None:
        info = _core.driver_info()
        if not info.gpus:
            raise ArgumentError(
                f"arch: expected 'sm_80' or the like where there is no GPU, got None. {info.problem}"
            )
        arch = info.gpus[0].arch
    built: dict[str, str] = {}
    for cfg in chosen:
        built.update(_core.prebuild(cfg, arch))
    return built
