"""The configurations that calls take by default, and their kernels made beforehand."""

from __future__ import annotations

from . import _core
from ._call import index_of, same_bits
from ._core import ArgumentError, BackwardConfig, ConfigError, ForwardConfig
from .variant import Variant, options_of


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


def default_backward_config(
    head_dim: int,
    dtype: object = "bfloat16",
    arch: str | int | None = None,
    *,
    head_dim_v: int | None = None,
    deterministic: bool | None = None,
    causal: bool = False,
) -> BackwardConfig:
    """The configuration that gradients of `flash_attention` take for a head dimension on `arch` ("cpu", "sm_90",
    ...), if addresses and strides are multiples of 16 bytes. On "sm_90" those that are deterministic, or of head
    dimensions above 128, are so under full and causal masks alone.

    arch: default the architecture of GPU 0 or, where there is no GPU, "cpu".
    head_dim_v: the head dimension of v, if it differs.
    deterministic: choose among the configurations that give the same bits in every run. None: if
        torch.use_deterministic_algorithms is on.
    causal: for the causal mask. Every configuration computes others too, but the fastest may be another one.

    Raises UnsupportedError where no kernel computes gradients.
    """
    return _core.default_backward_config(
        dtype,
        integer("head_dim", head_dim),
        arch_or_default(arch),
        optional_integer("head_dim_v", head_dim_v),
        same_bits(deterministic),
        causal,
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
    variant: Variant | None = None,
) -> dict[str, str]:
    """Makes kernels available before their first call, which may otherwise compile them (a few seconds each) or take
    slower ones that are at hand. What has to be compiled is compiled at the same time, as cores and memory allow.

    cfgs: a configuration of the forward or the backward, or a list of them; default all that the build compiles ahead
        of time and that `arch` can run.
    arch: "sm_90" and the like; default the architecture of GPU 0. If it is given, no GPU is needed.
    causal: only the kernels of calls with this `causal`; default those of both. (Gradients of causal calls may have
        another default: `default_backward_config(..., causal=True)`.)
    variant: only the kernels of calls with such a `Variant`, in place of `causal`. Those with a window that hides keys
        before the diagonal, lengths, packed sequences, a prefix or a sink share their kernels, whatever the numbers
        are; so do all with masks by element (attn_mask, documents, block_mask), whatever else they have.

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
    mask = {None: None, True: "causal", False: "full"}[causal]
    if variant is not None:
        if causal is not None:
            raise ArgumentError(f"causal: expected None beside variant=, got {causal!r}")
        mask = _mask_of(variant)
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
    return dict(_core.prebuild(forward, backward, arch, mask))


def _mask_of(variant: Variant) -> str:
    """Which kernels calls take: those of a `MaskKind`."""
    options = options_of(variant)
    if any(x is not None for x in (variant.attn_mask, variant.documents, variant.block_mask)):
        return "mapped"
    sequences = options.has_lengths or options.is_packed
    if sequences or options.has_prefix or options.sink is not None:
        return "band"
    if options.window_left is not None:
        return "band"
    return "causal" if options.causal or options.window_right is not None else "full"
