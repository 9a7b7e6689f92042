"""``compile``: makes kernels available before their first call."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from .. import BackwardConfig, ForwardConfig, Variant, _core, prebuild
from ..configurations import configs_ahead_of_time
from .options import (
    GPU_DTYPES,
    Commands,
    Config,
    UsageError,
    add_config_arguments,
    changed_backward_config,
    changed_config,
    changed_if_legal,
    config_changes,
    given_changes,
    positive_int,
)


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile kernels now instead of at their first call",
        description="Makes the kernels of a configuration available: finds them among the "
        "ahead-of-time images or in the disk cache, or compiles them into the disk cache. Options "
        "that are not given are those of the configuration that flash_attention takes for the head "
        "dimension. Needs no GPU if --arch is given.",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every ahead-of-time configuration, of the forward and the backward",
    )
    parser.add_argument(
        "--backward",
        action="store_true",
        help="the kernels of gradients; options and --config then name those of BackwardConfig",
    )
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="only the kernels of causal attention, or only those without a mask (default: both)",
    )
    parser.add_argument(
        "--window",
        action="store_true",
        help="the kernels of sliding windows of any size, of lengths, prefixes and sinks, instead",
    )
    parser.add_argument("--arch", help="sm_80, sm_90, ... (default: that of GPU 0)")
    parser.add_argument("--head-dim", type=positive_int, metavar="N", help="default: 128")
    parser.add_argument("--dtype", choices=GPU_DTYPES, help="default: bfloat16")
    parser.add_argument(
        "--config",
        type=config_changes,
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="also this configuration with these changes; may be given several times",
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="how many kernels to compile at the same time, as FLASHCUTE_JIT_JOBS "
        "(default: as cores and memory allow)",
    )
    add_config_arguments(parser, ForwardConfig, BackwardConfig)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    changes = given_changes(options, ForwardConfig, BackwardConfig)
    named = changes or options.config or options.head_dim or options.dtype or options.backward
    if options.all and named:
        raise UsageError("--all takes no option of a configuration")
    arch = options.arch or default_arch()

    def chosen(causal: bool) -> list[Config]:
        if options.all:
            return configs_ahead_of_time(arch)
        base = one_config(options, arch, changes, causal)
        return [base, *(also(base, more) for more in options.config)]

    def also(base: Config, more: dict[str, Any]) -> Config:
        plain = one_config(options, arch, changes, causal=False)
        if isinstance(base, BackwardConfig) and isinstance(plain, BackwardConfig):
            return changed_if_legal(base, plain, more, arch)
        return base.replace(**more)

    if not chosen(causal=False):
        raise UsageError("--all: this build has no ahead-of-time configurations; name one")

    if options.jobs:
        os.environ["FLASHCUTE_JIT_JOBS"] = str(options.jobs)
    start = time.perf_counter()
    if options.window and options.causal is not None:
        raise UsageError("--window takes neither --causal nor --no-causal: windows share kernels")
    origins: dict[str, str] = {}
    if options.window:  # kernels fit windows of any size
        origins = prebuild(chosen(causal=False), arch, variant=Variant(window=(0, 0)))
    elif options.causal is None and chosen(causal=False) == chosen(causal=True):
        origins = prebuild(chosen(causal=False), arch)
    else:
        for causal in (False, True) if options.causal is None else (options.causal,):
            origins |= prebuild(chosen(causal), arch, causal=causal)
    for kernel, origin in origins.items():
        print(f"{kernel} for {arch}: {origin}")
    print(f"{time.perf_counter() - start:.1f} s")
    return 0


def one_config(
    options: argparse.Namespace, arch: str, changes: dict[str, object], causal: bool
) -> Config:
    head_dim, dtype = options.head_dim or 128, options.dtype or "bfloat16"
    if options.backward:
        return changed_backward_config(head_dim, dtype, arch, changes, causal=causal)
    return changed_config(head_dim, dtype, arch, changes)


def default_arch() -> str:
    driver = _core.driver_info()
    if not driver.gpus:
        raise UsageError(
            f"--arch: expected sm_80 or the like where there is no GPU. {driver.problem}"
        )
    return f"sm_{driver.gpus[0].arch}"
