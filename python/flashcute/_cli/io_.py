"""``io``: the bytes that attention moves, in theory and as Nsight Compute counts them."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .. import ForwardConfig
from . import ncu, profile_
from .cases import add_case_arguments, cases_of, forward_config, gpu_arch
from .kits import choose_kit
from .options import Commands, UsageError, positive_float
from .problem import Case
from .provenance import provenance
from .recorded import append_line, opened_to_append
from .table import format_bytes, format_number, format_table
from .traffic import (
    LEVELS,
    LONGEST,
    PUBLISHED,
    blocks_of,
    bound_by_computing_from,
    flash_dram,
    flash_l2,
    intensity,
    standard,
    traffic_of,
)

PEAK_TFLOPS, _, BANDWIDTH_GB = PUBLISHED["NVIDIA H200"]
COUNTERS = {
    "dram_read": ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    "dram_written": ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    "l2": ("lts__t_bytes.sum",),
    "l2_sectors_of_sms": ("lts__t_sectors_srcunit_tex.sum",),
    "seconds": ("gpu__time_duration.sum",),
}
SECTOR_BYTES = 32


# ---- the command -----------------------------------------------------------------------------------


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "io",
        help="bytes that attention moves: in theory, and measured by ncu",
        description="Prints the bytes that the forward moves: by the standard algorithm, which stores the scores, and "
        "by flash attention at DRAM and at L2, with the tiles and the visited blocks of the real configuration. "
        "Arithmetic intensity is FLOP for each byte; from the length in the last column on, computing takes longer "
        "than moving. With --ncu the kernel runs under Nsight Compute, and what it counts stands beside.",
    )
    add_case_arguments(parser)
    parser.add_argument(
        "--arch",
        metavar="sm_NN",
        help="the GPU whose default configuration is taken (default: GPU 0, without one sm_90)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=positive_float,
        default=PEAK_TFLOPS,
        metavar="N",
        help="what the GPU computes at most in this dtype (default: "
        f"{PEAK_TFLOPS:g}, an H200 in 16 bits by its data sheet)",
    )
    parser.add_argument(
        "--bandwidth-gb",
        type=positive_float,
        default=BANDWIDTH_GB,
        metavar="N",
        help="what its memory moves at most, in 1e9 bytes a second (default: "
        f"{BANDWIDTH_GB:g}, the same)",
    )
    parser.add_argument(
        "--ncu", action="store_true", help="measure with Nsight Compute; needs a GPU"
    )
    parser.add_argument("--out", metavar="FILE", help="append a JSON line for each case")
    parser.add_argument("--commit", metavar="TEXT", help="what to record as the commit")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cases = cases_of(options)
    longest = max(max(case.seqlen_q, case.seqlen_k) for case in cases)
    if longest > LONGEST:
        raise UsageError(f"--seqlen, --seqlen-k: expected at most {LONGEST:,}, got {longest:,}")
    program = None
    if options.ncu:
        ncu.require_gpu()
        if options.arch not in (None, gpu_arch()):
            raise UsageError(
                f"--arch: expected {gpu_arch()}, the GPU here, with --ncu, got {options.arch}"
            )
        program = ncu.require_ncu()
    arch = options.arch or gpu_arch()
    configs = [forward_config(case, arch, options) for case in cases]
    common = provenance(choose_kit("auto", prefer_numpy=True), options.commit)
    ratio = 1e3 * options.peak_tflops / options.bandwidth_gb
    with nullcontext() if options.out is None else opened_to_append("--out", options.out) as out:
        print(
            f"{options.peak_tflops:g} TFLOP/s and {options.bandwidth_gb:g} GB/s: "
            f"each byte of DRAM must bring {ratio:.0f} FLOP"
        )
        for case, cfg in zip(cases, configs, strict=True):
            found = None if program is None else measured(program, case, options)
            print("\n" + told(case, cfg, arch, ratio, found), flush=True)
            if out is not None:
                append_line(out, common | record(case, cfg, arch, found))
    return 0


def told(
    case: Case, cfg: ForwardConfig, arch: str, ratio: float, found: dict[str, float] | None
) -> str:
    blocks = blocks_of(case, cfg)
    rows = []
    for level in LEVELS:
        traffic = traffic_of(level, case, cfg)
        at_dram = level.endswith("DRAM")
        from_length = bound_by_computing_from(level, case, cfg, ratio) if at_dram else None
        told_from = "never" if from_length is None else f"{from_length:,}"
        if not at_dram or case.window is not None:
            told_from = "-"
        rows.append(
            [level, *map(format_bytes, (*traffic, traffic.total)),
             f"{intensity(case, traffic):.1f}", f"{standard(case).total / traffic.total:.2f}", told_from]
        )  # fmt: skip
    header = ["", "read", "written", "all", "FLOP/byte", "standard / this", "computing from"]
    text = (
        f"{case.label} {case.dtype}, {cfg.name} on {arch}\n"
        f"tiles of {cfg.block_m * cfg.cluster} queries; blocks of {cfg.block_n} keys: {blocks.full:,} visited whole, "
        f"{blocks.partial:,} with a test, {blocks.skipped:,} skipped\n\n{format_table(header, rows)}"
    )
    if found is not None:
        text += "\n\n" + told_beside(case, cfg, found)
    return text


def told_beside(case: Case, cfg: ForwardConfig, found: dict[str, float]) -> str:
    """What ncu counted, beside theory."""
    dram, l2 = flash_dram(case), flash_l2(case, cfg)
    beside = {
        "DRAM, read": ("dram_read", dram.read),
        "DRAM, written": ("dram_written", dram.written),
        "L2, all requests": ("l2", l2.total),
        "L2, of SMs": ("l2_of_sms", l2.total),
    }
    rows = []
    for what, (key, theory) in beside.items():
        value = found.get(key)
        ratio = None if value is None else value / theory
        rows.append([what, format_bytes(theory), format_bytes(value), format_number(ratio, ".3f")])
    return format_table(["", "theory", "measured", "measured / theory"], rows)


def measured(program: str, case: Case, options: argparse.Namespace) -> dict[str, float]:
    """What ncu counts in one launch, with caches that it has emptied before."""
    job = profile_.job_of(case, options, tuple(COUNTERS.values()))
    with tempfile.TemporaryDirectory(prefix="flashcute_io_") as folder:
        (launch,) = ncu.profile(program, job, str(Path(folder) / "io.ncu-rep"))[:1]
    found = {
        key: launch.metrics[names[0]]
        for key, names in COUNTERS.items()
        if names[0] in launch.metrics
    }
    if "l2_sectors_of_sms" in found:
        found["l2_of_sms"] = SECTOR_BYTES * found["l2_sectors_of_sms"]
    return found


def record(
    case: Case, cfg: ForwardConfig, arch: str, found: dict[str, float] | None
) -> dict[str, Any]:
    names = ("standard", "flash_dram", "flash_l2")
    theory = {name: traffic_of(level, case, cfg) for name, level in zip(names, LEVELS, strict=True)}
    return {
        "kind": "io",
        **case._asdict(),
        "arch": arch,
        "config": str(cfg.name),
        "blocks": blocks_of(case, cfg)._asdict(),
        "theory": {name: traffic._asdict() for name, traffic in theory.items()},
        "measured": found,
    }
