"""The calls: forward, flash_attention, and the functions that tell about them."""

from __future__ import annotations

from typing import Any

from . import _core
from ._arrays import Array, Library, Torch, library_of, stream_number
from ._call import (
    checked_options,
    index_of,
    missing_feature,
    require_arrays,
    require_kind,
    require_mutable,
    rows_of_heads,
    run,
    same_bits,
    unsupported,
    with_copies,
)
from ._core import (
    ArgumentError,
    BackwardConfig,
    ConfigError,
    Explanation,
    ForwardConfig,
    UnsupportedError,
)


def forward(
    cfg: ForwardConfig,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    diagonal: str | int = "end",
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
    causal: query i sees key j if and only if j <= i + diagonal.
    diagonal: of the causal mask. "end" is seqlen_k - seqlen_q: the last query sees all keys; "start" is 0: the first
        query sees the first key alone; or an integer, which may be negative. Without causal=True only "end" is allowed.
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
    require_unrecorded(q=q, k=k, v=v, out=out)
    options = checked_options(causal, diagonal, scale, layout, stream)
    return run(cfg, q, k, v, options, out, return_lse)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    diagonal: str | int = "end",
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    stream: object = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int, int] | None = None,
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
    deterministic: whether the gradients have the same bits in every run. On a GPU atomic additions sum the gradient of
        q, so its last bits differ from run to run; True takes two passes instead. The CPU always gives the same bits,
        and so does the output everywhere. None: as torch.use_deterministic_algorithms says when they are computed.

    Gradients: torch tensors are differentiated once, not twice, through the output and, if it is returned, the
    log-sum-exp. Under torch.autocast tensors are cast as for torch's own attention.
    torch.compile and torch.export see the operators flashcute::flash_attention_forward and
    flashcute::flash_attention_backward. torch.vmap and batched gradients (is_grads_batched) fold the mapped dimension
    into the batch. torch.func.grad and other derivatives of torch.func are refused.

    On a GPU no kernel covers yet gradients of float64, nor gradients of float32 with head dimensions above 128 where a
    thread block has at most 99 KB of shared memory. On no device do kernels cover these arguments:

    attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k); bool (True: keep), or a float that is added to the
        scaled scores. A torch CausalBias is causal=True with the diagonal "start" or "end", which kernels cover.
    dropout_p: the probability with which a weight is dropped.
    window: (left, right): query i sees keys from i + diagonal - left to i + diagonal + right; -1 means no limit.

    on_unsupported: what to do then. "warn" (the default for torch tensors) and "silent" call torch's
        scaled_dot_product_attention, with or without a warning. It may need memory for seqlen_q * seqlen_k scores;
        `explain` says how much. Masks mean there what they mean here, and a row that sees no key is 0. But a NaN in a
        key or value that only some rows see reaches the others too (0 * NaN); one that no row sees reaches none.
        "error" raises UnsupportedError, as arrays of other libraries always do.

    Packed sequences are not supported yet: call flash_attention per sequence, or use torch.nn.attention.varlen.
    """
    options = checked_options(causal, diagonal, scale, layout, stream, allow_tf32, deterministic)
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    missing = missing_feature(attn_mask, dropout_p, window)
    if isinstance(library, Torch) and (missing or library.wants_more(q, k, v)):
        from . import _torch

        problem = _torch.Problem(q, k, v, options, attn_mask, dropout_p, window)
        return _torch.attend(problem, out, return_lse, fallback)
    require_torch_to_record(k=k, v=v, out=out)  # of q, torch's have been asked for above
    if missing:
        raise UnsupportedError(missing)
    return run(None, q, k, v, options, out, return_lse)


def checked_fallback(on_unsupported: str | None, library: Library) -> str:
    """What to do where no kernel serves a call."""
    if on_unsupported not in (None, "warn", "error", "silent"):
        raise ArgumentError(
            f"on_unsupported: expected 'warn', 'error', 'silent' or None, got {on_unsupported!r}"
        )
    if not isinstance(library, Torch):
        return "error"  # nobody else's attention is at hand
    return on_unsupported or "warn"


def require_unrecorded(**arrays: Array) -> None:
    """For `forward`, which records no gradient."""
    if name := _wanting_gradients(arrays):
        raise ArgumentError(
            f"{name}: expected a tensor without requires_grad, got requires_grad=True. forward records "
            "no gradient: call it under torch.no_grad(), detach the tensor, or use flash_attention"
        )


def require_torch_to_record(**arrays: Array) -> None:
    """For `flash_attention` of arrays of which not all are torch tensors, or where out is one."""
    if name := _wanting_gradients(arrays):
        raise UnsupportedError(
            f"{name}: gradients (requires_grad=True) need q, k and v to be torch tensors, and out to "
            "require none. Call flash_attention under torch.no_grad(), or detach the tensor"
        )


def _wanting_gradients(arrays: dict[str, Array]) -> str | None:
    """The first of the arrays of which a gradient would be expected."""
    for name, array in arrays.items():
        if library_of(type(array)).wants_gradient(array):
            return name
    return None


def explain(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    cfg: ForwardConfig | None = None,
    gradients: bool = False,
    diagonal: str | int = "end",
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    stream: object = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int, int] | None = None,
    on_unsupported: str | None = None,
) -> Explanation:
    """What `flash_attention` (or `forward` with `cfg`) would run for these arguments, and why. Launches nothing.

    cfg: what `forward` would be given.
    gradients: also tell how `backward` with the default configuration computes gradients. Where torch records them
        (requires_grad=True), it is told anyway.

    The other arguments are those of `flash_attention`.

    Returns an Explanation: the backend, the configuration, the kernel and where its image comes from; `reasons`, why
    these were chosen; `rejected`, for every other backend and ahead-of-time configuration the reason why it was not
    taken; and `notes`, what else the call will do or cost. print() shows it, with what was not taken grouped by reason.
    `gradients` is None, or a BackwardExplanation: the same of the gradients, with the size of their workspace, and
    whether all runs give the same bits.

    If no backend can run the call, `backend` is '' and `rejected` says why. If torch's own attention would be called,
    `backend` is 'torch', and `notes` says how much memory it needs. Raises ArgumentError only for arguments that cannot
    be described at all: no DLPack, a dtype that no kernel could have, an option that is wrong for any tensors.
    """
    options = checked_options(causal, diagonal, scale, layout, stream, allow_tf32, deterministic)
    options = options._replace(gradients_follow=bool(gradients))
    missing = missing_feature(attn_mask, dropout_p, window)
    if cfg is not None and missing:
        raise ArgumentError(f"cfg: expected None, as only flash_attention takes it: {missing}")
    require_kind(q=q, k=k, v=v)
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    if isinstance(library, Torch) and cfg is None:
        from . import _torch

        problem = _torch.Problem(q, k, v, options, attn_mask, dropout_p, window)
        return _torch.explained(problem, out, return_lse, fallback)
    arrays = {"q": q, "k": k, "v": v} if out is None else {"q": q, "k": k, "v": v, "out": out}
    require_arrays(arrays)
    address = stream_number(stream)
    options = options._replace(stream=None, deterministic=same_bits(deterministic))
    found = _core.explain(cfg, q, k, v, out, options)
    try:
        if cfg is None:
            require_torch_to_record(**arrays)
        else:
            require_unrecorded(**arrays)
        if missing:
            raise UnsupportedError(missing)
        if out is not None:
            require_mutable("out", out)
        if address is not None:
            library.require_stream(address, list(arrays.values()))
    except (ArgumentError, UnsupportedError) as error:
        return unsupported(found, str(error))
    return with_copies(found, q, v)


def count_blocks(
    cfg: ForwardConfig,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    diagonal: str | int = "end",
    layout: str = "bshd",
) -> Any:
    """Debug mode of `forward`: what each tile of query rows did with the K/V blocks of its sequence.

    Runs the kernel of `cfg` in a variant that counts (on a GPU NVRTC compiles it at the first call).

    Returns an int32 array (batch, heads, tiles, 3) of q's library and device. Its last dimension counts the blocks of
    cfg.block_n keys that were (0) visited with all elements visible, (1) visited with a test of each element,
    (2) skipped. A tile is cfg.block_m * cfg.cluster query rows. If one is incomplete, it is the last, on a GPU
    with kernel='sm90' the first.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    require_arrays({"q": q, "k": k, "v": v})
    require_kind(q=q, k=k, v=v)
    options = checked_options(causal, diagonal, None, layout)
    _core.check_problem(q, k, v, options)
    library = library_of(type(q))
    batch, heads, rows = rows_of_heads(q, layout)
    on_cpu = q.__dlpack_device__()[0] == 1  # kDLCPU, where clusters are no option
    tiles = -(-rows // max(cfg.block_m if on_cpu else cfg.block_m * cfg.cluster, 1))
    out = library.empty((*q.shape[:-1], v.shape[-1]), q)
    counts = library.empty((batch, heads, tiles, 3), q, "int32")
    _core.forward(cfg, q, k, v, out, None, counts, options)
    return library.finish(counts, q)


def default_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int | None = None,
    *,
    head_dim_v: int | None = None,
) -> ForwardConfig:
    """The configuration that `flash_attention` takes for a head dimension on `arch` ("cpu", "sm_90", ...), if addresses
    and strides are multiples of 16 bytes.

    arch: default the architecture of GPU 0 or, where there is no GPU, "cpu".
    head_dim_v: the head dimension of v, if it differs.
    """
    return _core.default_config(
        dtype,
        integer("head_dim", head_dim),
        arch_or_default(arch),
        optional_integer("head_dim_v", head_dim_v),
    )


def arch_or_default(arch: str | int | None) -> str | int:
    """Where arrays are, most likely: on GPU 0 or, without one, on the CPU."""
    if arch is not None:
        return arch
    gpus = _core.driver_info().gpus
    return gpus[0].arch if gpus else "cpu"


def integer(name: str, value: object) -> int:
    try:
        return index_of(value)
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
    *,
    causal: bool | None = None,
) -> dict[str, str]:
    """Makes kernels available before their first call, which may otherwise compile them (a few seconds each) or take
    slower ones that are at hand. What has to be compiled is compiled at the same time, as cores and memory allow.

    cfgs: a configuration of the forward or the backward, or a list of them; default all that the build compiles ahead
        of time and that `arch` can run.
    arch: "sm_90" and the like; default the architecture of GPU 0. If it is given, no GPU is needed.
    causal: only the kernels of calls with this `causal`; default those of both.

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
    if causal is not None and not isinstance(causal, bool):
        raise ArgumentError(f"causal: expected True, False or None, got {causal!r}")
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
    return dict(_core.prebuild(forward, backward, arch, causal))
