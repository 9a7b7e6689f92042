"""The calls: forward, flash_attention, and the functions that tell about them."""

from __future__ import annotations

import operator
from typing import Any

from . import _core
from ._arrays import Array, Library, Torch, library_of, stream_number, would_record
from ._core import (
    ArgumentError,
    BackwardConfig,
    ConfigError,
    Explanation,
    ForwardConfig,
    UnsupportedError,
)

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
    """Attention, softmax(scale * q kᵀ) v, with a kernel configuration of your choice.

    cfg: the static configuration; see `default_config` and `configs`.
    q: (batch, seqlen_q, heads, d).  k: (batch, seqlen_k, kv_heads, d).  v: (batch, seqlen_k, kv_heads, d_v).
        heads is a multiple of kv_heads; d and d_v are at most 256. All have one dtype: float16, bfloat16 or float32, on
        the CPU also float64. The last stride is 1, the others are free; on a GPU they, d and d_v must be multiples of
        cfg.copy_bytes bytes.
    causal: query i sees key j if and only if j <= i + seqlen_k - seqlen_q: the last query sees all keys.
    scale: factor of the scores, >= 0; default d**-0.5. A tensor is taken by its value, and refused if it requires a
        gradient.
    layout: "bshd" as above, or "bhsd" with heads before seqlen, for all arrays.
    out: an array to write to, (batch, seqlen_q, heads, d_v); default a new array of q's library.
    return_lse: also return the log-sum-exp of each row, log(sum(exp(scores))), by the natural logarithm: (batch, heads,
        seqlen_q), float32 (float64 for float64 inputs). A row that sees no key has -inf there, and output 0.
    stream: the CUDA stream to launch on; default the library's current one. The call does not synchronise.

    Returns out, or (out, lse).

    Raises ArgumentError (a ValueError), ConfigError (a ValueError), UnsupportedError (a NotImplementedError) or
    DeviceError (a RuntimeError) before anything is launched.

    Source: Dao, FlashAttention-2, arXiv 2307.08691.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    recording = _wanting_gradients(q=q, k=k, v=v, out=out)
    if recording:
        raise ArgumentError(
            f"{recording}: expected a tensor without requires_grad, got requires_grad=True. forward records "
            "no gradient: call it under torch.no_grad(), detach the tensor, or use flash_attention"
        )
    return run(cfg, q, k, v, causal, scale, layout, out, return_lse, stream, False)


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
    on_unsupported: str | None = None,
) -> Any:
    """Attention, softmax(scale * q kᵀ) v, with the configuration that suits the arrays.

    The arguments up to `stream`, their shapes and the exceptions are those of `forward`. `explain` tells which
    configuration a call takes and why.

    On a GPU every head dimension and alignment runs; multiples of 16 bytes are fastest. They need no compilation at the
    first call if the build has GPU kernels, except for float32 or deterministic gradients.

    allow_tf32: let a GPU round float32 inputs to TF32 (10 bits of fraction), once that kernel is compiled (`prebuild`,
        or FLASHCUTE_JIT=fastest). Without it, and always for gradients, three TF32 products take the place of one,
        which is about as exact as float32.

    Gradients: torch tensors are differentiated once, not twice, through the output and, if it is returned, the
    log-sum-exp. On a GPU atomic additions sum the gradient of q, so its last bits differ from run to run, unless
    torch.use_deterministic_algorithms is on. Under torch.autocast tensors are cast as for torch's own attention.
    torch.compile and torch.export see the operators flashcute::flash_attention_forward and
    flashcute::flash_attention_backward. torch.vmap and batched gradients (is_grads_batched) fold the mapped dimension
    into the batch. torch.func.grad and other derivatives of torch.func are refused.

    On a GPU no kernel covers yet gradients of float64, nor gradients of float32 with head dimensions above 128 where a
    thread block has at most 99 KB of shared memory. On no device do kernels cover these arguments:

    attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k); bool (True: keep), or a float that is added to the
        scaled scores. A torch CausalBias that is aligned to the last key is causal=True, which kernels cover.
    dropout_p: the probability with which a weight is dropped.
    window: (left, right): query i sees keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right;
        -1 means no limit.

    on_unsupported: what to do then. "warn" (the default for torch tensors) and "silent" call torch's
        scaled_dot_product_attention, with or without a warning. It may need memory for seqlen_q * seqlen_k scores;
        `explain` says how much. Masks mean there what they mean here, and a row that sees no key is 0. But a NaN in a
        key or value that only some rows see reaches the others too (0 * NaN); one that no row sees reaches none.
        "error" raises UnsupportedError, as arrays of other libraries always do.
    cu_seqlens_q, cu_seqlens_k: packed sequences raise UnsupportedError.
    """
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise UnsupportedError(
            "cu_seqlens_q, cu_seqlens_k: packed sequences are not supported yet: call flash_attention "
            "per sequence, or use torch.nn.attention.varlen"
        )
    missing = missing_feature(attn_mask, dropout_p, window)
    if isinstance(library, Torch) and (missing or library.wants_more(q, k, v)):
        from . import _torch

        problem = _torch.Problem(q, k, v, causal, scale, layout, attn_mask, dropout_p, window)
        return _torch.attend(problem, return_lse, out, stream, bool(allow_tf32), fallback)
    recording = _wanting_gradients(k=k, v=v, out=out)  # of q, torch's have been asked for above
    if recording:
        raise UnsupportedError(
            f"{recording}: gradients (requires_grad=True) need q, k and v to be torch tensors, and out to "
            "require none. Call flash_attention under torch.no_grad(), or detach the tensor"
        )
    if missing:
        raise UnsupportedError(missing)
    return run(None, q, k, v, causal, scale, layout, out, return_lse, stream, bool(allow_tf32))


def missing_feature(
    attn_mask: Array | None, dropout_p: float, window: tuple[int, int] | None
) -> str | None:
    """The first of these features that is asked for, and what to use instead: no kernel has it yet."""
    if attn_mask is not None:
        return f"attn_mask is not supported yet: use {SDPA}(attn_mask=...)"
    if not isinstance(dropout_p, float) and would_record(dropout_p):
        raise ArgumentError(
            f"dropout_p: expected a number, got a tensor that requires gradients: {dropout_p!r}. There is no "
            "gradient of dropout_p: pass its value, dropout_p.item()"
        )
    if dropout_p != 0.0:
        return f"dropout_p={dropout_p} is not supported yet: use {SDPA}(dropout_p=...)"
    if checked_window(window) != (-1, -1):
        return (
            "window is not supported yet: use torch.nn.attention.flex_attention with a block mask"
        )
    return None


def checked_window(window: object) -> tuple[int, int]:
    """(left, right); -1: no limit."""
    if window is None:
        return -1, -1
    try:
        left, right = (operator.index(bound) for bound in window)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        left = right = -2
    if min(left, right) < -1:
        raise ArgumentError(f"window: expected two integers >= -1, (left, right), got {window!r}")
    return left, right


def checked_fallback(on_unsupported: str | None, library: Library) -> str:
    """What to do where no kernel serves a call."""
    if on_unsupported not in (None, "warn", "error", "silent"):
        raise ArgumentError(
            f"on_unsupported: expected 'warn', 'error', 'silent' or None, got {on_unsupported!r}"
        )
    if not isinstance(library, Torch):
        return "error"  # nobody else's attention is at hand
    return on_unsupported or "warn"


def _wanting_gradients(**arrays: Array) -> str | None:
    """The first of the arrays of which a gradient would be expected."""
    for name, array in arrays.items():
        if library_of(type(array)).wants_gradient(array):
            return name
    return None


def require_kind(traced: bool = False, **arrays: Array) -> None:
    """Raises ArgumentError for nested, sparse and other arrays that no call takes."""
    for name, array in arrays.items():
        problem = library_of(type(array)).kind_problem(array, traced)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")


def require_arrays(**arrays: Array) -> None:
    for name, array in arrays.items():
        if not hasattr(array, "__dlpack__"):
            raise ArgumentError(
                f"{name}: expected an array that supports DLPack (NumPy, torch, CuPy, JAX, ...), got "
                f"{type(array).__module__}.{type(array).__qualname__}"
            )
        problem = library_of(type(array)).problem(array)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")


def require_options(causal: object, layout: object) -> None:
    if layout not in ("bshd", "bhsd"):
        raise ArgumentError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}")
    # NumPy's bool is a type of its own, named bool or, before NumPy 2, bool_.
    if not isinstance(causal, bool) and type(causal).__name__ not in ("bool", "bool_"):
        raise ArgumentError(f"causal: expected True or False, got {causal!r}")


def run(
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
    deterministic_gradients: bool | None = None,
) -> Any:
    """deterministic_gradients: not None if gradients will follow, whose kernels are then compiled at the same time."""
    arrays = {"q": q, "k": k, "v": v} if out is None else {"q": q, "k": k, "v": v, "out": out}
    require_arrays(**arrays)
    require_options(causal, layout)
    if out is not None and library_of(type(out)).immutable:
        raise ArgumentError("out: expected a writable array, got an immutable one of JAX. Omit out")
    library = library_of(type(q))
    address = stream_number(stream)
    options = (allow_tf32, deterministic_gradients)
    try:
        if address is None:
            return _run_on(
                library, cfg, q, k, v, causal, scale, layout, out, return_lse, None, *options
            )
        with library.use_stream(address, list(arrays.values())):
            return _run_on(
                library, cfg, q, k, v, causal, scale, layout, out, return_lse, address, *options
            )
    except (ArgumentError, RuntimeError):
        require_kind(**arrays)  # says it better, if that is the reason
        raise


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
    deterministic_gradients: bool | None,
) -> Any:
    if len(q.shape) != 4 or len(v.shape) != 4 or not 1 <= v.shape[3] <= 256:
        options = _core.CallOptions(scale=number(scale), layout=layout)
        _core.check_problem(q, k, v, options)  # raises before anything is allocated
    target = library.empty((*q.shape[:-1], v.shape[-1]), q) if out is None else out
    lse = None
    if return_lse and len(q.shape) == 4:
        batch, rows, heads = q.shape[0], q.shape[1], q.shape[2]
        if layout == "bhsd":
            rows, heads = heads, rows
        double = str(q.dtype).endswith("float64")
        lse = library.empty((batch, heads, rows), q, "float64" if double else "float32")
    options = _core.CallOptions(
        bool(causal), None, number(scale), layout, stream, allow_tf32,
        bool(deterministic_gradients), deterministic_gradients is not None,
    )  # fmt: skip
    _core.forward(cfg, q, k, v, target, lse, None, options)
    if out is not None:
        library_of(type(out)).wrote(out)
    result = library.finish(target, q) if out is None else out
    return (result, library.finish(lse, q)) if return_lse else result


def number(scale: object) -> float | None:
    """The value of `scale`, of which no gradient is computed."""
    if scale is None or isinstance(scale, float):
        return scale
    if would_record(scale):
        raise ArgumentError(
            "scale: expected a number or None, got a tensor that requires gradients. There is no gradient of "
            "scale: multiply q by it, flash_attention(q * scale, k, v, scale=1.0), or pass its value, scale.item()"
        )
    try:
        return float(scale)  # type: ignore[arg-type]
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # RuntimeError: a tensor that is no single real number
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
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int, int] | None = None,
    on_unsupported: str | None = None,
) -> Explanation:
    """What `flash_attention` (or `forward` with `cfg`) would run for these arguments, and why. Launches nothing.

    Returns an Explanation: the backend, the configuration, the kernel and where its image comes from; `reasons`, why
    these were chosen; `rejected`, for every other backend and ahead-of-time configuration the reason why it was not
    taken; and `notes`, what else the call will do or cost. print() shows it, with what was not taken grouped by reason.

    If no backend can run the call, `backend` is '' and `rejected` says why. If torch's own attention would be called,
    `backend` is 'torch', and `notes` says how much memory it needs. If the tensors require gradients, `notes` says how
    these are computed. Raises ArgumentError only for arguments that cannot be described at all: no DLPack, a dtype that
    no kernel could have, an unknown layout, a causal that is no boolean.
    """
    require_options(causal, layout)
    missing = missing_feature(attn_mask, dropout_p, window)
    if cfg is not None and missing:
        raise ArgumentError(f"cfg: expected None, as only flash_attention takes it: {missing}")
    require_kind(q=q, k=k, v=v)
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    if isinstance(library, Torch) and cfg is None:
        from . import _torch

        problem = _torch.Problem(q, k, v, causal, scale, layout, attn_mask, dropout_p, window)
        return _torch.explained(problem, bool(allow_tf32), fallback)
    require_arrays(q=q, k=k, v=v)
    options = _core.CallOptions(
        bool(causal), scale=number(scale), layout=layout, allow_tf32=bool(allow_tf32)
    )
    found = _core.explain(cfg, q, k, v, options)
    return unsupported(found, missing) if missing else found


def unsupported(found: Explanation, missing: str) -> Explanation:
    """The explanation of a call that raises UnsupportedError."""
    return Explanation(
        backend="",
        config=None,
        kernel="",
        image="",
        rejected=[(found.backend, missing), *found.rejected],
        notes=[],
    )


def count_blocks(
    cfg: ForwardConfig, q: Array, k: Array, v: Array, *, causal: bool = False, layout: str = "bshd"
) -> Any:
    """Debug mode of `forward`: what each tile of query rows did with the K/V blocks of its sequence.

    Runs the kernel of `cfg` in a variant that counts (on a GPU NVRTC compiles it at the first call).

    Returns an int32 array (batch, heads, tiles, 3) of q's library and device. Its last dimension counts the blocks of
    cfg.block_n keys that were (0) visited with all elements visible, (1) visited with a test of each element,
    (2) skipped. A tile is cfg.block_m * cfg.cluster query rows. If one is incomplete, it is the last, with
    math='wgmma' the first.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    require_arrays(q=q, k=k, v=v)
    require_kind(q=q, k=k, v=v)
    require_options(causal, layout)
    options = _core.CallOptions(bool(causal), layout=layout)
    _core.check_problem(q, k, v, options)
    library = library_of(type(q))
    batch, rows, heads = q.shape[0], q.shape[1], q.shape[2]
    if layout == "bhsd":
        rows, heads = heads, rows
    out = library.empty((*q.shape[:-1], v.shape[-1]), q)
    counts = library.empty(
        (batch, heads, -(-rows // max(cfg.block_m * cfg.cluster, 1)), 3), q, "int32"
    )
    _core.forward(cfg, q, k, v, out, None, counts, options)
    return library.finish(counts, q)


def default_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int = "sm_80",
    *,
    head_dim_v: int | None = None,
) -> ForwardConfig:
    """The configuration that `flash_attention` takes for a head dimension on `arch` ("cpu", "sm_90", ...), if addresses
    and strides are multiples of 16 bytes.

    head_dim_v: the head dimension of v, if it differs.
    """
    return _core.default_config(
        dtype, integer("head_dim", head_dim), arch, optional_integer("head_dim_v", head_dim_v)
    )


def integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"{name}: expected an integer, got {value!r}") from None


def optional_integer(name: str, value: object) -> int | None:
    return None if value is None else integer(name, value)


def configs() -> list[ForwardConfig]:
    """The configurations of the forward whose GPU kernels are compiled ahead of time."""
    return list(_core.configs())


def configs_ahead_of_time(arch: str | int) -> list[ForwardConfig | BackwardConfig]:
    """The configurations whose kernels are compiled ahead of time and that `arch` can run."""

    def runs(cfg: ForwardConfig | BackwardConfig) -> bool:
        try:
            cfg.check(arch)
        except ConfigError:
            return False
        return True

    every: list[ForwardConfig | BackwardConfig] = [*_core.configs(), *_core.backward_configs()]
    return [cfg for cfg in every if runs(cfg)]


def prebuild(
    cfgs: ForwardConfig | BackwardConfig | list[ForwardConfig | BackwardConfig] | None = None,
    arch: str | int | None = None,
) -> dict[str, str]:
    """Makes kernels available before their first call, which may otherwise compile them (a few seconds each) or take
    slower ones that are at hand. What has to be compiled is compiled at the same time, as cores and memory allow.

    cfgs: a configuration of the forward or the backward, or a list of them; default all that the build compiles ahead
        of time and that `arch` can run.
    arch: "sm_90" and the like; default the architecture of GPU 0. If it is given, no GPU is needed.

    Returns, by kernel name, where each kernel came from: "ahead of time", "disk cache" or "compiled by NVRTC ...".
    """
    kinds = ForwardConfig, BackwardConfig
    chosen = [cfgs] if isinstance(cfgs, kinds) else cfgs
    fits = chosen is None or (
        isinstance(chosen, list) and all(isinstance(c, kinds) for c in chosen)
    )
    if not fits:
        raise ArgumentError(
            f"cfgs: expected a ForwardConfig, a BackwardConfig or a list of them, got {cfgs!r}"
        )
    if arch is None:
        info = _core.driver_info()
        if not info.gpus:
            raise ArgumentError(
                f"arch: expected 'sm_80' or the like where there is no GPU, got None. {info.problem}"
            )
        arch = info.gpus[0].arch
    every = configs_ahead_of_time(arch) if chosen is None else chosen
    forward = [cfg for cfg in every if isinstance(cfg, ForwardConfig)]
    backward = [cfg for cfg in every if isinstance(cfg, BackwardConfig)]
    return dict(_core.prebuild(forward, backward, arch))
