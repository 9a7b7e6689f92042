"""Tables of docs/guides/: what masks skip, what units and types cost, what another GPU gets."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import flashcute
from flashcute import ForwardConfig
from lines import ROOT, Line, lines, link, one, rounded, table, where

CPU_MASKS = {
    "causal": "causal",
    "window": "causal, window of 1,025 keys",
    "documents": "causal documents, as a block mask",
    "mapped_causal": "causal, as a block mask",
    "mapped_window": "the window, as a block mask",
}


# ---- masks and early exit ------------------------------------------------------------------------


def cpu_shares() -> str:
    """Of the CPU: visible pairs, visited blocks and time, each relative to the call without a mask."""
    rows = []
    for line in lines("cpu_block_masks"):
        for name, what in CPU_MASKS.items():
            visible = line[f"visible_{name.removeprefix('mapped_')}"]
            share, time = line[f"share_{name}"], line[f"ms_{name}"] / line["ms_full"]
            rows.append(
                [f"{line['tokens']:,}", line["head_dim"], what]
                + [percent(x) for x in (visible, share, time)]
                + [rounded(time / share)]
            )
    header = ["length", "head dimension", "mask", "visible pairs", "visited blocks", "time"]
    return table([*header, "time / blocks"], rows, numbers=4)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def visited(tokens: int, rows: int, keys: int, width: int, first_incomplete: bool) -> int:
    """How many blocks of `keys` all tiles of `rows` visit together, if each query sees itself and the width - 1 keys
    before it."""
    begin = -(-tokens // rows) * rows - tokens if first_incomplete else 0
    blocks = 0
    for row in range(-begin, tokens, rows):
        first_key = max(0, row - width + 1)
        blocks += -(-min(row + rows, tokens) // keys) - first_key // keys
    return blocks


def tile_of(config: str) -> tuple[int, int]:
    found = re.search(r"_m(\d+)_n(\d+)_", config)
    if found is None:
        raise ValueError(f"{config}: no tile in this name")
    return int(found[1]), int(found[2])


def window_shares() -> str:
    """Of the forward on a GPU: visited blocks and time of a window, relative to the causal mask."""
    rows = []
    for x in where("gpu_windows", kind="window"):
        if x["pass"] != "forward":
            continue
        tokens, width = x["seqlen_q"], x["window"][0] + 1
        block_m, block_n = tile_of(x["config"])
        hopper = "_sm90" in x["config"]
        count = [visited(tokens, block_m, block_n, w, hopper) for w in (width, tokens)]
        blocks, time = count[0] / count[1], x["ms_window"] / x["ms_causal"]
        rows.append(
            [f"{tokens:,}", f"{width:,}", x["head_dim"], "Hopper's" if hopper else "mma.sync"]
            + [f"{block_m}×{block_n}"]
            + [percent(share) for share in (visible_of_causal(tokens, width), blocks, time)]
            + [rounded(time / blocks)]
        )
    header = ["length", "window", "head dimension", "kernel", "tile", "visible pairs"]
    return table([*header, "visited blocks", "time", "time / blocks"], rows, numbers=4)


def visible_of_causal(tokens: int, width: int) -> float:
    """Visible pairs of a window over those of the causal mask."""
    return (width * tokens - width * (width - 1) / 2) / (tokens * (tokens + 1) / 2)


def short_rates() -> str:
    """A sentence: rates without a mask at 1,024 tokens over those at 16,384, head dimension 128."""
    told = []
    for what, file in (
        ("Hopper's kernel", "gpu_forward_hopper"),
        ("the mma.sync kernel", "gpu_forward"),
    ):
        cell = {"impl": "flashcute", "head_dim": 128, "causal": False}
        short, long = (one(file, seqlen_q=n, **cell)["tflops"] for n in (1024, 16384))
        told.append(f"{link(what, file)} has {rounded(short / long)} of its rate at 16,384 tokens")
    return f"At 1,024 tokens, head dimension 128, {told[0]}, and {told[1]}."


def map_costs() -> str:
    """What it costs on a GPU to read a mask as data: the same mask, told by an argument and by a BlockMask."""
    rows = []
    for x in where("gpu_block_masks", tokens=16384):
        for kernel, prefix in (("Hopper's", ""), ("mma.sync", "sm80_")):
            ms = {name: x[f"ms_{prefix}{name}"] for name in ("full", "causal")}
            mapped = {name: x[f"ms_{prefix}mapped_{name}"] for name in ms}
            documents = x[f"ms_{prefix}mapped_documents"] / ms["causal"]
            rows.append(
                [x["head_dim"], kernel]
                + [rounded(mapped[name] / ms[name]) for name in ms]
                + [percent(documents)]
            )
    header = ["head dimension", "kernel", "all visible, as a block mask", "causal, as a block mask"]
    return table([*header, "14 causal documents, of causal's time"], rows, numbers=3)


# ---- tensor cores --------------------------------------------------------------------------------


def median_of(found: list[Line]) -> Line:
    """The only line, or that with the median time."""
    if not found:
        raise ValueError("no line")
    return sorted(found, key=lambda x: float(x["ms_p50"]))[len(found) // 2]


def of_config(file: str, impl: str, **fields: Any) -> Line:
    """The flashcute line of a problem; `impl` says how its configuration's name ends, or which peer."""
    found = [x for x in where(file, **fields) if x["impl"] == impl]
    return median_of(found)


PROBLEM = {"seqlen_q": 4096, "causal": False}


def units() -> str:
    """Time, rate and error of the ways to multiply, one problem for each head dimension."""
    told = []
    ways = [
        ("bfloat16, Hopper's tensor cores (wgmma)", "gpu_forward_hopper", "flashcute", ""),
        ("bfloat16, tensor cores (mma.sync)", "gpu_forward", "flashcute", ""),
        ("float32, three TF32 products", "gpu_forward_float32", "flashcute", "tf32x3"),
        ("float32, CUDA cores", "gpu_float32_steps", "flashcute", "cudacore"),
        ("float32, torch, memory-efficient", "gpu_forward_float32", "sdpa_efficient", ""),
        ("float32, torch, math", "gpu_forward_float32", "sdpa_math", ""),
    ]
    for head_dim in (64, 128, 256):
        for what, file, impl, word in ways:
            found = [
                x
                for x in where(file, impl=impl, head_dim=head_dim, **PROBLEM)
                if word in (x["config"] or "")
            ]
            x = median_of(found)
            told.append(
                (
                    head_dim,
                    link(what, file),
                    f"{x['ms_p50']:.2f}",
                    f"{x['tflops']:.0f}",
                    f"{x['rel_l2']:.1e}",
                    f"{x['max_error']:.1e}",
                )
            )
    header = ["head dimension", "units, and lines", "ms", "TFLOP/s", "relative L2 error"]
    return table([*header, "largest error"], told, numbers=4)


def cuda_core_option() -> str:
    """The one option `math`, everything else as it is, in bfloat16."""
    file, rows = "gpu_options", []
    for head_dim in (64, 128):
        for causal in (False, True):
            cell = {"head_dim": head_dim, "causal": causal, "seqlen_q": 4096}
            tensor = one(file, impl="flashcute", **cell)
            [cuda] = [x for x in where(file, **cell) if "math=cuda_core" in x["impl"]]
            rows.append(
                [head_dim, "causal" if causal else "none"]
                + [f"{x['tflops']:.0f}" for x in (tensor, cuda)]
                + [f"{cuda['ms_p50'] / tensor['ms_p50']:.0f}"]
                + [f"{x['rel_l2']:.1e}" for x in (tensor, cuda)]
            )
    header = ["head dimension", "mask", "TFLOP/s, tensor cores", "CUDA cores", "times as long"]
    header += ["relative L2 error, tensor cores", "CUDA cores"]
    return table(header, rows, numbers=5)


def float32_gain() -> str:
    """A sentence: the range of CUDA cores' time over that of three TF32 products."""
    ratios = []
    for x in where("gpu_forward_float32", impl="flashcute"):
        cell = {name: x[name] for name in ("head_dim", "seqlen_q", "batch", "causal")}
        [cuda] = where("gpu_float32_steps", note="CUDA cores", impl="flashcute", **cell)
        ratios.append(cuda["ms_p50"] / x["ms_p50"])
    return (
        f"The CUDA cores take {rounded(min(ratios))} to {rounded(max(ratios))} times as long as three TF32 "
        f"products, in the {len(ratios)} problems that both were timed for."
    )


# ---- GPUs ----------------------------------------------------------------------------------------

GPUS = {
    "sm_80": "A100",
    "sm_89": "RTX 4070",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50",
}
REGISTERS = 65536  # of a multiprocessor, of 32 bits, on all of them
RESERVED = 1024  # bytes of shared memory that CUDA takes for each thread block


def limit(function: str, arch: str) -> int:
    """What this function of core/arch.hpp returns."""
    text = (ROOT / "include/flashcute/core/arch.hpp").read_text()
    found = re.search(
        rf"{function}\(Arch arch\) {{\n  switch \(arch\) {{\n(.*?)\n  }}", text, re.DOTALL
    )
    if found is None:
        raise ValueError(
            f"core/arch.hpp has no function {function} that switches over the architecture"
        )
    listed = f"case {arch.removeprefix('sm_')}:"
    returns = re.findall(r"((?:\s*(?:case \d+|default):)+) return ([\d *]+);", found[1])
    [value, *_] = [x for labels, x in returns if listed in labels] or [returns[-1][1]]
    return math.prod(int(factor) for factor in value.split("*"))


def gpu_limits() -> str:
    rows = []
    for arch, gpu in GPUS.items():
        smem, threads = limit("max_smem_bytes", arch), limit("max_threads_per_sm", arch)
        rows.append(
            [gpu, arch, smem // 1024, (smem + RESERVED) // 1024, threads, REGISTERS // 1024]
        )
    header = ["GPU", "architecture", "KB of a thread block", "KB of a multiprocessor", "threads"]
    return table([*header, "Ki registers"], rows, numbers=4)


def threads_of(cfg: ForwardConfig) -> int:
    """Hopper's kernel has one more warpgroup, which loads."""
    return 32 * cfg.num_warps + (128 if cfg.kernel == "sm90" else 0)


def registers_of(cfg: ForwardConfig, arch: str) -> int:
    """Of a thread, as recorded for the image that this GPU runs."""
    kernels = json.loads((ROOT / "tests/images.json").read_text())
    images = kernels[f"flashcute_{cfg.kernel}_{cfg.name.replace('_sm90', '')}_full"]
    target = {"sm_89": "sm_80"}.get(arch, "sm_90a" if cfg.kernel == "sm90" else arch)
    return int(images[target]["registers"])


def resident(cfg: ForwardConfig, arch: str) -> tuple[int, str]:
    """How many thread blocks share a multiprocessor, and what ends their number."""
    threads, registers = threads_of(cfg), -(-registers_of(cfg, arch) // 8) * 8
    fits = {
        "memory": (limit("max_smem_bytes", arch) + RESERVED) // (cfg.smem_bytes + RESERVED),
        "registers": REGISTERS // (registers * threads),
        "threads": limit("max_threads_per_sm", arch) // threads,
    }
    least = min(fits.values())
    return least, ", ".join(what for what, number in fits.items() if number == least)


def gpu_tiles(dtype: str) -> str:
    """The default configurations of the forward, and how many of their thread blocks share a multiprocessor."""
    rows = []
    for head_dim in (64, 128, 256):
        for arch, gpu in GPUS.items():
            cfg = flashcute.default_config(head_dim, dtype, arch)
            blocks, ends = resident(cfg, arch)
            occupancy = blocks * threads_of(cfg) / limit("max_threads_per_sm", arch)
            rows.append(
                [
                    head_dim,
                    gpu,
                    cfg.kernel,
                    f"{cfg.block_m}×{cfg.block_n}",
                    cfg.stages,
                    cfg.smem_bytes // 1024,
                    registers_of(cfg, arch),
                    blocks,
                    ends,
                    f"{100 * occupancy:.0f} %",
                ]
            )
    header = ["head dimension", "GPU", "kernel", "tile", "stages", "KB", "registers", "blocks"]
    return table([*header, "limited by", "occupancy"], rows)


def gpu_backward_tiles(dtype: str) -> str:
    rows = []
    for head_dim in (64, 128, 256):
        for arch, gpu in GPUS.items():
            try:
                cfg = flashcute.default_backward_config(head_dim, dtype, arch, deterministic=False)
            except flashcute.UnsupportedError:
                rows.append([head_dim, gpu, "-", "none fits", "-", "-", "-"])
                continue
            rows.append(
                [
                    head_dim,
                    gpu,
                    cfg.kernel,
                    f"{cfg.block_m}×{cfg.block_n}",
                    cfg.num_warps,
                    cfg.stages,
                    cfg.blocks_per_sm if cfg.kernel == "sm80" else 1,
                ]
            )
    return table(
        ["head dimension", "GPU", "kernel", "tile", "warps", "stages", "`blocks_per_sm`"], rows
    )


# ---- options -------------------------------------------------------------------------------------
