"""``compile``: makes kernels available before their first call."""

from __future__ import annotations

import argparse
import time

from .. import ForwardConfig, _core, configs, prebuild
from .options import (
    GPU_DTYPES,
    Commands,
    UsageError,
    add_config_arguments,
    changed_config,
    given_changes,
    positive_int,
)


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile kernels now instead of at their first call",
        description="Makes the kernels of a configuration available: finds them among the "
        "ahead-of-time images or in the disk cache, or compiles them and puts them there. What is "
        "not given is what flash_attention would take for the head dimension. Needs no GPU if "
        "--arch is given.",
    )
    parser.add_argument("--all", action="store_true", help="every ahead-of-time configuration")
    parser.add_argument("--arch", help="sm_80, sm_90, ... (default: that of GPU 0)")
    parser.add_argument("--head-dim", type=positive_int, metavar="N", help="default: 128")
    parser.add_argument("--dtype", choices=GPU_DTYPES, help="default: bfloat16")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    changes = given_changes(options)
    if options.all and (changes or options.head_dim or options.dtype):
        raise UsageError("--all takes no option of a configuration")
    arch = options.arch or default_arch()
    if options.all:
        chosen = configs()
        if not chosen:
            raise UsageError("--all: this build has no ahead-of-time configurations; name one")
    else:
        chosen = [one_config(options, arch, changes)]
    for cfg in chosen:
        start = time.perf_counter()
        kernels = prebuild(cfg, arch)
        seconds = time.perf_counter() - start
        print(f"{cfg.name} for {arch}: {seconds:.1f} s")
        for kernel, origin in kernels.items():
            print(f"  {kernel}: {origin}")
    return 0


def one_config(options: argparse.Namespace, arch: str, changes: dict[str, object]) -> ForwardConfig:
    return changed_config(options.head_dim or 128, options.dtype or "bfloat16", arch, changes)


def default_arch() -> str:
    driver = _core.driver_info()
    if not driver.gpus:
        raise UsageError(
            f"--arch: expected sm_80 or the like where there is no GPU. {driver.problem}"
        )
    return f"sm_{driver.gpus[0].arch}"
