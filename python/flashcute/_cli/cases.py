"""One problem from arguments, for the commands that look closely at one kernel: io and profile."""

from __future__ import annotations

import argparse

from .. import BackwardConfig, ForwardConfig, _core
from .options import (
    GPU_DTYPES,
    UsageError,
    bounded_window,
    changed_backward_config,
    changed_config,
    changes_text,
    config_changes,
    list_of,
    positive_int,
)
from .problem import Case

GPU_WITHOUT_ONE = "sm_90"  # whose kernels are told about where there is no GPU


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    cases = parser.add_argument_group("case")

    def size(name: str, default: int | None, help_text: str) -> None:
        cases.add_argument(name, type=positive_int, default=default, metavar="N", help=help_text)

    size("--batch", 4, "default: 4")
    size("--heads", 16, "query heads (default: 16)")
    size("--kv-heads", None, "key and value heads (default: as many as --heads)")
    cases.add_argument(
        "--seqlen",
        type=list_of(positive_int),
        default=[4096],
        metavar="N,...",
        help="queries, and keys; several make a case each (default: 4096)",
    )
    size("--seqlen-k", None, "keys (default: as many as queries)")
    size("--head-dim", 128, "default: 128")
    cases.add_argument("--dtype", choices=GPU_DTYPES, default="bfloat16", help="default: bfloat16")
    cases.add_argument("--causal", action="store_true", help="with the causal mask")
    cases.add_argument(
        "--window",
        type=bounded_window,
        metavar="LEFT,RIGHT",
        help="how many keys before and after the diagonal a query sees; -1: no limit, as in --window=-1,0",
    )
    cases.add_argument(
        "--config",
        type=config_changes,
        default={},
        metavar="NAME=VALUE,...",
        help="change the default configuration, for example block_m=64,num_warps=4",
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    if options.heads % kv_heads != 0:
        raise UsageError(f"--kv-heads: expected a divisor of {options.heads} heads, got {kv_heads}")
    if "head_dim_v" in options.config:
        raise UsageError("--config: expected no head_dim_v: values have the head dimension of keys")
    window = None if options.window == (-1, -1) else options.window
    return [
        Case(
            batch=options.batch,
            heads=options.heads,
            kv_heads=kv_heads,
            seqlen_q=seqlen,
            seqlen_k=seqlen if options.seqlen_k is None else options.seqlen_k,
            head_dim=options.head_dim,
            causal=options.causal,
            dtype=options.dtype,
            window=window,
        )
        for seqlen in options.seqlen
    ]


def case_arguments(case: Case, options: argparse.Namespace) -> list[str]:
    """What makes another process take this case and configuration."""
    sizes = {
        "--batch": case.batch,
        "--heads": case.heads,
        "--kv-heads": case.kv_heads,
        "--seqlen": case.seqlen_q,
        "--seqlen-k": case.seqlen_k,
        "--head-dim": case.head_dim,
        "--dtype": case.dtype,
    }
    told = [str(word) for pair in sizes.items() for word in pair]
    if case.causal:
        told.append("--causal")
    if case.window is not None:
        told.append("--window={},{}".format(*case.window))
    if options.config:
        told += ["--config", changes_text(options.config)]
    return told


def gpu_arch() -> str:
    """Of GPU 0, or of the GPU that is told about where there is none."""
    gpus = _core.driver_info().gpus
    return f"sm_{gpus[0].arch}" if gpus else GPU_WITHOUT_ONE


def forward_config(case: Case, arch: str, options: argparse.Namespace) -> ForwardConfig:
    """The default configuration, of a grid that fills the GPU, with the changes that were asked for."""
    cfg = changed_config(case.head_dim, case.dtype, arch, options.config)
    cfg.check(arch)
    return cfg


def backward_config(case: Case, arch: str, options: argparse.Namespace) -> BackwardConfig:
    cfg = changed_backward_config(
        case.head_dim, case.dtype, arch, options.config, causal=case.only_causal
    )
    cfg.check(arch)
    return cfg
