"""What each option of a kernel does to registers, shared memory, instructions and time.

Compiles the default configuration of a head dimension and every configuration that differs from it in
one option, in one translation unit, and reads the result. Times come from lines that
``python -m flashcute bench`` has written for the same configurations; ``--bench-arguments`` prints the
arguments that make it time them. Fails if an option does not change the code.

usage: python tools/option_table.py [--arch sm_90] [--head-dims 64,128] [--times FILE.jsonl]
       python tools/option_table.py --kernel sm90 [--head-dims 64,128,256] ...
       python tools/option_table.py --kernel sm90_gradients ...

`make tables ALL=1` writes docs/reference/options_sm80.md, options_sm90.md and options_sm90_gradients.md so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashcute
from check_images import resources
from flashcute import BackwardConfig, ConfigError, ForwardConfig
from sass import Function, disassemble, product_opcode

ROOT = Path(__file__).parent.parent
Config = ForwardConfig | BackwardConfig


@dataclass(frozen=True)
class Kernel:
    """A kernel: what is told about it, how it is compiled, and what is tried."""

    introduction: str
    header: str
    macro: str
    kernel_id: str  # its type and what it has beside the configuration, as C++
    virtual_arch: str
    base: Callable[[int, str], Any]  # the configuration of a head dimension and an architecture
    changes: Callable[[Any], list[dict[str, Any]]]
    columns: tuple[str, ...]
    counts: Callable[[Function, Any], list[float]]  # one for each column
    arch: str | None = None  # the only one that runs it


def mma_sync_base(head_dim: int, arch: str) -> ForwardConfig:
    # sm_90's own default is Hopper's kernel; what mma.sync takes there is what the next one takes.
    return flashcute.default_config(head_dim, "bfloat16", "sm_100" if arch == "sm_90" else arch)


def mma_sync_changes(_: ForwardConfig) -> list[dict[str, Any]]:
    return [
        {"async_copy": False},
        {"eager_load_blocks": False, "stages": 1},
        {"swizzled": False},
        *({"q_in_registers": held} for held in (True, False)),
        *({"stages": n} for n in (1, 2)),
        {"k_tiles_per_load": 1},
        {"k_tiles_per_load": 2},
        {"mma_double_buffer": False},
        {"optimized_softmax": False},
        {"rescale_threshold": 0},
        {"math": "cuda_core", "q_in_registers": False},
        *({"copy_bytes": n} for n in (8, 4)),
        {"copy_bytes": 2, "async_copy": False},
        *({"block_m": n} for n in (64, 128)),
        *({"block_n": n} for n in (32, 96, 128)),
        *({"block_m": 128, "num_warps": n} for n in (2, 8)),
        {"blocks_per_sm": 3},
    ]


def main_loop(function: Function, cfg: ForwardConfig) -> list[float]:
    """Of the loop over whole K/V blocks, which is the last one, for 64 keys."""
    loop = function.loops(product_opcode(function.name))[-1]
    counts = (
        loop.length,
        loop.counts["LDSM"] + loop.counts["LDS"],
        loop.counts["LDL"] + loop.counts["STL"],
    )
    return [count * 64 / cfg.block_n for count in counts]


def sm90_base(head_dim: int, _: str) -> ForwardConfig:
    return flashcute.default_config(head_dim, "bfloat16", "sm_90")


def sm90_changes(base: ForwardConfig) -> list[dict[str, Any]]:
    fresh = {"stale_max": False, "scores_ahead": False}
    serial = {"overlap": False, "late_store": False, **fresh}
    return [
        {"pingpong": not base.pingpong},
        {"scores_ahead": False},
        {"scores_ahead": True, "block_n": 80},
        {"late_store": not base.late_store},
        fresh,
        serial,
        {"optimized_softmax": False, **fresh},
        {"rescale_threshold": 0, **fresh},
        {"rescale_threshold": 1},
        {"cluster": 2},
        *({"stages": n} for n in (2, 3)),
        *({"block_m": m, "num_warps": m // 16} for m in (64, 128)),
        *({"block_n": n} for n in (64, 80, 96, 128)),
    ]


def gradients_base(head_dim: int, _: str) -> BackwardConfig:
    return flashcute.default_backward_config(head_dim, "bfloat16", "sm_90", deterministic=False)


def gradients_changes(base: BackwardConfig) -> list[dict[str, Any]]:
    return [
        {"late_dq": False},
        {"early_reads": not base.early_reads},
        {"persistent": False},
        {"deterministic": True},
        {"k_stages": 1} if base.k_stages == 2 else {"stages": 2, "k_stages": 2},
        *({"stages": n} for n in (1, 2)),
        *({"dout_stages": n} for n in (1, 3) if n == 1 or base.k_stages == 1),
        {"stages": 2, "dout_stages": 3},
    ]


def whole_kernel(function: Function, _: Config) -> list[float]:
    counts = function.counts()
    return [len(function.instructions), counts["LDL"] + counts["STL"]]


KERNELS = {
    "sm80": Kernel(
        """# Options of the mma.sync forward

What one option of the sm80 forward changes, in bfloat16 without a mask, compiled by nvcc for {arch}. The first
line of each table is the default configuration, and each other line changes one option. The columns are

- registers of a thread, and stack: bytes of local memory of a thread;
- shared memory: bytes of a thread block;
- instructions of the main loop for one block of 64 keys (loops inside the products of the CUDA cores are counted once);
- shared loads: those of these instructions that load from shared memory (LDSM, LDS);
- spills: those that load or store spilled registers (LDL, STL).

{times} [How the kernel works](../kernels/sm80_forward.md).

Generated by `tools/option_table.py`.
""",
        "flashcute/sm80/entry.hpp",
        "FLASHCUTE_SM80_FORWARD_ENTRY",
        "ForwardKernelId{{.config = {{{options}}}}}",
        "compute_80",
        mma_sync_base,
        mma_sync_changes,
        ("instructions", "shared loads", "spills"),
        main_loop,
    ),
    "sm90": Kernel(
        """# Options of Hopper's forward

What one option of the sm90 forward changes, in bfloat16, compiled by nvcc for sm_90a. The first line of each table
is the default configuration, and each other line changes one option, with those that have to change with it. The
columns are

- registers of a thread at launch (the warpgroups redistribute them then), and stack: bytes of local memory of a thread;
- shared memory: bytes of a thread block;
- instructions of the whole kernel without a mask;
- spills: those of these instructions that load or store spilled registers (LDL, STL).

{times} The last column is with the causal mask, the one before without. Times are of an H200 with sequences
of 4096 tokens ([lines](../../benchmarks/results/gpu_hopper_options.jsonl)); differences below 3 % are noise. Where
registers run out (wide blocks with scores_ahead), the assembler makes products wait for each other.
[How the kernel works](../kernels/sm90_forward.md).

Generated by `tools/option_table.py --kernel sm90`.
""",
        "flashcute/sm90/entry.hpp",
        "FLASHCUTE_SM90_FORWARD_ENTRY",
        "ForwardKernelId{{.config = {{{options}}}}}",
        "compute_90a",
        sm90_base,
        sm90_changes,
        ("instructions", "spills"),
        whole_kernel,
        "sm_90",
    ),
    "sm90_gradients": Kernel(
        """# Options of Hopper's gradients

What one option of Hopper's gradients changes, in bfloat16 without a mask, compiled by nvcc for sm_90a: the pass
`gradients`, which multiplies. The first line of each table is the default configuration, and each other line changes
one option. The columns are

- registers of a thread at launch (the warpgroups redistribute them then), and stack: bytes of local memory of a thread;
- shared memory: bytes of a thread block;
- instructions of the whole kernel;
- spills: those of these instructions that load or store spilled registers (LDL, STL).

What `late_dq` is worth, and what other orders were tried, is in [the notebook](../kernels/sm90_backward_notebook.md).
[How the kernel works](../kernels/sm90_backward.md).

Generated by `tools/option_table.py --kernel sm90_gradients`.
""",
        "flashcute/sm90/backward_entry.hpp",
        "FLASHCUTE_SM90_GRADIENTS_ENTRY",
        "BackwardKernelId{{.config = {{{options}}}, .pass = flashcute::BackwardPass::gradients, .features = {{}}}}",
        "compute_90a",
        gradients_base,
        gradients_changes,
        ("instructions", "spills"),
        whole_kernel,
        "sm_90",
    ),
}


def variations(kernel: Kernel, head_dim: int, arch: str) -> dict[str, Config]:
    """What is changed -> configuration, the default first."""
    base = kernel.base(head_dim, arch)
    found = {"(default)": base}
    for change in kernel.changes(base):
        cfg = base.replace(**change)
        try:
            cfg.check(arch)
        except ConfigError:
            continue
        if cfg not in found.values():
            changed = {name: x for name, x in change.items() if getattr(base, name) != x}
            found[", ".join(f"{name}={value}" for name, value in changed.items())] = cfg
    return found


ENUMS = {
    "dtype": "flashcute::DType::",
    "kernel": "flashcute::Kernel::",
    "math": "flashcute::Math::",
}


def literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def entry(kernel: Kernel, cfg: Config) -> str:
    options = []
    for option, member in vars(type(cfg)).items():
        if not isinstance(member, property) or option in ("name", "smem_bytes"):
            continue
        kind = ENUMS.get(option, "")
        options.append(f".{option} = {kind}{literal(getattr(cfg, option))}")
    kernel_id = kernel.kernel_id.format(options=", ".join(options))
    return f"{kernel.macro}({cfg.name}, flashcute::{kernel_id})\n"


def compile_all(kernel: Kernel, cfgs: list[Config], arch: str, folder: Path) -> Path:
    headers = Path(flashcute.__file__).parent / "include"
    unit, image = folder / "options.cu", folder / "options.cubin"
    entries = "".join(entry(kernel, cfg) for cfg in cfgs)
    unit.write_text(f'#include "{kernel.header}"\n{entries}')
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, "-cubin", "-std=c++20", "-O3", "-DNDEBUG", "--split-compile=0"]
    command += [
        f"-gencode=arch={kernel.virtual_arch},code={arch}",
        "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",  # some block_n of Hopper's need it
        f"-I{headers}",
        "-o",
        str(image),
        str(unit),
    ]
    subprocess.run(command, check=True)
    return image


def read_times(files: list[Path], *, causal: bool) -> dict[str, float]:
    """Configuration -> TFLOP/s, of the longest case with this mask that was measured."""
    best: dict[str, tuple[int, float]] = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            # As lines call Hopper's kernel that are older than the option `kernel`.
            line["config"] = (line.get("config") or "").replace("_b1_wgmma", "_sm90")
            if line["config"] and line["causal"] == causal and line.get("tflops"):
                length = line["seqlen_q"]
                if length > best.get(line["config"], (0, 0.0))[0]:
                    best[line["config"]] = (length, line["tflops"])
    return {name: speed for name, (_, speed) in best.items()}


def bench_argument(kernel: str, change: str) -> str:
    """For ``--config``: on a Hopper GPU the default is Hopper's kernel."""
    change = change.replace(" ", "").replace("True", "1").replace("False", "0")
    return f"kernel={kernel},{change}" if kernel == "sm80" else change


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, default="sm80")
    parser.add_argument("--arch", default="sm_90", help="of --kernel sm80")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--times", type=Path, nargs="*", default=[])
    parser.add_argument("--bench-arguments", action="store_true", help="print them and end")
    options = parser.parse_args()
    kernel = KERNELS[options.kernel]
    arch = kernel.arch or options.arch
    head_dims = [int(d) for d in options.head_dims.split(",")]
    if options.bench_arguments:
        for head_dim in head_dims:
            for change in list(variations(kernel, head_dim, arch))[1:]:
                print("--config", bench_argument(options.kernel, change))
        return
    times = {"TFLOP/s": read_times(options.times, causal=False)}
    if kernel.arch:
        times["causal"] = read_times(options.times, causal=True)
    timed = any(times.values())
    speed = "Speed in TFLOP/s." if timed else "Not yet timed on a GPU."
    print(kernel.introduction.format(arch=arch, times=speed))
    for head_dim in head_dims:
        found = variations(kernel, head_dim, arch)
        with tempfile.TemporaryDirectory() as folder:
            target = f"{arch}a" if kernel.arch else arch
            image = compile_all(kernel, list(found.values()), target, Path(folder))
            functions = {f.name: f for f in disassemble(image)}
            used = {name: r for (name, _), r in resources(image).items()}
        code: dict[str, str] = {}
        for change, cfg in found.items():
            same = code.setdefault(repr(functions[cfg.name].instructions), change)
            if same != change:
                sys.exit(f"head dimension {head_dim}: {change} gives the same code as {same}")
        print(f"## Head dimension {head_dim}\n\n`{found['(default)'].name}`\n")
        columns = ["option", "registers", "stack", "shared memory", *kernel.columns]
        columns += list(times) if timed else []
        print("| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|")
        for change, cfg in found.items():
            r = used[cfg.name]
            row = [change, r["registers"], r["stack"], cfg.smem_bytes]
            row += [round(x) for x in kernel.counts(functions[cfg.name], cfg)]
            if timed:
                row += [f"{x[cfg.name]:.0f}" if cfg.name in x else "" for x in times.values()]
            print("| " + " | ".join(map(str, row)) + " |")
        print()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
