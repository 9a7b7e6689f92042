"""Tables of Hopper's gradients beside FlashAttention-4: rates, what a profiler counts, sustained runs; orders of the
loop that were tried; the first run at head dimension 256."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from lines import Cell, Line, one, rounded, speed_ups, table, where

from tables.sm90_backward import HEAD_DIMS, LENGTHS, MASKS, mean, span

FA4, STUDY = "gpu_sm90_backward_fa4", "gpu_sm90_backward_study"


def rates() -> str:
    """TFLOP/s beside cuDNN and FlashAttention-4, and their times over ours."""
    by_peer = {peer: speed_ups(FA4, peer) for peer in ("sdpa_cudnn", "fa4")}
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for length in LENGTHS:
                of = {"head_dim": head_dim, "causal": causal, "seqlen_q": length}
                told = [
                    f"{one(FA4, impl=impl, **of)['tflops']:.0f}" for impl in ("flashcute", *by_peer)
                ]
                ratios = [
                    rounded(
                        next(
                            x for cell, x in found.items() if cell[3:] == (length, head_dim, causal)
                        )
                    )
                    for found in by_peer.values()
                ]
                rows.append([f"{head_dim} {mask}", f"{length // 1024}k", *told, *ratios])
    header = ["head dim, mask", "length", "ours", "cuDNN", "FlashAttention-4"]
    return table([*header, "speed-up over cuDNN", "over FlashAttention-4"], rows, numbers=5)


def summary() -> str:
    version = one(FA4, impl="fa4", head_dim=64, causal=True, seqlen_q=1024)["impl_version"]
    cudnn, fa4 = (told_means(speed_ups(FA4, peer)) for peer in ("sdpa_cudnn", "fa4"))
    return (
        f"Geometric means, with the lowest and the highest case: over cuDNN\n{cudnn};\n"
        f"over FlashAttention-4 ({version}) {fa4}."
    )


def told_means(found: dict[Cell, float]) -> str:
    told = []
    for head_dim in HEAD_DIMS:
        of = {cell: x for cell, x in found.items() if cell[4] == head_dim}
        told.append(f"{mean(of)} ({span(of.values())}) at head dimension {head_dim}")
    return " and ".join(told)


COUNTED: dict[str, Callable[[Line], str]] = {
    "ms": lambda x: f"{x['ms']:.2f}",
    "million clocks": lambda x: f"{x['sm_cycles'] / 1e6:.2f}",
    "tensor cores": lambda x: f"{x['tensor_percent']:.0f} %",
    "instructions, 10⁹": lambda x: f"{x['warp_instructions'] / 1e9:.2f}",
    "shared memory, 10⁹ wavefronts": lambda x: f"{x['shared_wavefronts'] / 1e9:.2f}",
    "L2, 10⁹ sectors": lambda x: f"{x['l2_sectors'] / 1e9:.2f}",
    "DRAM, GB": lambda x: f"{x['dram_bytes'] / 1e9:.2f}",
}
NAMES = {
    "flashcute": "ours",
    "fa4": "FlashAttention-4",
    "flashcute[late_dq=0]": "ours, `late_dq=False`",
    "sdpa_cudnn": "cuDNN",
}


def counters() -> str:
    """What Nsight Compute counts in one launch of the main pass, 16k tokens, head dimension 128."""
    rows = []
    for mask, causal in MASKS.items():
        for impl in ("flashcute", "fa4"):
            x = one(STUDY, kind="gradient_counters", impl=impl, causal=causal)
            rows.append([f"{NAMES[impl]}, {mask}", *(told(x) for told in COUNTED.values())])
    return table(["kernel", *COUNTED], rows, numbers=len(COUNTED))


def sustained() -> str:
    """Calls for 1.6 s without a pause: medians of all, and of the second half of clocks and watts."""
    rows = []
    for mask, causal in MASKS.items():
        for impl, name in NAMES.items():
            found = where(STUDY, kind="gradient_sustained", impl=impl, causal=causal)
            told = [
                f"{statistics.mean(x[key] for x in found):.0f}"
                for key in ("tflops", "clock_mhz", "watts")
            ]
            rows.append([f"{name}, {mask}", *told])
    return table(["kernels", "TFLOP/s", "MHz", "W"], rows, numbers=3)


def orders() -> str:
    """TFLOP/s of other orders of the loop, and their change in percent."""
    cells = {
        "128 full 16k": (128, False, 16384),
        "128 causal 16k": (128, True, 16384),
        "128 causal 4k": (128, True, 4096),
        "128 causal 1k": (128, True, 1024),
        "64 full 16k": (64, False, 16384),
        "64 causal 4k": (64, True, 4096),
    }
    found: dict[str, dict[tuple[int, bool, int], float]] = {}
    for x in where(STUDY, kind="gradient_order"):
        found.setdefault(x["step"], {})[x["head_dim"], x["causal"], x["seqlen"]] = x["tflops"]
    base = found["as it is"]
    rows = []
    for step, rates_of in found.items():
        told = [
            f"{rates_of[cell]:.0f}"
            + ("" if step == "as it is" else f" ({100 * (rates_of[cell] / base[cell] - 1):+.0f} %)")
            for cell in cells.values()
        ]
        rows.append([step.replace("late_dq=False", "`late_dq=False`"), *told])
    return table(["TFLOP/s", *cells], rows, numbers=len(cells))


PASSES = {"queries": 3, "keys": 4}  # products


def wide() -> str:
    """The first run at head dimension 256: TFLOP/s, and of each launch its time and the rate of what it multiplies."""
    rows = []
    for x in where(STUDY, kind="gradient_passes"):
        ratio = rounded(x["tflops"] / x["tflops_cudnn"])
        mask = "causal" if x["causal"] else "full"
        product = 2 * x["batch"] * x["heads"] * x["seqlen"] ** 2 * x["head_dim"]
        launches = []
        for launch, count in PASSES.items():
            us = x[f"us_{launch}"]
            flop = count * product / (2 if x["causal"] else 1)
            launches += [f"{us / 1000:.2f}", f"{flop / us / 1e6:.0f}"]
        told = [f"{x[key]:.0f}" for key in ("tflops", "tflops_cudnn")]
        rows.append([mask, f"{x['seqlen'] // 1024}k", *told, ratio, *launches])
    rows.sort(key=lambda row: row[0] != "full")
    header = ["mask", "length", "ours", "cuDNN", "speed-up"]
    launches = [x for launch in PASSES for x in (f"`{launch}`, ms", "TFLOP/s")]
    return table([*header, *launches], rows, numbers=7)
