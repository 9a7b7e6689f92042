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
    q: (batch, seqlen_q, heads, d).  k: (batch, seqlen_k, kv_heads, d).  v: (batch, seqlen_k, kv_heads, d_v).
        kv_heads divides heads; d and d_v at most 256. float16, bfloat16 or float32, on the CPU also float64;
        last stride 1, other strides free (on a GPU multiples of cfg.copy_bytes, and d and d_v, too).
    causal: query i sees key j iff j <= i + seqlen_k - seqlen_q.
    scale: of the scores, >= 0; default d**-0.5.
    layout: "bshd" as above, or "bhsd" with heads before seqlen, for all tensors.
    out: where to write, (batch, seqlen_q, heads, d_v); default a new array of q's library.
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
    return _run(cfg, q, k, v, causal, scale, layout, out, return_lse, stream, False)


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
    allow_tf32: bool = False,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int, int] | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> Any:
    """softmax(scale * q kᵀ) v, with the configuration that suits the tensors.

    The arguments, their shapes and the exceptions are those of `forward`; `explain` tells what was chosen
    and why. allow_tf32 lets a GPU round float32 inputs to TF32 (10 bits of fraction), for its tensor cores.
    On a GPU every head dimension and alignment runs; multiples of 16 bytes are fastest, and need no
    compilation at the first call.

    Gradients, attn_mask, dropout_p, window and cu_seqlens_* are not supported yet and raise
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
    return _run(None, q, k, v, causal, scale, layout, out, return_lse, stream, bool(allow_tf32))


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
    allow_tf32: bool,
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
        return _run_on(
            library, cfg, q, k, v, causal, scale, layout, out, return_lse, None, allow_tf32
        )
    with library.use_stream(number, [q, k, v] if out is None else [q, k, v, out]):
        return _run_on(
            library, cfg, q, k, v, causal, scale, layout, out, return_lse, number, allow_tf32
        )


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
    allow_tf32: bool,
) -> Any:
    target = library.empty((*q.shape[:-1], v.shape[-1]), q) if out is None else out
    lse = None
    if return_lse and len(q.shape) == 4:
        batch, rows, heads = q.shape[0], q.shape[1], q.shape[2]
        if layout == "bhsd":
            rows, heads = heads, rows
        double = str(q.dtype).endswith("float64")
        lse = library.empty((batch, heads, rows), q, "float64" if double else "float32")
    _core.forward(
        cfg, q, k, v, target, lse, None, bool(causal), _number(scale), layout, stream, allow_tf32
    )
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
    allow_tf32: bool = False,
) -> Explanation:
    """What `flash_attention` (or `forward` with `cfg`) would run for these arguments, and why.

    Returns the backend, the configuration, the kernel, where its image comes from, and for every other
    backend and ahead-of-time configuration the reason it was not taken. Launches nothing. If no backend
    can run the call, `backend` is '' and `rejected` says why; ArgumentError is raised only for what cannot
    be described at all: no DLPack, a dtype that no kernel could have, an unknown layout.
    """
    return _core.explain(cfg, q, k, v, bool(causal), _number(scale), layout, bool(allow_tf32))


def count_blocks(
    cfg: ForwardConfig, q: Array, k: Array, v: Array, *, causal: bool = False, layout: str = "bshd"
) -> Any:
    """Debug mode of `forward`: what each tile of query rows did with the K/V blocks of its sequence.

    Runs the kernel of `cfg`, compiled to count as it goes (on a GPU at the first call, by NVRTC).

    Returns int32 (batch, heads, ceil(seqlen_q / cfg.block_m), 3), of q's library and device: how many blocks
    of cfg.block_n keys were visited with all elements visible, visited with a test of each element, skipped.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    library = library_of(type(q))
    batch, rows, heads = q.shape[0], q.shape[1], q.shape[2]
    if layout == "bhsd":
        rows, heads = heads, rows
    out = library.empty((*q.shape[:-1], v.shape[-1]), q)
    counts = library.empty((batch, heads, -(-rows // max(cfg.block_m, 1)), 3), q, "int32")
    _core.forward(cfg, q, k, v, out, None, counts, bool(causal), None, layout, None, False)
    return library.finish(counts, q)


def default_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int = "sm_80",
    *,
    head_dim_v: int | None = None,
) -> ForwardConfig:
    """The configuration that `flash_attention` takes for a head dimension on `arch` ("cpu", "sm_90", ...),
    where addresses and strides are multiples of 16 bytes. head_dim_v: of v, if it is another."""
    d = _integer("head_dim", head_dim)
    d_v = None if head_dim_v is None else _integer("head_dim_v", head_dim_v)
    return _core.default_config(dtype, d, arch, d_v)


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"{name}: expected an integer, got {value!r}") from None


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
